// feed_forward: the pre-norm feed-forward network with its residual. Meaning: mvit3_kernels/ops/feed_forward/reference.py.
//
// Training keeps the hidden tensor before its activation: reading it costs a tenth of computing it again, a seventh of a step's products.
// Backward is one pass over tiles of rows that adds to the weights' gradients in a part's accumulators. Masks of dropout are computed again.

#include <tuple>

#include "feed_forward.h"

namespace mvit3 {
namespace {

// y, mean and 1 / deviation of each token or sample, and with `keep` the hidden tensor before its activation, else nothing.
std::tuple<Tensor, Tensor, Tensor, Tensor> feed_forward_forward(
    const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, bool per_sample, const Tensor& weight1,
    const std::optional<Tensor>& bias1, const Tensor& weight2, const std::optional<Tensor>& bias2, double hidden_dropout,
    double output_dropout, const std::optional<Tensor>& seed, bool keep) {
  check_map("x", x);
  check_eps("eps", eps);
  const Tensor dense = torch::stable::contiguous(x), y = new_output(dense);
  const Tokens tokens(dense);
  const NormLinearParameters first(norm_weight, norm_bias, "weight1", weight1, "bias1", bias1, tokens.channels);
  const FloatMatrix second("weight2", weight2, first.inputs, first.outputs);
  const FeedForwardDropout dropout(hidden_dropout, output_dropout, seed);
  const int64_t count = tokens.norms(per_sample);
  const Tensor mean = torch::stable::new_empty(dense, {count}, ScalarType::Float), rstd = torch::stable::new_empty(mean, {count});
  const Tensor hidden = keep ? new_output(dense, {x.size(0), x.size(1), x.size(2), first.outputs}) : torch::stable::new_empty(dense, {0});
  if (tokens.total() == 0) return std::make_tuple(y, mean, rstd, hidden);
  dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    const FeedForwardWeightsOf<Multiplied<T>> weights(first, second, read_vector("bias2", bias2, tokens.channels));
    const NormedMap<T> map(data_of<T>(dense), tokens, per_sample, mutable_data_of<float>(mean), mutable_data_of<float>(rstd));
    feed_forward(map, eps, weights, dropout, mutable_data_of<T>(y), keep ? mutable_data_of<T>(hidden) : nullptr);
  });
  return std::make_tuple(y, mean, rstd, hidden);
}

// Gradients of x, norm weight, norm bias, weight1, bias1 (empty without one), weight2 and bias2.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    const Tensor& dy, const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, bool per_sample, const Tensor& weight1,
    const std::optional<Tensor>& bias1, const Tensor& weight2, const std::optional<Tensor>& bias2, double hidden_dropout,
    double output_dropout, const std::optional<Tensor>& seed, const Tensor& mean, const Tensor& rstd, const Tensor& hidden) {
  check_map("x", x);
  const Tensor dense = torch::stable::contiguous(x), dense_dy = contiguous_like("dy", dy, x), dx = new_output(dense);
  const Tokens tokens(dense);
  const NormLinearParameters parameters(norm_weight, norm_bias, "weight1", weight1, "bias1", bias1, tokens.channels);
  const int64_t channels = parameters.inputs, wide = parameters.outputs, lanes = lanes_of(channels), wide_lanes = lanes_of(wide);
  const FloatMatrix second("weight2", weight2, channels, wide);
  read_vector("bias2", bias2, channels);  // only its gradient is needed, which has its shape
  const FeedForwardDropout dropout(hidden_dropout, output_dropout, seed);
  const Tensor kept = contiguous_map("hidden", hidden, x, {x.size(0), x.size(1), x.size(2), wide});
  const Tensor kept_mean = contiguous_kept("mean", mean, {tokens.norms(per_sample)});
  const Tensor kept_rstd = contiguous_kept("rstd", rstd, {tokens.norms(per_sample)});

  const int64_t parts = count_parts(tokens.total() * channels * wide, 1 << 21);
  auto sums1 = accumulators<double>(parts, wide_lanes), sums2 = accumulators<double>(parts, lanes);
  return dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    using E = Multiplied<T>;
    const auto first_transposed = parameters.transposed<E>();
    const auto second_transposed = PackedWeightOf<E>::columns(second.data(), wide, channels, wide);
    OuterSumsOf<E> products1(parts, wide, lanes), products2(parts, channels, wide_lanes);
    const NormedMap<T> map(data_of<T>(dense), tokens, per_sample, mutable_data_of<float>(kept_mean), mutable_data_of<float>(kept_rstd));
    NormedMapBackward<T> norm(map, data_of<T>(dense_dy), mutable_data_of<T>(dx), parts);
    const int64_t floats = 3 * lanes + 2 * wide_lanes, tile = tile_rows(floats);
    for_each_tile(tokens.total(), parts, [&](int64_t part, int64_t first, int64_t count) {
      float* dnormalised = workspace(tile * floats);
      E *normalised = tile_of<E>(dnormalised + tile * lanes), *memory = normalised + tile * lanes, *active = memory + tile * lanes;
      E* dhidden = active + tile * wide_lanes;
      const T* given = data_of<T>(dense_dy) + first * channels;
      RowsOf<E> grads = as_rows(given, channels, count, channels, memory);
      if (dropout.output.active()) {
        const TileMask mask(dropout.output, first, count, tokens.rows, channels);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t c = 0; c < channels; c += kLanes)
            store(memory + r * lanes + c, mask(load_some(given + r * channels + c, channels - c), r, c));
        grads = {memory, lanes};
      }
      const TileMask mask(dropout.hidden, first, count, tokens.rows, wide);
      map.normalise_again(first, count, normalised, lanes);
      multiply(grads.data, grads.stride, count, second_transposed, [&](int64_t r, int64_t c, Vec product) {
        const T* at = data_of<T>(kept) + (first + r) * wide + c;
        prefetch(at + kPanel);  // of the panel that comes next
        Vec value, slope;
        activate_with_slope<kSilu>(load_some(at, wide - c), value, slope);
        store(active + r * wide_lanes + c, mask(value, r, c));
        store(dhidden + r * wide_lanes + c, mask(product * slope, r, c));
      });
      products2.add(part, grads, {active, wide_lanes}, count);
      add_columns(grads.data, grads.stride, count, channels, sums2[part].data());
      products1.add(part, {dhidden, wide_lanes}, {normalised, lanes}, count);
      add_columns(dhidden, wide_lanes, count, wide, sums1[part].data());
      multiply_into(dhidden, wide_lanes, count, first_transposed, dnormalised, lanes);
      norm.tile(part, first, count, dnormalised, normalised, lanes);
    }, tile);
    norm.finish();

    const Values dbias1 = add_up(sums1, wide), dbias2 = add_up(sums2, channels);
    const NormLinearGradients gradients(parameters, products1.parts(), dbias1, weight1);
    const Tensor dweight2 = torch::stable::new_empty(weight2, weight2.sizes());
    dispatch_dtype("weight2", weight2, [&](auto w) { add_up_rows(products2.parts(), channels, wide, wide_lanes, mutable_data_of<decltype(w)>(dweight2)); });
    return std::make_tuple(
        dx, write_channels(gradients.dgamma, norm_weight), write_channels(gradients.dbeta, norm_bias), gradients.dweight,
        write_bias(dbias1, bias1, x), dweight2, write_bias(dbias2, bias2, x));
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("feed_forward_forward", TORCH_BOX(&mvit3::feed_forward_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&mvit3::feed_forward_backward));
}
