// Dense 3x3 convolution with zero padding of its dilation, norm and activation, for inference: of one map or of the
// concatenation of two, which is never built, at stride 1 or 2.
//
// An implicit matrix product. At dilation 1 the input rows that a few output rows need are copied to cache, with their
// zero padding; what an output pixel reads is then three runs of memory, one for each row of taps, and so are the same
// taps of its neighbour, a pixel further. A map of few channels (an image) has runs too short for that: its three runs
// are put together, or, where it comes as NCHW, its rows are copied as one line per tap, along which the pixels lie.
//
// At a larger dilation each tap is a product of its own over the pixels that it meets inside of the map, where they
// lie: of ASPP's three branches on 32 x 32 pixels, 77, 56 and 39 % of the products that zero padding makes.
#pragma once

#include "pointwise_conv.h"

namespace mvit3 {

// Which pixels meet at the taps of a 3x3 convolution: output i meets input i * stride + (tap - 1) * dilation in each
// direction. A product walks from inputs to outputs, or backward.
struct Conv3x3Walk {
  int64_t height, width, out_height, out_width, stride, dilation;

  Conv3x3Walk(int64_t height, int64_t width, int64_t stride, int64_t any_dilation)
      : height(height), width(width), out_height((height + stride - 1) / stride),
        out_width((width + stride - 1) / stride), stride(stride),
        dilation(nearest_dilation(any_dilation, height, width)) {}

  int64_t offset(int64_t tap) const { return (tap - 1) * dilation; }

  // The columns, and the rows, of the output whose tap lies inside of the map.
  Range columns(int64_t tap) const { return met(tap, width, out_width); }
  Range rows(int64_t tap) const { return met(tap, height, out_height); }

  // The row of the input that a row of the output meets, or -1.
  int64_t input_row(int64_t out, int64_t tap) const {
    const int64_t row = out * stride + offset(tap);
    return row < height ? std::max<int64_t>(row, -1) : -1;
  }

 private:
  Range met(int64_t tap, int64_t size, int64_t out_size) const {
    const int64_t from = std::max<int64_t>(-offset(tap), 0), to = std::max<int64_t>(size - offset(tap), 0);
    const int64_t begin = std::min((from + stride - 1) / stride, out_size),
                  end = std::min((to + stride - 1) / stride, out_size);
    return {begin, std::max(begin, end)};
  }
};

// A map whose pixels lie `stride` elements apart, a multiple of Dot<E>::kDepth.
template <typename E>
struct Conv3x3Map {
  const E* data;
  int64_t channels, stride;
};

// One map or two side by side, NHWC and contiguous; a single one of few channels may be NCHW.
struct Conv3x3Inputs {
  const float *a, *b;
  int64_t a_channels, b_channels, batch, height, width;
  bool nchw;

  int64_t channels() const { return a_channels + b_channels; }

  // Pixels from..from + count - 1 of all images, `pixel` elements apart, zero behind their channels. Up to a vector is
  // written beyond each.
  template <typename E>
  void load_pixels(int64_t from, int64_t count, int64_t pixel, E* out) const {
    if (!b && pixel == a_channels) return load_rows(a + from * pixel, 0, 1, count * pixel, out, 0);
    for (int64_t i = from; i < from + count; ++i, out += pixel) {
      load_rows(a + i * a_channels, 0, 1, a_channels, out, 0);
      if (b) load_rows(b + i * b_channels, 0, 1, b_channels, out + a_channels, 0);
      std::fill(out + channels(), out + pixel, E{});
    }
  }

  // Row y of an image, or zeros where it has none, as pixels with a zero pixel before and behind them.
  template <typename E>
  void load_row(int64_t index, int64_t y, int64_t pixel, E* out) const {
    if (y < 0 || y >= height) return void(std::fill_n(out, (width + 2) * pixel, E{}));
    std::fill_n(out, pixel, E{});
    load_pixels((index * height + y) * width, width, pixel, out + pixel);
    std::fill_n(out + (width + 1) * pixel, pixel, E{});
  }

  // The same row, from NCHW, as one line of `columns` output columns for each horizontal tap and channel, `line` floats
  // apart.
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

// The nine taps of each of `columns` pixels, `step` floats apart in three padded rows, as rows of 9 channels. Up to a
// vector is written beyond.
inline void gather_taps(const float* const (&rows)[3], int64_t step, int64_t channels, int64_t columns, float* out) {
  const int64_t run = 3 * channels;
  for (int64_t i = 0; i < columns; ++i)
    for (int t = 0; t < 3; ++t, out += run)
      for (int64_t c = 0; c < run; c += kLanes) store(out + c, load(rows[t] + i * step + c));
}

template <typename E>
struct Conv3x3WeightsOf {
  int64_t inputs, outputs, stride, dilation, pixel;  // pixel: the inputs, padded to whole steps
  PackedWeightOf<E> weight;                          // its inputs are (tap row, tap column, channel of a pixel)
  ScaleShift affine;                                 // the norm

  // w is (outputs, 3, 3, inputs), contiguous.
  Conv3x3WeightsOf(const float* w, int64_t outputs, int64_t inputs, int64_t stride, int64_t dilation, ScaleShift norm)
      : inputs(inputs), outputs(outputs), stride(stride), dilation(dilation), pixel(round_up(inputs, Dot<E>::kDepth)),
        weight(pack(w, outputs, inputs, pixel)), affine(std::move(norm)) {}

  // Whether the maps have few channels: then a single one may be NCHW. Their products are too short to gain from
  // another type than float.
  static bool few(int64_t inputs) { return inputs < kLanes / 2; }
  bool few() const { return std::is_same_v<E, float> && few(inputs) && dilation == 1; }

  int64_t out_size(int64_t size) const { return (size + stride - 1) / stride; }

 private:
  static PackedWeightOf<E> pack(const float* w, int64_t outputs, int64_t inputs, int64_t pixel) {
    if (pixel == inputs) return PackedWeightOf<E>::rows(w, outputs, 9 * inputs, 9 * inputs);
    return PackedWeightOf<E>(outputs, 9 * pixel, [=](int64_t o, int64_t i) {
      return i % pixel < inputs ? w[(9 * o + i / pixel) * inputs + i % pixel] : 0.0f;
    });
  }
};

// How a convolution is cut over threads: output rows over all images, and panels where there are more threads than
// rows.
struct ConvCut {
  int64_t rows, panels, row_parts, columns;

  template <typename E>
  ConvCut(int64_t rows, int64_t width, const PackedWeightOf<E>& weight)
      : ConvCut(
            rows, weight.panels().size(), spread_parts(rows * width * weight.inputs() * weight.outputs(), 1 << 16)) {}
  ConvCut(int64_t rows, int64_t panels, int64_t threads)
      : rows(rows), panels(panels), row_parts(std::clamp<int64_t>(rows, 1, threads)),
        columns(std::clamp<int64_t>(panels, 1, threads / row_parts)) {}

  int64_t parts() const { return row_parts * columns; }
  Range rows_of(int64_t part) const { return part_range(rows, part / columns, row_parts); }
  Range panels_of(int64_t part) const { return part_range(panels, part % columns, columns); }

  template <typename E>
  Region operations(int64_t width, const PackedWeightOf<E>& weight) const {
    return operations_of(parts(), [&](int64_t part) {
      return rows_of(part).size() * width * weight.lanes(panels_of(part)) * weight.inputs();
    });
  }
};

// Calls f(range of output rows over all images, range of panels) once a part, all parts in parallel.
template <typename E, typename F>
void for_each_conv_part(int64_t rows, int64_t width, const PackedWeightOf<E>& weight, const F& f) {
  const ConvCut cut(rows, width, weight);
  for_each_part(cut.parts(), [&](int64_t part) { f(cut.rows_of(part), cut.panels_of(part)); });
}

constexpr int64_t kConvRows = 8;     // output rows of a tile, at most
constexpr int64_t kConvSteps = 192;  // of a product before the next one: a panel's share of them fits first-level cache

// The product for some output rows, rows of walk.out_width pixels of whole vectors.
template <typename E>
class Conv3x3Tile {
 public:
  // For `rows` rows of all images' output rows, from `first` on.
  Conv3x3Tile(const Conv3x3Walk& walk, const PackedWeightOf<E>& weight, int64_t first, int64_t rows, float* product)
      : walk_(walk), weight_(weight), rows_(rows), lanes_(lanes_of(weight.outputs())), product_(product) {
    std::fill_n(product, rows * walk.out_width * lanes_, 0.0f);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t tap = 0; tap < 3; ++tap) {
        const int64_t image = (first + r) / walk.out_height, row = walk.input_row((first + r) % walk.out_height, tap);
        from_[tap][r] = row < 0 ? -1 : (image * walk.height + row) * walk.width;
      }
  }

  // Adds one panel of a tap's product with a map, whose channels are the weight's inputs from `input` on. A piece of
  // the panel stays in first-level cache while all rows are walked.
  void add(const Conv3x3Map<E>& map, int64_t input, int64_t tap, int64_t panel) const {
    constexpr int64_t kDepth = Dot<E>::kDepth;
    const Range columns = walk_.columns(tap % 3);
    const int64_t *from = from_[tap / 3], step = walk_.stride, start = columns.begin * step + walk_.offset(tap % 3);
    const int64_t vecs = weight_.panel_vecs(panel * kPanel), steps = (map.channels + kDepth - 1) / kDepth,
                  pieces = (steps + kConvSteps - 1) / kConvSteps,
                  blocks = (columns.size() + kBlockRows - 1) / kBlockRows;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const Range depth = part_range(steps, piece, pieces);
      const E* b = weight_.panel(panel * kPanel) + (input + depth.begin * kDepth) * vecs * kLanes;
      OperandsOf<E> in{nullptr, b, step * map.stride, kDepth, vecs * kLanes * kDepth, depth.size()};
      for (int64_t block = 0; block < blocks; ++block) {
        const Range pixels = part_range(columns.size(), block, blocks);
        float* out = product_ + (columns.begin + pixels.begin) * lanes_ + panel * kPanel;
        for (int64_t r = 0; r < rows_; ++r) {
          if (from[r] < 0) continue;
          in.a = map.data + (from[r] + start + pixels.begin * step) * map.stride + depth.begin * kDepth;
          multiply_block(pixels.size(), vecs, in, out + r * walk_.out_width * lanes_, lanes_, true);
        }
      }
    }
  }

 private:
  const Conv3x3Walk& walk_;
  const PackedWeightOf<E>& weight_;
  const int64_t rows_, lanes_;
  float* const product_;
  int64_t from_[3][kConvRows];  // the first pixel of the input row that a row meets, for each row of taps; or -1
};

// y = act(affine(conv(x))), dense, tap by tap. x is one map or two side by side, the second without data where there is
// none; the inputs of the weight are (tap, channel), padded to whole steps for each tap.
template <int Act, typename E, typename T>
void conv3x3_taps(
    const Conv3x3Walk& walk, const PackedWeightOf<E>& weight, const ScaleShift& affine, int64_t batch,
    const Conv3x3Map<E>& a, const Conv3x3Map<E>& b, T* y) {
  const int64_t width = walk.out_width, outputs = weight.outputs(), lanes = lanes_of(outputs);
  const int64_t most = std::clamp<int64_t>(kTileFloats / std::max<int64_t>(width * lanes, 1), 1, kConvRows);
  for_each_conv_part(batch * walk.out_height, width, weight, [&](Range mine, Range panels) {
    const Range columns{panels.begin * kPanel, std::min(panels.end * kPanel, outputs)};
    float* product = workspace(most * width * lanes);
    for (int64_t first = mine.begin, count; first < mine.end; first += count) {
      count = std::min(most, mine.end - first);
      const Conv3x3Tile<E> tile(walk, weight, first, count, product);
      for (int64_t panel = panels.begin; panel < panels.end; ++panel)
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t input = tap * weight.inputs() / 9;
          tile.add(a, input, tap, panel);
          if (b.data) tile.add(b, input + a.channels, tap, panel);
        }
      finish_rows<Act, float, T>(
          product, lanes, count * width, columns, outputs, affine, nullptr, y + first * width * outputs);
    }
  });
}

// The same for a dilation, tap by tap. Products of another type than float read a copy of the maps.
template <int Act, typename E>
void conv3x3_dilated(const Conv3x3WeightsOf<E>& weights, const Conv3x3Inputs& x, float* y) {
  const Conv3x3Walk walk(x.height, x.width, weights.stride, weights.dilation);
  if constexpr (std::is_same_v<E, float>) {
    const Conv3x3Map<float> a{x.a, x.a_channels, x.a_channels}, b{x.b, x.b_channels, x.b_channels};
    conv3x3_taps<Act>(walk, weights.weight, weights.affine, x.batch, a, b, y);
  } else {
    const int64_t rows = x.batch * x.height * x.width, stride = lanes_of(x.a_channels + lanes_of(x.b_channels));
    E* copy = tile_of<E>(workspace<1>(rows * stride));
    for_each_tile(rows, count_parts(rows * stride), [&](int64_t, int64_t first, int64_t count) {
      for (int64_t r = first; r < first + count; ++r) x.load_pixels(r, 1, weights.pixel, copy + r * stride);
    });
    const Conv3x3Map<E> map{copy, weights.pixel, stride};
    conv3x3_taps<Act>(walk, weights.weight, weights.affine, x.batch, map, {}, y);
  }
}

// y = act(norm(conv(x))), NHWC and contiguous.
template <int Act, typename E>
void conv3x3(const Conv3x3WeightsOf<E>& weights, const Conv3x3Inputs& x, float* y) {
  if (weights.dilation > 1) return conv3x3_dilated<Act>(weights, x, y);
  constexpr int64_t kDepth = Dot<E>::kDepth;
  const PackedWeightOf<E>& weight = weights.weight;
  const bool few = weights.few(), lines = x.nchw;
  const int64_t stride = weights.stride, outputs = weights.outputs, height = weights.out_size(x.height),
                width = weights.out_size(x.width);
  const int64_t lanes = lanes_of(outputs), rows = x.batch * height, line = lanes_of(width);
  const int64_t pixel = weights.pixel, row_size = lines ? 3 * pixel * line : (x.width + 2) * pixel;
  const int64_t taps_floats = few && !lines ? width * weight.inputs() + kLanes : 0;
  const int64_t most =
      std::clamp<int64_t>((kTileFloats - 2 * row_size) / (stride * row_size + width * lanes), 1, few ? 3 : 8);
  for_each_conv_part(rows, width, weight, [&](Range mine, Range panels) {
    const Range columns{panels.begin * kPanel, std::min(panels.end * kPanel, outputs)};
    float* product = workspace(most * width * lanes + taps_floats + ((most - 1) * stride + 3) * row_size + 2 * kLanes);
    float* taps = product + most * width * lanes;
    E* input = tile_of<E>(taps + taps_floats);
    for (int64_t first = mine.begin, count; first < mine.end; first += count) {
      const int64_t index = first / height, top = first % height;
      count = std::min({most, mine.end - first, height - top});
      for (int64_t i = 0; i < (count - 1) * stride + 3; ++i) {
        const int64_t from = top * stride - 1 + i;
        if constexpr (std::is_same_v<E, float>)
          if (lines) {
            x.load_lines(index, from, stride, width, line, input + i * row_size);
            continue;
          }
        x.load_row(index, from, pixel, input + i * row_size);
      }
      // The inputs of the weight from tap * depth on, of a row of pixels.
      const auto add = [&](const E* from, int64_t pixel, int64_t step, int64_t row, int64_t tap, int64_t depth,
                           Range panels) {
        for_each_panel(weight, panels, [&](int64_t output, int64_t vecs) {
          const OperandsOf<E> in{
              from,
              weight.panel(output) + tap * depth * vecs * kLanes,
              pixel,
              step,
              vecs * kLanes * kDepth,
              depth / kDepth,
              depth * vecs * kLanes};
          for_each_block_of(width, in, [&](int64_t first, int64_t pixels, const OperandsOf<E>& block) {
            multiply_block(pixels, vecs, block, product + (row * width + first) * lanes + output, lanes, tap > 0);
          });
        });
      };
      if (few) {  // one reduction over all taps
        if constexpr (std::is_same_v<E, float>)
          for (int64_t r = 0; r < count; ++r) {
            const float* from = input + r * stride * row_size;
            if (!lines) gather_taps({from, from + row_size, from + 2 * row_size}, stride * pixel, pixel, width, taps);
            add(lines ? from : taps, lines ? 1 : weight.inputs(), lines ? line : 1, r, 0, weight.inputs(), panels);
          }
      } else {  // one for each row of taps, over all output rows while its weights are near
        for (int64_t panel = panels.begin; panel < panels.end; ++panel)
          for (int64_t tap = 0; tap < 3; ++tap)
            for (int64_t r = 0; r < count; ++r)
              add(input + (r * stride + tap) * row_size, stride * pixel, kDepth, r, tap, 3 * pixel, {panel, panel + 1});
      }
      finish_rows<Act, float, float>(
          product, lanes, count * width, columns, outputs, weights.affine, nullptr, y + first * width * outputs);
    }
  });
}

}  // namespace mvit3
