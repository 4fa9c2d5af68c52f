// The CUDA kernels as implementations of PyTorch's registered ops, on the torch stable ABI. Built by the host compiler: no CUDA header, and
// nothing of torch's CUDA libraries, so that the file also loads where torch has none.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"

namespace mvit3 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// torch's current stream of the device. The function is looked up where torch is loaded already: linking to it would tie the file to CUDA
// builds of torch.
void* current_stream(int32_t device) {
  using Getter = int (*)(int32_t, void**);
  static const Getter getter = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter, "torch has no aoti_torch_get_current_cuda_stream: its CUDA library is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "torch does not tell its current stream");
  return stream;
}

int to_int(const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= std::numeric_limits<int>::max() / 4, name, " is too large for the CUDA kernels: ", value);
  return int(value);
}

// `t`, contiguous, on the device of x, of this number of elements.
Tensor dense(const char* name, const Tensor& t, const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " must be on the device of x");
  STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " elements, has ", t.numel());
  return torch::stable::contiguous(t);
}

// What a kernel reads, kept alive until its launch.
class Inputs {
 public:
  explicit Inputs(const Tensor& x) : x_(x) {}

  Values values(const char* name, const Tensor& t, int64_t count) {
    const ScalarType dtype = t.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == x_.scalar_type(), name, " must be in float32 or in the dtype of x");
    return {keep(dense(name, t, x_, count)), dtype == ScalarType::Float};
  }
  const float* floats(const char* name, const Tensor& t, int64_t count) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be in float32");
    return static_cast<const float*>(keep(dense(name, t, x_, count)));
  }
  const void* map(const char* name, const Tensor& t, int64_t count) {
    STD_TORCH_CHECK(t.scalar_type() == x_.scalar_type(), name, " must have the dtype of x");
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

// The geometry of a call; outputs and wide 0 where they have no part in it.
Maps maps_of(const Tensor& x, int64_t wide, int64_t outputs, int64_t stride, int64_t dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cuda(), "x must be a feature map (B, H, W, C) on a CUDA device");
  STD_TORCH_CHECK(stride == 1 || (stride == 2 && dilation == 1), "the CUDA kernels have stride 1, and stride 2 with dilation 1");
  STD_TORCH_CHECK(dilation >= 1 && dilation <= 1024, "dilation must be 1 to 1024, got ", dilation);
  const auto out = [&](int64_t size) { return to_int("x", (size + stride - 1) / stride); };
  return {x.size(0),          to_int("x", x.size(1)), to_int("x", x.size(2)),     to_int("x", x.size(3)),
          out(x.size(1)),     out(x.size(2)),         to_int("project", outputs), to_int("expand", wide),
          int(dilation)};
}

Maps maps_of(const Tensor& x, const Tensor& expand, int64_t outputs, int64_t stride, int64_t dilation) {
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
      "x must be in bfloat16 or float16 for the CUDA kernels");
  return maps_of(x, expand.size(0), outputs, stride, dilation);
}

int64_t pixels(const Maps& m) { return m.batch * m.height * m.width; }
int64_t out_pixels(const Maps& m) { return m.batch * m.out_height * m.out_width; }

ExpansionArguments front_of(
    Inputs& in, const Maps& m, const Tensor& x, const Tensor& expand, const Norm& norm, const Tensor& depthwise, int64_t act) {
  STD_TORCH_CHECK(act >= 0 && act <= 2, "act must be a position in ACTIVATIONS, got ", act);
  return {m, in.map("x", x, pixels(m) * m.inputs), in.values("expand", expand, int64_t(m.wide) * m.inputs), norm,
          in.values("depthwise", depthwise, int64_t(m.wide) * 9), slice_of(m.inputs), int(act), {}};
}

bool is_bfloat16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

Tensor empty_map(const Tensor& x, const Maps& m, int64_t channels) {
  return torch::stable::new_empty(x, {m.batch, m.out_height, m.out_width, channels});
}

Tensor empty_floats(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> inverted_residual_filter(
    const Tensor& x, const Tensor& expand, const Tensor& scale, const Tensor& shift, const Tensor& depthwise, int64_t stride,
    int64_t dilation, int64_t act) {
  const Maps m = maps_of(x, expand, 0, stride, dilation);
  STD_TORCH_CHECK(x.numel() > 0, "x must not be empty");
  const DeviceGuard guard(x.get_device_index());
  Inputs in(x);
  const Norm norm{in.floats("scale", scale, m.wide), in.floats("shift", shift, m.wide), {}, {}, {}, {}, 0.0f};
  const Tensor z = empty_map(x, m, m.wide), mean = empty_floats(x, {m.wide}), var = empty_floats(x, {m.wide});
  FilterArguments a{front_of(in, m, x, expand, norm, depthwise, act), z.mutable_data_ptr(), floats_of(mean), floats_of(var), nullptr,
                    int(stride), is_bfloat16(x)};
  const Tensor workspace = empty_floats(x, {filter_workspace(a)});
  a.workspace = floats_of(workspace);
  filter(a, current_stream(x.get_device_index()));
  return {z, mean, var};
}

Tensor inverted_residual_inference(
    const Tensor& x,
    const Tensor& expand, const Tensor& expand_weight, const Tensor& expand_bias,
    const Tensor& expand_mean, const Tensor& expand_var, double expand_eps,
    const Tensor& depthwise, const Tensor& depthwise_weight, const Tensor& depthwise_bias,
    const Tensor& depthwise_mean, const Tensor& depthwise_var, double depthwise_eps,
    const Tensor& project, const Tensor& project_weight, const Tensor& project_bias,
    const Tensor& project_mean, const Tensor& project_var, double project_eps,
    int64_t stride, int64_t dilation, int64_t act) {
  const Maps m = maps_of(x, expand, project.size(0), stride, dilation);
  const Tensor y = empty_map(x, m, m.outputs);
  if (y.numel() == 0) return y;
  const DeviceGuard guard(x.get_device_index());
  Inputs in(x);
  const auto norm = [&](const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var, double eps, int channels) {
    return Norm{nullptr, nullptr, in.values("norm.weight", weight, channels), in.values("norm.bias", bias, channels),
                in.values("norm.running_mean", mean, channels), in.values("norm.running_var", var, channels), float(eps)};
  };
  const Norm first = norm(expand_weight, expand_bias, expand_mean, expand_var, expand_eps, m.wide);
  InferenceArguments a{
      front_of(in, m, x, expand, first, depthwise, act),
      norm(depthwise_weight, depthwise_bias, depthwise_mean, depthwise_var, depthwise_eps, m.wide),
      in.values("project", project, int64_t(m.outputs) * m.wide),
      norm(project_weight, project_bias, project_mean, project_var, project_eps, m.outputs),
      y.mutable_data_ptr(), nullptr, stride == 1 && m.inputs == m.outputs, int(stride), is_bfloat16(x)};
  const Tensor workspace = empty_floats(x, {inference_workspace(a)});
  a.workspace = floats_of(workspace);
  inference(a, current_stream(x.get_device_index()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> inverted_residual_filter_backward(
    const Tensor& dp, const Tensor& project, const Tensor& z, const Tensor& z_scale, const Tensor& z_shift, const Tensor& c0,
    const Tensor& c1, const Tensor& c2, const Tensor& x, const Tensor& expand, const Tensor& scale, const Tensor& shift,
    const Tensor& depthwise, int64_t stride, int64_t dilation, int64_t act) {
  const Maps m = maps_of(x, expand, project.size(0), stride, dilation);
  STD_TORCH_CHECK(x.numel() > 0 && m.outputs > 0, "x and dp must not be empty");
  const DeviceGuard guard(x.get_device_index());
  Inputs in(x);
  const Norm norm{in.floats("scale", scale, m.wide), in.floats("shift", shift, m.wide), {}, {}, {}, {}, 0.0f};
  const Tensor dx = torch::stable::new_empty(x, x.sizes()), n1 = empty_floats(x, {m.wide, m.inputs}), g1 = empty_floats(x, {m.wide});
  const Tensor dtaps = empty_floats(x, {m.wide, 1, 3, 3});
  BackwardArguments a{
      front_of(in, m, x, expand, norm, depthwise, act), in.map("dp", dp, out_pixels(m) * m.outputs), in.map("z", z, out_pixels(m) * m.wide),
      in.values("project", project, int64_t(m.outputs) * m.wide), in.floats("z_scale", z_scale, m.wide),
      in.floats("z_shift", z_shift, m.wide), in.floats("c0", c0, m.wide), in.floats("c1", c1, m.wide), in.floats("c2", c2, m.wide),
      dx.mutable_data_ptr(), floats_of(n1), floats_of(g1), floats_of(dtaps), nullptr, int(stride), is_bfloat16(x)};
  const Tensor workspace = empty_floats(x, {backward_workspace(a)});
  a.workspace = floats_of(workspace);
  backward(a, current_stream(x.get_device_index()));
  return {dx, n1, g1, dtaps};
}

DepthwiseArguments depthwise_arguments(Inputs& in, const Tensor& x, const Tensor& weight, int64_t stride, int64_t dilation) {
  Maps m = maps_of(x, 0, 0, stride, dilation);
  m.dilation = std::min(m.dilation, std::max({m.height, m.width, 1}));  // taps that reach beyond the map reach no further with a larger one
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "x must be in float32, bfloat16 or float16 for the CUDA kernels");
  const Type type = dtype == ScalarType::Float ? Type::kFloat : dtype == ScalarType::BFloat16 ? Type::kBFloat16 : Type::kFloat16;
  const Values taps = in.values("weight", weight, int64_t(m.inputs) * 9);
  return {m, in.map("x", x, pixels(m) * m.inputs), nullptr, taps, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, int(stride), type};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv_filter(const Tensor& x, const Tensor& weight, int64_t stride, int64_t dilation) {
  Inputs in(x);
  DepthwiseArguments a = depthwise_arguments(in, x, weight, stride, dilation);
  const DeviceGuard guard(x.get_device_index());
  const Tensor z = empty_map(x, a.maps, a.maps.inputs);
  Tensor mean = empty_floats(x, {a.maps.inputs}), var = empty_floats(x, {a.maps.inputs});
  if (z.numel() == 0) return {z, torch::stable::zero_(mean), torch::stable::zero_(var)};
  a.z = z.mutable_data_ptr();
  a.mean = floats_of(mean);
  a.var = floats_of(var);
  const Tensor workspace = empty_floats(x, {depthwise_filter_workspace(a)});
  a.workspace = floats_of(workspace);
  depthwise_filter(a, current_stream(x.get_device_index()));
  return {z, mean, var};
}

std::tuple<Tensor, Tensor> depthwise_conv_filter_backward(
    const Tensor& dz, const Tensor& x, const Tensor& weight, int64_t stride, int64_t dilation) {
  Inputs in(x);
  DepthwiseArguments a = depthwise_arguments(in, x, weight, stride, dilation);
  const DeviceGuard guard(x.get_device_index());
  a.dz = in.map("dz", dz, out_pixels(a.maps) * a.maps.inputs);
  const Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = torch::stable::new_empty(weight, weight.sizes());
  if (x.numel() == 0) return {dx, torch::stable::zero_(dweight)};
  a.dx = dx.mutable_data_ptr();
  a.dweight = dweight.mutable_data_ptr();
  const Tensor workspace = empty_floats(x, {depthwise_backward_workspace(a)});
  a.workspace = floats_of(workspace);
  depthwise_backward(a, current_stream(x.get_device_index()));
  return {dx, dweight};
}

STABLE_TORCH_LIBRARY_IMPL(mvit3, CUDA, m) {
  m.impl("depthwise_conv_filter", TORCH_BOX(&depthwise_conv_filter));
  m.impl("depthwise_conv_filter_backward", TORCH_BOX(&depthwise_conv_filter_backward));
  m.impl("inverted_residual_filter", TORCH_BOX(&inverted_residual_filter));
  m.impl("inverted_residual_inference", TORCH_BOX(&inverted_residual_inference));
  m.impl("inverted_residual_filter_backward", TORCH_BOX(&inverted_residual_filter_backward));
}

}  // namespace
}  // namespace mvit3
