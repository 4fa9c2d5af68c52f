// conv3x3: dense 3x3 convolution at stride 1 and any dilation, forward and backward. Meaning:
// mvit3_kernels/ops/conv3x3/reference.py.
//
// The convolution alone, and in inference the norm and the activation behind it: next to hundreds of products for each
// value, the passes of `batch_norm_act` over the result are nothing. Each tap is a product over the pixels that it
// meets inside of the map, in all three directions. Backward to x it is a convolution again, with the weight's taps in
// reverse order and its channels exchanged. The gradient of the weight is, for each tap, a product over pixels: x and
// dy are copied for each column of taps, without the pixels that it does not meet, so that those of an image which a
// tap meets are one run of memory. Nobody's sums are added up by threads: each has parts of the weight of its own.

#include "conv3x3.h"

#include "../op_arguments.h"

namespace mvit3 {
namespace {

// The products of rows stored as T read them as E, in whole steps: where they lie, or a copy.
template <typename T, typename E = Multiplied<T>>
class Operand {
 public:
  Operand(const T* x, int64_t rows, int64_t channels)
      : copied_(!std::is_same_v<T, E> || channels % Dot<E>::kDepth),
        copy_(copied_ ? rows * lanes_of(channels) + kLanes : 1) {
    if constexpr (std::is_same_v<T, E>) map_ = {x, channels, channels};
    if (!copied_) return;
    map_ = {copy_.data(), channels, lanes_of(channels)};
    for_each_tile(rows, count_parts(rows * channels), [&](int64_t, int64_t first, int64_t count) {
      E* out = copy_.data() + first * map_.stride;
      load_rows(x + first * channels, channels, count, channels, out, map_.stride);
    });
  }

  const Conv3x3Map<E>& map() const { return map_; }

 private:
  bool copied_;
  Scratch<E> copy_;
  Conv3x3Map<E> map_{};
};

// The arguments of a call. The taps of a weight (outputs, inputs, 3, 3) lie side by side; products take them one by
// one.
template <typename T>
struct Layer {
  using E = Multiplied<T>;

  Tensor x;
  int64_t batch, inputs, outputs;
  Conv3x3Walk walk;
  FloatMatrix weight;

  Layer(const Tensor& x, const Tensor& w, int64_t dilation)
      : x(torch::stable::contiguous(x)), batch(x.size(0)), inputs(x.size(3)), outputs(outputs_of("weight", w)),
        walk(x.size(1), x.size(2), 1, dilation), weight("weight", w, outputs, 9 * inputs) {}

  int64_t rows() const { return batch * walk.height * walk.width; }
  Operand<T> operand(const Tensor& map) const { return Operand<T>(data_of<T>(map), rows(), map.size(3)); }
  Tensor new_map(int64_t channels) const { return new_output(x, {batch, walk.height, walk.width, channels}); }

  PackedWeightOf<E> packed() const {
    const int64_t padded = round_up(inputs, Dot<E>::kDepth);
    Scratch<float> taps(outputs * 9 * padded, 0.0f);
    spread(taps.data(), 9 * padded, padded);
    return PackedWeightOf<E>::rows(taps.data(), outputs, 9 * padded, 9 * padded);
  }

  // The weight of the convolution that leads from dy to dx.
  PackedWeightOf<E> reversed() const {
    const int64_t padded = round_up(outputs, Dot<E>::kDepth);
    Scratch<float> taps(9 * padded * inputs, 0.0f);
    spread(taps.data() + 8 * padded * inputs, inputs, -padded * inputs);
    return PackedWeightOf<E>::columns(taps.data(), inputs, 9 * padded, inputs);
  }

 private:
  // Writes each output's inputs of a tap side by side, at to[output * stride + tap * tap_stride].
  void spread(float* to, int64_t stride, int64_t tap_stride) const {
    const int64_t parts = count_parts(outputs * inputs * 9);
    for_each_part(parts, [&](int64_t part) {
      const Range mine = part_range(outputs, part, parts);
      for (int64_t o = mine.begin; o < mine.end; ++o) {
        const float* from = weight.data() + o * inputs * 9;
        for (int64_t tap = 0; tap < 9; ++tap)
          for (int64_t c = 0; c < inputs; ++c) to[o * stride + tap * tap_stride + c] = from[9 * c + tap];
      }
    });
  }
};

// Some rows of a map as the gradient of the weight reads them: [channels / Wide][row][step of pixels][Wide channels],
// of the pixels that a column of taps meets. What a product reads is then a run of memory.
template <typename E, int64_t Wide>
class Column {
 public:
  // For rows of at most `width` pixels.
  Column(int64_t rows, int64_t width, int64_t channels)
      : rows_(rows), channels_(channels), data_(rows * round_up(width, kDepth) * round_up(channels, Wide)) {}

  void set_width(int64_t width) { row_size_ = round_up(width, kDepth) * Wide; }
  int64_t row_size() const { return row_size_; }
  const E* row(int64_t index, int64_t channel) const { return data_.data() + place(index, channel); }

  // Rows `mine` of a map of `width` pixels a row, `columns` of each.
  template <typename T>
  void load(const T* x, int64_t width, Range columns, Range mine) {
    for (int64_t r = mine.begin; r < mine.end; ++r)
      for (int64_t c = 0; c < channels_; c += Wide)
        rows_in_steps(
            x + (r * width + columns.begin) * channels_ + c, channels_, columns.size(), std::min(Wide, channels_ - c),
            data_.data() + place(r, c), Wide);
  }

 private:
  static constexpr int64_t kDepth = Dot<E>::kDepth;

  int64_t place(int64_t row, int64_t channel) const { return (channel / Wide * rows_ + row) * row_size_; }

  int64_t rows_, channels_, row_size_ = 0;
  Scratch<E> data_;
};

// The sums of dy^T x for each tap: [tap][output][inputs, padded to whole vectors].
template <typename T>
class WeightGradient {
  using E = Multiplied<T>;

 public:
  WeightGradient(const Layer<T>& layer, const T* x, const T* dy)
      : walk_(layer.walk), inputs_(layer.inputs), outputs_(layer.outputs), lanes_(lanes_of(inputs_)),
        most_(
            std::clamp<int64_t>(
                kCopied / std::max<int64_t>(pixels() * (inputs_ + outputs_), 1), 1, std::max<int64_t>(layer.batch, 1))),
        ranges_((outputs_ + kOutputs - 1) / kOutputs), tasks_((inputs_ + kPanel - 1) / kPanel * ranges_),
        parts_(std::clamp<int64_t>(tasks_, 1, count_parts(layer.rows() * inputs_ * outputs_, 1 << 16))),
        a_(most_ * walk_.height, walk_.width, outputs_), b_(most_ * walk_.height, walk_.width, inputs_),
        sums_(9 * outputs_ * lanes_, 0.0f) {
    for (int64_t first = 0; first < layer.batch; first += most_) {
      const int64_t images = std::min(most_, layer.batch - first);
      for (int64_t column = 0; column < 3; ++column) {
        if (walk_.columns(column).size() == 0) continue;
        load(column, images, x + first * pixels() * inputs_, dy + first * pixels() * outputs_);
        for_each_part(parts_, [&](int64_t part) {
          const Range mine = part_range(tasks_, part, parts_);
          for (int64_t task = mine.begin; task < mine.end; ++task)
            for (int64_t row = 0; row < 3; ++row)
              for (int64_t image = 0; image < images; ++image) add(task, 3 * row + column, image);
        });
      }
    }
  }

  // The sums as a tensor like the weight.
  Tensor like(const Tensor& weight) const {
    const Tensor out = torch::stable::new_empty(weight, weight.sizes());
    const int64_t parts = count_parts(sums_size());
    dispatch_dtype("weight", out, [&](auto type) {
      using P = decltype(type);
      P* data = mutable_data_of<P>(out);
      for_each_part(parts, [&](int64_t part) {
        const Range mine = part_range(outputs_, part, parts);
        for (int64_t o = mine.begin; o < mine.end; ++o)
          for (int64_t c = 0; c < inputs_; ++c)
            for (int64_t tap = 0; tap < 9; ++tap)
              data[(o * inputs_ + c) * 9 + tap] = from_float<P>(sums_[(tap * outputs_ + o) * lanes_ + c]);
      });
    });
    return out;
  }

 private:
  static constexpr int64_t kDepth = Dot<E>::kDepth;
  static constexpr int64_t kCopied = 1 << 21;      // values of the images that are copied together, or one image
  static constexpr int64_t kOutputs = 6 * kLanes;  // of a task, which has one panel of inputs
  static constexpr int64_t kRows = kBlockRows >= 8 ? 8 : kBlockRows >= 4 ? 4 : 2;  // of a block: they divide kLanes

  int64_t pixels() const { return walk_.height * walk_.width; }
  int64_t sums_size() const { return 9 * outputs_ * lanes_; }

  // The pixels that a column of taps meets.
  void load(int64_t column, int64_t images, const T* x, const T* dy) {
    const Range met = walk_.columns(column);
    const int64_t offset = walk_.offset(column);
    a_.set_width(met.size());
    b_.set_width(met.size());
    for_each_part(parts_, [&](int64_t part) {
      const Range mine = part_range(images * walk_.height, part, parts_);
      a_.load(dy, walk_.width, met, mine);
      b_.load(x, walk_.width, {met.begin + offset, met.end + offset}, mine);
    });
  }

  // One image's share of a task of a tap.
  void add(int64_t task, int64_t tap, int64_t image) {
    const Range rows = walk_.rows(tap / 3);
    const int64_t input = task / ranges_ * kPanel, first = task % ranges_ * kOutputs,
                  last = std::min(first + kOutputs, outputs_), row = image * walk_.height + rows.begin;
    const int64_t vecs = std::min<int64_t>(kPanelVecs, (inputs_ - input + kLanes - 1) / kLanes),
                  steps = rows.size() * b_.row_size() / (kPanel * kDepth),
                  pieces = (steps + kConvSteps - 1) / kConvSteps;
    for (int64_t piece = 0; piece < pieces; ++piece) {  // of x in first-level cache, for all outputs
      const Range depth = part_range(steps, piece, pieces);
      const E* from = b_.row(row + walk_.offset(tap / 3), input) + depth.begin * kPanel * kDepth;
      for (int64_t o = first; o < last; o += kRows) {
        const E* to = a_.row(row, o) + (depth.begin * kLanes + o % kLanes) * kDepth;
        multiply_block<E>(
            std::min(kRows, outputs_ - o), vecs, {to, from, kDepth, kLanes * kDepth, kPanel * kDepth, depth.size()},
            sums_.data() + (tap * outputs_ + o) * lanes_ + input, lanes_, true);
      }
    }
  }

  const Conv3x3Walk walk_;
  const int64_t inputs_, outputs_, lanes_, most_, ranges_, tasks_, parts_;
  Column<E, kLanes> a_;
  Column<E, kPanel> b_;
  Scratch<float> sums_;
};

struct ConvArguments3x3 {
  Tensor x, weight;
};

// Calls f(layer, storage type) on arguments that fit.
template <typename F>
auto with_layer(const ConvArguments3x3& a, int64_t dilation, const F& f) {
  check_map("x", a.x);
  check_pixels("x", a.x.size(1), a.x.size(2));
  MVIT3_CHECK(dilation >= 1, "dilation must be at least 1, got ", dilation);
  check_shape("weight", a.weight, {outputs_of("weight", a.weight), a.x.size(3), 3, 3});
  return dispatch_dtype("x", a.x, [&](auto type) {
    using T = decltype(type);
    return f(Layer<T>(a.x, a.weight, dilation), type);
  });
}

template <int Act, typename T>
Tensor convolve(const Layer<T>& layer, const ScaleShift& affine) {
  const Tensor y = layer.new_map(layer.outputs);
  const Operand<T> x = layer.operand(layer.x);
  conv3x3_taps<Act>(layer.walk, layer.packed(), affine, layer.batch, x.map(), {}, mutable_data_of<T>(y));
  return y;
}

ScaleShift identity(int64_t channels) { return Norm(Values(channels, 1.0), Values(channels, 0.0)).affine(); }

struct InferenceArguments {
  ConvArguments3x3 conv;
  OptionalTensor norm_weight, norm_bias, running_mean, running_var;
  double eps;
  int64_t act, dilation;
};

Tensor conv3x3_inference(const InferenceArguments& a) {
  return with_layer(a.conv, a.dilation, [&](const auto& layer, auto) {
    ScaleShift affine = identity(layer.outputs);
    MVIT3_CHECK(
        a.norm_weight.has_value() == a.norm_bias.has_value(), "norm_weight and norm_bias must be given together");
    if (a.norm_weight) {
      Norm norm("norm_", *a.norm_weight, *a.norm_bias, layer.outputs, a.eps);
      norm.read_running("norm_", a.running_mean, a.running_var);
      affine = norm.affine();
    }
    return dispatch_activation(a.act, [&](auto act) { return convolve<act>(layer, affine); });
  });
}

struct ForwardArguments {
  ConvArguments3x3 conv;
  int64_t dilation;
};

Tensor conv3x3_forward(const ForwardArguments& a) {
  return with_layer(
      a.conv, a.dilation, [](const auto& layer, auto) { return convolve<kIdentity>(layer, identity(layer.outputs)); });
}

struct BackwardArguments {
  Tensor dy;
  ConvArguments3x3 conv;
  int64_t dilation;
};

// Gradients of x and weight.
std::array<Tensor, 2> conv3x3_backward(const BackwardArguments& a) {
  return with_layer(a.conv, a.dilation, [&](const auto& layer, auto type) {
    using T = decltype(type);
    const Tensor dy =
        contiguous_map("dy", a.dy, a.conv.x, {layer.batch, layer.walk.height, layer.walk.width, layer.outputs});
    const Tensor dx = layer.new_map(layer.inputs);
    {
      const Operand<T> grad = layer.operand(dy);
      conv3x3_taps<kIdentity>(
          layer.walk, layer.reversed(), identity(layer.inputs), layer.batch, grad.map(), {}, mutable_data_of<T>(dx));
    }
    const WeightGradient<T> dweight(layer, data_of<T>(layer.x), data_of<T>(dy));
    return std::array<Tensor, 2>{dx, dweight.like(a.conv.weight)};
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("conv3x3_inference", mvit3::boxed<mvit3::conv3x3_inference>);
  m.impl("conv3x3_forward", mvit3::boxed<mvit3::conv3x3_forward>);
  m.impl("conv3x3_backward", mvit3::boxed<mvit3::conv3x3_backward>);
}
