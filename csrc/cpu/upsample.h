// Bilinear up-sampling of a map (B, h, w, C) to H x W, row by row: an output row mixes two rows of the map, an output
// pixel two pixels of that. What is up-sampled stays in registers or in cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "tensor.h"
#include "tile.h"
#include "vec.h"

namespace mvit3 {

// Where the outputs of one axis read: output i is (1 - share[i]) * input[low[i]] + share[i] * input[high[i]].
struct Axis {
  std::vector<int32_t> low, high;
  std::vector<float> share;

  // As torch.nn.functional.interpolate maps coordinates.
  Axis(int64_t inputs, int64_t outputs, bool align_corners) : low(outputs), high(outputs), share(outputs) {
    const double step = !align_corners ? double(inputs) / double(outputs)
                        : outputs > 1  ? double(inputs - 1) / double(outputs - 1)
                                       : 0.0;
    for (int64_t i = 0; i < outputs; ++i) {
      const double at = align_corners ? i * step : std::max((i + 0.5) * step - 0.5, 0.0);
      low[i] = int32_t(std::min<int64_t>(int64_t(at), inputs - 1));
      // an axis that keeps its size meets no neighbour, as in PyTorch: 0 times an infinite one would be NaN
      high[i] = inputs == outputs ? low[i] : int32_t(std::min<int64_t>(low[i] + 1, inputs - 1));
      share[i] = float(std::min(at - low[i], 1.0));
    }
  }

  int64_t size() const { return int64_t(low.size()); }
};

struct Upsampling {
  int64_t batch, inner_height, inner_width, classes;
  Axis rows, columns;

  Upsampling(const Tensor& logits, int64_t height, int64_t width, bool align_corners)
      : batch(logits.size(0)), inner_height(logits.size(1)), inner_width(logits.size(2)), classes(logits.size(3)),
        rows(logits.size(1), height, align_corners), columns(logits.size(2), width, align_corners) {}

  int64_t lanes() const { return lanes_of(classes); }
  int64_t inner_pixels() const { return inner_height * inner_width; }
  int64_t pixels() const { return rows.size() * columns.size(); }
};

// The map's row for output row `y` of an image at `in`, (w, lanes); zeros behind the classes.
template <typename T>
void mix_rows(const Upsampling& up, const T* in, int64_t y, float* out) {
  const int64_t lanes = up.lanes(), stride = up.inner_width * up.classes;
  const T *low = in + up.rows.low[y] * stride, *high = in + up.rows.high[y] * stride;
  const Vec share = up.rows.share[y], rest = Vec(1.0f) - share;
  const auto mixed = [&](Vec a, Vec b) { return fma(b, share, a * rest); };
  const int64_t whole = up.classes / kLanes * kLanes;
  for (int64_t x = 0; x < up.inner_width; ++x, low += up.classes, high += up.classes, out += lanes) {
    for (int64_t c = 0; c < whole; c += kLanes) store(out + c, mixed(load(low + c), load(high + c)));
    if (whole < lanes) {
      const int64_t left = up.classes - whole;
      store(out + whole, mixed(load_some(low + whole, left), load_some(high + whole, left)));
    }
  }
}

// 0 .. lanes - 1 for the last sixteen classes: what tells them from the lanes behind them.
struct ValidLanes {
  Vec index;
  float last;

  explicit ValidLanes(int64_t classes) : last(float((classes - 1) % kLanes)) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = float(i);
    index = load(lanes);
  }
  // v, and `other` behind the classes.
  MVIT3_INLINE Vec keep(Vec v, float other) const { return select_greater(index, last, other, v); }
};

MVIT3_INLINE float max_of_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  float most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = lanes[i] > most || lanes[i] != lanes[i] ? lanes[i] : most;
  return most;
}

// The cut of a call: whole images where they share out evenly over the threads, else bands of rows of each.
struct Bands {
  int64_t per_image, total;

  explicit Bands(const Upsampling& up) {
    const int64_t parts = count_parts(up.batch * up.pixels() * up.lanes(), 1 << 19);
    per_image = up.batch % parts == 0 || up.batch >= 8 * parts ? 1 : parts;
    per_image = std::min(per_image, std::max<int64_t>(up.rows.size(), 1));
    total = up.batch * per_image;
  }

  Range rows(const Upsampling& up, int64_t band) const {
    return part_range(up.rows.size(), band % per_image, per_image);
  }
  int64_t image(int64_t band) const { return band / per_image; }
};

}  // namespace mvit3
