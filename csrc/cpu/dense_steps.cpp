// The steps of the heads of dense prediction: pooled branches that join a product before they are up-sampled
// (docs/algebra.md, I and J), and the outputs of the heads of a detector, as they are or as boxes and probabilities.
#include <cmath>

#include "pointwise_conv.h"
#include "steps.h"
#include "upsample.h"

namespace mvit3 {
namespace {

// The means of size x size windows, as torch.nn.AdaptiveAvgPool2d cuts them.
class AdaptivePool : public Step {
 public:
  explicit AdaptivePool(Source& from) : size_(from.integer("size", 1, 1 << 10)) {}
  MapShape shape(const Shapes& in) const override { return {size_, size_, in[0].channels}; }
  void run(const Maps& in, const Map& out) const override {
    const MapShape& s = in[0].shape;
    const int64_t vectors = lanes_of(s.channels) / kLanes, tasks = out.rows() * vectors,
                  parts = count_parts(in[0].rows() * s.channels);
    const auto window = [&](int64_t i, int64_t side) {
      return Range{i * side / size_, ((i + 1) * side + size_ - 1) / size_};
    };
    for_each_part(parts, [&](int64_t part) {
      const Range mine = part_range(tasks, part, parts);
      for (int64_t task = mine.begin; task < mine.end; ++task) {
        const int64_t c = task % vectors * kLanes, left = s.channels - c, pixel = task / vectors;
        const Range rows = window(pixel / size_ % size_, s.height), columns = window(pixel % size_, s.width);
        const float* x = in[0].data + pixel / (size_ * size_) * s.floats() + c;
        Vec sum = 0.0f;
        for (int64_t row = rows.begin; row < rows.end; ++row)
          for (int64_t column = columns.begin; column < columns.end; ++column)
            sum += load_some(x + (row * s.width + column) * s.channels, left);
        store_some(out.data + pixel * s.channels + c, sum * (1.0f / float(rows.size() * columns.size())), left);
      }
    });
  }

 private:
  int64_t size_;
};

// A 1x1 convolution of a concatenation, which is built for a tile of rows at a time. Inputs: the maps, and a map of one
// pixel that is added in front of the activation. Weights: (outputs, channels of all maps), scale, shift.
template <typename E>
class PointwiseSum : public Step {
 public:
  explicit PointwiseSum(Source& from) : PointwiseSum{from, Folded::take(from, "weight")} {}

  Range inputs() const override { return {2, 64}; }
  MapShape shape(const Shapes& in) const override {
    const MapShape& bias = in.back();
    int64_t channels = 0;
    for (size_t i = 0; i + 1 < in.size(); ++i) {
      check_same_size("pointwise_sum", in[0], in[i]);
      channels += in[i].channels;
    }
    check_channels("pointwise_sum", channels, weight_.inputs());
    check_channels("pointwise_sum's bias", bias.channels, weight_.outputs());
    MVIT3_CHECK(bias.pixels() == 1, "step pointwise_sum takes a bias of one pixel, got ", bias.pixels());
    return {in[0].height, in[0].width, weight_.outputs()};
  }
  void run(const Maps& in, const Map& out) const override {
    dispatch_activation(act_, [&](auto act) { run<act>(in, out); });
  }

 private:
  PointwiseSum(Source& from, const Folded& conv)
      : weight_(conv.pack<E>(conv.outputs, conv.inputs)), affine_(conv.affine()), act_(from.activation()) {}

  template <int Act>
  void run(const Maps& in, const Map& out) const {
    const int64_t outputs = weight_.outputs(), stride = lanes_of(outputs), depth = lanes_of(weight_.inputs()),
                  pixels = out.shape.pixels();
    for_each_block(out.rows(), weight_, [&](Range mine, Range panels) {
      float* product = workspace(kTileRows * (stride + depth) + kLanes);
      E* tile = tile_of<E>(product + kTileRows * stride);
      for (int64_t first = mine.begin; first < mine.end; first += kTileRows) {
        const int64_t count = std::min(kTileRows, mine.end - first);
        for (int64_t r = 0; r < count; ++r) gather(in, first + r, tile + r * depth);
        multiply_into(tile, depth, count, weight_, panels, product, stride);
        for (int64_t r = 0; r < count; ++r) {
          const float* bias = in.back().data + (first + r) / pixels * outputs;
          for (int64_t c = panels.begin * kPanel; c < std::min(panels.end * kPanel, outputs); c += kLanes) {
            const Vec value = affine_(load(product + r * stride + c), c) + load_some(bias + c, outputs - c);
            store_some(out.data + (first + r) * outputs + c, activate<Act>(value), outputs - c);
          }
        }
      }
    });
  }

  // Row `row` of all maps side by side; padding behind a map is overwritten by the next one.
  static void gather(const Maps& in, int64_t row, E* tile) {
    for (size_t i = 0; i + 1 < in.size(); ++i) {
      const int64_t channels = in[i].shape.channels;
      load_rows(in[i].data + row * channels, 0, 1, channels, tile, 0);
      tile += channels;
    }
  }

  PackedWeightOf<E> weight_;
  ScaleShift affine_;
  int64_t act_;
};

// What each pixel of one axis reads of the products of `tokens` tokens with three taps, when tokens are up-sampled to
// the pixels with align_corners: pairs of 3 * token + tap and the share, of the taps that lie inside the map.
using Shares = std::vector<std::pair<int64_t, float>>;

std::vector<Shares> tap_shares(int64_t tokens, int64_t pixels) {
  const Axis axis(tokens, pixels, true);
  std::vector<Shares> shares(pixels);
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t tap = 0; tap < 3; ++tap) {
      const int64_t at = i + tap - 1;
      if (at < 0 || at >= pixels) continue;
      if (axis.share[at] < 1) shares[i].push_back({3 * axis.low[at] + tap, 1 - axis.share[at]});
      if (axis.share[at] > 0) shares[i].push_back({3 * axis.high[at] + tap, axis.share[at]});
    }
  return shares;
}

// act(map + what a 3x3 convolution makes of up-sampled tokens). Inputs: the map (H, W, C), and for each small map its
// products with the nine taps (h, w, 9 * C), the taps in reading order.
class SpreadTaps : public Step {
 public:
  explicit SpreadTaps(Source& from) : act_(from.activation()) {}

  Range inputs() const override { return {2, 64}; }
  MapShape shape(const Shapes& in) const override {
    for (size_t i = 1; i < in.size(); ++i) check_channels("spread_taps", in[i].channels, 9 * in[0].channels);
    return in[0];
  }
  void run(const Maps& in, const Map& out) const override {
    dispatch_activation(act_, [&](auto act) { run<act>(in, out); });
  }

 private:
  static constexpr int64_t kChunk = 4 * kLanes;  // channels whose rows between the two passes stay in cache

  template <int Act>
  void run(const Maps& in, const Map& out) const {
    const int64_t height = out.shape.height, width = out.shape.width, channels = out.shape.channels;
    // rows of tokens between the passes: 3 * h of each small map, already spread along the row
    std::vector<Shares> down(height);
    std::vector<std::vector<Shares>> along;
    int64_t rows = 0;
    for (size_t k = 1; k < in.size(); ++k) {
      const auto shares = tap_shares(in[k].shape.height, height);
      for (int64_t y = 0; y < height; ++y)
        for (const auto& [row, share] : shares[y]) down[y].push_back({rows + row, share});
      along.push_back(tap_shares(in[k].shape.width, width));
      rows += 3 * in[k].shape.height;
    }
    const int64_t chunks = (channels + kChunk - 1) / kChunk, tasks = out.batch * chunks,
                  parts = count_parts(out.rows() * channels, 4096);
    for_each_part(parts, [&](int64_t part) {
      const Range mine = part_range(tasks, part, parts);
      float* between = workspace(rows * width * kChunk);
      for (int64_t task = mine.begin; task < mine.end; ++task) {
        const int64_t image = task / chunks, c = task % chunks * kChunk, count = std::min(kChunk, channels - c);
        float* row = between;
        for (size_t k = 1; k < in.size(); ++k)
          for (int64_t i = 0; i < 3 * in[k].shape.height; ++i, row += width * kChunk)
            spread_along(in[k], image, i, along[k - 1], c, count, row);
        const int64_t at = image * out.shape.floats() + c;
        for (int64_t y = 0; y < height; ++y)
          add_rows<Act>(
              between, down[y], in[0].data + at + y * width * channels, width, channels, count,
              out.data + at + y * width * channels);
      }
    });
  }

  // Of row `i` = 3 * token row + tap row: the products with its three taps, spread along the row.
  static void spread_along(
      const Map& tokens, int64_t image, int64_t i, const std::vector<Shares>& along, int64_t c, int64_t count,
      float* row) {
    const MapShape& s = tokens.shape;
    const int64_t channels = s.channels / 9;
    const float* from = tokens.data + image * s.floats() + (i / 3 * s.width * 9 + i % 3 * 3) * channels + c;
    for (size_t x = 0; x < along.size(); ++x, row += kChunk)
      for (int64_t v = 0; v < count; v += kLanes) {
        Vec sum = 0.0f;
        for (const auto& [tap, share] : along[x])
          sum = fma(load_some(from + (tap / 3 * 9 + tap % 3) * channels + v, count - v), share, sum);
        store(row + v, sum);
      }
  }

  template <int Act>
  static void add_rows(
      const float* between, const Shares& shares, const float* x, int64_t width, int64_t channels, int64_t count,
      float* y) {
    for (int64_t column = 0; column < width; ++column)
      for (int64_t v = 0; v < count; v += kLanes) {
        Vec sum = load_some(x + column * channels + v, count - v);
        for (const auto& [row, share] : shares)
          sum = fma(load(between + (row * width + column) * kChunk + v), share, sum);
        store_some(y + column * channels + v, activate<Act>(sum), count - v);
      }
  }

  int64_t act_;
};

// The outputs of a detector's heads, maps (H, W, anchors * values), as one list of anchors (N, 1, values).
class Anchors : public Step {
 public:
  explicit Anchors(Source& from) : values_(from.integer("values", 1, 1 << 20)) {}

  Range inputs() const override { return {1, 64}; }
  MapShape shape(const Shapes& in) const override {
    int64_t floats = 0;
    for (const MapShape& map : in) {
      MVIT3_CHECK(
          map.channels % values_ == 0, "step anchors takes multiples of ", values_, " channels, got ", map.channels);
      floats += map.floats();
    }
    return {floats / values_, 1, values_};
  }
  void run(const Maps& in, const Map& out) const override {
    for (int64_t image = 0; image < out.batch; ++image) {
      float* y = out.data + image * out.shape.floats();
      for (const Map& map : in) y = std::copy_n(map.data + image * map.shape.floats(), map.shape.floats(), y);
    }
  }

 private:
  int64_t values_;
};

// The same list with its first four values, offsets, turned into the corners of boxes, and the others into
// probabilities. Inputs: the heads' maps. Weights: of each map the widths and heights of a pixel's anchors (anchors,
// 2). Numbers: the variances of centres and of sizes.
class Boxes : public Step {
 public:
  explicit Boxes(Source& from) : values_(from.integer("values", 5, 1 << 20)) {
    const int64_t maps = from.integer("maps", 1, 64);
    for (int64_t i = 0; i < maps; ++i) {
      const Tensor& sizes = from.matrix();
      check_channels("boxes' sizes", sizes.size(1), 2);
      const FloatMatrix read("sizes", sizes, sizes.size(0), 2);
      sizes_.emplace_back(read.data(), read.data() + sizes.numel());
    }
    center_ = float(from.number());
    size_ = float(from.number());
  }

  Range inputs() const override { return {int64_t(sizes_.size()), int64_t(sizes_.size())}; }
  MapShape shape(const Shapes& in) const override {
    int64_t anchors = 0;
    for (size_t i = 0; i < in.size(); ++i) {
      check_channels("boxes", in[i].channels, values_ * int64_t(sizes_[i].size()) / 2);
      anchors += in[i].floats() / values_;
    }
    return {anchors, 1, values_};
  }
  void run(const Maps& in, const Map& out) const override {
    int64_t before = 0;
    for (size_t i = 0; i < in.size(); ++i) {
      const int64_t anchors = in[i].shape.floats() / values_, tasks = in[i].batch * anchors,
                    parts = count_parts(tasks * values_, 8192);
      for_each_part(parts, [&](int64_t part) {
        const Range mine = part_range(tasks, part, parts);
        for (int64_t task = mine.begin; task < mine.end; ++task)
          convert(
              in[i].data + task * values_, in[i].shape, sizes_[i], task % anchors,
              out.data + (task / anchors * out.shape.height + before + task % anchors) * values_);
      });
      before += anchors;
    }
  }

 private:
  void convert(const float* x, const MapShape& map, const std::vector<float>& sizes, int64_t anchor, float* y) const {
    const int64_t kinds = int64_t(sizes.size()) / 2, pixel = anchor / kinds, kind = anchor % kinds;
    const float sides[2] = {sizes[2 * kind], sizes[2 * kind + 1]},
                centers[2] = {
                    float((double(pixel % map.width) + 0.5) / double(map.width)),
                    float((double(pixel / map.width) + 0.5) / double(map.height))};
    for (int i = 0; i < 2; ++i) {
      const float center = x[i] * center_ * sides[i] + centers[i], half = std::exp(x[2 + i] * size_) * sides[i] / 2;
      y[i] = center - half;
      y[2 + i] = center + half;
    }
    const int64_t classes = values_ - 4;
    x += 4, y += 4;
    const float none = -std::numeric_limits<float>::infinity();
    Vec most = none, sum = 0.0f;
    for (int64_t c = 0; c < classes; c += kLanes) most = max(load_some(x + c, classes - c, none), most);
    const float largest = max_of_lanes(most);
    for (int64_t c = 0; c < classes; c += kLanes) {
      const Vec value = exp(load_some(x + c, classes - c, none) - largest);
      store_some(y + c, value, classes - c);
      sum += value;
    }
    const float factor = 1 / sum_of_lanes(sum);
    for (int64_t c = 0; c < classes; c += kLanes)
      store_some(y + c, load_some(y + c, classes - c) * factor, classes - c);
  }

  int64_t values_;
  std::vector<std::vector<float>> sizes_;
  float center_, size_;
};

}  // namespace

template <typename E>
std::vector<StepKind> dense_step_kinds() {
  return {
      {"adaptive_pool", make<AdaptivePool>},
      {"pointwise_sum", make<PointwiseSum<E>>},
      {"spread_taps", make<SpreadTaps>},
      {"anchors", make<Anchors>},
      {"boxes", make<Boxes>},
  };
}

template std::vector<StepKind> dense_step_kinds<float>();
#if defined(__AVX512BF16__)
template std::vector<StepKind> dense_step_kinds<BFloat16>();
#endif

}  // namespace mvit3
