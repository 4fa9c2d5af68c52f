// patch_attention for the dispatcher, and its backward pass.
//
// Backward turns the forward's layout round: lanes are keys, a block of kPanel of them at a time, rows are queries. The probabilities come
// back from the scores and the saved log-sum-exp; the gradients of keys and values accumulate transposed, in cache, and only the
// gradient of the queries has the head width in its lanes. A group is one thread's, so nothing is added up across threads.

#include "patch_attention.h"

#include <tuple>

namespace mvit3 {
namespace {

template <typename T>
class AttentionBackward {
 public:
  static constexpr int64_t kQueries = 64;  // of a block of scores: 8 KiB, twice

  AttentionBackward(const PatchGroups& groups, const Dropout& dropout, const T* dout, const T* qkv, const T* out, const float* lse, T* dqkv)
      : g_(groups), dropout_(dropout), dout_(dout), qkv_(qkv), out_(out), lse_(lse), dqkv_(dqkv) {}

  // The memory that `run` needs.
  int64_t floats() const {
    return 3 * rows_floats() + round_up(g_.tokens(), kLanes) + g_.tokens() * lanes_of(g_.dim) + 2 * kQueries * kPanel + 4 * g_.dim * kPanel +
        kPanel * lanes_of(g_.dim);
  }

  void run(int64_t group, float* memory) const {
    const int64_t dim = g_.dim, tokens = g_.tokens(), channel = g_.channel(group), channels = g_.channels(), lanes = lanes_of(dim);
    float *queries = memory, *keys = queries + rows_floats(), *grads = keys + rows_floats(), *deltas = grads + rows_floats();
    float *dqueries = deltas + round_up(tokens, kLanes), *panels = dqueries + tokens * lanes;

    g_.load_tokens(group, 0, tokens, qkv_, 3 * channels, channel, queries);
    g_.load_tokens(group, 0, tokens, qkv_, 3 * channels, channels + channel, keys);
    // The gradient of out, and its product with out: what softmax's backward subtracts.
    g_.for_each_token(group, 0, tokens, [&](int64_t i, int64_t pixel) {
      const int64_t at = pixel * channels + channel;
      Vec sum = 0.0f;
      for (int64_t c = 0; c < dim; c += kLanes) {
        const Vec grad = load_some(dout_ + at + c, dim - c);
        store(grads + i * dim + c, grad);
        sum = fma(grad, load_some(out_ + at + c, dim - c), sum);
      }
      deltas[i] = sum_of_lanes(sum);
    });
    std::fill_n(dqueries, tokens * lanes, 0.0f);
    for (int64_t first = 0; first < tokens; first += kPanel) {
      const int64_t count = std::min(kPanel, tokens - first);
      if (count > kLanes)
        add_keys<kPanelVecs>(group, first, count, queries, keys, grads, deltas, dqueries, panels);
      else
        add_keys<1>(group, first, count, queries, keys, grads, deltas, dqueries, panels);
    }
    const Vec scale = g_.scale();
    g_.store_tokens(group, 0, tokens, dqueries, [&](int64_t) { return scale; }, dqkv_, 3 * channels, channel);
  }

 private:
  int64_t rows_floats() const { return round_up(g_.tokens() * g_.dim + kLanes, kLanes); }

  // A block of keys: their part of the gradient of all queries, and the gradients of the keys and their values.
  template <int Vecs>
  void add_keys(
      int64_t group, int64_t first, int64_t count, const float* queries, const float* keys, const float* grads, const float* deltas, float* dqueries, float* panels) const {
    constexpr int64_t kWide = Vecs * kLanes;
    const int64_t dim = g_.dim, tokens = g_.tokens(), channel = g_.channel(group), channels = g_.channels(), lanes = lanes_of(dim);
    float *keys_t = panels, *values_t = keys_t + dim * kPanel, *dkeys_t = values_t + dim * kPanel, *dvalues_t = dkeys_t + dim * kPanel;
    float *scores = dvalues_t + dim * kPanel, *dscores = scores + kQueries * kPanel, *rows = dscores + kQueries * kPanel;

    transpose(keys + first * dim, dim, count, dim, g_.scale() * kLog2e, keys_t, kWide);
    g_.load_tokens(group, first, count, qkv_, 3 * channels, 2 * channels + channel, rows);
    transpose(rows, dim, count, dim, 1.0f, values_t, kWide);
    std::fill_n(dkeys_t, 2 * dim * kPanel, 0.0f);

    for (int64_t query = 0; query < tokens; query += kQueries) {
      const int64_t n = std::min(kQueries, tokens - query);
      multiply_panel(n, Vecs, {queries + query * dim, keys_t, dim, 1, kWide, dim}, 0, StoreSums{scores, kWide});
      multiply_panel(n, Vecs, {grads + query * dim, values_t, dim, 1, kWide, dim}, 0, StoreSums{dscores, kWide});
      if (dropout_.active())
        differentiate<Vecs, true>(group, first, query, n, deltas, scores, dscores);
      else
        differentiate<Vecs, false>(group, first, query, n, deltas, scores, dscores);
      add_outer(grads + query * dim, dim, dim, scores, kWide, kWide, n, dvalues_t, kWide);
      add_outer(queries + query * dim, dim, dim, dscores, kWide, kWide, n, dkeys_t, kWide);
      for (int64_t c = 0; c < dim; c += kPanel)
        multiply_panel(
            n, std::min<int64_t>(kPanelVecs, (dim - c + kLanes - 1) / kLanes), {dscores, keys + first * dim + c, kWide, 1, dim, count}, c,
            AddSums{dqueries + query * lanes, lanes});
    }

    const Vec scale = g_.scale();
    transpose(dkeys_t, kWide, dim, count, 1.0f, rows, lanes);
    g_.store_tokens(group, first, count, rows, [&](int64_t) { return scale; }, dqkv_, 3 * channels, channels + channel);
    transpose(dvalues_t, kWide, dim, count, 1.0f, rows, lanes);
    g_.store_tokens(group, first, count, rows, [](int64_t) { return Vec(1.0f); }, dqkv_, 3 * channels, 2 * channels + channel);
  }

  // Scores become the probabilities (after dropout), the gradients of these become those of the scores.
  template <int Vecs, bool Drop>
  void differentiate(int64_t group, int64_t first, int64_t query, int64_t n, const float* deltas, float* scores, float* dscores) const {
    const int64_t tokens = g_.tokens();
    const float* lse = lse_ + group * tokens;
    const uint32_t seed = Drop ? dropout_.key(group / g_.per_image()) : 0;
    for (int64_t q = 0; q < n; ++q) {
      const Vec log_sum = lse[query + q], delta = deltas[query + q];
      for (int v = 0; v < Vecs; ++v) {
        const int64_t at = (q * Vecs + v) * kLanes;
        const Vec probability = exp2(load(scores + at) - log_sum);
        Vec weight = probability, grad = load(dscores + at);
        if constexpr (Drop) {
          const Vec kept = dropout_(seed, (group % g_.per_image() * tokens + query + q) * tokens + first + v * kLanes);
          weight = weight * kept;
          grad = grad * kept;
        }
        store(scores + at, weight);
        store(dscores + at, probability * (grad - delta));
      }
    }
  }

  const PatchGroups& g_;
  const Dropout& dropout_;
  const T *dout_, *qkv_, *out_;
  const float* lse_;
  T* dqkv_;
};

PatchGroups groups_of(const Tensor& qkv, int64_t heads, int64_t patch_height, int64_t patch_width) {
  STD_TORCH_CHECK(qkv.is_cpu() && qkv.dim() == 4, "qkv must be a feature map (B, H, W, 3D) on the CPU");
  STD_TORCH_CHECK(heads >= 1 && qkv.size(3) % (3 * heads) == 0, "3 * num_heads must divide the channels of qkv, got num_heads ", heads);
  STD_TORCH_CHECK(
      patch_height >= 1 && patch_width >= 1 && qkv.size(1) % patch_height == 0 && qkv.size(2) % patch_width == 0,
      "height and width of qkv must be multiples of the patch size, got ", patch_height, " and ", patch_width);
  return {qkv.size(0), qkv.size(1), qkv.size(2), heads, qkv.size(3) / (3 * heads), patch_height, patch_width};
}

// out, and the log-sum-exp (B, patch positions, heads, tokens) that backward needs.
std::tuple<Tensor, Tensor> patch_attention_forward(
    const Tensor& qkv, int64_t num_heads, int64_t patch_height, int64_t patch_width, double p, std::optional<Tensor> seed) {
  const PatchGroups g = groups_of(qkv, num_heads, patch_height, patch_width);
  const Dropout dropout(p, seed, 0);
  const Tensor dense = torch::stable::contiguous(qkv);
  const Tensor out = new_output(torch::stable::new_empty(dense, {g.batch, g.height, g.width, g.channels()}));
  const Tensor lse = torch::stable::new_empty(dense, {g.batch, patch_height * patch_width, num_heads, g.tokens()}, ScalarType::Float);
  if (out.numel() > 0)
    dispatch_dtype("qkv", dense, [&](auto type) {
      using T = decltype(type);
      patch_attention(g, dropout, data_of<T>(dense), mutable_data_of<T>(out), mutable_data_of<float>(lse));
    });
  return std::make_tuple(out, lse);
}

Tensor patch_attention_backward(
    const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse, int64_t num_heads, int64_t patch_height, int64_t patch_width,
    double p, std::optional<Tensor> seed) {
  const PatchGroups g = groups_of(qkv, num_heads, patch_height, patch_width);
  const Dropout dropout(p, seed, 0);
  const Tensor dense = torch::stable::contiguous(qkv), dense_out = torch::stable::contiguous(out), dense_dout = contiguous_like("dout", dout, out);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  STD_TORCH_CHECK(out.numel() * 3 == qkv.numel() && out.scalar_type() == qkv.scalar_type(), "out must be what forward returned for qkv");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.numel() == g.groups() * g.tokens(), "lse must be what forward returned for qkv");
  const Tensor dqkv = new_output(dense);
  if (dqkv.numel() > 0)
    dispatch_dtype("qkv", dense, [&](auto type) {
      using T = decltype(type);
      const AttentionBackward<T> backward(
          g, dropout, data_of<T>(dense_dout), data_of<T>(dense), data_of<T>(dense_out), data_of<float>(dense_lse), mutable_data_of<T>(dqkv));
      const int64_t parts = std::min(g.groups(), count_parts(g.groups() * g.tokens() * g.tokens() * 5 * g.dim, 1 << 17));
      for_each_part(parts, [&](int64_t part) {
        const Range mine = part_range(g.groups(), part, parts);
        float* memory = workspace(backward.floats());
        for (int64_t group = mine.begin; group < mine.end; ++group) backward.run(group, memory);
      });
    });
  return dqkv;
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("patch_attention_forward", TORCH_BOX(&mvit3::patch_attention_forward));
  m.impl("patch_attention_backward", TORCH_BOX(&mvit3::patch_attention_backward));
}
