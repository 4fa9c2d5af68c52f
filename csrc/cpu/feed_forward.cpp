// feed_forward: the pre-norm feed-forward network with its residual. Meaning:
// mvit3_kernels/ops/feed_forward/reference.py.
//
// Training keeps the hidden tensor before its activation: reading it costs a tenth of computing it again, a seventh of
// a step's products. Backward is one pass over tiles of rows that adds to the weights' gradients in a part's
// accumulators. Masks of dropout are computed again.

#include "feed_forward.h"

namespace mvit3 {
namespace {

struct ForwardArguments {
  Tensor x;
  LayerNormArguments norm;
  double eps;
  bool per_sample;
  LinearArguments first, second;
  DropoutArguments dropout;
  bool keep;
};

// y, mean and 1 / deviation of each token or sample, and with `keep` the hidden tensor before its activation, else
// nothing.
std::array<Tensor, 4> feed_forward_forward(const ForwardArguments& a) {
  check_map("x", a.x);
  check_eps("eps", a.eps);
  const Tensor dense = torch::stable::contiguous(a.x), y = new_output(dense);
  const Tokens tokens(dense);
  const NormLinearParameters first(a.norm, "weight1", "bias1", a.first, tokens.channels);
  const FloatMatrix second("weight2", a.second.weight, first.inputs, first.outputs);
  const FeedForwardDropout dropout(a.dropout);
  const auto statistics = NormStatistics::empty(dense, tokens.norms(a.per_sample));
  const Tensor hidden = a.keep ? new_output(dense, {a.x.size(0), a.x.size(1), a.x.size(2), first.outputs})
                               : torch::stable::new_empty(dense, {0});
  if (tokens.total() > 0)
    dispatch_dtype("x", dense, [&](auto type) {
      using T = decltype(type);
      const FeedForwardWeightsOf<Multiplied<T>> weights(
          first, second, read_vector("bias2", a.second.bias, tokens.channels));
      const NormedMap<T> map(data_of<T>(dense), tokens, a.per_sample, statistics);
      feed_forward(map, a.eps, weights, dropout, mutable_data_of<T>(y), a.keep ? mutable_data_of<T>(hidden) : nullptr);
    });
  return {y, statistics.mean, statistics.rstd, hidden};
}

struct BackwardArguments {
  Tensor dy, x;
  LayerNormArguments norm;
  bool per_sample;
  LinearArguments first, second;
  DropoutArguments dropout;
  NormStatistics statistics;
  Tensor hidden;
};

// The sums of a backward pass over tiles, one accumulator a part: the gradients of both weights and biases.
template <typename E>
struct FeedForwardSums {
  int64_t channels, hidden;
  OuterSumsOf<E> weight1, weight2;
  std::vector<Scratch<double>> bias1, bias2;

  FeedForwardSums(int64_t parts, int64_t channels, int64_t hidden)
      : channels(channels), hidden(hidden), weight1(parts, hidden, lanes_of(channels)),
        weight2(parts, channels, lanes_of(hidden)), bias1(accumulators<double>(parts, lanes_of(hidden))),
        bias2(accumulators<double>(parts, lanes_of(channels))) {}
};

// The gradient of x, in dx, and the sums.
template <typename T>
FeedForwardSums<Multiplied<T>> backward(
    const NormedMap<T>& x, const NormLinearParameters& parameters, const FloatMatrix& second,
    const FeedForwardDropout& dropout, const T* dy, const T* kept, T* dx) {
  using E = Multiplied<T>;
  const Tokens& tokens = x.tokens();
  const int64_t channels = parameters.inputs, hidden = parameters.outputs, lanes = lanes_of(channels),
                hidden_lanes = lanes_of(hidden), parts = count_parts(tokens.total() * channels * hidden, 1 << 21);
  const auto first_transposed = parameters.transposed<E>();
  const auto second_transposed = PackedWeightOf<E>::columns(second.data(), hidden, channels, hidden);
  FeedForwardSums<E> sums(parts, channels, hidden);
  NormedMapBackward<T> norm(x, dy, dx, parts);
  const int64_t floats = 3 * lanes + 2 * hidden_lanes, tile = tile_rows(floats);
  const auto differentiate = [&](int64_t part, int64_t first, int64_t count) {
    float* dnormalised = workspace(tile * floats);
    E *normalised = tile_of<E>(dnormalised + tile * lanes), *memory = normalised + tile * lanes,
      *active = memory + tile * lanes;
    E* dhidden = active + tile * hidden_lanes;
    const TileMask output(dropout.output, first, count, tokens.rows, channels);
    const RowsOf<E> grads = masked_rows(dy + first * channels, count, channels, output, memory);
    const TileMask mask(dropout.hidden, first, count, tokens.rows, hidden);
    x.normalise_again(first, count, normalised, lanes);
    multiply(grads.data, grads.stride, count, second_transposed, [&](int64_t r, int64_t c, Vec product) {
      const T* at = kept + (first + r) * hidden + c;
      prefetch(at + kPanel);  // of the panel that comes next
      Vec value, slope;
      activate_with_slope<kSilu, kRoughly<E>>(load_some(at, hidden - c), value, slope);
      store(active + r * hidden_lanes + c, mask(value, r, c));
      store(dhidden + r * hidden_lanes + c, mask(product * slope, r, c));
    });
    sums.weight2.add(part, grads, {active, hidden_lanes}, count);
    add_columns(grads.data, grads.stride, count, channels, sums.bias2[part].data());
    sums.weight1.add(part, {dhidden, hidden_lanes}, {normalised, lanes}, count);
    add_columns(dhidden, hidden_lanes, count, hidden, sums.bias1[part].data());
    multiply_into(dhidden, hidden_lanes, count, first_transposed, dnormalised, lanes);
    norm.tile(part, first, count, dnormalised, normalised, lanes);
  };
  for_each_tile(tokens.total(), parts, differentiate, tile);
  norm.finish();
  return sums;
}

// Gradients of x, norm weight, norm bias, and of weight and bias of the two linear maps (empty without a bias).
std::array<Tensor, 7> feed_forward_backward(const BackwardArguments& a) {
  check_map("x", a.x);
  const Tensor dense = torch::stable::contiguous(a.x), dy = contiguous_like("dy", a.dy, a.x), dx = new_output(dense);
  const Tokens tokens(dense);
  const NormLinearParameters first(a.norm, "weight1", "bias1", a.first, tokens.channels);
  const int64_t channels = first.inputs, hidden = first.outputs;
  const FloatMatrix second("weight2", a.second.weight, channels, hidden);
  read_vector("bias2", a.second.bias, channels);  // only its gradient is needed, which has its shape
  const FeedForwardDropout dropout(a.dropout);
  const Tensor kept = contiguous_map("hidden", a.hidden, a.x, {a.x.size(0), a.x.size(1), a.x.size(2), hidden});
  const NormStatistics statistics = a.statistics.checked(tokens.norms(a.per_sample));
  return dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    const NormedMap<T> map(data_of<T>(dense), tokens, a.per_sample, statistics);
    auto sums = backward(map, first, second, dropout, data_of<T>(dy), data_of<T>(kept), mutable_data_of<T>(dx));
    const Values dbias1 = add_up(sums.bias1, hidden), dbias2 = add_up(sums.bias2, channels);
    const NormLinearGradients gradients(first, sums.weight1.parts(), dbias1, a.first.weight);
    const Tensor dweight2 = write_weight("weight2", sums.weight2.parts(), channels, hidden, a.second.weight);
    return std::array<Tensor, 7>{
        dx,
        write_channels(gradients.dnorm_weight, a.norm.weight),
        write_channels(gradients.dnorm_bias, a.norm.bias),
        gradients.dweight,
        write_bias(dbias1, a.first.bias, a.x),
        dweight2,
        write_bias(dbias2, a.second.bias, a.x)};
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("feed_forward_forward", mvit3::boxed<mvit3::feed_forward_forward>);
  m.impl("feed_forward_backward", mvit3::boxed<mvit3::feed_forward_backward>);
}
