// Depth-wise 3x3 convolution on NHWC maps: what its kernels, the inverted residual and the inference engine share.
//
// The channels are the lanes: a walk along a row of the output keeps the nine taps of sixteen channels and the
// unfinished sums in registers, so that a pixel of the input is read once a row. Zero padding is index arithmetic: a
// row outside of the map is one vector of zeros with step 0, a column outside of it is left out.
#pragma once

#include <numeric>

#include "norm.h"

namespace mvit3 {

struct DepthwiseGeometry {
  int64_t batch, height, width, channels, stride, dilation, out_height, out_width;
  // Output columns that lie `classes` apart share inputs: the window moves by `shift` of its own columns from one to
  // the next.
  int64_t shift, classes;

  DepthwiseGeometry(
      int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t stride, int64_t any_dilation)
      : batch(batch), height(height), width(width), channels(channels), stride(stride),
        dilation(nearest_dilation(any_dilation, height, width)), out_height((height + stride - 1) / stride),
        out_width((width + stride - 1) / stride), shift(stride / std::gcd(stride, dilation)),
        classes(dilation / std::gcd(stride, dilation)) {}

  int64_t image_rows() const { return batch * height; }  // over all images
  int64_t out_image_rows() const { return batch * out_height; }
  int64_t row_size() const { return width * channels; }
  int64_t out_row_size() const { return out_width * channels; }
  int64_t lanes() const { return lanes_of(channels); }
};

// The taps of 3x3 weights (channels, 1, 3, 3), times a scale of each channel where one is given: [channels /
// 16][9][16].
inline Scratch<float> pack_taps(const float* weight, int64_t channels, const float* scale = nullptr) {
  Scratch<float> taps(lanes_of(channels) * 9, 0.0f);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < 9; ++t)
      taps[(c / kLanes * 9 + t) * kLanes + c % kLanes] = weight[c * 9 + t] * (scale ? scale[c] : 1.0f);
  return taps;
}

// A window of rows of a map of many channels, each with a border of zero pixels: row i lives in slot i modulo the
// number of slots.
class Ring {
 public:
  static int64_t floats(int64_t slots, int64_t width, int64_t border, int64_t pixel) {
    return (slots + 1) * (width + 2 * border) * pixel;
  }

  // `pixel` floats from one pixel to the next.
  Ring(float* memory, int64_t slots, int64_t height, int64_t width, int64_t border, int64_t pixel)
      : memory_(memory), slots_(slots), height_(height), border_(border * pixel), row_((width + 2 * border) * pixel) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      std::fill_n(memory_ + slot * row_, border_, 0.0f);
      std::fill_n(memory_ + (slot + 1) * row_ - border_, border_, 0.0f);
    }
    std::fill_n(memory_ + slots * row_, row_, 0.0f);
  }

  // The first pixel of row i.
  float* row(int64_t i) const { return memory_ + i % slots_ * row_ + border_; }
  // The first pixel of the border before row i; of a row of zeros where the map has no row i.
  const float* bordered(int64_t i) const { return memory_ + (i < 0 || i >= height_ ? slots_ : i % slots_) * row_; }

 private:
  float* memory_;
  int64_t slots_, height_, border_, row_;
};

// Calls f(first channel, std::true_type) for every sixteen channels, with std::false_type where there are fewer.
template <typename F>
MVIT3_INLINE void for_each_lanes(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, std::true_type{});
  if (c < channels) f(c, std::false_type{});
}

template <bool Whole, typename T>
MVIT3_INLINE Vec load_lanes(const T* p, int64_t left) {
  if constexpr (Whole) return load(p);
  return load_some(p, left);
}

template <bool Whole, typename T>
MVIT3_INLINE void store_lanes(T* p, Vec v, int64_t left, bool past_cache = false) {
  if constexpr (!Whole)
    store_some(p, v, left);
  else if (past_cache)
    stream(p, v);
  else
    store(p, v);
}

// Whether an output of rows of `channels` is written past the cache: it is large, and a vector is a whole cache line of
// it.
template <typename T>
bool writes_past_cache(const T* out, int64_t elements, int64_t channels) {
  return sizeof(T) == sizeof(float) && channels % kLanes == 0 && is_aligned(out) &&
         exceeds_cache(elements * int64_t(sizeof(T)));
}

template <typename T>
alignas(64) inline constexpr T kZeroLanes[kLanes] = {};

// The three rows of a map x that an output row reads.
template <typename T>
struct Window {
  const T *row[3], *ahead[2];  // `ahead` will be read by the next output row for the first time
  int64_t step[3],
      direction;  // from a column to the next: 0 in a row outside of the map; from this output row to the next: 1 or -1

  // Row `index` of all images' output rows; the next one will be `index` + `direction`.
  Window(const DepthwiseGeometry& g, const T* x, int64_t index, int64_t direction = 1) : direction(direction) {
    const int64_t out_row = index % g.out_height;
    const T* first = x + index / g.out_height * g.height * g.row_size();
    for (int64_t t = 0; t < 3; ++t) {
      const int64_t i = out_row * g.stride + (t - 1) * g.dilation;
      const bool inside = 0 <= i && i < g.height;
      row[t] = inside ? first + i * g.row_size() : kZeroLanes<T>;
      step[t] = inside ? g.channels : 0;
    }
    for (int64_t t = 0; t < 2; ++t)
      ahead[t] = first + ((out_row + direction) * g.stride + direction * (1 - t) * g.dilation) * g.row_size();
  }
};

// The three taps of a column of the window.
struct ColumnTaps {
  Vec top, middle, bottom;

  ColumnTaps(const float* taps, int64_t column)
      : top(load(taps + column * kLanes)), middle(load(taps + (3 + column) * kLanes)),
        bottom(load(taps + (6 + column) * kLanes)) {}
};

// Walks along three rows of the input, column by column, at sixteen channels.
template <bool Whole, typename T>
struct Columns {
  const T *top, *middle, *bottom;
  int64_t top_step, middle_step, bottom_step, left;

  struct Values {
    Vec top, middle, bottom;

    MVIT3_INLINE Vec add(Vec sum, const ColumnTaps& w) const {
      return fma(bottom, w.bottom, fma(middle, w.middle, fma(top, w.top, sum)));
    }
  };

  Columns(const Window<T>& in, int64_t channel, int64_t column, int64_t step, int64_t channels)
      : top(in.row[0]), middle(in.row[1]), bottom(in.row[2]), top_step(in.step[0] * step),
        middle_step(in.step[1] * step), bottom_step(in.step[2] * step), left(channels - channel) {
    top += in.step[0] ? channel + column * in.step[0] : 0;
    middle += in.step[1] ? channel + column * in.step[1] : 0;
    bottom += in.step[2] ? channel + column * in.step[2] : 0;
  }

  MVIT3_INLINE Values next() {
    const Values values{load_lanes<Whole>(top, left), load_lanes<Whole>(middle, left), load_lanes<Whole>(bottom, left)};
    top += top_step;
    middle += middle_step;
    bottom += bottom_step;
    return values;
  }
};

// f(output column, filtered value) for `columns` columns of an output row, at the sixteen channels from `channel`. The
// value is start + the sum of the taps. A column of the input is read once and added to the sums of all outputs that it
// belongs to.
template <int Shift, bool Whole, typename T, typename F>
MVIT3_INLINE void filter_row(
    const DepthwiseGeometry& g, const Window<T>& in, const Scratch<float>& taps, int64_t channel, Vec start,
    int64_t columns, const F& f) {
  const float* w = taps.data() + channel * 9;
  const ColumnTaps first_taps(w, 0), second_taps(w, 1), third_taps(w, 2);
  const int64_t classes = g.classes, step = g.dilation * g.channels;
  for (int64_t first = 0; first < std::min(classes, columns); ++first) {
    const int64_t centre = first * g.stride, begin = centre < g.dilation ? centre : centre - g.dilation;
    Columns<Whole, T> input(in, channel, begin, g.dilation, g.channels);
    const T *ahead = in.ahead[0] + begin * g.channels + channel,
            *ahead_too = in.ahead[1] + begin * g.channels + channel;
    const auto next = [&] {
      prefetch(ahead);
      ahead += step;
      if constexpr (Shift == 2) {
        prefetch(ahead_too);
        ahead_too += step;
      }
      return input.next();
    };
    // The last output may have its third column outside of the map.
    const int64_t count = classes == 1 ? columns : (columns - first + classes - 1) / classes,
                  last = first + (count - 1) * classes;
    const bool cut = last * g.stride + g.dilation >= g.width;
    const int64_t end = cut ? last : last + 1;
    Vec one = start;  // the next output, with its first column
    if (centre >= g.dilation) one = next().add(start, first_taps);
    if constexpr (Shift == 1) {
      const auto values = next();
      Vec two = values.add(one, second_taps);  // the next output, with two columns
      one = values.add(start, first_taps);
      for (int64_t column = first; column < end; column += classes) {
        const auto values = next();
        const Vec sum = values.add(two, third_taps);
        two = values.add(one, second_taps);
        one = values.add(start, first_taps);
        f(column, sum);
      }
      if (cut) f(last, two);
    } else {
      for (int64_t column = first; column < end; column += classes) {
        const Vec two = next().add(one, second_taps);
        const auto values = next();
        one = values.add(start, first_taps);
        f(column, values.add(two, third_taps));
      }
      if (cut) f(last, next().add(one, second_taps));
    }
  }
}

// Calls f with the geometry's shift as a compile-time constant.
template <typename F>
void dispatch_shift(const DepthwiseGeometry& g, const F& f) {
  if (g.shift == 1)
    f(std::integral_constant<int, 1>{});
  else
    f(std::integral_constant<int, 2>{});
}

// Convolution and norm together: act(taps * x + shift).
struct DepthwiseWeights {
  Scratch<float> taps, shift;

  DepthwiseWeights(const float* weight, int64_t channels, ScaleShift norm)
      : taps(pack_taps(weight, channels, norm.scale.data())), shift(std::move(norm.shift)) {}
};

// Parts of its rows of all images.
inline int64_t depthwise_parts(const DepthwiseGeometry& g) {
  return spread_parts(g.out_image_rows() * g.out_row_size());
}

// y = act(norm(conv(x))) in one pass.
template <int Act, typename T>
void depthwise_conv(const DepthwiseGeometry& g, const DepthwiseWeights& weights, const T* x, T* y) {
  const int64_t parts = depthwise_parts(g);
  const bool past_cache = writes_past_cache(y, g.out_image_rows() * g.out_row_size(), g.channels);
  dispatch_shift(g, [&](auto shift) {
    for_each_part(parts, [&](int64_t part) {
      const Range range = part_range(g.out_image_rows(), part, parts);
      for (int64_t row = range.begin; row < range.end; ++row) {
        const Window<T> window(g, x, row);
        T* out = y + row * g.out_row_size();
        for_each_lanes(g.channels, [&](int64_t c, auto whole) {
          filter_row<shift, whole>(
              g, window, weights.taps, c, load(weights.shift.data() + c), g.out_width, [&](int64_t column, Vec value) {
                store_lanes<whole>(out + column * g.channels + c, activate<Act>(value), g.channels - c, past_cache);
              });
        });
      }
      if (past_cache) stream_fence();
    });
  });
}

}  // namespace mvit3
