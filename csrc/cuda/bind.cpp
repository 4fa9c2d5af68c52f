// The CUDA kernels as implementations of PyTorch's registered ops, on the torch stable ABI. Built by the host compiler:
// no CUDA header, and nothing of torch's CUDA libraries, so that the file also loads where torch has none.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "../activations.h"
#include "../op_arguments.h"
#include "arguments.h"

namespace mvit3 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

// torch's current stream of the device. The function is looked up where torch is loaded already: linking to it would
// tie the file to CUDA builds of torch.
void* current_stream(int32_t device) {
  using Getter = int (*)(int32_t, void**);
  static const Getter getter = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  MVIT3_CHECK(getter, "torch has no aoti_torch_get_current_cuda_stream: its CUDA library is not loaded");
  void* stream = nullptr;
  MVIT3_CHECK(getter(device, &stream) == 0, "torch does not tell its current stream");
  return stream;
}

int to_int(const char* name, int64_t value) {
  MVIT3_CHECK(
      value >= 0 && value <= std::numeric_limits<int>::max() / 4, name, " is too large for the CUDA kernels: ", value);
  return int(value);
}

// `t`, contiguous, on the device of x, of this number of elements.
Tensor dense(const char* name, const Tensor& t, const Tensor& x, int64_t count) {
  MVIT3_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " must be on the device of x");
  MVIT3_CHECK(t.numel() == count, name, " must have ", count, " elements, has ", t.numel());
  return torch::stable::contiguous(t);
}

// What a kernel reads, kept alive until its launch.
class Inputs {
 public:
  explicit Inputs(const Tensor& x) : x_(x) {}

  Values values(const char* name, const Tensor& t, int64_t count) {
    const ScalarType dtype = t.scalar_type();
    MVIT3_CHECK(
        dtype == ScalarType::Float || dtype == x_.scalar_type(), name, " must be in float32 or in the dtype of x");
    return {keep(dense(name, t, x_, count)), dtype == ScalarType::Float};
  }
  const float* floats(const char* name, const Tensor& t, int64_t count) {
    MVIT3_CHECK(t.scalar_type() == ScalarType::Float, name, " must be in float32");
    return static_cast<const float*>(keep(dense(name, t, x_, count)));
  }
  const void* map(const char* name, const Tensor& t, int64_t count) {
    MVIT3_CHECK(t.scalar_type() == x_.scalar_type(), name, " must have the dtype of x");
    return keep(dense(name, t, x_, count));
  }

 private:
  const void* keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back().data_ptr();
  }

  const Tensor& x_;
  std::vector<Tensor> kept_;
};

// The geometry of a call; outputs and expanded are 0 where they have no part in it.
Maps maps_of(const Tensor& x, int64_t expanded, int64_t outputs, const StrideArguments& taps) {
  const auto [stride, dilation] = taps;
  MVIT3_CHECK(x.dim() == 4 && x.is_cuda(), "x must be a feature map (B, H, W, C) on a CUDA device");
  MVIT3_CHECK(
      stride == 1 || (stride == 2 && dilation == 1), "the CUDA kernels have stride 1, and stride 2 with dilation 1");
  MVIT3_CHECK(dilation >= 1 && dilation <= 1024, "dilation must be 1 to 1024, got ", dilation);
  const int64_t out_height = (x.size(1) + stride - 1) / stride, out_width = (x.size(2) + stride - 1) / stride;
  return {
      x.size(0),
      to_int("x", x.size(1)),
      to_int("x", x.size(2)),
      to_int("x", x.size(3)),
      to_int("x", out_height),
      to_int("x", out_width),
      to_int("project", outputs),
      to_int("expand", expanded),
      int(dilation)};
}

int64_t pixels(const Maps& m) { return m.batch * m.height * m.width; }
int64_t out_pixels(const Maps& m) { return m.batch * m.out_height * m.out_width; }

bool is_bfloat16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

Tensor empty_map(const Tensor& x, const Maps& m, int64_t channels) {
  return torch::stable::new_empty(x, {m.batch, m.out_height, m.out_width, channels});
}

Tensor empty_floats(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// ---- inverted_residual

Maps block_maps(const Tensor& x, const Tensor& expand, int64_t outputs, const BlockArguments& block) {
  MVIT3_CHECK(
      x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
      "x must be in bfloat16 or float16 for the CUDA kernels");
  return maps_of(x, expand.size(0), outputs, block.taps);
}

// What makes the expanded map, and the taps that filter it.
ExpansionArguments expansion_of(
    Inputs& in, const Maps& m, const Tensor& x, const Tensor& expand, const Norm& norm, const Tensor& depthwise,
    int64_t act) {
  MVIT3_CHECK(0 <= act && act < kActivations, "act must be a position in ACTIVATIONS, got ", act);
  return {
      m,
      in.map("x", x, pixels(m) * m.inputs),
      in.values("expand", expand, int64_t(m.expanded) * m.inputs),
      norm,
      in.values("depthwise", depthwise, int64_t(m.expanded) * 9),
      slice_of(m.inputs),
      int(act),
      {}};
}

// The norm behind a convolution, by its statistics.
Norm fixed_norm(Inputs& in, const FixedConvArguments& conv, int channels) {
  return {
      nullptr,
      nullptr,
      in.values("norm.weight", conv.norm_weight, channels),
      in.values("norm.bias", conv.norm_bias, channels),
      in.values("norm.running_mean", conv.mean, channels),
      in.values("norm.running_var", conv.var, channels),
      float(conv.eps)};
}

// The same as an op takes it in training, its norm folded.
struct ExpansionTensors {
  Tensor x, expand, scale, shift, depthwise;

  ExpansionArguments read(Inputs& in, const Maps& m, int64_t act) const {
    const Norm norm{in.floats("scale", scale, m.expanded), in.floats("shift", shift, m.expanded), {}, {}, {}, {}, 0.0f};
    return expansion_of(in, m, x, expand, norm, depthwise, act);
  }
};

struct FilterCall {
  ExpansionTensors expansion;
  BlockArguments block;
  int64_t parts;
};

int parts_of(int64_t parts) {
  MVIT3_CHECK(1 <= parts && parts <= 65535, "parts must be 1 to 65535, got ", parts);
  return int(parts);
}

// z (B, H', W', expanded), and moments and counts of its parts.
std::array<Tensor, 3> inverted_residual_filter(const FilterCall& call) {
  const Tensor& x = call.expansion.x;
  const Maps m = block_maps(x, call.expansion.expand, 0, call.block);
  MVIT3_CHECK(x.numel() > 0, "x must not be empty");
  const DeviceGuard guard(x.get_device_index());
  Inputs in(x);
  const int parts = parts_of(call.parts);
  const Tensor z = empty_map(x, m, m.expanded), moments = empty_floats(x, {2, parts, m.expanded}),
               counts = empty_floats(x, {parts});
  FilterArguments a{
      call.expansion.read(in, m, call.block.act),
      z.mutable_data_ptr(),
      floats_of(moments),
      floats_of(counts),
      parts,
      nullptr,
      int(call.block.taps.stride),
      is_bfloat16(x)};
  const Tensor workspace = empty_floats(x, {filter_workspace(a)});
  a.workspace = floats_of(workspace);
  filter(a, current_stream(x.get_device_index()));
  return {z, moments, counts};
}

struct InferenceCall {
  Tensor x;
  LayersArguments<FixedConvArguments> layers;
  BlockArguments block;
};

Tensor inverted_residual_inference(const InferenceCall& call) {
  const auto& [x, layers, block] = call;
  const auto& [expand, depthwise, project] = layers;
  const Maps m = block_maps(x, expand.weight, project.weight.size(0), block);
  const Tensor y = empty_map(x, m, m.outputs);
  if (y.numel() == 0) return y;
  const DeviceGuard guard(x.get_device_index());
  Inputs in(x);
  const Norm first = fixed_norm(in, expand, m.expanded);
  InferenceArguments a{
      expansion_of(in, m, x, expand.weight, first, depthwise.weight, block.act),
      fixed_norm(in, depthwise, m.expanded),
      in.values("project", project.weight, int64_t(m.outputs) * m.expanded),
      fixed_norm(in, project, m.outputs),
      y.mutable_data_ptr(),
      nullptr,
      block.taps.stride == 1 && m.inputs == m.outputs,
      int(block.taps.stride),
      is_bfloat16(x)};
  const Tensor workspace = empty_floats(x, {inference_workspace(a)});
  a.workspace = floats_of(workspace);
  inference(a, current_stream(x.get_device_index()));
  return y;
}

// From the gradient dp of the projection on: what BackwardArguments says.
struct FilterBackwardCall {
  Tensor dp, z, part, project, x, mean, covariance;
  FixedConvArguments expand, depthwise;
  BlockArguments block;
};

std::array<Tensor, 11> inverted_residual_filter_backward(const FilterBackwardCall& call) {
  const auto& [dp, z, part, project, x, mean, covariance, expand, depthwise, block] = call;
  const Maps m = block_maps(x, expand.weight, project.size(0), block);
  MVIT3_CHECK(x.numel() > 0 && m.outputs > 0, "x and dp must not be empty");
  const DeviceGuard guard(x.get_device_index());
  Inputs in(x);
  const bool wide = m.inputs > kMostGradientInputs;
  const auto map = [&x = x](bool wanted, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return wanted ? torch::stable::new_empty(x, sizes) : torch::stable::new_empty(x, {0});
  };
  const auto floats = [&](bool wanted, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return wanted ? empty_floats(x, sizes) : empty_floats(x, {0});
  };
  const Tensor dx = map(!wide, x.sizes()), gradient = map(wide, {m.batch, m.height, m.width, m.expanded}),
               scaled = map(wide, {m.expanded, m.inputs}), correction = floats(!wide, {2, m.expanded}),
               dexpand = floats(!wide, expand.weight.sizes()), dfirst_weight = floats(!wide, {m.expanded}),
               dfirst_bias = floats(!wide, {m.expanded}), dtaps = floats(true, {m.expanded, 1, 3, 3}),
               dmiddle_weight = floats(true, {m.expanded}), dmiddle_bias = floats(true, {m.expanded}),
               dproject = floats(true, project.sizes());
  const int parts = parts_of(part.size(0));
  BackwardArguments a{
      expansion_of(in, m, x, expand.weight, fixed_norm(in, expand, m.expanded), depthwise.weight, block.act),
      in.map("dp", dp, out_pixels(m) * m.outputs),
      in.map("z", z, out_pixels(m) * m.expanded),
      in.values("project", project, int64_t(m.outputs) * m.expanded),
      fixed_norm(in, depthwise, m.expanded),
      in.floats("part", part, int64_t(parts) * (m.outputs + 2) * m.expanded),
      parts,
      in.floats("mean", mean, m.inputs),
      in.floats("covariance", covariance, int64_t(m.inputs) * m.inputs),
      dx.mutable_data_ptr(),
      gradient.mutable_data_ptr(),
      scaled.mutable_data_ptr(),
      floats_of(correction),
      floats_of(dexpand),
      floats_of(dfirst_weight),
      floats_of(dfirst_bias),
      floats_of(dtaps),
      floats_of(dmiddle_weight),
      floats_of(dmiddle_bias),
      floats_of(dproject),
      nullptr,
      int(block.taps.stride),
      is_bfloat16(x)};
  const Tensor workspace = empty_floats(x, {backward_workspace(a)});
  a.workspace = floats_of(workspace);
  backward(a, current_stream(x.get_device_index()));
  return {dx,          gradient, scaled,         correction,   dexpand, dfirst_weight,
          dfirst_bias, dtaps,    dmiddle_weight, dmiddle_bias, dproject};
}

// ---- depthwise_conv

DepthwiseArguments depthwise_arguments(
    Inputs& in, const Tensor& x, const Tensor& weight, const StrideArguments& geometry) {
  DepthwiseArguments a{};
  a.maps = maps_of(x, 0, 0, geometry);
  // Taps that reach beyond the map reach no further with a larger dilation.
  a.maps.dilation = std::min(a.maps.dilation, std::max({a.maps.height, a.maps.width, 1}));
  const ScalarType dtype = x.scalar_type();
  MVIT3_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "x must be in float32, bfloat16 or float16 for the CUDA kernels");
  a.type = dtype == ScalarType::Float ? Type::kFloat : dtype == ScalarType::BFloat16 ? Type::kBFloat16 : Type::kFloat16;
  a.weight = in.values("weight", weight, int64_t(a.maps.inputs) * 9);
  a.x = in.map("x", x, pixels(a.maps) * a.maps.inputs);
  a.stride = int(geometry.stride);
  return a;
}

struct DepthwiseFilterCall {
  Tensor x, weight;
  StrideArguments geometry;
  int64_t parts;
};

// z, and moments and counts of its parts.
std::array<Tensor, 3> depthwise_conv_filter(const DepthwiseFilterCall& call) {
  const Tensor& x = call.x;
  Inputs in(x);
  DepthwiseArguments a = depthwise_arguments(in, x, call.weight, call.geometry);
  const DeviceGuard guard(x.get_device_index());
  a.parts = parts_of(call.parts);
  const Tensor z = empty_map(x, a.maps, a.maps.inputs);
  Tensor moments = empty_floats(x, {2, a.parts, a.maps.inputs}), counts = empty_floats(x, {a.parts});
  if (z.numel() == 0) return {z, torch::stable::zero_(moments), torch::stable::zero_(counts)};
  a.z = z.mutable_data_ptr();
  a.moments = floats_of(moments);
  a.counts = floats_of(counts);
  depthwise_filter(a, current_stream(x.get_device_index()));
  return {z, moments, counts};
}

struct DepthwiseBackwardCall {
  Tensor dz, x, weight;
  StrideArguments geometry;
};

// The gradients of x and of the weight.
std::array<Tensor, 2> depthwise_conv_filter_backward(const DepthwiseBackwardCall& call) {
  const Tensor& x = call.x;
  Inputs in(x);
  DepthwiseArguments a = depthwise_arguments(in, x, call.weight, call.geometry);
  const DeviceGuard guard(x.get_device_index());
  a.dz = in.map("dz", call.dz, out_pixels(a.maps) * a.maps.inputs);
  const Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = torch::stable::new_empty(call.weight, call.weight.sizes());
  if (x.numel() == 0) return {dx, torch::stable::zero_(dweight)};
  a.dx = dx.mutable_data_ptr();
  a.dweight = dweight.mutable_data_ptr();
  const Tensor workspace = empty_floats(x, {depthwise_backward_workspace(a)});
  a.workspace = floats_of(workspace);
  depthwise_backward(a, current_stream(x.get_device_index()));
  return {dx, dweight};
}

STABLE_TORCH_LIBRARY_IMPL(mvit3, CUDA, m) {
  m.impl("depthwise_conv_filter", boxed<depthwise_conv_filter>);
  m.impl("depthwise_conv_filter_backward", boxed<depthwise_conv_filter_backward>);
  m.impl("inverted_residual_filter", boxed<inverted_residual_filter>);
  m.impl("inverted_residual_inference", boxed<inverted_residual_inference>);
  m.impl("inverted_residual_filter_backward", boxed<inverted_residual_filter_backward>);
}

}  // namespace
}  // namespace mvit3
