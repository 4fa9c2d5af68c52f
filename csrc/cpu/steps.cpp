// The kinds of steps that the inference engine knows: thin wrappers of the ops' forward cores, and the few small maps between them.
#include "conv3x3.h"
#include "depthwise_conv.h"
#include "engine.h"
#include "feed_forward.h"
#include "inverted_residual.h"
#include "norm_linear.h"
#include "patch_attention.h"
#include "pointwise_conv.h"
#include "separable_attention.h"

namespace mvit3 {
namespace {

using Shapes = std::vector<MapShape>;
using Maps = std::vector<Map>;

// What a step is built from, taken one after the other: where several are taken in one call, in a list in braces, which is read from left
// to right.
class Source {
 public:
  Source(const std::string& kind, const std::vector<Tensor>& weights, const std::vector<int64_t>& integers, const std::vector<double>& numbers)
      : kind_(kind), weights_(weights), integers_(integers), numbers_(numbers) {}

  // A weight with as many dimensions as its layout needs.
  const Tensor& weight() { return take(weights_, weight_, "weights"); }
  const Tensor& matrix() { return of_dim(2, weight()); }
  const Tensor& vector() { return of_dim(1, weight()); }
  int64_t integer(const char* what, int64_t least, int64_t most) {
    const int64_t value = take(integers_, integer_, "integers");
    STD_TORCH_CHECK(least <= value && value <= most, "step ", kind_, ": ", what, " must be ", least, " to ", most, ", got ", value);
    return value;
  }
  double eps() {
    const double value = take(numbers_, number_, "numbers");
    check_eps("step " + kind_ + ": eps", value);
    return value;
  }

  int64_t stride() { return integer("stride", 1, 2); }
  int64_t dilation() { return integer("dilation", 1, kMost); }
  int64_t activation() { return integer("act", kIdentity, kRelu); }
  int64_t patch() { return integer("a patch size", 1, kMost); }
  bool flag(const char* what) { return integer(what, 0, 1) == 1; }

  void check_empty() const {
    check_all(weights_, weight_, "weights");
    check_all(integers_, integer_, "integers");
    check_all(numbers_, number_, "numbers");
  }

 private:
  template <typename T>
  const T& take(const std::vector<T>& from, size_t& at, const char* what) {
    STD_TORCH_CHECK(at < from.size(), "step ", kind_, " needs more ", what, ", got ", from.size());
    return from[at++];
  }

  template <typename T>
  void check_all(const std::vector<T>& from, size_t taken, const char* what) const {
    STD_TORCH_CHECK(taken == from.size(), "step ", kind_, " takes ", taken, " ", what, ", got ", from.size());
  }

  const Tensor& of_dim(int64_t dim, const Tensor& weight) const {
    STD_TORCH_CHECK(
        weight.dim() == dim && weight.size(0) >= 1, "step ", kind_, ": weights[", weight_ - 1, "] must have ", dim, " dimensions, got shape ",
        text(weight.sizes()));
    return weight;
  }

  static constexpr int64_t kMost = int64_t(1) << 20;

  const std::string& kind_;
  const std::vector<Tensor>& weights_;
  const std::vector<int64_t>& integers_;
  const std::vector<double>& numbers_;
  size_t weight_ = 0, integer_ = 0, number_ = 0;
};

void check_channels(const char* kind, int64_t got, int64_t wanted) {
  STD_TORCH_CHECK(got == wanted, "step ", kind, " takes ", wanted, " channels, got ", got);
}

void check_same_size(const char* kind, const MapShape& one, const MapShape& other) {
  STD_TORCH_CHECK(
      one.height == other.height && one.width == other.width, "step ", kind, " takes maps of one size, got ", one.height, " x ", one.width, " and ",
      other.height, " x ", other.width);
}

// A convolution's weight, and scale and shift of its outputs: batch norm and bias, already folded together.
struct Folded : ConvNorm {
  int64_t outputs, inputs;

  Folded(const char* name, const Tensor& weight, const Tensor& scale, const Tensor& shift, int64_t inputs)
      : ConvNorm(name, weight, outputs_of(name, weight), inputs, scale, shift, 0), outputs(weight.size(0)), inputs(inputs) {
    std::fill(var.begin(), var.end(), 1.0);
  }
  static Folded take(Source& from, const char* name) {
    const Tensor &weight = from.weight(), &scale = from.vector(), &shift = from.vector();
    return Folded(name, weight, scale, shift, weight.numel() / outputs_of(name, weight));
  }
};

class InvertedResidual : public Step {
 public:
  explicit InvertedResidual(Source& from)
      : InvertedResidual{from, Folded::take(from, "expand"), from.weight(), from.vector(), from.vector(), Folded::take(from, "project")} {}

  MapShape shape(const Shapes& in) const override {
    check_channels("inverted_residual", in[0].channels, weights_.inputs);
    const InvertedResidualShape s = weights_.shape(1, in[0].height, in[0].width);
    return {s.out_height(), s.out_width(), s.outputs};
  }
  void run(const Maps& in, const Map& out) const override {
    inverted_residual_forward(weights_, in[0].data, in[0].batch, in[0].shape.height, in[0].shape.width, out.data);
  }

 private:
  InvertedResidual(Source& from, const Folded& expand, const Tensor& taps, const Tensor& scale, const Tensor& shift, const Folded& project)
      : weights_(make(from, expand, Folded("depthwise", taps, scale, shift, 9), project)) {}

  static InvertedResidualWeights make(Source& from, const Folded& expand, const Folded& depthwise, const Folded& project) {
    check_channels("inverted_residual's depthwise weight", depthwise.outputs, expand.outputs);
    check_channels("inverted_residual's project weight", project.inputs, expand.outputs);
    const int64_t stride = from.stride(), dilation = from.dilation();
    const InvertedResidualShape s{1, 1, 1, expand.inputs, expand.outputs, project.outputs, stride, dilation};
    return InvertedResidualWeights(s, expand, depthwise, project, from.activation());
  }

  InvertedResidualWeights weights_;
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

 private:
  DepthwiseConv(Source& from, const Tensor& weight, const Tensor& scale, const Tensor& shift)
      : channels_(outputs_of("depthwise", weight)), stride_(from.stride()), dilation_(from.dilation()), act_(from.activation()),
        weights_(make(Folded("depthwise", weight, scale, shift, 9))) {}

  static DepthwiseWeights make(const Folded& conv) { return DepthwiseWeights(conv.weight.data(), conv.outputs, conv.affine()); }
  DepthwiseGeometry geometry(int64_t batch, const MapShape& in) const { return {batch, in.height, in.width, channels_, stride_, dilation_}; }

  int64_t channels_, stride_, dilation_, act_;
  DepthwiseWeights weights_;
};

// Inputs a, (b), (residual).
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
    const PointwiseInputs<float> x{in[0].data, has_b ? in[1].data : nullptr, in[0].shape.channels, has_b ? in[1].shape.channels : 0};
    const float* residual = residual_ ? in.back().data : nullptr;
    dispatch_activation(act_, [&](auto act) { pointwise_conv<act>(weights_, x, residual, out.data, out.rows()); });
  }

 private:
  PointwiseConv(Source& from, const Folded& conv)
      : act_(from.activation()), residual_(from.flag("residual")), weights_{conv.pack(conv.outputs, conv.inputs), conv.affine()} {}

  bool two(size_t inputs) const { return inputs == size_t(2 + residual_); }

  int64_t act_, residual_;
  PointwiseWeights weights_;
};

class NormLinear : public Step {
 public:
  explicit NormLinear(Source& from) : NormLinear{from, from.vector(), from.vector(), from.matrix(), from.vector()} {}

  MapShape shape(const Shapes& in) const override {
    check_channels("norm_linear", in[0].channels, weights_.weight.inputs());
    return {in[0].height, in[0].width, weights_.weight.outputs()};
  }
  void run(const Maps& in, const Map& out) const override {
    const Statistics statistics(in[0], per_sample_);
    norm_linear(statistics.map, eps_, weights_, out.data);
  }

  // A map's norm, with memory for its statistics where they are of samples.
  struct Statistics {
    Scratch<float> memory;
    NormedMap<float> map;
    Statistics(const Map& x, bool per_sample)
        : memory(2 * x.batch), map(x.data, Tokens(x.batch, x.shape.pixels(), x.shape.channels), per_sample, per_sample ? memory.data() : nullptr,
                                   per_sample ? memory.data() + x.batch : nullptr) {}
  };

 private:
  NormLinear(Source& from, const Tensor& gamma, const Tensor& beta, const Tensor& weight, const Tensor& bias)
      : weights_(NormLinearParameters(gamma, beta, "weight", weight, "bias", bias, gamma.size(0))), per_sample_(from.flag("per_sample")), eps_(from.eps()) {}

  NormLinearWeights weights_;
  bool per_sample_;
  double eps_;
};

class FeedForward : public Step {
 public:
  explicit FeedForward(Source& from)
      : FeedForward{from, from.vector(), from.vector(), from.matrix(), from.vector(), from.matrix(), from.vector()} {}

  MapShape shape(const Shapes& in) const override {
    check_channels("feed_forward", in[0].channels, weights_.second.outputs());
    return in[0];
  }
  void run(const Maps& in, const Map& out) const override {
    const NormLinear::Statistics statistics(in[0], per_sample_);
    feed_forward(statistics.map, eps_, weights_, FeedForwardDropout(), out.data);
  }

 private:
  FeedForward(Source& from, const Tensor& gamma, const Tensor& beta, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2)
      : weights_(
            NormLinearParameters(gamma, beta, "fc1", w1, "fc1.bias", b1, gamma.size(0)), FloatMatrix("fc2", w2, gamma.size(0), w1.size(0)),
            read_vector("fc2.bias", b2, gamma.size(0))),
        per_sample_(from.flag("per_sample")), eps_(from.eps()) {}

  FeedForwardWeights weights_;
  bool per_sample_;
  double eps_;
};

class SeparableAttention : public Step {
 public:
  explicit SeparableAttention(Source& from)
      : SeparableAttention{from, from.vector(), from.vector(), from.matrix(), from.vector(), from.matrix(), from.vector()} {}

  MapShape shape(const Shapes& in) const override {
    check_channels("separable_attention", in[0].channels, weights_.out.outputs());
    STD_TORCH_CHECK(in[0].height % patch_height_ == 0 && in[0].width % patch_width_ == 0, "separable_attention takes whole patches");
    return in[0];
  }
  void run(const Maps& in, const Map& out) const override {
    const MapShape& s = in[0].shape;
    const PatchedMap map{in[0].batch, s.height, s.width, s.channels, patch_height_, patch_width_};
    separable_attention(map, eps_, per_sample_, weights_, in[0].data, out.data);
  }

 private:
  SeparableAttention(Source& from, const Tensor& gamma, const Tensor& beta, const Tensor& qkv, const Tensor& qkv_bias, const Tensor& w, const Tensor& b)
      : patch_height_(from.patch()), patch_width_(from.patch()), per_sample_(from.flag("per_sample")), eps_(from.eps()),
        weights_(parameters(gamma, beta, qkv, qkv_bias), FloatMatrix("out_proj", w, gamma.size(0), gamma.size(0)), b) {}

  static NormLinearParameters parameters(const Tensor& gamma, const Tensor& beta, const Tensor& qkv, const Tensor& bias) {
    check_channels("separable_attention's qkv weight", qkv.size(0), 1 + 2 * gamma.size(0));
    return NormLinearParameters(gamma, beta, "qkv", qkv, "qkv.bias", bias, gamma.size(0));
  }

  int64_t patch_height_, patch_width_;
  bool per_sample_;
  double eps_;
  SeparableAttentionWeights weights_;
};

class PatchAttention : public Step {
 public:
  explicit PatchAttention(Source& from) : heads_(from.integer("num_heads", 1, 1 << 20)), patch_height_(from.patch()), patch_width_(from.patch()) {}

  MapShape shape(const Shapes& in) const override {
    STD_TORCH_CHECK(in[0].channels % (3 * heads_) == 0, "patch_attention takes three times ", heads_, " heads, got ", in[0].channels, " channels");
    STD_TORCH_CHECK(in[0].height % patch_height_ == 0 && in[0].width % patch_width_ == 0, "patch_attention takes whole patches");
    return {in[0].height, in[0].width, in[0].channels / 3};
  }
  void run(const Maps& in, const Map& out) const override {
    const MapShape& s = in[0].shape;
    const PatchGroups groups{in[0].batch, s.height, s.width, heads_, s.channels / 3 / heads_, patch_height_, patch_width_};
    patch_attention<float>(groups, Dropout(), in[0].data, out.data, nullptr);
  }

 private:
  int64_t heads_, patch_height_, patch_width_;
};

// Inputs a, (b). Weights: (outputs, 3, 3, inputs), scale, shift.
class Conv3x3 : public Step {
 public:
  explicit Conv3x3(Source& from) : Conv3x3{from, from.weight(), from.vector(), from.vector()} {}

  Range inputs() const override { return {1, 2}; }
  MapShape shape(const Shapes& in) const override {
    check_same_size("conv3x3", in[0], in.back());
    check_channels("conv3x3", in[0].channels + (in.size() > 1 ? in[1].channels : 0), weights_.inputs);
    return {weights_.out_size(in[0].height), weights_.out_size(in[0].width), weights_.outputs};
  }
  bool takes_nchw() const override { return Conv3x3Weights::few(weights_.inputs); }
  void run(const Maps& in, const Map& out) const override {
    const MapShape& s = in[0].shape;
    const bool two = in.size() > 1;
    const Conv3x3Inputs x{in[0].data, two ? in[1].data : nullptr, s.channels, two ? in[1].shape.channels : 0, in[0].batch, s.height, s.width, in[0].nchw};
    dispatch_activation(act_, [&](auto act) { conv3x3_forward<act>(weights_, x, out.data); });
  }

 private:
  Conv3x3(Source& from, const Tensor& weight, const Tensor& scale, const Tensor& shift)
      : weights_(make(Folded("conv3x3", weight, scale, shift, 9 * channels(weight)), from.stride())), act_(from.activation()) {}

  static int64_t channels(const Tensor& weight) {
    STD_TORCH_CHECK(
        weight.dim() == 4 && weight.size(1) == 3 && weight.size(2) == 3 && weight.size(3) >= 1,
        "step conv3x3: weights[0] must have shape (outputs, 3, 3, inputs), got ", text(weight.sizes()));
    return weight.size(3);
  }

  static Conv3x3Weights make(const Folded& conv, int64_t stride) {
    return Conv3x3Weights(conv.weight.data(), conv.outputs, conv.inputs / 9, stride, conv.affine());
  }

  Conv3x3Weights weights_;
  int64_t act_;
};

// The mean over height and width.
class GlobalPool : public Step {
 public:
  explicit GlobalPool(Source&) {}
  MapShape shape(const Shapes& in) const override { return {1, 1, in[0].channels}; }
  void run(const Maps& in, const Map& out) const override {
    const int64_t pixels = in[0].shape.pixels(), channels = in[0].shape.channels, parts = count_parts(in[0].rows() * channels);
    const float factor = float(1.0 / double(pixels));
    const int64_t vectors = lanes_of(channels) / kLanes, tasks = in[0].batch * vectors;
    for_each_part(parts, [&](int64_t part) {
      const Range mine = part_range(tasks, part, parts);
      for (int64_t task = mine.begin; task < mine.end; ++task) {
        const int64_t c = task % vectors * kLanes;
        const float* x = in[0].data + task / vectors * pixels * channels + c;
        Vec sum = 0.0f;
        for (int64_t i = 0; i < pixels; ++i) sum += load_some(x + i * channels, channels - c);
        store_some(out.data + task / vectors * channels + c, sum * factor, channels - c);
      }
    });
  }
};

// Bilinear, as torch.nn.functional.interpolate.
void resize(const Map& x, const Map& y, bool align_corners) {
  const int64_t channels = x.shape.channels, rows = y.batch * y.shape.height, parts = count_parts(rows * y.shape.width * channels);
  struct Place {
    int64_t low, high;
    float part;  // of `high`
  };
  const auto place = [&](int64_t i, int64_t from, int64_t to) {
    const float step = align_corners ? (to > 1 ? float(from - 1) / float(to - 1) : 0.0f) : float(from) / float(to);
    const float at = align_corners ? step * float(i) : std::max(step * (float(i) + 0.5f) - 0.5f, 0.0f);
    const int64_t low = std::min(int64_t(at), from - 1);
    return Place{low, std::min(low + 1, from - 1), at - float(low)};
  };
  for_each_part(parts, [&](int64_t part) {
    const Range mine = part_range(rows, part, parts);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const Place v = place(row % y.shape.height, x.shape.height, y.shape.height);
      const float* image = x.data + row / y.shape.height * x.shape.floats();
      for (int64_t column = 0; column < y.shape.width; ++column) {
        const Place h = place(column, x.shape.width, y.shape.width);
        const auto at = [&](int64_t r, int64_t c) { return image + (r * x.shape.width + c) * channels; };
        const float *a = at(v.low, h.low), *b = at(v.low, h.high), *c = at(v.high, h.low), *d = at(v.high, h.high);
        float* out = y.data + (row * y.shape.width + column) * channels;
        for (int64_t i = 0; i < channels; i += kLanes) {
          const int64_t left = channels - i;
          const Vec top = fma(load_some(b + i, left), h.part, load_some(a + i, left) * (1 - h.part));
          const Vec bottom = fma(load_some(d + i, left), h.part, load_some(c + i, left) * (1 - h.part));
          store_some(out + i, fma(bottom, v.part, top * (1 - v.part)), left);
        }
      }
    }
  });
}

// To the smallest size of whole patches.
class ResizeToPatches : public Step {
 public:
  explicit ResizeToPatches(Source& from) : patch_height_(from.patch()), patch_width_(from.patch()), align_corners_(from.flag("align_corners")) {}
  MapShape shape(const Shapes& in) const override { return {round_up(in[0].height, patch_height_), round_up(in[0].width, patch_width_), in[0].channels}; }
  bool is_identity(const Shapes& in) const override { return in[0].height % patch_height_ == 0 && in[0].width % patch_width_ == 0; }
  void run(const Maps& in, const Map& out) const override { resize(in[0], out, align_corners_); }

 private:
  int64_t patch_height_, patch_width_;
  bool align_corners_;
};

// To the size of the second input.
class ResizeBack : public Step {
 public:
  explicit ResizeBack(Source&) {}
  Range inputs() const override { return {2, 2}; }
  MapShape shape(const Shapes& in) const override { return {in[1].height, in[1].width, in[0].channels}; }
  bool is_identity(const Shapes& in) const override { return in[0].height == in[1].height && in[0].width == in[1].width; }
  void run(const Maps& in, const Map& out) const override { resize(in[0], out, false); }
};

class LayerNorm : public Step {
 public:
  explicit LayerNorm(Source& from) : LayerNorm{from, from.vector(), from.vector()} {}

  MapShape shape(const Shapes& in) const override {
    check_channels("layer_norm", in[0].channels, channels_);
    return in[0];
  }
  void run(const Maps& in, const Map& out) const override {
    const NormLinear::Statistics statistics(in[0], per_sample_);
    statistics.map.measure(eps_);
    for_each_tile(out.rows(), count_parts(out.rows() * channels_), [&](int64_t, int64_t first, int64_t count) {
      const int64_t lanes = lanes_of(channels_);
      float* tile = workspace(kTileRows * lanes);
      statistics.map.normalise(first, count, eps_, tile, lanes);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < channels_; c += kLanes)
          store_some(out.data + (first + r) * channels_ + c, fma(load(tile + r * lanes + c), load(gamma_.data() + c), load(beta_.data() + c)), channels_ - c);
    });
  }

 private:
  LayerNorm(Source& from, const Tensor& gamma, const Tensor& beta)
      : channels_(gamma.size(0)), gamma_(read_vector("weight", gamma, channels_)), beta_(read_vector("bias", beta, channels_)),
        per_sample_(from.flag("per_sample")), eps_(from.eps()) {}

  int64_t channels_;
  Scratch<float> gamma_, beta_;
  bool per_sample_;
  double eps_;
};

using Maker = std::unique_ptr<Step> (*)(Source&);

template <typename T>
std::unique_ptr<Step> make(Source& from) {
  return std::make_unique<T>(from);
}

const std::pair<const char*, Maker> kMakers[] = {
    {"inverted_residual", make<InvertedResidual>},
    {"conv3x3", make<Conv3x3>},
    {"depthwise_conv", make<DepthwiseConv>},
    {"pointwise_conv", make<PointwiseConv>},
    {"norm_linear", make<NormLinear>},
    {"feed_forward", make<FeedForward>},
    {"separable_attention", make<SeparableAttention>},
    {"patch_attention", make<PatchAttention>},
    {"global_pool", make<GlobalPool>},
    {"resize_to_patches", make<ResizeToPatches>},
    {"resize_back", make<ResizeBack>},
    {"layer_norm", make<LayerNorm>},
};

}  // namespace

std::unique_ptr<Step> make_step(
    const std::string& kind, const std::vector<Tensor>& weights, const std::vector<int64_t>& integers, const std::vector<double>& numbers) {
  Source from(kind, weights, integers, numbers);
  for (const auto& [name, maker] : kMakers)
    if (kind == name) {
      auto step = maker(from);
      from.check_empty();
      return step;
    }
  STD_TORCH_CHECK(false, "kind must be a step that the engine knows, got ", kind);
}

}  // namespace mvit3
