// conv3x3_inference: dense 3x3 convolution, batch normalisation with constant statistics, activation. See conv3x3.h.
#include "conv3x3.h"

namespace mvit3 {
namespace {

Tensor conv3x3_inference(
    const Tensor& x, std::optional<Tensor> other, const Tensor& weight, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensor& running_mean, const Tensor& running_var, double eps, int64_t act, int64_t stride) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "x must be a feature map (B, H, W, C) on the CPU");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  const int64_t batch = x.size(0), height = x.size(1), width = x.size(2), channels = x.size(3), others = other ? other->size(3) : 0;
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(3) == channels + others, "weight must have shape (O, 3, 3, C) with the channels of the inputs");
  const int64_t outputs = weight.size(0);
  Norm norm("norm.weight", norm_weight, norm_bias, outputs, eps);
  norm.mean = read_channels("running_mean", running_mean, outputs);
  norm.var = read_channels("running_var", running_var, outputs);
  const FloatMatrix values("weight", weight, outputs, 9 * (channels + others));
  const Conv3x3Weights weights(values.data(), outputs, channels + others, stride, norm.affine());
  return dispatch_dtype("x", x, [&](auto type) {
    using T = decltype(type);
    const auto is_nchw = [&] {  // an image of few channels is read as it is
      return Conv3x3Weights::few(channels) && channels > 1 && x.stride(2) == 1 && x.stride(1) == width && x.stride(3) == height * width &&
             x.stride(0) == channels * height * width;
    };
    const bool nchw = !other && is_nchw();
    const Tensor dense = nchw ? x : torch::stable::contiguous(x), second = other ? torch::stable::contiguous(*other) : dense;
    if (other)
      STD_TORCH_CHECK(
          other->is_cpu() && other->scalar_type() == x.scalar_type() && other->numel() == batch * height * width * others,
          "other must have the dtype, height and width of x");
    const Conv3x3Inputs<T> in{data_of<T>(dense), other ? data_of<T>(second) : nullptr, channels, others,
                              batch, height, width, nchw};
    const Tensor y = new_output(torch::stable::new_empty(x, {batch, weights.out_size(height), weights.out_size(width), outputs}));
    if (y.numel() > 0)
      dispatch_activation(act, [&](auto code) { conv3x3_forward<code>(weights, in, mutable_data_of<T>(y)); });
    return y;
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) { m.impl("conv3x3_inference", TORCH_BOX(&mvit3::conv3x3_inference)); }
