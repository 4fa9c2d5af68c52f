// norm_linear: layer normalisation (per token or per sample), then a linear map. Meaning: mvit3_kernels/ops/norm_linear/reference.py.
//
// Backward is one pass over tiles of rows: the gradient of the normalised rows, the weight's gradient in a part's accumulator, and, per
// token, the norm's own gradient while the tile is in cache. Per sample a second pass over dx adds what the two sums of a sample decide.

#include <tuple>

#include "norm_linear.h"

namespace mvit3 {
namespace {

// y, and mean and 1 / deviation of each token or sample.
std::tuple<Tensor, Tensor, Tensor> norm_linear_forward(
    const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, bool per_sample, const Tensor& weight,
    const std::optional<Tensor>& bias) {
  check_map("x", x);
  check_eps("eps", eps);
  const Tensor dense = torch::stable::contiguous(x);
  const Tokens tokens(dense);
  const NormLinearParameters parameters(norm_weight, norm_bias, "weight", weight, "bias", bias, tokens.channels);
  const int64_t count = tokens.norms(per_sample);
  const Tensor mean = torch::stable::new_empty(dense, {count}, ScalarType::Float), rstd = torch::stable::new_empty(mean, {count});
  const Tensor y = new_output(dense, {x.size(0), x.size(1), x.size(2), parameters.outputs});
  if (tokens.total() == 0) return std::make_tuple(y, mean, rstd);
  dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    const NormedMap<T> map(data_of<T>(dense), tokens, per_sample, mutable_data_of<float>(mean), mutable_data_of<float>(rstd));
    norm_linear(map, eps, NormLinearWeightsOf<Multiplied<T>>(parameters), mutable_data_of<T>(y));
  });
  return std::make_tuple(y, mean, rstd);
}

// Gradients of x, norm weight, norm bias, weight and bias (empty without a bias).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, bool per_sample, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& rstd) {
  check_map("x", x);
  const Tensor dense = torch::stable::contiguous(x), dx = new_output(dense);
  const Tokens tokens(dense);
  const NormLinearParameters parameters(norm_weight, norm_bias, "weight", weight, "bias", bias, tokens.channels);
  const int64_t inputs = parameters.inputs, outputs = parameters.outputs, lanes = lanes_of(inputs), out_lanes = lanes_of(outputs);
  const Tensor dense_dy = contiguous_map("dy", dy, x, {x.size(0), x.size(1), x.size(2), outputs});
  const Tensor kept_mean = contiguous_kept("mean", mean, {tokens.norms(per_sample)});
  const Tensor kept_rstd = contiguous_kept("rstd", rstd, {tokens.norms(per_sample)});
  const int64_t parts = count_parts(tokens.total() * inputs * outputs, 1 << 21);
  auto sums = accumulators<double>(parts, out_lanes);
  return dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    using E = Multiplied<T>;
    const auto transposed = parameters.transposed<E>();
    OuterSumsOf<E> products(parts, outputs, lanes);
    const NormedMap<T> map(data_of<T>(dense), tokens, per_sample, mutable_data_of<float>(kept_mean), mutable_data_of<float>(kept_rstd));
    NormedMapBackward<T> norm(map, nullptr, mutable_data_of<T>(dx), parts);
    for_each_tile(tokens.total(), parts, [&](int64_t part, int64_t first, int64_t count) {
      float* grads = workspace(kTileRows * (2 * lanes + out_lanes));
      E *normalised = tile_of<E>(grads + kTileRows * lanes), *memory = normalised + kTileRows * lanes;
      const RowsOf<E> rows = as_rows(data_of<T>(dense_dy) + first * outputs, outputs, count, outputs, memory);
      map.normalise_again(first, count, normalised, lanes);
      multiply_into(rows.data, rows.stride, count, transposed, grads, lanes);
      products.add(part, rows, {normalised, lanes}, count);
      add_columns(rows.data, rows.stride, count, outputs, sums[part].data());
      norm.tile(part, first, count, grads, normalised, lanes);
    });
    norm.finish();
    const Values dbias = add_up(sums, outputs);
    const NormLinearGradients gradients(parameters, products.parts(), dbias, weight);
    return std::make_tuple(
        dx, write_channels(gradients.dgamma, norm_weight), write_channels(gradients.dbeta, norm_bias), gradients.dweight,
        write_bias(dbias, bias, x));
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("norm_linear_forward", TORCH_BOX(&mvit3::norm_linear_forward));
  m.impl("norm_linear_backward", TORCH_BOX(&mvit3::norm_linear_backward));
}
