// The kinds of steps that the inference engine knows: thin wrappers of the ops' forward cores. Those between them, and
// those of the heads of dense prediction, have files of their own.
#include "conv3x3.h"
#include "depthwise_conv.h"
#include "feed_forward.h"
#include "inverted_residual.h"
#include "norm_linear.h"
#include "patch_attention.h"
#include "pointwise_conv.h"
#include "separable_attention.h"
#include "steps.h"
#include "winograd.h"

namespace mvit3 {
namespace {

template <typename E>
class InvertedResidual : public Step {
 public:
  explicit InvertedResidual(Source& from)
      : InvertedResidual{from,          Folded::take(from, "expand"), from.weight(), from.vector(),
                         from.vector(), Folded::take(from, "project")} {}

  MapShape shape(const Shapes& in) const override {
    check_channels("inverted_residual", in[0].channels, weights_.inputs);
    const InvertedResidualShape s = weights_.shape(1, in[0].height, in[0].width);
    return {s.out_height(), s.out_width(), s.outputs};
  }
  void run(const Maps& in, const Map& out) const override {
    evaluate_inverted_residual(weights_, in[0].data, in[0].batch, in[0].shape.height, in[0].shape.width, out.data);
  }
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    return inverted_residual_regions(weights_, weights_.shape(batch, in[0].height, in[0].width));
  }

 private:
  InvertedResidual(
      Source& from, const Folded& expand, const Tensor& taps, const Tensor& scale, const Tensor& shift,
      const Folded& project)
      : weights_(make(from, expand, Folded("depthwise", taps, scale, shift, 9), project)) {}

  static InvertedResidualWeightsOf<E> make(
      Source& from, const Folded& expand, const Folded& depthwise, const Folded& project) {
    check_channels("inverted_residual's depthwise weight", depthwise.outputs, expand.outputs);
    check_channels("inverted_residual's project weight", project.inputs, expand.outputs);
    const int64_t stride = from.stride(), dilation = from.dilation();
    const InvertedResidualShape s{1, 1, 1, expand.inputs, expand.outputs, project.outputs, stride, dilation};
    return InvertedResidualWeightsOf<E>(s, expand, depthwise, project, from.activation());
  }

  InvertedResidualWeightsOf<E> weights_;
};

class DepthwiseConv : public Step {
 public:
  explicit DepthwiseConv(Source& from) : DepthwiseConv{from, from.weight(), from.vector(), from.vector()} {}

  MapShape shape(const Shapes& in) const override {
    check_channels("depthwise_conv", in[0].channels, channels_);
    const DepthwiseGeometry g = geometry(1, in[0]);
    return {g.out_height, g.out_width, channels_};
  }
  void run(const Maps& in, const Map& out) const override {
    const DepthwiseGeometry g = geometry(in[0].batch, in[0].shape);
    dispatch_activation(act_, [&](auto act) { depthwise_conv<act>(g, weights_, in[0].data, out.data); });
  }
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    const DepthwiseGeometry g = geometry(batch, in[0]);
    return {even_region(g.out_image_rows(), depthwise_parts(g), g.out_row_size() * 9)};
  }

 private:
  DepthwiseConv(Source& from, const Tensor& weight, const Tensor& scale, const Tensor& shift)
      : channels_(outputs_of("depthwise", weight)), stride_(from.stride()), dilation_(from.dilation()),
        act_(from.activation()), weights_(make(Folded("depthwise", weight, scale, shift, 9))) {}

  static DepthwiseWeights make(const Folded& conv) {
    return DepthwiseWeights(conv.matrix.data(), conv.outputs, conv.affine());
  }
  DepthwiseGeometry geometry(int64_t batch, const MapShape& in) const {
    return {batch, in.height, in.width, channels_, stride_, dilation_};
  }

  int64_t channels_, stride_, dilation_, act_;
  DepthwiseWeights weights_;
};

template <typename E>
int64_t operations_of_row(const PackedWeightOf<E>& weight) {
  return weight.inputs() * weight.lanes(weight.panels());
}

// Inputs a, (b), (residual).
template <typename E>
class PointwiseConv : public Step {
 public:
  explicit PointwiseConv(Source& from) : PointwiseConv{from, Folded::take(from, "weight")} {}

  Range inputs() const override { return {1 + residual_, 2 + residual_}; }
  MapShape shape(const Shapes& in) const override {
    check_channels("pointwise_conv", in[0].channels + (two(in.size()) ? in[1].channels : 0), weights_.weight.inputs());
    if (residual_) check_channels("pointwise_conv's residual", in.back().channels, weights_.weight.outputs());
    for (const MapShape& other : in) check_same_size("pointwise_conv", in[0], other);
    return {in[0].height, in[0].width, weights_.weight.outputs()};
  }
  void run(const Maps& in, const Map& out) const override {
    const bool has_b = two(in.size());
    const PointwiseInputs<float, E> x{
        in[0].data, has_b ? in[1].data : nullptr, in[0].shape.channels, has_b ? in[1].shape.channels : 0};
    const float* residual = residual_ ? in.back().data : nullptr;
    dispatch_activation(act_, [&](auto act) { pointwise_conv<act>(weights_, x, residual, out.data, out.rows()); });
  }
  int64_t row_operations() const override { return operations_of_row(weights_.weight); }
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    return {BlockCut(batch * in[0].pixels(), weights_.weight).operations(weights_.weight)};
  }

 private:
  PointwiseConv(Source& from, const Folded& conv)
      : act_(from.activation()), residual_(from.flag("residual")),
        weights_{conv.pack<E>(conv.outputs, conv.inputs), conv.affine()} {}

  bool two(size_t inputs) const { return inputs == size_t(2 + residual_); }

  int64_t act_, residual_;
  PointwiseWeightsOf<E> weights_;
};

Tokens tokens_of(const MapShape& s, int64_t batch) { return Tokens(batch, s.pixels(), s.channels); }

// A map's norm, with memory for its statistics where they are of samples.
struct Statistics {
  Scratch<float> memory;
  NormedMap<float> map;
  Statistics(const Map& x, bool per_sample)
      : memory(2 * x.batch), map(x.data, tokens_of(x.shape, x.batch), per_sample, per_sample ? memory.data() : nullptr,
                                 per_sample ? memory.data() + x.batch : nullptr) {}
};

// With an output of type Y.
template <typename E, typename Y>
class NormLinear : public Step {
 public:
  explicit NormLinear(Source& from) : NormLinear{from, from.vector(), from.vector(), from.matrix(), from.vector()} {}

  MapShape shape(const Shapes& in) const override {
    check_channels("norm_linear", in[0].channels, weights_.weight.inputs());
    return {in[0].height, in[0].width, weights_.weight.outputs(), !std::is_same_v<Y, float>};
  }
  void run(const Maps& in, const Map& out) const override {
    const Statistics statistics(in[0], per_sample_);
    norm_linear(statistics.map, eps_, weights_, reinterpret_cast<Y*>(out.data));
  }
  int64_t row_operations() const override { return per_sample_ ? 0 : operations_of_row(weights_.weight); }
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    std::vector<Region> all;
    tokens_of(in[0], batch).add_measure_to(all, per_sample_);
    all.push_back(BlockCut(batch * in[0].pixels(), weights_.weight).operations(weights_.weight));
    return all;
  }

 private:
  NormLinear(Source& from, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight, const Tensor& bias)
      : weights_(NormLinearParameters(
            {norm_weight, norm_bias}, "weight", "bias", {weight, OptionalTensor(bias)}, norm_weight.size(0))),
        per_sample_(from.flag("per_sample")), eps_(from.eps()) {}

  NormLinearWeightsOf<E> weights_;
  bool per_sample_;
  double eps_;
};

template <typename E>
class FeedForward : public Step {
 public:
  explicit FeedForward(Source& from)
      : FeedForward{from, from.vector(), from.vector(), from.matrix(), from.vector(), from.matrix(), from.vector()} {}

  MapShape shape(const Shapes& in) const override {
    check_channels("feed_forward", in[0].channels, weights_.second.outputs());
    return in[0];
  }
  void run(const Maps& in, const Map& out) const override {
    const Statistics statistics(in[0], per_sample_);
    feed_forward(statistics.map, eps_, weights_, FeedForwardDropout(), out.data);
  }
  int64_t row_operations() const override {
    return per_sample_ ? 0 : operations_of_row(weights_.first.weight) + operations_of_row(weights_.second);
  }
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    std::vector<Region> all;
    tokens_of(in[0], batch).add_measure_to(all, per_sample_);
    FeedForwardCut(batch * in[0].pixels(), in[0].channels, weights_.second.inputs()).add_to(all, weights_);
    return all;
  }

 private:
  FeedForward(
      Source& from, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& w1, const Tensor& b1,
      const Tensor& w2, const Tensor& b2)
      : weights_(
            NormLinearParameters(
                {norm_weight, norm_bias}, "fc1", "fc1.bias", {w1, OptionalTensor(b1)}, norm_weight.size(0)),
            FloatMatrix("fc2", w2, norm_weight.size(0), w1.size(0)), read_vector("fc2.bias", b2, norm_weight.size(0))),
        per_sample_(from.flag("per_sample")), eps_(from.eps()) {}

  FeedForwardWeightsOf<E> weights_;
  bool per_sample_;
  double eps_;
};

template <typename E>
class SeparableAttention : public Step {
 public:
  explicit SeparableAttention(Source& from)
      : SeparableAttention{from,          from.vector(), from.vector(), from.matrix(),
                           from.vector(), from.matrix(), from.vector()} {}

  MapShape shape(const Shapes& in) const override {
    check_channels("separable_attention", in[0].channels, weights_.out.outputs());
    MVIT3_CHECK(
        in[0].height % patch_height_ == 0 && in[0].width % patch_width_ == 0,
        "separable_attention takes whole patches");
    return in[0];
  }
  void run(const Maps& in, const Map& out) const override {
    const PatchedMap map = patched(in[0].shape, in[0].batch);
    separable_attention(map, eps_, per_sample_, weights_, in[0].data, out.data);
  }
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    return separable_attention_regions(patched(in[0], batch), weights_);
  }

 private:
  PatchedMap patched(const MapShape& s, int64_t batch) const {
    return {batch, s.height, s.width, s.channels, patch_height_, patch_width_};
  }
  SeparableAttention(
      Source& from, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& qkv, const Tensor& qkv_bias,
      const Tensor& w, const Tensor& b)
      : patch_height_(from.patch()), patch_width_(from.patch()), per_sample_(from.flag("per_sample")), eps_(from.eps()),
        weights_(
            parameters(norm_weight, norm_bias, qkv, qkv_bias),
            FloatMatrix("out_proj", w, norm_weight.size(0), norm_weight.size(0)), b) {}

  static NormLinearParameters parameters(
      const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& qkv, const Tensor& bias) {
    check_channels("separable_attention's qkv weight", qkv.size(0), 1 + 2 * norm_weight.size(0));
    return NormLinearParameters(
        {norm_weight, norm_bias}, "qkv", "qkv.bias", {qkv, OptionalTensor(bias)}, norm_weight.size(0));
  }

  int64_t patch_height_, patch_width_;
  bool per_sample_;
  double eps_;
  SeparableAttentionWeightsOf<E> weights_;
};

template <typename E>
class PatchAttention : public Step {
 public:
  explicit PatchAttention(Source& from)
      : heads_(from.integer("num_heads", 1, 1 << 20)), patch_height_(from.patch()), patch_width_(from.patch()) {}

  MapShape shape(const Shapes& in) const override {
    MVIT3_CHECK((in[0].rounded == !std::is_same_v<E, float>), "patch_attention takes a map of norm_qkv");
    MVIT3_CHECK(
        in[0].channels % (3 * heads_) == 0, "patch_attention takes three times ", heads_, " heads, got ",
        in[0].channels, " channels");
    MVIT3_CHECK(
        in[0].height % patch_height_ == 0 && in[0].width % patch_width_ == 0, "patch_attention takes whole patches");
    return {in[0].height, in[0].width, in[0].channels / 3};
  }
  void run(const Maps& in, const Map& out) const override {
    const PatchGroups all = groups(in[0].shape, in[0].batch);
    patch_attention<E, E>(all, Dropout(), reinterpret_cast<const E*>(in[0].data), out.data, nullptr);
  }
  bool takes_rounded() const override { return true; }
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    const PatchGroups all = groups(in[0], batch);
    return {AttentionCut(all).operations(all)};
  }

 private:
  PatchGroups groups(const MapShape& s, int64_t batch) const {
    return {batch, s.height, s.width, heads_, s.channels / 3 / heads_, patch_height_, patch_width_};
  }
  int64_t heads_, patch_height_, patch_width_;
};

// Inputs a, (b). Weights: (outputs, 3, 3, inputs), scale, shift.
template <typename E>
class Conv3x3 : public Step {
 public:
  Conv3x3(Source& from, const Tensor& weight, const Tensor& scale, const Tensor& shift)
      : Conv3x3(from, Folded("conv3x3", weight, scale, shift, 9 * channels(weight))) {}

  static int64_t channels(const Tensor& weight) {
    MVIT3_CHECK(
        weight.dim() == 4 && weight.size(1) == 3 && weight.size(2) == 3 && weight.size(3) >= 1,
        "step conv3x3: weights[0] must have shape (outputs, 3, 3, inputs), got ", text(weight.sizes()));
    return weight.size(3);
  }

  Range inputs() const override { return {1, 2}; }
  MapShape shape(const Shapes& in) const override {
    check_same_size("conv3x3", in[0], in.back());
    check_channels("conv3x3", in[0].channels + (in.size() > 1 ? in[1].channels : 0), weights_.inputs);
    return {weights_.out_size(in[0].height), weights_.out_size(in[0].width), weights_.outputs};
  }
  bool takes_nchw() const override { return weights_.few(); }
  void run(const Maps& in, const Map& out) const override {
    const MapShape& s = in[0].shape;
    const bool two = in.size() > 1;
    const Conv3x3Inputs x{in[0].data,  two ? in[1].data : nullptr,
                          s.channels,  two ? in[1].shape.channels : 0,
                          in[0].batch, s.height,
                          s.width,     in[0].nchw};
    dispatch_activation(act_, [&](auto act) {
      if (by_winograd(s))
        conv3x3_winograd<act>(*winograd_, weights_.affine, x, out.data);
      else
        conv3x3<act>(weights_, x, out.data);
    });
  }
  // Of a dilation all taps count, also those that meet nothing.
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    if (by_winograd(in[0])) return {WinogradTiles{batch, in[0].height, in[0].width}.operations(*winograd_)};
    const int64_t rows = batch * weights_.out_size(in[0].height), width = weights_.out_size(in[0].width);
    return {ConvCut(rows, width, weights_.weight).operations(width, weights_.weight)};
  }

 private:
  Conv3x3(Source& from, const Folded& conv) : weights_(make(conv, from)), act_(from.activation()) {
    if (weights_.stride == 1 && weights_.dilation == 1 && WinogradWeightsOf<E>::pays(conv.outputs, weights_.inputs))
      winograd_.emplace(conv.matrix.data(), conv.outputs, weights_.inputs);
  }

  static Conv3x3WeightsOf<E> make(const Folded& conv, Source& from) {
    const int64_t stride = from.stride(), dilation = from.dilation();
    return Conv3x3WeightsOf<E>(conv.matrix.data(), conv.outputs, conv.inputs / 9, stride, dilation, conv.affine());
  }

  bool by_winograd(const MapShape& s) const { return winograd_ && WinogradWeightsOf<E>::suits(s.height, s.width); }

  Conv3x3WeightsOf<E> weights_;
  std::optional<WinogradWeightsOf<E>> winograd_;
  int64_t act_;
};

template <typename E>
std::unique_ptr<Step> make_conv3x3(Source& from) {
  const Tensor &weight = from.weight(), &scale = from.vector(), &shift = from.vector();
  if (Conv3x3WeightsOf<E>::few(Conv3x3<E>::channels(weight)))
    return std::make_unique<Conv3x3<float>>(from, weight, scale, shift);
  return std::make_unique<Conv3x3<E>>(from, weight, scale, shift);
}

// What the two steps of a norm alone share.
class NormStep : public Step {
 public:
  explicit NormStep(Source& from) : NormStep{from, from.vector(), from.vector()} {}

 protected:
  Vec affine(Vec value, int64_t c) const { return fma(value, load(weight_.data() + c), load(bias_.data() + c)); }

  const int64_t channels_;
  const Scratch<float> weight_, bias_;
  const bool per_sample_;
  const double eps_;

 private:
  NormStep(Source& from, const Tensor& norm_weight, const Tensor& norm_bias)
      : channels_(norm_weight.size(0)), weight_(read_vector("weight", norm_weight, channels_)),
        bias_(read_vector("bias", norm_bias, channels_)), per_sample_(from.flag("per_sample")), eps_(from.eps()) {}
};

class LayerNorm : public NormStep {
 public:
  using NormStep::NormStep;

  MapShape shape(const Shapes& in) const override {
    check_channels("layer_norm", in[0].channels, channels_);
    return in[0];
  }
  void run(const Maps& in, const Map& out) const override {
    const Statistics statistics(in[0], per_sample_);
    statistics.map.measure(eps_);
    for_each_tile(out.rows(), count_parts(out.rows() * channels_), [&](int64_t, int64_t first, int64_t count) {
      const int64_t lanes = lanes_of(channels_);
      float* tile = workspace(kTileRows * lanes);
      statistics.map.normalise(first, count, eps_, tile, lanes);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < channels_; c += kLanes)
          store_some(out.data + (first + r) * channels_ + c, affine(load(tile + r * lanes + c), c), channels_ - c);
    });
  }
  int64_t row_operations() const override { return per_sample_ ? 0 : 3 * channels_; }
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    const int64_t rows = batch * in[0].pixels();
    std::vector<Region> all;
    tokens_of(in[0], batch).add_measure_to(all, per_sample_);
    all.push_back(even_region(rows, count_parts(rows * channels_), 3 * channels_));
    return all;
  }
};

// The mean of a norm's output over height and width. The scale and the shift wait for the mean.
class NormPool : public NormStep {
 public:
  using NormStep::NormStep;

  MapShape shape(const Shapes& in) const override {
    check_channels("norm_pool", in[0].channels, channels_);
    return {1, 1, channels_};
  }
  void run(const Maps& in, const Map& out) const override {
    const Statistics statistics(in[0], per_sample_);
    statistics.map.measure(eps_);
    const int64_t pixels = in[0].shape.pixels(), lanes = lanes_of(channels_), parts = parts_for(out.batch);
    for_each_part(parts, [&](int64_t part) {
      float *sums = workspace((kTileRows + 1) * lanes), *tile = sums + lanes;
      const Range mine = part_range(out.batch, part, parts);
      for (int64_t image = mine.begin; image < mine.end; ++image) {
        std::fill_n(sums, lanes, 0.0f);
        for (int64_t first = 0; first < pixels; first += kTileRows) {
          const int64_t count = std::min(kTileRows, pixels - first);
          statistics.map.normalise(image * pixels + first, count, eps_, tile, lanes);
          for (int64_t c = 0; c < lanes; c += kLanes) {
            Vec sum = 0.0f;
            for (int64_t r = 0; r < count; ++r) sum += load(tile + r * lanes + c);
            store(sums + c, load(sums + c) + sum);
          }
        }
        const Vec factor = float(1.0 / double(pixels));
        for (int64_t c = 0; c < channels_; c += kLanes)
          store_some(out.data + image * channels_ + c, affine(load(sums + c) * factor, c), channels_ - c);
      }
    });
  }
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    std::vector<Region> all;
    tokens_of(in[0], batch).add_measure_to(all, per_sample_);
    all.push_back(even_region(batch, parts_for(batch), 3 * in[0].floats()));
    return all;
  }
};

template <typename E>
std::vector<StepKind> step_kinds() {
  std::vector<StepKind> kinds{
      {"inverted_residual", make<InvertedResidual<E>>},
      {"conv3x3", make_conv3x3<E>},
      {"depthwise_conv", make<DepthwiseConv>},
      {"pointwise_conv", make<PointwiseConv<E>>},
      {"norm_linear", make<NormLinear<E, float>>},
      {"norm_qkv", make<NormLinear<E, E>>},  // of which products alone are made next: written as they read it
      {"feed_forward", make<FeedForward<E>>},
      {"separable_attention", make<SeparableAttention<E>>},
      {"patch_attention", make<PatchAttention<E>>},
      {"layer_norm", make<LayerNorm>},
      {"norm_pool", make<NormPool>},
  };
  for (const StepKind& one : map_step_kinds()) kinds.push_back(one);
  for (const StepKind& one : dense_step_kinds<E>()) kinds.push_back(one);
  return kinds;
}

}  // namespace

std::unique_ptr<Step> make_step(
    const std::string& kind, bool bfloat16, const std::vector<Tensor>& weights, const std::vector<int64_t>& integers,
    const std::vector<double>& numbers) {
  Source from(kind, weights, integers, numbers);
  for (const auto& [name, maker] : bfloat16 ? step_kinds<HalfProducts>() : step_kinds<float>())
    if (kind == name) {
      auto step = maker(from);
      from.check_empty();
      return step;
    }
  MVIT3_CHECK(false, "kind must be a step that the engine knows, got ", kind);
}

}  // namespace mvit3
