// patch_attention: multi-head softmax attention among the pixels that share their position inside a patch. Forward core
// and geometry.
//
// Unfold and fold are index arithmetic: a head of a group of pixels is copied to dense rows in a thread's cache (of the
// type that products read, where the map is of it, else of float32), and the result is written where the pixels lie.
// The vector lanes are queries: scores are S^T[key][query], so that neither a head width nor a number of keys is
// padded, the softmax runs along rows, and keys and values are read by the micro-kernel as they are. Scores are scaled,
// to units of log 2, where their exponentials are taken, as queries and keys that are bfloat16 lose nothing in a
// product then. Many keys are taken in blocks, with the running maximum and sum of the online softmax. Products of
// bfloat16 read a copy of the transposed values, which is made once for all blocks of queries, and the exponentials in
// pairs of keys.
#pragma once

#include <cmath>

#include "random.h"
#include "tile.h"
#include "transpose.h"

namespace mvit3 {

// The pixels of one image that share their position inside a patch, as one head sees them, are a group: its tokens
// attend to each other.
struct PatchGroups {
  int64_t batch, height, width, heads, dim, patch_height, patch_width;

  int64_t channels() const { return heads * dim; }
  int64_t tokens() const { return (height / patch_height) * (width / patch_width); }
  int64_t positions() const { return patch_height * patch_width; }
  int64_t per_image() const { return positions() * heads; }
  int64_t groups() const { return batch * per_image(); }
  int64_t channel(int64_t group) const { return group % heads * dim; }
  // Of maps of `parts` times D channels.
  template <typename T>
  int64_t bytes(int64_t parts) const {
    return batch * height * width * parts * channels() * int64_t(sizeof(T));
  }
  float scale() const { return float(1 / std::sqrt(double(dim))); }
  float binary_scale() const { return scale() * kLog2e; }

  // f(i, pixel) for tokens first..first+count-1 of a group: the i'th of them is that pixel of the whole map.
  template <typename F>
  MVIT3_INLINE void for_each_token(int64_t group, int64_t first, int64_t count, const F& f) const {
    const int64_t position = group / heads % positions(), columns = width / patch_width;
    int64_t row = group / per_image() * height + first / columns * patch_height + position / patch_width,
            column = first % columns;
    for (int64_t i = 0; i < count; ++i) {
      f(i, row * width + column * patch_width + position % patch_width);
      if (++column == columns) column = 0, row += patch_height;
    }
  }

  // Elements of a group's tokens as rows, `stride` apart, the last of which may be followed by up to a vector of
  // anything.
  int64_t rows_size(int64_t stride) const { return round_up(tokens() * stride + kLanes, 2 * kLanes); }

  // How many heads to load at once, if a head takes that many floats: what lies together in a pixel is best read
  // together, and should stay in the second-level cache.
  int64_t heads_at_once(int64_t floats) const { return std::clamp<int64_t>(kTileFloats / floats, 1, heads); }

  // All tokens of `count` groups, the heads from that of `group` on, from a map x of `parts` times D channels, as rows
  // `stride` apart, zero behind D: part p of the i'th group begins at rows + (i * parts + p) * rows_size(stride).
  template <typename T, typename Row>
  void load_tokens(int64_t group, int64_t count, const T* x, int64_t parts, Row* rows, int64_t stride) const {
    const int64_t size = rows_size(stride);
    for_each_token(group, 0, tokens(), [&](int64_t token, int64_t pixel) {
      for (int64_t p = 0; p < parts; ++p) {
        const T* source = x + (pixel * parts + p) * channels() + channel(group);
        for (int64_t i = 0; i < count; ++i) {
          Row* target = rows + (i * parts + p) * size + token * stride;
          for (int64_t c = 0; c < dim; c += kLanes) store(target + c, load_some(source + i * dim + c, dim - c));
        }
      }
    });
  }

  // Asks for the memory of some of these tokens, into the second-level cache.
  template <typename T>
  void prefetch_tokens(int64_t group, int64_t count, Range tokens, const T* x, int64_t parts) const {
    constexpr uintptr_t kLine = 64;
    for_each_token(group, tokens.begin, tokens.size(), [&](int64_t, int64_t pixel) {
      for (int64_t p = 0; p < parts; ++p) {
        const T* source = x + (pixel * parts + p) * channels() + channel(group);
        for (auto line = reinterpret_cast<uintptr_t>(source) & ~(kLine - 1);
             line < reinterpret_cast<uintptr_t>(source + count * dim); line += kLine)
          prefetch(reinterpret_cast<const void*>(line));
      }
    });
  }

  // The way back, from rows of lanes_of(dim) floats, each times factor(i).
  template <typename T, typename Factor>
  void store_tokens(
      int64_t group, int64_t first, int64_t count, const float* rows, const Factor& factor, T* x, int64_t stride,
      int64_t channel) const {
    for_each_token(group, first, count, [&](int64_t i, int64_t pixel) {
      T* target = x + pixel * stride + channel;
      const Vec times = factor(i);
      for (int64_t c = 0; c < dim; c += kLanes)
        store_some(target + c, load(rows + i * lanes_of(dim) + c) * times, dim - c);
    });
  }
};

// How the forward pass is cut over threads: into blocks of queries, a panel of them, or a vector where there would be
// fewer blocks than threads. Made by the calling thread: what PyTorch says of threads holds there.
struct AttentionCut {
  int64_t queries, blocks_per_group, blocks, parts;

  explicit AttentionCut(const PatchGroups& g) {
    const int64_t tokens = g.tokens();
    const bool few = g.groups() * ((tokens + kPanel - 1) / kPanel) < torch::stable::get_num_threads();
    queries = few ? kLanes : kPanel;
    blocks_per_group = (tokens + queries - 1) / queries;
    blocks = g.groups() * blocks_per_group;
    parts = std::min(blocks, spread_parts(g.groups() * tokens * tokens * 2 * g.dim, 1 << 17));
  }

  Region operations(const PatchGroups& g) const {
    return operations_of(parts, [&](int64_t part) {
      const Range mine = part_range(blocks, part, parts);
      int64_t lanes = 0;
      for (int64_t block = mine.begin; block < mine.end; ++block)
        lanes += lanes_of(std::min(queries, g.tokens() - block % blocks_per_group * queries));
      return lanes * g.tokens() * 2 * g.dim;
    });
  }
};

// The groups that a thread loads next. Their pixels lie too far apart for the hardware to fetch them ahead of
// `load_tokens`, and asking for all of them at once takes as long as reading them: so a share is fetched before every
// product of the groups at hand.
struct GroupsAhead {
  int64_t group = 0, count = 0;  // no groups: nothing to fetch
  int64_t share = 0, done = 0;   // tokens

  GroupsAhead() = default;
  // After `before` groups from `first` on, whose work has `products` products each. The next heads of an image follow
  // each other.
  GroupsAhead(const PatchGroups& g, int64_t first, int64_t before, int64_t at_once, int64_t products)
      : group(first + before), count(group < g.groups() ? std::min(at_once, g.heads - group % g.heads) : 0),
        share((g.tokens() + before * products - 1) / (before * products)) {}

  // Calls f(tokens) with the next share.
  template <typename F>
  void step(const PatchGroups& g, const F& f) {
    if (count == 0 || done >= g.tokens()) return;
    const Range tokens{done, std::min(done + share, g.tokens())};
    done = tokens.end;
    f(tokens);
  }

  // Whether it pays: not for what a second-level cache may still hold.
  static bool pays(int64_t bytes) { return bytes > int64_t(8) << 20; }
};

// Attention of blocks of queries. Products are made of E, results are written as Y.
template <typename T, typename E, typename Y = T>
class AttentionForward {
 public:
  static constexpr int64_t kKeys = 128;  // of a block of scores: 16 KiB

  // `lse`, if not null, receives the binary logarithm of each query's sum of 2^score: (groups, tokens).
  AttentionForward(const PatchGroups& groups, const Dropout& dropout, const T* qkv, Y* out, float* lse)
      : g_(groups), cut_(groups), dropout_(dropout), qkv_(qkv), out_(out), lse_(lse),
        far_(GroupsAhead::pays(groups.bytes<T>(4))) {}

  const AttentionCut& cut() const { return cut_; }

  // The memory that `run` needs.
  int64_t floats() const {
    return heads_at_once() * group_floats() + copies_floats() + std::min(kKeys, g_.tokens()) * kPanel +
           2 * depth() * kPanel + kPanel * lanes_of(g_.dim) + 2 * kPanel;
  }

  void run(Range blocks, float* memory) const {
    const int64_t per_group = cut_.blocks_per_group, queries = cut_.queries;
    int64_t loaded = 0, end = 0, copied = -1;  // the groups in memory; the one whose operands are
    GroupsAhead ahead;
    E* copies = tile_of<E>(memory + heads_at_once() * group_floats());
    float* rest = memory + heads_at_once() * group_floats() + copies_floats();
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t group = block / per_group, first = block % per_group * queries,
                    count = std::min(queries, g_.tokens() - first);
      if (group >= end) {
        loaded = group;
        end =
            group + std::min({heads_at_once(), g_.heads - group % g_.heads, (blocks.end - 1) / per_group - group + 1});
        g_.load_tokens(group, end - group, qkv_, 3, tile_of<Row>(memory), depth());
        if (far_)
          ahead =
              GroupsAhead(g_, group, end - group, heads_at_once(), per_group * 2 * ((g_.tokens() + kKeys - 1) / kKeys));
      }
      const Row* tokens = tile_of<Row>(memory + (group - loaded) * group_floats());
      if (kCopies && group != copied) copy(tokens, copies);
      copied = group;
      if (count > kLanes)
        attend<kPanelVecs>(group, first, count, tokens, copies, ahead, rest);
      else
        attend<1>(group, first, count, tokens, copies, ahead, rest);
    }
  }

 private:
  static constexpr int64_t kDepth = Dot<E>::kDepth;
  static constexpr bool kCopies = !std::is_same_v<E, float>;
  using Row = std::conditional_t<std::is_same_v<T, E>, E, float>;  // E, wherever products are not of float32

  int64_t part_size() const { return g_.rows_size(depth()); }
  int64_t group_floats() const { return 3 * part_size() * int64_t(sizeof(Row)) / int64_t(sizeof(float)); }
  int64_t heads_at_once() const { return g_.heads_at_once(group_floats()); }

  // Rows are whole steps of a head. The copy of the values is transposed: rows of `width` keys.
  int64_t depth() const { return round_up(g_.dim, kDepth); }
  int64_t width() const { return round_up(g_.tokens(), kLanes * kDepth); }
  int64_t copies_floats() const { return kCopies ? g_.dim * width() : 0; }

  // Neighbours of a step side by side first: they are words then, which are half as many.
  void copy(const Row* rows, E* copies) const {
    const int64_t dim = g_.dim, tokens = g_.tokens();
    const Row* values = rows + 2 * part_size();
    for (int64_t c = 0; c < dim; c += kLanes)
      for (int64_t token = 0; token < tokens; token += kLanes * kDepth) {
        alignas(64) float square[kLanes * kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          store_step(tile_of<E>(square + i * kLanes), [&](int64_t k) {
            const int64_t at = token + i * kDepth + k;
            return at < tokens ? load_some(values + at * depth() + c, dim - c) : Vec(0.0f);
          });
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, dim - c); ++i)
          std::memcpy(copies + (c + i) * width() + token, square + i * kLanes, kLanes * sizeof(float));
      }
  }

  // Keys from `key` on and queries, for scores; transposed values from `key` on and the exponentials of `n` keys.
  OperandsOf<E> of_scores(const E* keys, const E* queries, int64_t width) const {
    return {keys, queries, depth(), kDepth, width * kDepth, depth() / kDepth};
  }
  OperandsOf<E> of_sums(
      const Row* rows, const E* copies, int64_t key, const E* weights, int64_t width, int64_t n) const {
    if constexpr (!kCopies) return {rows + 2 * part_size() + key * g_.dim, weights, 1, g_.dim, width, n};
    return {copies + key, weights, this->width(), kDepth, width * kDepth, (n + kDepth - 1) / kDepth};
  }

  void fetch(GroupsAhead& ahead) const {
    ahead.step(g_, [&](Range tokens) { g_.prefetch_tokens(ahead.group, ahead.count, tokens, qkv_, 3); });
  }

  template <int Vecs>
  void attend(
      int64_t group, int64_t first, int64_t count, const Row* rows, const E* copies, GroupsAhead& ahead,
      float* memory) const {
    constexpr int64_t kQueries = Vecs * kLanes;
    const int64_t dim = g_.dim, tokens = g_.tokens();
    float *scores = memory, *turned = scores + std::min(kKeys, tokens) * kPanel, *sums = turned + depth() * kPanel;
    float *results = sums + depth() * kPanel, *greatest = results + kPanel * lanes_of(dim), *totals = greatest + kPanel;
    const E* weights = tile_of<E>(scores);  // what `exponentiate` leaves
    // Words are steps of a head: transposed, they are the second operand of a product.
    transpose(
        reinterpret_cast<const float*>(rows + first * depth()), depth() / kDepth, count, depth() / kDepth, turned,
        kQueries);
    const E *queries = tile_of<E>(turned), *keys = rows + part_size();
    const Vec scale = g_.binary_scale();

    Vec top[Vecs], total[Vecs];
    for (int v = 0; v < Vecs; ++v) {
      top[v] = -std::numeric_limits<float>::infinity();
      total[v] = 0.0f;
    }
    for (int64_t key = 0; key < tokens; key += kKeys) {
      const int64_t n = std::min(kKeys, tokens - key);
      fetch(ahead);
      multiply_panel_into(n, Vecs, of_scores(keys + key * depth(), queries, kQueries), scores, kQueries, false);
      Vec before[Vecs], block[Vecs];
      for (int v = 0; v < Vecs; ++v) {
        before[v] = top[v];
        block[v] = -std::numeric_limits<float>::infinity();
      }
      for (int64_t k = 0; k < n; ++k)
        for (int v = 0; v < Vecs; ++v) block[v] = max(load(scores + k * kQueries + v * kLanes), block[v]);
      for (int v = 0; v < Vecs; ++v) top[v] = max(block[v] * scale, top[v]);
      if (key > 0)
        for (int v = 0; v < Vecs; ++v) {
          const Vec shrink = exp2(before[v] - top[v]);
          total[v] = total[v] * shrink;
          for (int64_t c = 0; c < dim; ++c) {
            float* p = sums + c * kQueries + v * kLanes;
            store(p, load(p) * shrink);
          }
        }
      if (dropout_.active())
        exponentiate<Vecs, true>(group, first, key, n, scores, top, total);
      else
        exponentiate<Vecs, false>(group, first, key, n, scores, top, total);
      fetch(ahead);
      multiply_panel_into(dim, Vecs, of_sums(rows, copies, key, weights, kQueries, n), sums, kQueries, key > 0);
    }

    for (int v = 0; v < Vecs; ++v) {
      store(greatest + v * kLanes, top[v]);
      store(totals + v * kLanes, total[v]);
    }
    transpose(sums, kQueries, dim, count, results, lanes_of(dim));
    g_.store_tokens(
        group, first, count, results, [&](int64_t i) { return Vec(1 / totals[i]); }, out_, g_.channels(),
        g_.channel(group));
    if (lse_)
      for (int64_t i = 0; i < count; ++i) lse_[group * tokens + first + i] = greatest[i] + std::log2(totals[i]);
  }

  // The exponentials of the scores of `n` keys from `key` on, in the place of the scores, which are read before, and
  // their sums; those of dropout are multiplied by its mask behind that.
  template <int Vecs, bool Drop>
  void exponentiate(
      int64_t group, int64_t first, int64_t key, int64_t n, float* scores, const Vec* top, Vec* total) const {
    constexpr int64_t kQueries = Vecs * kLanes, kRun = 16;  // what a sum of many rounds off, every output would share
    const int64_t tokens = g_.tokens(), in_image = group % g_.per_image();
    const uint32_t seed = Drop ? dropout_.key(group / g_.per_image()) : 0;
    const Vec scale = g_.binary_scale();
    E* weights = tile_of<E>(scores);
    for (int64_t begin = 0; begin < n; begin += kRun) {
      Vec run[Vecs] = {};
      for (int64_t k = begin; k < std::min(begin + kRun, n); k += kDepth)
        for (int v = 0; v < Vecs; ++v)
          store_step(weights + k * kQueries + v * kLanes * kDepth, [&](int64_t i) {
            if (k + i >= n) return Vec(0.0f);
            const Vec weight =
                exp2<kRoughly<E>>(fma(load(scores + (k + i) * kQueries + v * kLanes), scale, Vec(0.0f) - top[v]));
            run[v] += weight;
            if constexpr (!Drop) return weight;
            return weight * dropout_(seed, (in_image * tokens + first + v * kLanes) * tokens + key + k + i, tokens);
          });
      for (int v = 0; v < Vecs; ++v) total[v] += run[v];
    }
  }

  const PatchGroups& g_;
  const AttentionCut cut_;
  const Dropout& dropout_;
  const T* qkv_;
  Y* out_;
  float* lse_;
  bool far_;
};

// qkv (B, H, W, 3D) to out (B, H, W, D), both contiguous, on all threads.
template <typename T, typename E = float, typename Y = T>
void patch_attention(const PatchGroups& groups, const Dropout& dropout, const T* qkv, Y* out, float* lse) {
  const AttentionForward<T, E, Y> forward(groups, dropout, qkv, out, lse);
  const AttentionCut& cut = forward.cut();
  for_each_part(cut.parts, [&](int64_t part) {
    forward.run(part_range(cut.blocks, part, cut.parts), workspace(forward.floats()));
  });
}

}  // namespace mvit3
