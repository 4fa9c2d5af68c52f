// patch_attention for the dispatcher, and its backward pass.
//
// Backward turns the forward's layout round: lanes are keys, a block of kPanel of them at a time, rows are queries. The
// probabilities come back from the scores and the saved log-sum-exp; the gradients of keys and values accumulate
// transposed, in cache, and only the gradient of the queries has the head width in its lanes. A group is one thread's,
// so nothing is added up across threads.

#include "patch_attention.h"

#include "../op_arguments.h"

namespace mvit3 {
namespace {

template <typename T>
class AttentionBackward {
 public:
  static constexpr int64_t kQueries = 128;  // of a block of scores: 16 KiB, twice

  AttentionBackward(
      const PatchGroups& groups, const Dropout& dropout, const T* dout, const T* qkv, const T* out, const float* lse,
      T* dqkv)
      : g_(groups), dropout_(dropout), dout_(dout), qkv_(qkv), out_(out), lse_(lse), dqkv_(dqkv),
        far_(GroupsAhead::pays(groups.bytes<T>(8))) {}

  // The memory that `run` needs.
  int64_t floats() const {
    return heads_at_once() * group_floats() + round_up(g_.tokens(), kLanes) + g_.tokens() * lanes_of(g_.dim) +
           2 * kQueries * kPanel + 4 * g_.dim * kPanel + kPanel * lanes_of(g_.dim);
  }

  void run(Range groups, float* memory) const {
    float* rest = memory + heads_at_once() * group_floats();
    for (int64_t group = groups.begin; group < groups.end;) {
      const int64_t count = std::min({heads_at_once(), g_.heads - group % g_.heads, groups.end - group}),
                    rows = count * g_.rows_floats();
      float *qkv = memory, *grads = qkv + 3 * rows, *outs = grads + rows;
      g_.load_tokens(group, count, qkv_, 3, qkv);
      g_.load_tokens(group, count, dout_, 1, grads);
      g_.load_tokens(group, count, out_, 1, outs);
      GroupsAhead ahead;
      if (far_)
        ahead = GroupsAhead(
            g_, group, count, heads_at_once(),
            5 * ((g_.tokens() + kPanel - 1) / kPanel) * ((g_.tokens() + kQueries - 1) / kQueries));
      for (int64_t end = group + count; group < end;
           ++group, qkv += 3 * g_.rows_floats(), grads += g_.rows_floats(), outs += g_.rows_floats())
        differentiate(group, qkv, grads, outs, ahead, rest);
    }
  }

 private:
  int64_t group_floats() const { return 5 * g_.rows_floats(); }
  int64_t heads_at_once() const { return g_.heads_at_once(group_floats()); }

  void differentiate(
      int64_t group, const float* queries, const float* grads, const float* outs, GroupsAhead& ahead,
      float* memory) const {
    const int64_t dim = g_.dim, tokens = g_.tokens(), lanes = lanes_of(dim);
    float *deltas = memory, *dqueries = deltas + round_up(tokens, kLanes), *rest = dqueries + tokens * lanes;
    for (int64_t i = 0; i < tokens; ++i) {  // the gradient of out times out: what softmax's backward subtracts
      Vec sum = 0.0f;
      for (int64_t c = 0; c < dim; c += kLanes)
        sum = fma(load_some(grads + i * dim + c, dim - c), load_some(outs + i * dim + c, dim - c), sum);
      deltas[i] = sum_of_lanes(sum);
    }
    for (int64_t first = 0; first < tokens; first += kPanel) {
      const int64_t count = std::min(kPanel, tokens - first);
      if (count > kLanes)
        add_keys<kPanelVecs>(group, first, count, queries, grads, deltas, dqueries, ahead, rest);
      else
        add_keys<1>(group, first, count, queries, grads, deltas, dqueries, ahead, rest);
    }
    const Vec scale = g_.scale();
    g_.store_tokens(
        group, 0, tokens, dqueries, [&](int64_t) { return scale; }, dqkv_, 3 * g_.channels(), g_.channel(group));
  }

  void fetch(GroupsAhead& ahead) const {
    ahead.step(g_, [&](Range tokens) {
      g_.prefetch_tokens(ahead.group, ahead.count, tokens, qkv_, 3);
      g_.prefetch_tokens(ahead.group, ahead.count, tokens, dout_, 1);
      g_.prefetch_tokens(ahead.group, ahead.count, tokens, out_, 1);
      g_.prefetch_tokens(ahead.group, ahead.count, tokens, dqkv_, 3);  // to be written
    });
  }

  // A block of keys: their part of the gradient of all queries, and the gradients of the keys and their values.
  template <int Vecs>
  void add_keys(
      int64_t group, int64_t first, int64_t count, const float* queries, const float* grads, const float* deltas,
      float* dqueries, GroupsAhead& ahead, float* memory) const {
    constexpr int64_t kKeys = Vecs * kLanes;
    const int64_t dim = g_.dim, tokens = g_.tokens(), channel = g_.channel(group), channels = g_.channels(),
                  lanes = lanes_of(dim);
    const float *keys = queries + g_.rows_floats(), *values = keys + g_.rows_floats();
    float *keys_t = memory, *values_t = keys_t + dim * kPanel, *dkeys_t = values_t + dim * kPanel,
          *dvalues_t = dkeys_t + dim * kPanel;
    float *scores = dvalues_t + dim * kPanel, *dscores = scores + kQueries * kPanel,
          *rows = dscores + kQueries * kPanel;

    transpose(keys + first * dim, dim, count, dim, g_.scale() * kLog2e, keys_t, kKeys);
    transpose(values + first * dim, dim, count, dim, 1.0f, values_t, kKeys);

    for (int64_t query = 0; query < tokens; query += kQueries) {
      const int64_t n = std::min(kQueries, tokens - query);
      fetch(ahead);
      multiply_panel_into(n, Vecs, {queries + query * dim, keys_t, dim, 1, kKeys, dim}, scores, kKeys, false);
      fetch(ahead);
      multiply_panel_into(n, Vecs, {grads + query * dim, values_t, dim, 1, kKeys, dim}, dscores, kKeys, false);
      if (dropout_.active())
        weigh<Vecs, true>(group, first, query, n, deltas, scores, dscores);
      else
        weigh<Vecs, false>(group, first, query, n, deltas, scores, dscores);
      fetch(ahead);
      multiply_panel_into(dim, Vecs, {grads + query * dim, scores, 1, dim, kKeys, n}, dvalues_t, kKeys, query > 0);
      fetch(ahead);
      multiply_panel_into(dim, Vecs, {queries + query * dim, dscores, 1, dim, kKeys, n}, dkeys_t, kKeys, query > 0);
      fetch(ahead);
      for (int64_t c = 0; c < dim; c += kPanel)
        multiply_panel_into(
            n, std::min<int64_t>(kPanelVecs, (dim - c + kLanes - 1) / kLanes),
            {dscores, keys + first * dim + c, kKeys, 1, dim, count}, dqueries + query * lanes + c, lanes, first > 0);
    }

    const Vec scale = g_.scale();
    transpose(dkeys_t, kKeys, dim, count, 1.0f, rows, lanes);
    g_.store_tokens(group, first, count, rows, [&](int64_t) { return scale; }, dqkv_, 3 * channels, channels + channel);
    transpose(dvalues_t, kKeys, dim, count, 1.0f, rows, lanes);
    g_.store_tokens(
        group, first, count, rows, [](int64_t) { return Vec(1.0f); }, dqkv_, 3 * channels, 2 * channels + channel);
  }

  // Scores become the probabilities (after dropout), the gradients of these become those of the scores.
  template <int Vecs, bool Drop>
  void weigh(int64_t group, int64_t first, int64_t query, int64_t n, const float* deltas, float* scores, float* dscores)
      const {
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
  bool far_;
};

// How a call attends, forward and backward.
struct AttentionArguments {
  int64_t num_heads;
  PatchArguments patch;
  double dropout;
  OptionalTensor seed;

  PatchGroups groups(const Tensor& qkv) const {
    check_map("qkv", qkv);
    const int64_t channels = qkv.size(3), most = std::max<int64_t>(channels / 3, 1);
    MVIT3_CHECK(
        num_heads >= 1 && num_heads <= most && channels % (3 * num_heads) == 0, "3 * num_heads must divide the ",
        channels, " channels of qkv, got num_heads ", num_heads);
    check_patches("qkv", qkv, patch.height, patch.width);
    return {qkv.size(0), qkv.size(1), qkv.size(2), num_heads, channels / (3 * num_heads), patch.height, patch.width};
  }
};

struct ForwardArguments {
  Tensor qkv;
  AttentionArguments attention;
};

// out, and the log-sum-exp (B, patch positions, heads, tokens) that backward needs.
std::array<Tensor, 2> patch_attention_forward(const ForwardArguments& a) {
  const PatchGroups g = a.attention.groups(a.qkv);
  const Dropout dropout("dropout", a.attention.dropout, a.attention.seed, 0);
  const Tensor dense = torch::stable::contiguous(a.qkv);
  const Tensor out = new_output(torch::stable::new_empty(dense, {g.batch, g.height, g.width, g.channels()}));
  const Tensor lse = torch::stable::new_empty(dense, {g.batch, g.positions(), g.heads, g.tokens()}, ScalarType::Float);
  if (out.numel() > 0)
    dispatch_dtype("qkv", dense, [&](auto type) {
      using T = decltype(type);
      patch_attention(g, dropout, data_of<T>(dense), mutable_data_of<T>(out), mutable_data_of<float>(lse));
    });
  return {out, lse};
}

struct BackwardArguments {
  Tensor dout, qkv, out, lse;
  AttentionArguments attention;
};

Tensor patch_attention_backward(const BackwardArguments& a) {
  const PatchGroups g = a.attention.groups(a.qkv);
  const Dropout dropout("dropout", a.attention.dropout, a.attention.seed, 0);
  const Tensor dense = torch::stable::contiguous(a.qkv);
  const std::vector<int64_t> shape{g.batch, g.height, g.width, g.channels()};
  const Tensor out = contiguous_map("out", a.out, a.qkv, shape), dout = contiguous_map("dout", a.dout, a.qkv, shape);
  const Tensor lse = contiguous_kept("lse", a.lse, {g.batch, g.positions(), g.heads, g.tokens()});
  const Tensor dqkv = new_output(dense);
  if (dqkv.numel() > 0)
    dispatch_dtype("qkv", dense, [&](auto type) {
      using T = decltype(type);
      const AttentionBackward<T> backward(
          g, dropout, data_of<T>(dout), data_of<T>(dense), data_of<T>(out), data_of<float>(lse),
          mutable_data_of<T>(dqkv));
      const int64_t parts =
          std::min(g.groups(), count_parts(g.groups() * g.tokens() * g.tokens() * 5 * g.dim, 1 << 17));
      for_each_part(parts, [&](int64_t part) {
        backward.run(part_range(g.groups(), part, parts), workspace(backward.floats()));
      });
    });
  return dqkv;
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("patch_attention_forward", mvit3::boxed<mvit3::patch_attention_forward>);
  m.impl("patch_attention_backward", mvit3::boxed<mvit3::patch_attention_backward>);
}
