// separable_attention, forward: the same for training and for evaluation.

#include <limits>

#include "activation.h"
#include "separable_attention_training.h"

namespace mvit3 {
namespace separable {
namespace {

constexpr int64_t kPoolRows = 32;  // of a tile that only dot products and sums read: it stays in the first-level cache
constexpr int64_t kPoolOperations = 4;  // of a value in the walks before the products
constexpr double kLowest = -std::numeric_limits<double>::infinity();

Plan plan_of(const PatchedMap& map) { return Plan(map, spread_parts(Plan::products(map), Plan::kLeastProducts)); }

// Whether W_v and W_o are cut over threads on their own, because a task would have less than a block of rows.
bool attends_by_products(const PatchedMap& map, const Plan& plan) {
  return !plan.whole() && map.samples * map.tokens() < kBlockRows * torch::stable::get_num_threads();
}

template <typename T, typename E, typename V>
class Forward {
 public:
  Forward(
      const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeightsOf<E, V>& weights,
      const SeparableAttentionDropout& dropout, const T* x, T* y, const SeparableAttentionKept& kept)
      : map_(map), normed_(x, Tokens(map.samples, map.tokens(), map.channels), per_sample, kept.mean, kept.rstd),
        eps_(eps), weights_(weights), dropout_(dropout), y_(y), kept_(kept), places_(places_of(map)),
        plan_(plan_of(map)) {
    thread_local std::vector<Moments> moments;
    thread_local std::vector<Softmax> softmax;
    moments.resize(plan_.tasks());
    softmax.resize(plan_.tasks() * map.positions());
    moments_ = moments.data();
    softmax_ = softmax.data();
    const int64_t floats = plan_.tasks() * map.positions() * map.lanes();
    pooled_ = workspace<1>(floats + (attends_by_products(map, plan_) ? map.samples * map.tokens() * map.lanes() : 0));
    attended_ = tile_of<E>(pooled_ + floats);
  }

  // What only the first task of a sample has to do is little: the calling thread does it for all samples, which is
  // quicker than handing it over.
  void run() const {
    if (plan_.whole())
      return plan_.for_each_task([this](const Task& task) {
        measure(task);
        finish_statistics(task.sample);
        pool(task);
        finish_mean(task.sample);
        multiply_keys(task.sample * map_.positions(), map_.positions(), weights_.key.panels());
        attend(task);
      });
    plan_.for_each_task([this](const Task& task) { measure(task); });
    for (int64_t sample = 0; sample < map_.samples; ++sample) finish_statistics(sample);
    plan_.for_each_task([this](const Task& task) { pool(task); });
    for (int64_t sample = 0; sample < map_.samples; ++sample) finish_mean(sample);
    for_each_block(map_.samples * map_.positions(), weights_.key, [this](Range rows, Range panels) {
      multiply_keys(rows.begin, rows.size(), panels);
    });
    if (attends_by_products(map_, plan_))
      attend_by_products();
    else
      plan_.for_each_task([this](const Task& task) { attend(task); });
  }

 private:
  // The largest score so far, and sums of the exponentials relative to it: of all, and of those that dropout keeps.
  struct Softmax {
    double largest = kLowest, total = 0, kept = 0;

    // Takes in a larger score; the factor for what was summed up before.
    double raise(double score) {
      if (!(score > largest)) return 1;
      const double factor = std::exp(largest - score);
      largest = score;
      total *= factor;
      kept *= factor;
      return factor;
    }
  };

  Softmax* softmax(int64_t task) const { return softmax_ + task * map_.positions(); }
  float* pooled(int64_t task) const { return pooled_ + task * map_.positions() * map_.lanes(); }
  int64_t row(const Task& task, int64_t token) const { return task.sample * map_.tokens() + token; }

  void measure(const Task& task) const {
    const int64_t first = row(task, task.rows.begin), channels = map_.channels;
    if (normed_.per_sample()) {
      moments_[task.index] = moments_of(normed_.row(first), task.rows.size() * channels);
      return;
    }
    for (int64_t r = first; r < first + task.rows.size(); ++r) {
      const Moments token = row_moments(normed_.row(r), channels);
      kept_.mean[r] = float(token.mean);
      kept_.rstd[r] = token.rstd(eps_);
    }
  }

  void finish_statistics(int64_t sample) const {
    if (!normed_.per_sample()) return;
    Moments whole;
    for (int64_t i = 0; i < plan_.ranges(); ++i) whole.join(moments_[sample * plan_.ranges() + i]);
    kept_.mean[sample] = float(whole.mean);
    kept_.rstd[sample] = whole.rstd(eps_);
  }

  // Scores and the weighted mean of the task's tokens, without their denominator.
  void pool(const Task& task) const {
    const int64_t lanes = map_.lanes(), positions = map_.positions();
    float *tile = workspace((kPoolRows + positions) * lanes + positions), *sums = tile + kPoolRows * lanes,
          *factors = sums + positions * lanes;
    float *out = pooled(task.index), *scores = kept_.scores ? kept_.scores + task.sample * map_.tokens() : nullptr;
    Softmax* softmax = this->softmax(task.index);
    const uint32_t key = dropout_.score.key(task.sample);
    std::fill_n(softmax, positions, Softmax{});
    std::fill_n(out, positions * lanes, 0.0f);
    for (int64_t first = task.rows.begin; first < task.rows.end; first += kPoolRows) {
      const int64_t count = std::min(kPoolRows, task.rows.end - first);
      const Place* places = places_ + first;
      normed_.normalise_again(row(task, first), count, tile, lanes);
      alignas(64) float weights[kPoolRows] = {};
      std::fill_n(factors, positions, 1.0f);
      for (int64_t r = 0; r < count; ++r) {
        const auto [position, score] = places[r];
        weights[r] = dot(tile + r * lanes, weights_.score.data(), lanes) + weights_.score_bias;
        if (scores) scores[score] = weights[r];
        factors[position] *= float(softmax[position].raise(weights[r]));
      }
      for (int64_t r = 0; r < count; ++r) weights[r] -= float(softmax[places[r].position].largest);
      for (int64_t r = 0; r < kPoolRows; r += kLanes) store(weights + r, exp(load(weights + r)));
      std::fill_n(sums, positions * lanes, 0.0f);
      for (int64_t r = 0; r < count; ++r) {
        const auto [position, score] = places[r];
        const float kept = weights[r] * kept_score(dropout_.score, key, score);
        softmax[position].total += weights[r];
        softmax[position].kept += kept;
        add_scaled(sums + position * lanes, 1.0f, tile + r * lanes, kept, lanes);
      }
      for (int64_t p = 0; p < positions; ++p) add_scaled(out + p * lanes, factors[p], sums + p * lanes, 1.0f, lanes);
    }
  }

  // Puts together what the tasks of a sample found: the weighted mean.
  void finish_mean(int64_t sample) const {
    const int64_t lanes = map_.lanes(), positions = map_.positions(), patches = map_.patches(),
                  first = sample * plan_.ranges();
    float* mean = kept_.pooled + sample * positions * lanes;
    std::fill_n(mean, positions * lanes, 0.0f);
    for (int64_t p = 0; p < positions; ++p) {
      Softmax whole;
      for (int64_t i = first; i < first + plan_.ranges(); ++i) whole.raise(softmax(i)[p].largest);
      for (int64_t i = first; i < first + plan_.ranges(); ++i) {
        const Softmax& part = softmax(i)[p];
        const double factor = part.largest == whole.largest ? 1 : std::exp(part.largest - whole.largest);
        whole.total += factor * part.total;
        whole.kept += factor * part.kept;
        add_scaled(mean + p * lanes, 1.0f, pooled(i) + p * lanes, float(factor), lanes);
      }
      const float scale = float(1 / whole.total);
      for (int64_t c = 0; c < lanes; c += kLanes) store(mean + p * lanes + c, load(mean + p * lanes + c) * scale);
      softmax(first)[p].kept = whole.kept / whole.total;
      if (!kept_.scores) continue;
      float* scores = kept_.scores + sample * map_.tokens() + p * patches;
      for (int64_t i = 0; i < patches; i += kLanes)
        store_some(scores + i, exp(load_some(scores + i, patches - i) - float(whole.largest)) * scale, patches - i);
    }
  }

  // Of positions of all samples, from `first` on: context = W_k m + b_k (sum of the weights), m the weighted mean.
  void multiply_keys(int64_t first, int64_t count, Range panels) const {
    const int64_t lanes = map_.lanes(), positions = map_.positions(), begin = panels.begin * kPanel,
                  width = weights_.key.lanes(panels);
    float* context = kept_.context + first * lanes;
    multiply_into(kept_.pooled + first * lanes, lanes, count, weights_.key, panels, context, lanes);
    for (int64_t i = 0; i < count; ++i) {
      const Softmax& whole = softmax((first + i) / positions * plan_.ranges())[(first + i) % positions];
      add_scaled(context + i * lanes + begin, 1.0f, weights_.key_bias.data() + begin, float(whole.kept), width);
    }
  }

  void attend(const Task& task) const {
    const int64_t lanes = map_.lanes();
    float* product = workspace(2 * kTileRows * lanes);  // in the place of the normalised rows, when they were read
    V* tile = tile_of<V>(product);
    E* attended = tile_of<E>(product + kTileRows * lanes);
    for (int64_t first = task.rows.begin; first < task.rows.end; first += kTileRows) {
      const int64_t count = std::min(kTileRows, task.rows.end - first);
      multiply_values(row(task, first), count, weights_.value.panels(), tile, attended);
      multiply_out(row(task, first), count, weights_.out.panels(), attended, product);
    }
  }

  // The same where a task would have less than a block of rows.
  void attend_by_products() const {
    const int64_t lanes = map_.lanes(), rows = map_.samples * map_.tokens();
    for_each_block_tile(rows, weights_.value, [&](int64_t first, int64_t count, Range panels) {
      multiply_values(first, count, panels, tile_of<V>(workspace(kTileRows * lanes)), attended_ + first * lanes);
    });
    for_each_block_tile(rows, weights_.out, [&](int64_t first, int64_t count, Range panels) {
      multiply_out(first, count, panels, attended_ + first * lanes, workspace(kTileRows * lanes));
    });
  }

  // ReLU(W_v n + b_v) * context of rows of all samples, from `first` on; `tile` takes the normalised rows.
  void multiply_values(int64_t first, int64_t count, Range panels, V* tile, E* attended) const {
    const int64_t lanes = map_.lanes(), tokens = map_.tokens();
    const float* contexts[kTileRows];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t position = places_[(first + r) % tokens].position;
      contexts[r] = kept_.context + ((first + r) / tokens * map_.positions() + position) * lanes;
    }
    normed_.normalise_again(first, count, tile, lanes);
    multiply(tile, lanes, count, weights_.value, panels, [&](int64_t r, int64_t c, Vec sums) {
      const Vec value = activate<kRelu>(sums + load(weights_.value_bias.data() + c));
      store(attended + r * lanes + c, value * load(contexts[r] + c));
    });
  }

  // x + dropout(W_o attended + b_o) of these rows.
  void multiply_out(int64_t first, int64_t count, Range panels, const E* attended, float* product) const {
    const int64_t lanes = map_.lanes(), channels = map_.channels, tokens = map_.tokens();
    multiply_into(attended, lanes, count, weights_.out, panels, product, lanes);
    for (int64_t r = 0; r < count; ++r) {
      const uint32_t key = dropout_.output.key((first + r) / tokens);
      const int64_t element = (first + r) % tokens * channels;
      const T* x = normed_.row(first + r);
      T* y = y_ + (first + r) * channels;
      for (int64_t c = panels.begin * kPanel; c < std::min(panels.end * kPanel, channels); c += kLanes) {
        Vec branch = load(product + r * lanes + c) + load(weights_.out_bias.data() + c);
        if (dropout_.output.active()) branch = branch * dropout_.output(key, element + c);
        store_some(y + c, load_some(x + c, channels - c) + branch, channels - c);
      }
    }
  }

  const PatchedMap& map_;
  const NormedMap<T> normed_;
  double eps_;
  const SeparableAttentionWeightsOf<E, V>& weights_;
  const SeparableAttentionDropout& dropout_;
  T* y_;
  const SeparableAttentionKept& kept_;
  const Place* places_;
  const Plan plan_;
  Moments* moments_;
  Softmax* softmax_;
  float* pooled_;
  E* attended_;
};

}  // namespace
}  // namespace separable

template <typename E, typename V>
SeparableAttentionWeightsOf<E, V>::SeparableAttentionWeightsOf(
    const NormLinearParameters& qkv, const FloatMatrix& out, const std::optional<Tensor>& out_bias)
    : SeparableAttentionWeightsOf(qkv, qkv.scale().data(), qkv.folded_bias().data(), out.data(), out_bias, qkv.inputs) {
}

template <typename E, typename V>
SeparableAttentionWeightsOf<E, V>::SeparableAttentionWeightsOf(
    const NormLinearParameters& qkv, const float* scale, const float* bias, const float* out_weight,
    const std::optional<Tensor>& out_bias, int64_t d)
    : score(separable::folded_score(qkv)), key_bias(separable::segment(bias + 1, d)),
      value_bias(separable::segment(bias + 1 + d, d)), out_bias(read_vector("out_bias", out_bias, d)),
      score_bias(bias[0]), key(PackedWeight::rows(separable::key_rows(qkv), d, d, d, scale)),
      value(PackedWeightOf<V>::rows(separable::value_rows(qkv), d, d, d, scale)),
      out(PackedWeightOf<E>::rows(out_weight, d, d, d)) {}

template <typename T, typename E, typename V>
void separable_attention(
    const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeightsOf<E, V>& weights,
    const SeparableAttentionDropout& dropout, const T* x, T* y, const SeparableAttentionKept& kept) {
  separable::Forward<T, E, V>(map, eps, per_sample, weights, dropout, x, y, kept).run();
}

template <typename T, typename E, typename V>
void separable_attention(
    const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeightsOf<E, V>& weights, const T* x,
    T* y) {
  const int64_t statistics = map.samples * (per_sample ? 1 : map.tokens()),
                context = map.samples * map.positions() * map.lanes();
  thread_local std::vector<float> memory;
  memory.resize(2 * statistics + 2 * context);
  float *mean = memory.data(), *rstd = mean + statistics, *pooled = rstd + statistics;
  const SeparableAttentionDropout none;
  separable_attention(map, eps, per_sample, weights, none, x, y, {mean, rstd, nullptr, pooled, pooled + context});
}

template <typename E, typename V>
std::vector<Region> separable_attention_regions(
    const PatchedMap& map, const SeparableAttentionWeightsOf<E, V>& weights) {
  using namespace separable;
  const Plan plan = plan_of(map);
  const int64_t walk = map.channels * kPoolOperations, products = 2 * map.channels * map.lanes();
  if (plan.whole()) {
    const int64_t keys = map.channels * map.lanes() * map.positions();
    return {plan.operations(2 * walk + products + keys / map.tokens())};
  }
  const int64_t rows = map.samples * map.tokens(), means = map.samples * map.positions();
  std::vector<Region> regions{
      plan.operations(walk), plan.operations(walk), BlockCut(means, weights.key).operations(weights.key)};
  if (attends_by_products(map, plan)) {
    regions.push_back(BlockCut(rows, weights.value).operations(weights.value));
    regions.push_back(BlockCut(rows, weights.out).operations(weights.out));
  } else {
    regions.push_back(plan.operations(products));
  }
  return regions;
}

#define MVIT3_WEIGHTS(E, V)                          \
  template struct SeparableAttentionWeightsOf<E, V>; \
  template std::vector<Region> separable_attention_regions(const PatchedMap&, const SeparableAttentionWeightsOf<E, V>&);
#define MVIT3_SEPARABLE_ATTENTION(T, E, V)                                                                         \
  template void separable_attention(                                                                               \
      const PatchedMap&, double, bool, const SeparableAttentionWeightsOf<E, V>&, const SeparableAttentionDropout&, \
      const T*, T*, const SeparableAttentionKept&);                                                                \
  template void separable_attention(                                                                               \
      const PatchedMap&, double, bool, const SeparableAttentionWeightsOf<E, V>&, const T*, T*);
MVIT3_WEIGHTS(float, float)
MVIT3_SEPARABLE_ATTENTION(float, float, float)
MVIT3_SEPARABLE_ATTENTION(Float16, float, float)
MVIT3_SEPARABLE_ATTENTION(BFloat16, Multiplied<BFloat16>, float)
#if defined(__AVX512BF16__)
MVIT3_WEIGHTS(BFloat16, float)
MVIT3_WEIGHTS(BFloat16, BFloat16)
MVIT3_SEPARABLE_ATTENTION(float, BFloat16, BFloat16)
#endif
#undef MVIT3_SEPARABLE_ATTENTION
#undef MVIT3_WEIGHTS

}  // namespace mvit3
