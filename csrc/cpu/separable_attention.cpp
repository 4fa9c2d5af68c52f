// separable_attention: reads the arguments of the ops and allocates their results. Meaning:
// mvit3_kernels/ops/separable_attention/reference.py.

#include "separable_attention_training.h"

namespace mvit3 {
namespace {

PatchedMap map_of(const Tensor& x, const PatchArguments& patch) {
  check_map("x", x);
  check_patches("x", x, patch.height, patch.width);
  return {x.size(0), x.size(1), x.size(2), x.size(3), patch.height, patch.width};
}

// The two linear maps: `qkv` (1 + 2D, D), which has the score, the keys and the values, and `out` (D, D).
struct LinearsArguments {
  LinearArguments qkv, out;

  NormLinearParameters read_qkv(const PatchedMap& map, const LayerNormArguments& norm) const {
    MVIT3_CHECK(
        outputs_of("qkv_weight", qkv.weight) == 1 + 2 * map.channels, "qkv_weight must have 1 + 2D rows for the ",
        map.channels, " channels D of x, got shape ", text(qkv.weight.sizes()));
    return NormLinearParameters(norm, "qkv_weight", "qkv_bias", qkv, map.channels);
  }
  FloatMatrix read_out(const PatchedMap& map) const {
    return FloatMatrix("out_weight", out.weight, map.channels, map.channels);
  }
};

struct InferenceArguments {
  Tensor x;
  LayerNormArguments norm;
  double eps;
  bool per_sample;
  LinearsArguments linears;
  PatchArguments patch;
};

Tensor separable_attention_inference(const InferenceArguments& a) {
  const PatchedMap map = map_of(a.x, a.patch);
  check_eps("eps", a.eps);
  const Tensor dense = torch::stable::contiguous(a.x), y = new_output(dense);
  const FloatMatrix out = a.linears.read_out(map);
  const NormLinearParameters qkv = a.linears.read_qkv(map, a.norm);
  if (y.numel() == 0) return y;
  dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    const SeparableAttentionWeights<T> weights(qkv, out, a.linears.out.bias);
    separable_attention(map, a.eps, a.per_sample, weights, data_of<T>(dense), mutable_data_of<T>(y));
  });
  return y;
}

// What the forward pass keeps, as `SeparableAttentionKept` names it.
struct KeptArguments {
  NormStatistics statistics;
  Tensor scores, pooled, context;

  static KeptArguments empty(const Tensor& x, const PatchedMap& map, bool per_sample) {
    const auto floats = [&](int64_t size) {
      return torch::stable::new_empty(x, {map.samples, map.positions(), size}, ScalarType::Float);
    };
    return {
        NormStatistics::empty(x, map.norms(per_sample)), floats(map.patches()), floats(map.lanes()),
        floats(map.lanes())};
  }
  KeptArguments checked(const PatchedMap& map, bool per_sample) const {
    const auto floats = [&](const char* name, const Tensor& t, int64_t size) {
      return contiguous_kept(name, t, {map.samples, map.positions(), size});
    };
    return {
        statistics.checked(map.norms(per_sample)), floats("scores", scores, map.patches()),
        floats("pooled", pooled, map.lanes()), floats("context", context, map.lanes())};
  }
  SeparableAttentionKept data() const {
    return {
        mutable_data_of<float>(statistics.mean), mutable_data_of<float>(statistics.rstd),
        mutable_data_of<float>(scores), mutable_data_of<float>(pooled), mutable_data_of<float>(context)};
  }
};

struct ForwardArguments {
  Tensor x;
  LayerNormArguments norm;
  double eps;
  bool per_sample;
  LinearsArguments linears;
  PatchArguments patch;
  DropoutArguments dropout;
};

// y, and what `SeparableAttentionKept` names.
std::array<Tensor, 6> separable_attention_forward(const ForwardArguments& a) {
  const PatchedMap map = map_of(a.x, a.patch);
  check_eps("eps", a.eps);
  const Tensor dense = torch::stable::contiguous(a.x), y = new_output(dense);
  const FloatMatrix out = a.linears.read_out(map);
  const NormLinearParameters qkv = a.linears.read_qkv(map, a.norm);
  const SeparableAttentionDropout dropout(a.dropout);
  const KeptArguments kept = KeptArguments::empty(dense, map, a.per_sample);
  if (y.numel() > 0)
    dispatch_dtype("x", dense, [&](auto type) {
      using T = decltype(type);
      const SeparableAttentionWeights<T> weights(qkv, out, a.linears.out.bias);
      separable_attention(
          map, a.eps, a.per_sample, weights, dropout, data_of<T>(dense), mutable_data_of<T>(y), kept.data());
    });
  return {y, kept.statistics.mean, kept.statistics.rstd, kept.scores, kept.pooled, kept.context};
}

struct BackwardArguments {
  Tensor dy, x;
  LayerNormArguments norm;
  bool per_sample;
  LinearsArguments linears;
  KeptArguments kept;
  PatchArguments patch;
  DropoutArguments dropout;
};

// Gradients of x, norm weight and bias, qkv weight and bias, out_proj weight and bias (empty without a bias).
std::array<Tensor, 7> separable_attention_backward(const BackwardArguments& a) {
  const PatchedMap map = map_of(a.x, a.patch);
  const Tensor dense = torch::stable::contiguous(a.x), dy = contiguous_like("dy", a.dy, a.x), dx = new_output(dense);
  const KeptArguments kept = a.kept.checked(map, a.per_sample);
  const NormLinearParameters qkv = a.linears.read_qkv(map, a.norm);
  const FloatMatrix out = a.linears.read_out(map);
  read_vector("out_bias", a.linears.out.bias, map.channels);  // only its gradient is needed, which has its shape
  const SeparableAttentionDropout dropout(a.dropout);
  separable::Sums sums = dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    return separable::backward(
        map, a.per_sample, qkv, out, dropout, data_of<T>(dy), data_of<T>(dense), mutable_data_of<T>(dx), kept.data());
  });
  sums.finish();
  const Values dqkv_bias = add_up(sums.qkv_bias, 1 + 2 * map.channels), dout_bias = add_up(sums.out_bias, map.channels);
  const auto& [qkv_weight, qkv_bias] = a.linears.qkv;
  const auto& [out_weight, out_bias] = a.linears.out;
  const NormLinearGradients gradients(qkv, sums.qkv, dqkv_bias, qkv_weight);
  return {
      dx,
      write_channels(gradients.dnorm_weight, a.norm.weight),
      write_channels(gradients.dnorm_bias, a.norm.bias),
      gradients.dweight,
      write_bias(dqkv_bias, qkv_bias, qkv_weight),
      write_weight("out_weight", sums.out, map.channels, map.channels, out_weight),
      write_bias(dout_bias, out_bias, out_weight)};
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("separable_attention_inference", mvit3::boxed<mvit3::separable_attention_inference>);
  m.impl("separable_attention_forward", mvit3::boxed<mvit3::separable_attention_forward>);
  m.impl("separable_attention_backward", mvit3::boxed<mvit3::separable_attention_backward>);
}
