// separable_attention, forward: the same for training and for evaluation.

#include <limits>

#include "activation.h"
#include "separable_attention_training.h"

namespace mvit3 {
namespace separable {
namespace {

constexpr int64_t kPoolRows = 32;  // of a tile that only dot products and sums read: it stays in the first-level cache
constexpr double kLowest = -std::numeric_limits<double>::infinity();

template <typename T, typename E>
class Forward {
 public:
  Forward(
      const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeightsOf<E>& weights,
      const SeparableAttentionDropout& dropout, const T* x, T* y, const SeparableAttentionKept& kept)
      : map_(map), normed_(x, Tokens(map.samples, map.tokens(), map.channels), per_sample, kept.mean, kept.rstd),
        eps_(eps), weights_(weights), dropout_(dropout), y_(y), kept_(kept), places_(places_of(map)), plan_(map) {
    thread_local std::vector<Moments> moments;
    thread_local std::vector<Softmax> softmax;
    moments.resize(plan_.tasks());
    softmax.resize(plan_.tasks() * map.positions());
    moments_ = moments.data();
    softmax_ = softmax.data();
    pooled_ = workspace<1>(plan_.tasks() * map.positions() * map.lanes());
  }

  void run() const {
    plan_.run(
        [this](const Task& task) { measure(task); }, [this](const Task& task) { finish_statistics(task); },
        [this](const Task& task) { pool(task); }, [this](const Task& task) { finish_context(task); },
        [this](const Task& task) { attend(task); });
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

  void finish_statistics(const Task& task) const {
    if (!normed_.per_sample() || !task.leads()) return;
    Moments whole;
    for (int64_t i = task.first; i < task.first + plan_.ranges(); ++i) whole.join(moments_[i]);
    kept_.mean[task.sample] = float(whole.mean);
    kept_.rstd[task.sample] = whole.rstd(eps_);
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

  // Puts together what the tasks of a sample found: context = W_k m + b_k (sum of the weights), m the weighted mean.
  void finish_context(const Task& task) const {
    if (!task.leads()) return;
    const int64_t lanes = map_.lanes(), positions = map_.positions(), patches = map_.patches();
    float *mean = kept_.pooled + task.sample * positions * lanes,
          *context = kept_.context + task.sample * positions * lanes;
    std::fill_n(mean, positions * lanes, 0.0f);
    for (int64_t p = 0; p < positions; ++p) {
      Softmax whole;
      for (int64_t i = task.first; i < task.first + plan_.ranges(); ++i) whole.raise(softmax(i)[p].largest);
      for (int64_t i = task.first; i < task.first + plan_.ranges(); ++i) {
        const Softmax& part = softmax(i)[p];
        const double factor = part.largest == whole.largest ? 1 : std::exp(part.largest - whole.largest);
        whole.total += factor * part.total;
        whole.kept += factor * part.kept;
        add_scaled(mean + p * lanes, 1.0f, pooled(i) + p * lanes, float(factor), lanes);
      }
      const float scale = float(1 / whole.total);
      for (int64_t c = 0; c < lanes; c += kLanes) store(mean + p * lanes + c, load(mean + p * lanes + c) * scale);
      softmax(task.first)[p].kept = whole.kept / whole.total;
      if (!kept_.scores) continue;
      float* scores = kept_.scores + task.sample * map_.tokens() + p * patches;
      for (int64_t i = 0; i < patches; i += kLanes)
        store_some(scores + i, exp(load_some(scores + i, patches - i) - float(whole.largest)) * scale, patches - i);
    }
    multiply_into(mean, lanes, positions, weights_.key, context, lanes);
    for (int64_t p = 0; p < positions; ++p)
      add_scaled(context + p * lanes, 1.0f, weights_.key_bias.data(), float(softmax(task.first)[p].kept), lanes);
  }

  void attend(const Task& task) const {
    const int64_t lanes = map_.lanes(), channels = map_.channels;
    const float *context = kept_.context + task.sample * map_.positions() * lanes,
                *value_bias = weights_.value_bias.data();
    const uint32_t key = dropout_.output.key(task.sample);
    float* product = workspace(2 * kTileRows * lanes);  // in the place of the normalised rows, when they were read
    E *tile = tile_of<E>(product), *attended = tile_of<E>(product + kTileRows * lanes);
    for (int64_t first = task.rows.begin; first < task.rows.end; first += kTileRows) {
      const int64_t count = std::min(kTileRows, task.rows.end - first);
      const Place* places = places_ + first;
      normed_.normalise_again(row(task, first), count, tile, lanes);
      multiply(tile, lanes, count, weights_.value, [&](int64_t r, int64_t c, Vec sums) {
        const Vec value = activate<kRelu>(sums + load(value_bias + c));
        store(attended + r * lanes + c, value * load(context + places[r].position * lanes + c));
      });
      multiply_into(attended, lanes, count, weights_.out, product, lanes);
      for (int64_t r = 0; r < count; ++r) {
        const T* x = normed_.row(row(task, first + r));
        T* y = y_ + row(task, first + r) * channels;
        for (int64_t c = 0; c < channels; c += kLanes) {
          Vec branch = load(product + r * lanes + c) + load(weights_.out_bias.data() + c);
          if (dropout_.output.active()) branch = branch * dropout_.output(key, (first + r) * channels + c);
          store_some(y + c, load_some(x + c, channels - c) + branch, channels - c);
        }
      }
    }
  }

  const PatchedMap& map_;
  const NormedMap<T> normed_;
  double eps_;
  const SeparableAttentionWeightsOf<E>& weights_;
  const SeparableAttentionDropout& dropout_;
  T* y_;
  const SeparableAttentionKept& kept_;
  const Place* places_;
  const Plan plan_;
  Moments* moments_;
  Softmax* softmax_;
  float* pooled_;
};

}  // namespace
}  // namespace separable

template <typename E>
SeparableAttentionWeightsOf<E>::SeparableAttentionWeightsOf(
    const NormLinearParameters& qkv, const FloatMatrix& out, const std::optional<Tensor>& out_bias)
    : SeparableAttentionWeightsOf(qkv, qkv.scale().data(), qkv.folded_bias().data(), out.data(), out_bias, qkv.inputs) {
}

template <typename E>
SeparableAttentionWeightsOf<E>::SeparableAttentionWeightsOf(
    const NormLinearParameters& qkv, const float* scale, const float* bias, const float* out_weight,
    const std::optional<Tensor>& out_bias, int64_t d)
    : score(separable::folded_score(qkv)), key_bias(separable::segment(bias + 1, d)),
      value_bias(separable::segment(bias + 1 + d, d)), out_bias(read_vector("out_bias", out_bias, d)),
      score_bias(bias[0]), key(PackedWeight::rows(separable::key_rows(qkv), d, d, d, scale)),
      value(PackedWeightOf<E>::rows(separable::value_rows(qkv), d, d, d, scale)),
      out(PackedWeightOf<E>::rows(out_weight, d, d, d)) {}

template <typename T, typename E>
void separable_attention(
    const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeightsOf<E>& weights,
    const SeparableAttentionDropout& dropout, const T* x, T* y, const SeparableAttentionKept& kept) {
  separable::Forward<T, E>(map, eps, per_sample, weights, dropout, x, y, kept).run();
}

template <typename T, typename E>
void separable_attention(
    const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeightsOf<E>& weights, const T* x,
    T* y) {
  const int64_t statistics = map.samples * (per_sample ? 1 : map.tokens()),
                context = map.samples * map.positions() * map.lanes();
  thread_local std::vector<float> memory;
  memory.resize(2 * statistics + 2 * context);
  float *mean = memory.data(), *rstd = mean + statistics, *pooled = rstd + statistics;
  const SeparableAttentionDropout none;
  separable_attention(map, eps, per_sample, weights, none, x, y, {mean, rstd, nullptr, pooled, pooled + context});
}

#define MVIT3_SEPARABLE_ATTENTION(T, E)                                                                         \
  template void separable_attention(                                                                            \
      const PatchedMap&, double, bool, const SeparableAttentionWeightsOf<E>&, const SeparableAttentionDropout&, \
      const T*, T*, const SeparableAttentionKept&);                                                             \
  template void separable_attention(                                                                            \
      const PatchedMap&, double, bool, const SeparableAttentionWeightsOf<E>&, const T*, T*);
template struct SeparableAttentionWeightsOf<float>;
MVIT3_SEPARABLE_ATTENTION(float, float)
MVIT3_SEPARABLE_ATTENTION(BFloat16, float)
MVIT3_SEPARABLE_ATTENTION(Float16, float)
#if defined(__AVX512BF16__)
template struct SeparableAttentionWeightsOf<BFloat16>;
MVIT3_SEPARABLE_ATTENTION(float, BFloat16)
#endif
#undef MVIT3_SEPARABLE_ATTENTION

}  // namespace mvit3
