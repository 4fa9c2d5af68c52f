// inverted_residual: 1x1 expansion, depth-wise 3x3, 1x1 projection, each with batch normalisation. Meaning:
// mvit3_kernels/ops/inverted_residual/reference.py. This file reads the arguments of the ops and allocates their
// results.

#include "../op_arguments.h"
#include "inverted_residual_training.h"

namespace mvit3 {
namespace {

using inverted_residual::Block;
using inverted_residual::Gradients;
using inverted_residual::Kept;
using inverted_residual::NormGradients;

ConvNorm read(const std::string& name, const ConvArguments& a, int64_t outputs, int64_t inputs) {
  return ConvNorm(name, a.weight, outputs, inputs, a.norm_weight, a.norm_bias, a.eps);
}

ConvNorm read(const std::string& name, const FixedConvArguments& a, int64_t outputs, int64_t inputs) {
  ConvNorm conv(name, a.weight, outputs, inputs, a.norm_weight, a.norm_bias, a.eps);
  conv.read_statistics(name + "_", a.mean, a.var);
  return conv;
}

template <typename Conv>
Block read_block(const Tensor& x, const LayersArguments<Conv>& layers, const BlockArguments& block) {
  check_map("x", x);
  check_pixels("x", x.size(1), x.size(2));
  block.taps.check();
  const int64_t inputs = x.size(3), expanded = outputs_of("expand", layers.expand.weight),
                outputs = outputs_of("project", layers.project.weight);
  return {
      {x.size(0), x.size(1), x.size(2), inputs, expanded, outputs, block.taps.stride,
       nearest_dilation(block.taps.dilation, x.size(1), x.size(2))},
      read("expand", layers.expand, expanded, inputs),
      read("depthwise", layers.depthwise, expanded, 9),
      read("project", layers.project, outputs, expanded)};
}

Tensor empty_map(const Tensor& x, const InvertedResidualShape& s, int64_t channels) {
  return torch::stable::new_empty(x, {s.batch, s.out_height(), s.out_width(), channels});
}

struct InferenceArguments {
  Tensor x;
  LayersArguments<FixedConvArguments> layers;
  BlockArguments block;
};

Tensor inverted_residual_inference(const InferenceArguments& a) {
  const Block b = read_block(a.x, a.layers, a.block);
  const InvertedResidualShape& s = b.shape;
  const Tensor dense = torch::stable::contiguous(a.x);
  const Tensor y = empty_map(dense, s, s.outputs);
  dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    const InvertedResidualWeightsOf<Multiplied<T>> weights(s, b.expand, b.depthwise, b.project, a.block.act);
    evaluate_inverted_residual(weights, data_of<T>(dense), s.batch, s.height, s.width, mutable_data_of<T>(y));
  });
  return y;
}

// With `store` the expanded map e is kept, else the moments of x.
struct ForwardArguments {
  Tensor x;
  LayersArguments<ConvArguments> layers;
  BlockArguments block;
  bool store;
};

// y; mean and variance of the three convolutions; then what backward needs: e or nothing, z, p, mean and covariance of
// x or nothing.
std::array<Tensor, 12> inverted_residual_forward(const ForwardArguments& a) {
  Block b = read_block(a.x, a.layers, a.block);
  const InvertedResidualShape& s = b.shape;
  MVIT3_CHECK(a.x.numel() > 0, "x must not be empty");
  const Tensor dense = torch::stable::contiguous(a.x);
  const Tensor y = new_output(empty_map(dense, s, s.outputs)), p = new_output(y),
               z = new_output(empty_map(dense, s, s.expanded));
  const Tensor e = a.store ? new_output(torch::stable::new_empty(dense, {s.batch, s.height, s.width, s.expanded}))
                           : torch::stable::new_empty(dense, {0});
  const int64_t moments = a.store ? 0 : s.inputs;
  const Tensor mean = torch::stable::new_empty(dense, {moments}, ScalarType::Float);
  const Tensor covariance = torch::stable::new_empty(dense, {moments, moments}, ScalarType::Double);
  dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    const Kept<T> kept{
        mutable_data_of<T>(e), mutable_data_of<T>(z), mutable_data_of<T>(p), mutable_data_of<float>(mean),
        mutable_data_of<double>(covariance)};
    inverted_residual::forward(b, a.block.act, data_of<T>(dense), mutable_data_of<T>(y), kept);
  });
  const auto channels = [&](const Values& v) { return write_channels(v, mean); };
  return {
      y,
      channels(b.expand.mean),
      channels(b.expand.var),
      channels(b.depthwise.mean),
      channels(b.depthwise.var),
      channels(b.project.mean),
      channels(b.project.var),
      e,
      z,
      p,
      mean,
      covariance};
}

// What forward kept, with names as above.
struct KeptArguments {
  Tensor e, z, p, mean, covariance;

  bool stored() const { return e.numel() > 0; }

  KeptArguments checked(const Tensor& x, const InvertedResidualShape& s) const {
    const auto map = [&](int64_t height, int64_t width, int64_t channels) {
      return std::vector<int64_t>{s.batch, height, width, channels};
    };
    const int64_t moments = stored() ? 0 : s.inputs;
    return {
        contiguous_map("e", e, x, stored() ? map(s.height, s.width, s.expanded) : std::vector<int64_t>{0}),
        contiguous_map("z", z, x, map(s.out_height(), s.out_width(), s.expanded)),
        contiguous_map("p", p, x, map(s.out_height(), s.out_width(), s.outputs)),
        contiguous_kept("mean", mean, {moments}),
        contiguous_kept("covariance", covariance, {moments, moments}, ScalarType::Double)};
  }

  template <typename T>
  Kept<T> data() const {
    return {
        mutable_data_of<T>(e), mutable_data_of<T>(z), mutable_data_of<T>(p), mutable_data_of<float>(mean),
        mutable_data_of<double>(covariance)};
  }
};

struct BackwardArguments {
  Tensor dy, x;
  LayersArguments<FixedConvArguments> layers;
  KeptArguments kept;
  BlockArguments block;
};

// Gradients of x, then of weight, norm weight and norm bias of the three convolutions.
std::array<Tensor, 10> inverted_residual_backward(const BackwardArguments& a) {
  const Block b = read_block(a.x, a.layers, a.block);
  const InvertedResidualShape& s = b.shape;
  MVIT3_CHECK(a.x.numel() > 0, "x must not be empty");
  const Tensor x = torch::stable::contiguous(a.x),
               dy = contiguous_map("dy", a.dy, a.x, {s.batch, s.out_height(), s.out_width(), s.outputs});
  const KeptArguments kept = a.kept.checked(a.x, s);
  const Tensor dx = new_output(x), of_z = new_output(kept.z), of_e = kept.stored() ? new_output(kept.e) : kept.e;
  const auto& [expand, depthwise, project] = a.layers;
  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  Gradients out{like(expand.weight), like(depthwise.weight), like(project.weight), {}, {}};
  dispatch_dtype("x", x, [&](auto type) {
    using T = decltype(type);
    const NormGradients<T> memory{mutable_data_of<T>(of_e), mutable_data_of<T>(of_z)};
    inverted_residual::backward(
        b, a.block.act, data_of<T>(dy), data_of<T>(x), kept.data<T>(), memory, mutable_data_of<T>(dx), out);
  });
  return {
      dx,
      out.expand,
      write_channels(out.norm_weights[0], expand.norm_weight),
      write_channels(out.norm_biases[0], expand.norm_bias),
      out.depthwise,
      write_channels(out.norm_weights[1], depthwise.norm_weight),
      write_channels(out.norm_biases[1], depthwise.norm_bias),
      out.project,
      write_channels(out.norm_weights[2], project.norm_weight),
      write_channels(out.norm_biases[2], project.norm_bias)};
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("inverted_residual_inference", mvit3::boxed<mvit3::inverted_residual_inference>);
  m.impl("inverted_residual_forward", mvit3::boxed<mvit3::inverted_residual_forward>);
  m.impl("inverted_residual_backward", mvit3::boxed<mvit3::inverted_residual_backward>);
}
