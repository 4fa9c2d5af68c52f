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

// Products are made of E.
template <typename T, typename E>
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
           2 * kQueries * kPanel + 2 * g_.dim * kPanel + 2 * depth() * kPanel + kPanel * lanes_of(g_.dim) +
           copies_floats();
  }

  void run(Range groups, float* memory) const {
    float* rest = memory + heads_at_once() * group_floats();
    for (int64_t group = groups.begin; group < groups.end;) {
      const int64_t count = std::min({heads_at_once(), g_.heads - group % g_.heads, groups.end - group}),
                    rows = count * g_.rows_size(g_.dim);
      float *qkv = memory, *grads = qkv + 3 * rows, *outs = grads + rows;
      g_.load_tokens(group, count, qkv_, 3, qkv, g_.dim);
      g_.load_tokens(group, count, dout_, 1, grads, g_.dim);
      g_.load_tokens(group, count, out_, 1, outs, g_.dim);
      GroupsAhead ahead;
      if (far_)
        ahead = GroupsAhead(
            g_, group, count, heads_at_once(),
            5 * ((g_.tokens() + kPanel - 1) / kPanel) * ((g_.tokens() + kQueries - 1) / kQueries));
      for (int64_t end = group + count; group < end;
           ++group, qkv += 3 * g_.rows_size(g_.dim), grads += g_.rows_size(g_.dim), outs += g_.rows_size(g_.dim))
        differentiate(group, qkv, grads, outs, ahead, rest);
    }
  }

 private:
  static constexpr int64_t kDepth = Dot<E>::kDepth;
  static constexpr bool kCopies = !std::is_same_v<E, float>;

  // The tokens of a group as products read them: `along` is for those that sum over a head's channels, rows of whole
  // steps, `across` for those that sum over tokens, steps of them side by side. Where E is float both are the rows
  // themselves.
  struct Operand {
    const E *along, *across;
  };

  // What the blocks of keys of a group share: operands of its queries and of the gradient of its outputs, its keys (its
  // values behind them), what softmax's backward subtracts, the gradient of its queries, and memory for a block's
  // copies.
  struct Group {
    int64_t group;
    Operand queries, grads;
    const float *keys, *deltas;
    float* dqueries;
    E* copy;
  };

  int64_t group_floats() const { return 5 * g_.rows_size(g_.dim); }
  int64_t heads_at_once() const { return g_.heads_at_once(group_floats()); }
  int64_t depth() const { return round_up(g_.dim, kDepth); }
  int64_t across_stride() const { return kCopies ? lanes_of(g_.dim) : g_.dim; }

  // Copies: of queries and gradients, of the gradients of a block of scores, and of a block of keys.
  int64_t along_size() const { return round_up(g_.tokens() * depth() + kLanes, 2 * kLanes); }
  int64_t operand_size() const { return along_size() + round_up(g_.tokens(), kDepth) * across_stride(); }
  int64_t copies_floats() const {
    const int64_t elements = 2 * operand_size() + kQueries * kPanel + kPanel * across_stride();
    return kCopies ? elements * int64_t(sizeof(E)) / int64_t(sizeof(float)) : 0;
  }

  Operand operand(const float* rows, E* copy) const {
    if constexpr (!kCopies) return {rows, rows};
    for (int64_t token = 0; token < g_.tokens(); ++token)
      load_rows(rows + token * g_.dim, 0, 1, g_.dim, copy + token * depth(), 0);
    E* across = copy + along_size();
    rows_in_steps(rows, g_.dim, g_.tokens(), g_.dim, across, across_stride());
    return {copy, across};
  }

  // The first operand of a product with the channels of the tokens from `first` on, and the second one.
  OperandsOf<E> along(const E* rows, int64_t first, const E* b, int64_t b_width) const {
    return {rows + first * depth(), b, depth(), kDepth, b_width * kDepth, depth() / kDepth};
  }
  // The same with `n` of the tokens.
  OperandsOf<E> across(const E* steps, int64_t first, int64_t n, const E* b, int64_t b_width) const {
    const int64_t stride = across_stride();
    return {steps + first * stride, b, kDepth, stride * kDepth, b_width * kDepth, (n + kDepth - 1) / kDepth};
  }

  // Tokens of a block, transposed, as the second operand of a product.
  template <int Vecs>
  const E* turn(const float* rows, int64_t count, float* out) const {
    constexpr int64_t kKeys = Vecs * kLanes;
    transpose(rows, g_.dim, count, g_.dim, out, kKeys);
    if constexpr (!kCopies) return out;
    E* steps = tile_of<E>(out);  // in the same place: a step is read before it is written
    for (int64_t c = 0; c < g_.dim; c += kDepth)
      for (int v = 0; v < Vecs; ++v)
        store_step(steps + c * kKeys + v * kLanes * kDepth, [&](int64_t k) {
          return c + k < g_.dim ? load(out + (c + k) * kKeys + v * kLanes) : Vec(0.0f);
        });
    return steps;
  }

  void differentiate(
      int64_t group, const float* queries, const float* grads, const float* outs, GroupsAhead& ahead,
      float* memory) const {
    const int64_t dim = g_.dim, tokens = g_.tokens(), lanes = lanes_of(dim);
    float *deltas = memory, *dqueries = deltas + round_up(tokens, kLanes), *copies = dqueries + tokens * lanes,
          *rest = copies + copies_floats();
    E* const copy = tile_of<E>(copies);
    const Group of_group{group,
                         operand(queries, copy),
                         operand(grads, copy + operand_size()),
                         queries + g_.rows_size(g_.dim),
                         deltas,
                         dqueries,
                         copy + 2 * operand_size()};
    for (int64_t i = 0; i < tokens; ++i) {  // the gradient of out times out: what softmax's backward subtracts
      Vec sum = 0.0f;
      for (int64_t c = 0; c < dim; c += kLanes)
        sum = fma(load_some(grads + i * dim + c, dim - c), load_some(outs + i * dim + c, dim - c), sum);
      deltas[i] = sum_of_lanes(sum);
    }
    for (int64_t first = 0; first < tokens; first += kPanel) {
      const int64_t count = std::min(kPanel, tokens - first);
      if (count > kLanes)
        add_keys<kPanelVecs>(of_group, first, count, ahead, rest);
      else
        add_keys<1>(of_group, first, count, ahead, rest);
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
  void add_keys(const Group& of, int64_t first, int64_t count, GroupsAhead& ahead, float* memory) const {
    constexpr int64_t kKeys = Vecs * kLanes;
    const int64_t dim = g_.dim, tokens = g_.tokens(), group = of.group, channel = g_.channel(group),
                  channels = g_.channels(), lanes = lanes_of(dim);
    const float *keys = of.keys + first * dim, *values = keys + g_.rows_size(g_.dim);
    float *keys_t = memory, *values_t = keys_t + depth() * kPanel, *dkeys_t = values_t + depth() * kPanel,
          *dvalues_t = dkeys_t + dim * kPanel;
    float *scores = dvalues_t + dim * kPanel, *dscores = scores + kQueries * kPanel,
          *rows = dscores + kQueries * kPanel;
    const E *turned_keys = turn<Vecs>(keys, count, keys_t), *turned_values = turn<Vecs>(values, count, values_t),
            *weights = tile_of<E>(scores), *dsteps = tile_of<E>(dscores), *key_steps, *drows;
    if constexpr (kCopies) {
      rows_in_steps(keys, dim, count, dim, of.copy + kQueries * kPanel, across_stride());
      key_steps = of.copy + kQueries * kPanel;
      drows = of.copy;
    } else {
      key_steps = keys;
      drows = dscores;
    }

    for (int64_t query = 0; query < tokens; query += kQueries) {
      const int64_t n = std::min(kQueries, tokens - query);
      fetch(ahead);
      multiply_panel_into<E>(n, Vecs, along(of.queries.along, query, turned_keys, kKeys), scores, kKeys, false);
      fetch(ahead);
      multiply_panel_into<E>(n, Vecs, along(of.grads.along, query, turned_values, kKeys), dscores, kKeys, false);
      if (dropout_.active())
        weigh<Vecs, true>(of, first, query, n, scores, dscores);
      else
        weigh<Vecs, false>(of, first, query, n, scores, dscores);
      fetch(ahead);
      multiply_panel_into<E>(dim, Vecs, across(of.grads.across, query, n, weights, kKeys), dvalues_t, kKeys, query > 0);
      fetch(ahead);
      multiply_panel_into<E>(dim, Vecs, across(of.queries.across, query, n, dsteps, kKeys), dkeys_t, kKeys, query > 0);
      fetch(ahead);
      for (int64_t c = 0; c < dim; c += kPanel)
        multiply_panel_into<E>(
            n, std::min<int64_t>(kPanelVecs, (dim - c + kLanes - 1) / kLanes),
            {drows, key_steps + c * kDepth, kKeys, kDepth, across_stride() * kDepth, (count + kDepth - 1) / kDepth},
            of.dqueries + query * lanes + c, lanes, first > 0);
    }

    const Vec scale = g_.scale();
    transpose(dkeys_t, kKeys, dim, count, rows, lanes);
    g_.store_tokens(group, first, count, rows, [&](int64_t) { return scale; }, dqkv_, 3 * channels, channels + channel);
    transpose(dvalues_t, kKeys, dim, count, rows, lanes);
    g_.store_tokens(
        group, first, count, rows, [](int64_t) { return Vec(1.0f); }, dqkv_, 3 * channels, 2 * channels + channel);
  }

  // Scores become the probabilities (after dropout), the gradients of these become those of the scores: both in steps
  // of queries, in the same place, which is read before; the latter as rows too, in the block's copy.
  template <int Vecs, bool Drop>
  void weigh(const Group& of, int64_t first, int64_t query, int64_t n, float* scores, float* dscores) const {
    constexpr int64_t kKeys = Vecs * kLanes;
    const int64_t tokens = g_.tokens();
    const float *lse = lse_ + of.group * tokens + query, *deltas = of.deltas + query;
    const uint32_t seed = Drop ? dropout_.key(of.group / g_.per_image()) : 0;
    const Vec scale = g_.binary_scale();
    E *weights = tile_of<E>(scores), *dsteps = tile_of<E>(dscores);
    for (int64_t q = 0; q < n; q += kDepth)
      for (int v = 0; v < Vecs; ++v) {
        Vec weight[kDepth], grad[kDepth];
        for (int64_t k = 0; k < kDepth; ++k) {
          weight[k] = grad[k] = 0.0f;
          if (q + k >= n) continue;
          const int64_t at = (q + k) * kKeys + v * kLanes;
          const Vec probability = exp2(fma(load(scores + at), scale, Vec(-lse[q + k])));
          weight[k] = probability;
          grad[k] = load(dscores + at);
          if constexpr (Drop) {
            const int64_t row = of.group % g_.per_image() * tokens + query + q + k;
            const Vec kept = dropout_(seed, row * tokens + first + v * kLanes);
            weight[k] = weight[k] * kept;
            grad[k] = grad[k] * kept;
          }
          grad[k] = probability * (grad[k] - Vec(deltas[q + k]));
          if constexpr (kCopies) store(of.copy + at, grad[k]);
        }
        Dot<E>::store(weights + q * kKeys + v * kLanes * kDepth, weight);
        Dot<E>::store(dsteps + q * kKeys + v * kLanes * kDepth, grad);
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

// Calls f(storage type, type of the operands of products): of few tokens copies of the operands take longer than they
// save.
template <typename F>
void dispatch(const PatchGroups& g, const Tensor& qkv, const F& f) {
  constexpr int64_t kFew = 32;
  dispatch_dtype("qkv", qkv, [&](auto type) {
    if (g.tokens() <= kFew) return f(type, float{});
    return f(type, Multiplied<decltype(type)>{});
  });
}

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
    dispatch(g, dense, [&](auto type, auto multiplied) {
      using T = decltype(type);
      patch_attention<T, decltype(multiplied)>(
          g, dropout, data_of<T>(dense), mutable_data_of<T>(out), mutable_data_of<float>(lse));
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
    dispatch(g, dense, [&](auto type, auto multiplied) {
      using T = decltype(type);
      const AttentionBackward<T, decltype(multiplied)> backward(
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
