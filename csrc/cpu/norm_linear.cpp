// norm_linear: layer normalisation (per token or per sample), then a linear map. Meaning:
// mvit3_kernels/ops/norm_linear/reference.py.
//
// Backward is one pass over tiles of rows: the gradient of the normalised rows, the weight's gradient in a part's
// accumulator, and, per token, the norm's own gradient while the tile is in cache. Per sample a second pass over dx
// adds what the two sums of a sample decide.

#include "norm_linear.h"

namespace mvit3 {
namespace {

struct ForwardArguments {
  Tensor x;
  LayerNormArguments norm;
  double eps;
  bool per_sample;
  LinearArguments linear;
};

// y, and mean and 1 / deviation of each token or sample.
std::array<Tensor, 3> norm_linear_forward(const ForwardArguments& a) {
  check_map("x", a.x);
  check_eps("eps", a.eps);
  const Tensor dense = torch::stable::contiguous(a.x);
  const Tokens tokens(dense);
  const NormLinearParameters parameters(a.norm, "weight", "bias", a.linear, tokens.channels);
  const auto statistics = NormStatistics::empty(dense, tokens.norms(a.per_sample));
  const Tensor y = new_output(dense, {a.x.size(0), a.x.size(1), a.x.size(2), parameters.outputs});
  if (tokens.total() == 0) return {y, statistics.mean, statistics.rstd};
  dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    const NormedMap<T> map(data_of<T>(dense), tokens, a.per_sample, statistics);
    norm_linear(map, a.eps, NormLinearWeightsOf<Multiplied<T>>(parameters), mutable_data_of<T>(y));
  });
  return {y, statistics.mean, statistics.rstd};
}

struct BackwardArguments {
  Tensor dy, x;
  LayerNormArguments norm;
  bool per_sample;
  LinearArguments linear;
  NormStatistics statistics;
};

// Gradients of x, norm weight, norm bias, weight and bias (empty without a bias).
std::array<Tensor, 5> norm_linear_backward(const BackwardArguments& a) {
  check_map("x", a.x);
  const Tensor dense = torch::stable::contiguous(a.x), dx = new_output(dense);
  const Tokens tokens(dense);
  const NormLinearParameters parameters(a.norm, "weight", "bias", a.linear, tokens.channels);
  const int64_t inputs = parameters.inputs, outputs = parameters.outputs, lanes = lanes_of(inputs),
                out_lanes = lanes_of(outputs);
  const Tensor dense_dy = contiguous_map("dy", a.dy, a.x, {a.x.size(0), a.x.size(1), a.x.size(2), outputs});
  const NormStatistics statistics = a.statistics.checked(tokens.norms(a.per_sample));
  const int64_t parts = count_parts(tokens.total() * inputs * outputs, 1 << 21);
  auto sums = accumulators<double>(parts, out_lanes);
  return dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    using E = Multiplied<T>;
    const auto transposed = parameters.transposed<E>();
    OuterSumsOf<E> products(parts, outputs, lanes);
    const NormedMap<T> map(data_of<T>(dense), tokens, a.per_sample, statistics);
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
    const NormLinearGradients gradients(parameters, products.parts(), dbias, a.linear.weight);
    return std::array<Tensor, 5>{
        dx, write_channels(gradients.dnorm_weight, a.norm.weight), write_channels(gradients.dnorm_bias, a.norm.bias),
        gradients.dweight, write_bias(dbias, a.linear.bias, a.x)};
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("norm_linear_forward", mvit3::boxed<mvit3::norm_linear_forward>);
  m.impl("norm_linear_backward", mvit3::boxed<mvit3::norm_linear_backward>);
}
