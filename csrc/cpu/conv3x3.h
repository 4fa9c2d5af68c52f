// Dense 3x3 convolution with zero padding of one, norm and activation, for inference: of one map or of the concatenation of two, which is
// never built, at stride 1 or 2.
//
// An implicit matrix product. The input rows that a few output rows need are copied to cache, with their zero padding; what
// an output pixel reads is then three runs of memory, one for each row of taps, and so are the same taps of its neighbour, a pixel further.
// A map of few channels (an image) has runs too short for that: its three runs are put together, or, where it comes as NCHW, its rows are
// copied as one line per tap, along which the pixels lie.
#pragma once

#include "pointwise_conv.h"

namespace mvit3 {

// One map or two side by side, NHWC and contiguous; a single one of few channels may be NCHW.
struct Conv3x3Inputs {
  const float *a, *b;
  int64_t a_channels, b_channels, batch, height, width;
  bool nchw;

  int64_t channels() const { return a_channels + b_channels; }

  // Row y of an image, or zeros where it has none, as pixels with a zero pixel before and behind them.
  void load_row(int64_t index, int64_t y, float* out) const {
    const int64_t channels = this->channels();
    if (y < 0 || y >= height) return void(std::fill_n(out, (width + 2) * channels, 0.0f));
    std::fill_n(out, channels, 0.0f);
    const float *from_a = a + (index * height + y) * width * a_channels, *from_b = b ? b + (index * height + y) * width * b_channels : nullptr;
    if (!b)
      std::copy_n(from_a, width * channels, out + channels);
    else
      for (int64_t i = 0; i < width; ++i) {
        std::copy_n(from_a + i * a_channels, a_channels, out + (i + 1) * channels);
        std::copy_n(from_b + i * b_channels, b_channels, out + (i + 1) * channels + a_channels);
      }
    std::fill_n(out + (width + 1) * channels, channels, 0.0f);
  }

  // The same row, from NCHW, as one line of `columns` output columns for each horizontal tap and channel, `line` floats apart.
  void load_lines(int64_t index, int64_t y, int64_t stride, int64_t columns, int64_t line, float* out) const {
    if (y < 0 || y >= height) return void(std::fill_n(out, 3 * a_channels * line, 0.0f));
    for (int64_t c = 0; c < a_channels; ++c, out += line) {
      const float* from = a + ((index * a_channels + c) * height + y) * width;
      float *left = out, *centre = out + a_channels * line, *right = out + 2 * a_channels * line;
      if (stride == 1) {
        std::copy_n(from, columns, centre);
        std::copy_n(centre + 1, columns - 1, right);
        std::copy_n(centre, columns - 1, left + 1);
        right[columns - 1] = 0.0f;
      } else {
        for (int64_t i = 0; i < width / 2; ++i) {
          centre[i] = from[2 * i];
          right[i] = from[2 * i + 1];
        }
        if (width % 2) {
          centre[columns - 1] = from[width - 1];
          right[columns - 1] = 0.0f;
        }
        std::copy_n(right, columns - 1, left + 1);
      }
      left[0] = 0.0f;
    }
  }
};

// The nine taps of each of `columns` pixels, `step` floats apart in three padded rows, as rows of 9 channels. Up to a vector is written beyond.
inline void gather_taps(const float* const (&rows)[3], int64_t step, int64_t channels, int64_t columns, float* out) {
  const int64_t run = 3 * channels;
  for (int64_t i = 0; i < columns; ++i)
    for (int t = 0; t < 3; ++t, out += run)
      for (int64_t c = 0; c < run; c += kLanes) store(out + c, load(rows[t] + i * step + c));
}

struct Conv3x3Weights {
  int64_t inputs, outputs, stride;
  PackedWeight weight;  // its inputs are (tap row, tap column, channel)
  ScaleShift affine;    // the norm

  // w is (outputs, 3, 3, inputs), contiguous.
  Conv3x3Weights(const float* w, int64_t outputs, int64_t inputs, int64_t stride, ScaleShift norm)
      : inputs(inputs), outputs(outputs), stride(stride), weight(PackedWeight::rows(w, outputs, 9 * inputs, 9 * inputs)),
        affine(std::move(norm)) {}

  // Whether the maps have few channels: then a single one may be NCHW.
  static bool few(int64_t inputs) { return inputs < kLanes / 2; }

  int64_t out_size(int64_t size) const { return (size + stride - 1) / stride; }
};

// y = act(norm(conv(x))), NHWC and contiguous.
template <int Act>
void conv3x3_forward(const Conv3x3Weights& weights, const Conv3x3Inputs& x, float* y) {
  const PackedWeight& weight = weights.weight;
  const bool few = Conv3x3Weights::few(weights.inputs), lines = x.nchw;
  const int64_t stride = weights.stride, outputs = weights.outputs, height = weights.out_size(x.height), width = weights.out_size(x.width);
  const int64_t lanes = lanes_of(outputs), rows = x.batch * height, line = lanes_of(width);
  const int64_t row_floats = lines ? 3 * weights.inputs * line : (x.width + 2) * weights.inputs;
  const int64_t taps_floats = few && !lines ? width * weight.inputs() + kLanes : 0;

  // Rows are cut over threads, and panels where there are more threads than rows.
  const int64_t threads = count_parts(rows * width * weight.inputs() * outputs, 1 << 16);
  const int64_t row_parts = std::clamp<int64_t>(rows, 1, threads), panel_parts = std::clamp<int64_t>(weight.panels().size(), 1, threads / row_parts);
  const int64_t most = std::clamp<int64_t>((kTileFloats - 2 * row_floats) / (stride * row_floats + width * lanes), 1, few ? 3 : 8);
  for_each_part(row_parts * panel_parts, [&](int64_t part) {
    const Range mine = part_range(rows, part / panel_parts, row_parts), panels = part_range(weight.panels().size(), part % panel_parts, panel_parts);
    const Range columns{panels.begin * kPanel, std::min(panels.end * kPanel, outputs)};
    float* product = workspace(most * width * lanes + taps_floats + ((most - 1) * stride + 3) * row_floats + 2 * kLanes);
    float *taps = product + most * width * lanes, *input = taps + taps_floats;
    for (int64_t first = mine.begin, count; first < mine.end; first += count) {
      const int64_t index = first / height, top = first % height;
      count = std::min({most, mine.end - first, height - top});
      for (int64_t i = 0; i < (count - 1) * stride + 3; ++i) {
        const int64_t from = top * stride - 1 + i;
        if (lines)
          x.load_lines(index, from, stride, width, line, input + i * row_floats);
        else
          x.load_row(index, from, input + i * row_floats);
      }
      const auto add = [&](const float* from, int64_t pixel, int64_t step, int64_t row, int64_t tap, int64_t depth, Range panels) {
        for_each_panel(weight, panels, [&](int64_t output, int64_t vecs) {
          const Operands in{from, weight.panel(output) + tap * depth * vecs * kLanes, pixel, step, vecs * kLanes, depth};
          for_each_block_of(width, in, [&](int64_t first, int64_t pixels, const Operands& block) {
            multiply_block(pixels, vecs, block, product + (row * width + first) * lanes + output, lanes, tap > 0);
          });
        });
      };
      if (few) {  // one reduction over all taps
        for (int64_t r = 0; r < count; ++r) {
          const float* from = input + r * stride * row_floats;
          if (!lines) gather_taps({from, from + row_floats, from + 2 * row_floats}, stride * weights.inputs, weights.inputs, width, taps);
          add(lines ? from : taps, lines ? 1 : weight.inputs(), lines ? line : 1, r, 0, weight.inputs(), panels);
        }
      } else {  // one for each row of taps, over all output rows while its weights are near
        for (int64_t panel = panels.begin; panel < panels.end; ++panel)
          for (int64_t tap = 0; tap < 3; ++tap)
            for (int64_t r = 0; r < count; ++r)
              add(input + (r * stride + tap) * row_floats, stride * weights.inputs, 1, r, tap, 3 * weights.inputs, {panel, panel + 1});
      }
      finish_rows<Act, float, float>(product, lanes, count * width, columns, outputs, weights.affine, nullptr, y + first * width * outputs);
    }
  });
}

}  // namespace mvit3
