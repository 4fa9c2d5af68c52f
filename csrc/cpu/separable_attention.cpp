// separable_attention without keys (identity D of the design): the context is linear in the normalised tokens, so their weighted mean goes
// through W_k once for each position inside a patch, and two products remain for each token, W_v and W_o, where the definition has three.
//
// Forward, for each sample: statistics of the norm; scores, their softmax and the weighted mean in one walk over x; the context; then
// ReLU(W_v n + b_v) * context, W_o and the residual, tile by tile. Backward recomputes the values, has the same shape, and walks over x
// twice more, for the softmax and for the norm.

#include "separable_attention.h"

#include <limits>
#include <numeric>
#include <tuple>

#include "activation.h"

namespace mvit3 {
namespace {

constexpr int64_t kPoolRows = 32;  // of a tile that only dot products and sums read: it stays in the first-level cache
constexpr double kLowest = -std::numeric_limits<double>::infinity();

// A token's position inside its patch, and its place among the scores (positions, patches).
struct Place {
  int32_t position, score;
};

const Place* places_of(const PatchedMap& map) {
  thread_local std::vector<Place> places;
  places.resize(map.tokens());
  const int64_t columns = map.width / map.patch_width;
  for (int64_t y = 0; y < map.height; ++y)
    for (int64_t x = 0; x < map.width; ++x) {
      const int64_t position = y % map.patch_height * map.patch_width + x % map.patch_width;
      const int64_t patch = y / map.patch_height * columns + x / map.patch_width;
      places[y * map.width + x] = {int32_t(position), int32_t(position * map.patches() + patch)};
    }
  return places.data();
}

// A range of the rows of a sample. `index` counts the tasks of a call, `first` is that of the sample's first one.
struct Task {
  int64_t part, index, first, sample;
  Range rows;

  bool leads() const { return index == first; }
};

// The cut of a call into tasks, the same for a fixed number of threads. Where the samples share out evenly a task is a whole sample, which
// one thread takes through all phases, its tokens in cache; elsewhere samples are cut, and all of them go through a phase together.
class Plan {
 public:
  explicit Plan(const PatchedMap& map) : samples_(map.samples), tokens_(map.tokens()) {
    constexpr int64_t kLeastRows = 16, kLeastProducts = 1 << 19;  // of a task; of a part
    const int64_t threads = count_parts(samples_ * tokens_ * map.channels * map.channels, kLeastProducts);
    const int64_t even = threads / std::gcd(samples_, threads);
    ranges_ = samples_ >= 8 * threads ? 1 : std::clamp<int64_t>(tokens_ / kLeastRows, 1, even);
    parts_ = std::min(threads, tasks());
  }

  int64_t ranges() const { return ranges_; }
  int64_t parts() const { return parts_; }
  int64_t tasks() const { return samples_ * ranges_; }

  // Runs the phases on every task, each phase after the earlier ones of the same sample.
  template <typename... Phases>
  void run(const Phases&... phases) const {
    if (ranges_ == 1)
      for_each_task([&](const Task& task) { (phases(task), ...); });
    else
      (for_each_task(phases), ...);
  }

 private:
  template <typename F>
  void for_each_task(const F& f) const {
    for_each_part(parts_, [&](int64_t part) {
      const Range mine = part_range(tasks(), part, parts_);
      for (int64_t i = mine.begin; i < mine.end; ++i) f(Task{part, i, i - i % ranges_, i / ranges_, part_range(tokens_, i % ranges_, ranges_)});
    });
  }

  int64_t samples_, tokens_, ranges_, parts_;
};

float dot(const float* a, const float* b, int64_t lanes) {
  Vec sum = 0.0f;
  for (int64_t c = 0; c < lanes; c += kLanes) sum = fma(load(a + c), load(b + c), sum);
  return float(sum_lanes(sum));
}

// out = out * factor + in * scale
MVIT3_INLINE void add_scaled(float* out, float factor, const float* in, float scale, int64_t lanes) {
  for (int64_t c = 0; c < lanes; c += kLanes) store(out + c, fma(load(out + c), factor, load(in + c) * scale));
}

// 1 / (1 - p) or 0: what dropout multiplies one score by.
float kept_score(const Dropout& dropout, uint32_t key, int64_t score) { return dropout.active() ? dropout(key, score).part[0][0] : 1.0f; }

template <typename T>
class Forward {
 public:
  Forward(
      const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeights& weights, const SeparableAttentionDropout& dropout, const T* x, T* y,
      const SeparableAttentionKept& kept)
      : map_(map), normed_(x, Tokens(map.samples, map.tokens(), map.channels), per_sample, kept.mean, kept.rstd), eps_(eps), weights_(weights),
        dropout_(dropout), y_(y), kept_(kept), places_(places_of(map)), plan_(map) {
    thread_local std::vector<Spread> spreads;
    thread_local std::vector<Softmax> softmax;
    spreads.resize(plan_.tasks());
    softmax.resize(plan_.tasks() * map.positions());
    spreads_ = spreads.data();
    softmax_ = softmax.data();
    pooled_ = workspace<1>(plan_.tasks() * map.positions() * map.lanes());
  }

  void run() const {
    plan_.run(
        [this](const Task& task) { measure(task); }, [this](const Task& task) { finish_statistics(task); }, [this](const Task& task) { pool(task); },
        [this](const Task& task) { finish_context(task); }, [this](const Task& task) { attend(task); });
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
      spreads_[task.index] = spread(normed_.row(first), task.rows.size() * channels);
      return;
    }
    for (int64_t r = first; r < first + task.rows.size(); ++r) {
      const Spread token = row_spread(normed_.row(r), channels);
      kept_.mean[r] = float(token.mean);
      kept_.rstd[r] = token.rstd(eps_);
    }
  }

  void finish_statistics(const Task& task) const {
    if (!normed_.per_sample() || !task.leads()) return;
    Spread whole;
    for (int64_t i = task.first; i < task.first + plan_.ranges(); ++i) whole.join(spreads_[i]);
    kept_.mean[task.sample] = float(whole.mean);
    kept_.rstd[task.sample] = whole.rstd(eps_);
  }

  // Scores and the weighted mean of the task's tokens, without their denominator.
  void pool(const Task& task) const {
    const int64_t lanes = map_.lanes(), positions = map_.positions();
    float *tile = workspace((kPoolRows + positions) * lanes + positions), *sums = tile + kPoolRows * lanes, *factors = sums + positions * lanes;
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
    float *mean = kept_.pooled + task.sample * positions * lanes, *context = kept_.context + task.sample * positions * lanes;
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
    const float *context = kept_.context + task.sample * map_.positions() * lanes, *value_bias = weights_.value_bias.data();
    const uint32_t key = dropout_.output.key(task.sample);
    float *tile = workspace(2 * kTileRows * lanes), *attended = tile + kTileRows * lanes;
    for (int64_t first = task.rows.begin; first < task.rows.end; first += kTileRows) {
      const int64_t count = std::min(kTileRows, task.rows.end - first);
      const Place* places = places_ + first;
      normed_.normalise_again(row(task, first), count, tile, lanes);
      multiply(tile, lanes, count, weights_.value, [&](int64_t r, int64_t c, Vec sums) {
        const Vec value = activate<kRelu>(sums + load(value_bias + c));
        store(attended + r * lanes + c, value * load(context + places[r].position * lanes + c));
      });
      multiply_into(attended, lanes, count, weights_.out, tile, lanes);
      for (int64_t r = 0; r < count; ++r) {
        const T* x = normed_.row(row(task, first + r));
        T* y = y_ + row(task, first + r) * channels;
        for (int64_t c = 0; c < channels; c += kLanes) {
          Vec branch = load(tile + r * lanes + c) + load(weights_.out_bias.data() + c);
          if (dropout_.output.active()) branch = branch * dropout_.output(key, (first + r) * channels + c);
          store_some(y + c, load_some(x + c, channels - c) + branch, channels - c);
        }
      }
    }
  }

  const PatchedMap& map_;
  const NormedMap<T> normed_;
  double eps_;
  const SeparableAttentionWeights& weights_;
  const SeparableAttentionDropout& dropout_;
  T* y_;
  const SeparableAttentionKept& kept_;
  const Place* places_;
  const Plan plan_;
  Spread* spreads_;
  Softmax* softmax_;
  float* pooled_;
};

// `count` values from `from` on, padded with zeros to whole vectors.
Scratch<float> segment(const float* from, int64_t count) {
  Scratch<float> out(lanes_of(count), 0.0f);
  std::copy_n(from, count, out.data());
  return out;
}

// W_q gamma
Scratch<float> folded_score(const NormLinearParameters& qkv) {
  Scratch<float> out = qkv.scale();
  for (int64_t c = 0; c < qkv.inputs; ++c) out[c] *= qkv.weight.data()[c];
  return out;
}

// The rows of W_k and of W_v in the weight of qkv.
const float* key_rows(const NormLinearParameters& qkv) { return qkv.weight.data() + qkv.inputs; }
const float* value_rows(const NormLinearParameters& qkv) { return qkv.weight.data() + (1 + qkv.inputs) * qkv.inputs; }

// The weights as the backward pass reads them; the norm is folded into those of qkv.
struct BackwardWeights {
  Scratch<float> score, key_bias, value_bias;
  PackedWeight value, value_back, key_back, out_back;

  BackwardWeights(const NormLinearParameters& qkv, const FloatMatrix& out)
      : BackwardWeights(qkv, qkv.scale().data(), qkv.folded_bias().data(), out.data(), qkv.inputs) {}

 private:
  BackwardWeights(const NormLinearParameters& qkv, const float* scale, const float* bias, const float* out, int64_t d)
      : score(folded_score(qkv)), key_bias(segment(bias + 1, d)), value_bias(segment(bias + 1 + d, d)),
        value(PackedWeight::rows(value_rows(qkv), d, d, d, scale)), value_back(PackedWeight::columns(value_rows(qkv), d, d, d, scale)),
        key_back(PackedWeight::columns(key_rows(qkv), d, d, d, scale)), out_back(PackedWeight::columns(out, d, d, d)) {}
};

// The parameters' gradients, one accumulator a part.
struct Sums {
  int64_t channels, lanes;
  std::vector<Scratch<float>> qkv;  // (1 + 2D, L) of the folded weight: score, keys, values
  OuterSums out;
  std::vector<Scratch<double>> score, qkv_bias, out_bias;
  std::vector<char> begun;  // whether a part has values yet: the first product is written, not added

  Sums(int64_t parts, int64_t channels, int64_t lanes)
      : channels(channels), lanes(lanes), out(parts, channels, lanes), score(accumulators<double>(parts, lanes)),
        qkv_bias(accumulators<double>(parts, 1 + 2 * channels + kLanes)), out_bias(accumulators<double>(parts, lanes)), begun(parts, false) {
    for (int64_t i = 0; i < parts; ++i) {
      qkv.emplace_back((1 + 2 * channels) * lanes);
      std::fill_n(qkv[i].data(), (1 + channels) * lanes, 0.0f);
    }
  }

  void add_key(int64_t part, const float* grads, const float* pooled, int64_t rows) {
    add_outer(grads, lanes, channels, pooled, lanes, lanes, rows, qkv[part].data() + lanes, lanes);
  }

  void add_value(int64_t part, const float* grads, const float* normal, int64_t rows) {
    add_outer(grads, lanes, channels, normal, lanes, lanes, rows, qkv[part].data() + (1 + channels) * lanes, lanes, begun[part]);
    begun[part] = true;
  }

  // The folded weight's gradient of all parts.
  const std::vector<Scratch<float>>& products() {
    const Values all = add_up(score, channels);
    std::transform(all.begin(), all.end(), qkv[0].data(), [](double v) { return float(v); });
    for (size_t i = 0; i < qkv.size(); ++i)
      if (!begun[i]) std::fill_n(qkv[i].data() + (1 + channels) * lanes, channels * lanes, 0.0f);
    return qkv;
  }
};

template <typename T>
class Backward {
 public:
  Backward(
      const PatchedMap& map, bool per_sample, const BackwardWeights& weights, const SeparableAttentionDropout& dropout, const T* dy, const T* x, T* dx,
      const SeparableAttentionKept& kept)
      : map_(map), normed_(x, Tokens(map.samples, map.tokens(), map.channels), per_sample, kept.mean, kept.rstd), weights_(weights), dropout_(dropout),
        dy_(dy), dx_(dx), kept_(kept), places_(places_of(map)), plan_(map), sums_(plan_.parts(), map.channels, map.lanes()),
        dcontext_(plan_.tasks() * map.positions() * map.lanes()), dmean_(map.samples * map.positions() * map.lanes()),
        dtotal_(map.samples * map.positions()), dscores_(map.samples * map.tokens()), slopes_(2 * plan_.tasks() * map.positions()), norm_sums_(plan_.tasks() * 2) {
    dnormal_ = workspace<1>((plan_.ranges() == 1 ? plan_.parts() : map.samples) * map.tokens() * map.lanes());
  }

  Sums run() {
    plan_.run(
        [this](const Task& task) { multiply_back(task); }, [this](const Task& task) { context_back(task); }, [this](const Task& task) { score_back(task); },
        [this](const Task& task) { gather(task); }, [this](const Task& task) { norm_back(task); });
    return std::move(sums_);
  }

 private:
  int64_t row(const Task& task, int64_t token) const { return task.sample * map_.tokens() + token; }
  float* dcontext(int64_t task) { return dcontext_.data() + task * map_.positions() * map_.lanes(); }
  float* dmean(int64_t sample) { return dmean_.data() + sample * map_.positions() * map_.lanes(); }
  double* slopes(int64_t task) { return slopes_.data() + task * map_.positions(); }
  // The sums over the sample, which every task of it makes for itself.
  double* own_slopes(const Task& task) { return slopes(plan_.tasks() + task.index); }

  // The gradient of the normalised token: of the whole sample, where a thread reuses the memory for its next one.
  float* dnormal(const Task& task, int64_t token) {
    return dnormal_ + ((plan_.ranges() == 1 ? task.part : task.sample) * map_.tokens() + token) * map_.lanes();
  }

  // The five products: the values again, and the gradients through W_o and W_v with those of the two weights.
  void multiply_back(const Task& task) {
    const int64_t lanes = map_.lanes(), channels = map_.channels, positions = map_.positions();
    const int64_t tile_rows = std::clamp<int64_t>(kTileFloats / (4 * lanes), 1, kTileRows);
    float *normal = workspace((4 * tile_rows + positions) * lanes), *value = normal + tile_rows * lanes, *grad = value + tile_rows * lanes;
    float *dvalue = grad + tile_rows * lanes, *sums = dvalue + tile_rows * lanes;
    const float *contexts = kept_.context + task.sample * positions * lanes, *bias = weights_.value_bias.data();
    const uint32_t key = dropout_.output.key(task.sample);
    std::fill_n(dcontext(task.index), positions * lanes, 0.0f);
    for (int64_t first = task.rows.begin; first < task.rows.end; first += tile_rows) {
      const int64_t count = std::min(tile_rows, task.rows.end - first);
      normed_.normalise_again(row(task, first), count, normal, lanes);
      multiply_into(normal, lanes, count, weights_.value, value, lanes);
      load_rows(dy_ + row(task, first) * channels, channels, count, channels, grad, lanes);
      if (dropout_.output.active())
        for (int64_t r = 0; r < count; ++r)
          for (int64_t c = 0; c < lanes; c += kLanes) {
            float* p = grad + r * lanes + c;
            store(p, load(p) * dropout_.output(key, (first + r) * channels + c));
          }
      multiply_into(grad, lanes, count, weights_.out_back, dvalue, lanes);
      std::fill_n(sums, positions * lanes, 0.0f);
      for (int64_t r = 0; r < count; ++r) {
        const float* context = contexts + places_[first + r].position * lanes;
        float* sum = sums + places_[first + r].position * lanes;
        for (int64_t c = 0; c < lanes; c += kLanes) {
          float *v = value + r * lanes + c, *dv = dvalue + r * lanes + c;
          const Vec active = activate<kRelu>(load(v) + load(bias + c)), dattended = load(dv), scale = load(context + c);
          store(sum + c, fma(dattended, active, load(sum + c)));
          store(v, active * scale);
          store(dv, activate_backward<kRelu>(active, dattended * scale));
        }
      }
      for (int64_t p = 0; p < positions; ++p) add_scaled(dcontext(task.index) + p * lanes, 1.0f, sums + p * lanes, 1.0f, lanes);
      sums_.out.add(task.part, {grad, lanes}, {value, lanes}, count);
      sums_.add_value(task.part, dvalue, normal, count);
      add_columns(grad, lanes, count, channels, sums_.out_bias[task.part].data());
      add_columns(dvalue, lanes, count, channels, sums_.qkv_bias[task.part].data() + 1 + channels);
      multiply_into(dvalue, lanes, count, weights_.value_back, dnormal(task, first), lanes);
    }
  }

  // From the gradient of the context to those of the weighted mean, of the sum of the weights, and of W_k.
  void context_back(const Task& task) {
    if (!task.leads()) return;
    const int64_t lanes = map_.lanes(), channels = map_.channels, positions = map_.positions();
    float* grads = dcontext(task.index);
    for (int64_t i = task.first + 1; i < task.first + plan_.ranges(); ++i) add_scaled(grads, 1.0f, dcontext(i), 1.0f, positions * lanes);
    multiply_into(grads, lanes, positions, weights_.key_back, dmean(task.sample), lanes);
    sums_.add_key(task.part, grads, kept_.pooled + task.sample * positions * lanes, positions);
    for (int64_t p = 0; p < positions; ++p) {
      dtotal_[task.sample * positions + p] = dot(grads + p * lanes, weights_.key_bias.data(), lanes);
      const double total = kept_weight(task.sample, p);
      for (int64_t c = 0; c < channels; ++c) sums_.qkv_bias[task.part][1 + c] += total * grads[p * lanes + c];
    }
  }

  // The sum of a position's weights: 1 but for dropout.
  double kept_weight(int64_t sample, int64_t position) const {
    if (!dropout_.score.active()) return 1;
    const int64_t patches = map_.patches(), first = position * patches;
    const float* scores = kept_.scores + sample * map_.tokens() + first;
    const uint32_t key = dropout_.score.key(sample);
    double total = 0;
    for (int64_t i = 0; i < patches; i += kLanes) total += sum_lanes(load_some(scores + i, patches - i) * dropout_.score(key, first + i));
    return total;
  }

  // The gradient of each weight, and its mean under the softmax. Without dropout the sum of the weights is constant, and its gradient vanishes.
  void score_back(const Task& task) {
    const int64_t channels = map_.channels, lanes = map_.lanes(), positions = map_.positions();
    const uint32_t key = dropout_.score.key(task.sample);
    const float* scores = kept_.scores + task.sample * map_.tokens();
    std::fill_n(slopes(task.index), positions, 0.0);
    for (int64_t token = task.rows.begin; token < task.rows.end; ++token) {
      const auto [position, score] = places_[token];
      const int64_t r = row(task, token);
      const T* x = normed_.row(r);
      const float* grads = dmean(task.sample) + position * lanes;
      const Vec mean = normed_.mean(r);
      Vec sum = 0.0f;
      for (int64_t c = 0; c < channels; c += kLanes) sum = fma(load_some(x + c, channels - c, mean) - mean, load(grads + c), sum);
      float grad = float(sum_lanes(sum)) * normed_.rstd(r);
      if (dropout_.score.active()) grad = (grad + dtotal_[task.sample * positions + position]) * kept_score(dropout_.score, key, score);
      dscores_[r] = grad;
      slopes(task.index)[position] += double(scores[score]) * grad;
    }
  }

  // All of the gradient of the normalised tokens: through the values, the scores and the weighted mean; and its sums for the norm.
  void gather(const Task& task) {
    const int64_t channels = map_.channels, lanes = map_.lanes(), positions = map_.positions();
    const uint32_t key = dropout_.score.key(task.sample);
    const float* scores = kept_.scores + task.sample * map_.tokens();
    alignas(64) double sum[kLanes] = {}, dot[kLanes] = {};
    double dbias = 0;
    double* slope = own_slopes(task);
    for (int64_t p = 0; p < positions; ++p) {
      slope[p] = 0;
      for (int64_t i = task.first; i < task.first + plan_.ranges(); ++i) slope[p] += slopes(i)[p];
    }
    for_each_run(task.rows.size(), [&](int64_t begin, int64_t end) {
      constexpr int64_t kRun = 16;
      float dscore[kRun], kept[kRun];
      const int64_t first = task.rows.begin + begin, count = end - begin;
      for (int64_t i = 0; i < count; ++i) {
        const auto [position, score] = places_[first + i];
        dscore[i] = scores[score] * float(dscores_[row(task, first + i)] - slope[position]);  // float64: an error here does not average out
        kept[i] = scores[score] * kept_score(dropout_.score, key, score);
        dbias += dscore[i];
      }
      for (int64_t c = 0; c < channels; c += kLanes) {
        const Vec score_weight = load(weights_.score.data() + c);
        Vec sums = 0.0f, dots = 0.0f, dweight = 0.0f;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t r = row(task, first + i);
          float* p = dnormal(task, first + i) + c;
          const Vec mean = normed_.mean(r), normal = (load_some(normed_.row(r) + c, channels - c, mean) - mean) * normed_.rstd(r);
          Vec grad = fma(score_weight, dscore[i], load(p));
          grad = fma(load(dmean(task.sample) + places_[first + i].position * lanes + c), kept[i], grad);
          store(p, grad);
          sums += grad;
          dots = fma(grad, normal, dots);
          dweight = fma(normal, dscore[i], dweight);
        }
        accumulate(sum, sums);
        accumulate(dot, dots);
        accumulate(sums_.score[task.part].data() + c, dweight);
      }
    });
    norm_sums_[2 * task.index] = std::accumulate(sum, sum + kLanes, 0.0);
    norm_sums_[2 * task.index + 1] = std::accumulate(dot, dot + kLanes, 0.0);
    sums_.qkv_bias[task.part][0] += dbias;
  }

  // dx = dy + rstd (grad - mean(grad) - normal mean(grad normal)), the means over the token or the sample.
  void norm_back(const Task& task) {
    const int64_t channels = map_.channels;
    double sum = 0, dot = 0;
    for (int64_t i = task.first; i < task.first + plan_.ranges(); ++i) {
      sum += norm_sums_[2 * i];
      dot += norm_sums_[2 * i + 1];
    }
    const double values = double(map_.tokens()) * double(channels);
    Vec offset = float(sum / values), slope = float(dot / values);
    for (int64_t token = task.rows.begin; token < task.rows.end; ++token) {
      const int64_t r = row(task, token);
      const float* grads = dnormal(task, token);
      const Vec mean = normed_.mean(r), rstd = normed_.rstd(r);
      const auto normal = [&](int64_t c) { return (load_some(normed_.row(r) + c, channels - c, mean) - mean) * rstd; };
      if (!normed_.per_sample()) {
        Vec sums = 0.0f, dots = 0.0f;
        for (int64_t c = 0; c < channels; c += kLanes) {
          sums += load(grads + c);
          dots = fma(load(grads + c), normal(c), dots);
        }
        offset = float(sum_lanes(sums) / double(channels));
        slope = float(sum_lanes(dots) / double(channels));
      }
      for (int64_t c = 0; c < channels; c += kLanes) {
        const Vec dx = fnma(normal(c), slope, load(grads + c) - offset);
        store_some(dx_ + r * channels + c, fma(dx, rstd, load_some(dy_ + r * channels + c, channels - c)), channels - c);
      }
    }
  }

  const PatchedMap& map_;
  const NormedMap<T> normed_;
  const BackwardWeights& weights_;
  const SeparableAttentionDropout& dropout_;
  const T* dy_;
  T* dx_;
  const SeparableAttentionKept& kept_;
  const Place* places_;
  const Plan plan_;
  Sums sums_;
  Scratch<float> dcontext_, dmean_, dtotal_, dscores_;
  Scratch<double> slopes_, norm_sums_;
  float* dnormal_;
};

PatchedMap map_of(const Tensor& x, int64_t patch_height, int64_t patch_width) {
  check_map("x", x);
  check_patches("x", x, patch_height, patch_width);
  return {x.size(0), x.size(1), x.size(2), x.size(3), patch_height, patch_width};
}

NormLinearParameters qkv_of(
    const PatchedMap& map, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(
      outputs_of("qkv_weight", weight) == 1 + 2 * map.channels, "qkv_weight must have 1 + 2D rows for the ", map.channels,
      " channels D of x, got shape ", text(weight.sizes()));
  return NormLinearParameters(norm_weight, norm_bias, "qkv_weight", weight, "qkv_bias", bias, map.channels);
}

Tensor separable_attention_inference(
    const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, bool per_sample, const Tensor& qkv_weight,
    const std::optional<Tensor>& qkv_bias, const Tensor& out_weight, const std::optional<Tensor>& out_bias, int64_t patch_height, int64_t patch_width) {
  const PatchedMap map = map_of(x, patch_height, patch_width);
  check_eps("eps", eps);
  const Tensor dense = torch::stable::contiguous(x), y = new_output(dense);
  const FloatMatrix out("out_weight", out_weight, map.channels, map.channels);
  const SeparableAttentionWeights weights(qkv_of(map, norm_weight, norm_bias, qkv_weight, qkv_bias), out, out_bias);
  if (y.numel() == 0) return y;
  dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    separable_attention(map, eps, per_sample, weights, data_of<T>(dense), mutable_data_of<T>(y));
  });
  return y;
}

// y, and what `SeparableAttentionKept` names.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> separable_attention_training(
    const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, bool per_sample, const Tensor& qkv_weight,
    const std::optional<Tensor>& qkv_bias, const Tensor& out_weight, const std::optional<Tensor>& out_bias, int64_t patch_height, int64_t patch_width,
    double score_dropout, double output_dropout, const std::optional<Tensor>& seed) {
  const PatchedMap map = map_of(x, patch_height, patch_width);
  check_eps("eps", eps);
  const Tensor dense = torch::stable::contiguous(x), y = new_output(dense);
  const FloatMatrix out("out_weight", out_weight, map.channels, map.channels);
  const SeparableAttentionWeights weights(qkv_of(map, norm_weight, norm_bias, qkv_weight, qkv_bias), out, out_bias);
  const SeparableAttentionDropout dropout(score_dropout, output_dropout, seed);
  const int64_t count = map.samples * (per_sample ? 1 : map.tokens());
  const Tensor mean = torch::stable::new_empty(dense, {count}, ScalarType::Float), rstd = torch::stable::new_empty(mean, {count});
  const Tensor scores = torch::stable::new_empty(mean, {map.samples, map.positions(), map.patches()});
  const Tensor pooled = torch::stable::new_empty(mean, {map.samples, map.positions(), map.lanes()});
  const Tensor context = torch::stable::new_empty(mean, {map.samples, map.positions(), map.lanes()});
  const SeparableAttentionKept kept{mutable_data_of<float>(mean), mutable_data_of<float>(rstd), mutable_data_of<float>(scores),
                                    mutable_data_of<float>(pooled), mutable_data_of<float>(context)};
  if (y.numel() > 0)
    dispatch_dtype("x", dense, [&](auto type) {
      using T = decltype(type);
      separable_attention(map, eps, per_sample, weights, dropout, data_of<T>(dense), mutable_data_of<T>(y), kept);
    });
  return std::make_tuple(y, mean, rstd, scores, pooled, context);
}

// Gradients of x, norm weight and bias, qkv weight and bias, out_proj weight and bias (empty without a bias).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> separable_attention_backward(
    const Tensor& dy, const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, bool per_sample, const Tensor& qkv_weight,
    const std::optional<Tensor>& qkv_bias, const Tensor& out_weight, const std::optional<Tensor>& out_bias, const Tensor& mean, const Tensor& rstd,
    const Tensor& scores, const Tensor& pooled, const Tensor& context, int64_t patch_height, int64_t patch_width, double score_dropout,
    double output_dropout, const std::optional<Tensor>& seed) {
  const PatchedMap map = map_of(x, patch_height, patch_width);
  const Tensor dense = torch::stable::contiguous(x), dense_dy = contiguous_like("dy", dy, x), dx = new_output(dense);
  const int64_t channels = map.channels, lanes = map.lanes(), norms = map.samples * (per_sample ? 1 : map.tokens());
  const Tensor kept_mean = contiguous_kept("mean", mean, {norms}), kept_rstd = contiguous_kept("rstd", rstd, {norms});
  const Tensor kept_scores = contiguous_kept("scores", scores, {map.samples, map.positions(), map.patches()});
  const Tensor kept_pooled = contiguous_kept("pooled", pooled, {map.samples, map.positions(), lanes});
  const Tensor kept_context = contiguous_kept("context", context, {map.samples, map.positions(), lanes});
  const NormLinearParameters qkv = qkv_of(map, norm_weight, norm_bias, qkv_weight, qkv_bias);
  const FloatMatrix out("out_weight", out_weight, channels, channels);
  read_vector("out_bias", out_bias, channels);  // only its gradient is needed, which has its shape
  const BackwardWeights weights(qkv, out);
  const SeparableAttentionDropout dropout(score_dropout, output_dropout, seed);
  const SeparableAttentionKept kept{mutable_data_of<float>(kept_mean), mutable_data_of<float>(kept_rstd), mutable_data_of<float>(kept_scores),
                                    mutable_data_of<float>(kept_pooled), mutable_data_of<float>(kept_context)};
  Sums sums = dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    if (dense.numel() == 0) return Sums(1, channels, lanes);
    return Backward<T>(map, per_sample, weights, dropout, data_of<T>(dense_dy), data_of<T>(dense), mutable_data_of<T>(dx), kept).run();
  });
  const Values dqkv_bias = add_up(sums.qkv_bias, 1 + 2 * channels);
  const NormLinearGradients gradients(qkv, sums.products(), dqkv_bias, qkv_weight);
  const Tensor dout = torch::stable::new_empty(out_weight, out_weight.sizes());
  dispatch_dtype("out_proj.weight", dout, [&](auto type) {
    add_up_rows(sums.out.parts(), channels, channels, lanes, mutable_data_of<decltype(type)>(dout));
  });
  return std::make_tuple(
      dx, write_channels(gradients.dgamma, norm_weight), write_channels(gradients.dbeta, norm_bias), gradients.dweight,
      write_bias(dqkv_bias, qkv_bias, qkv_weight), dout, write_bias(add_up(sums.out_bias, channels), out_bias, out_weight));
}

}  // namespace

SeparableAttentionWeights::SeparableAttentionWeights(const NormLinearParameters& qkv, const FloatMatrix& out, const std::optional<Tensor>& out_bias)
    : SeparableAttentionWeights(qkv, qkv.scale().data(), qkv.folded_bias().data(), out.data(), out_bias, qkv.inputs) {}

SeparableAttentionWeights::SeparableAttentionWeights(
    const NormLinearParameters& qkv, const float* scale, const float* bias, const float* out_weight, const std::optional<Tensor>& out_bias, int64_t d)
    : score(folded_score(qkv)), key_bias(segment(bias + 1, d)), value_bias(segment(bias + 1 + d, d)), out_bias(read_vector("out_bias", out_bias, d)),
      score_bias(bias[0]), key(PackedWeight::rows(key_rows(qkv), d, d, d, scale)), value(PackedWeight::rows(value_rows(qkv), d, d, d, scale)),
      out(PackedWeight::rows(out_weight, d, d, d)) {}

template <typename T>
void separable_attention(
    const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeights& weights, const SeparableAttentionDropout& dropout, const T* x,
    T* y, const SeparableAttentionKept& kept) {
  Forward<T>(map, eps, per_sample, weights, dropout, x, y, kept).run();
}

template <typename T>
void separable_attention(const PatchedMap& map, double eps, bool per_sample, const SeparableAttentionWeights& weights, const T* x, T* y) {
  const int64_t statistics = map.samples * (per_sample ? 1 : map.tokens()), context = map.samples * map.positions() * map.lanes();
  thread_local std::vector<float> memory;
  memory.resize(2 * statistics + 2 * context);
  float *mean = memory.data(), *rstd = mean + statistics, *pooled = rstd + statistics;
  const SeparableAttentionDropout none;
  separable_attention(map, eps, per_sample, weights, none, x, y, {mean, rstd, nullptr, pooled, pooled + context});
}

#define MVIT3_SEPARABLE_ATTENTION(T)                                                                                                    \
  template void separable_attention(                                                                                                    \
      const PatchedMap&, double, bool, const SeparableAttentionWeights&, const SeparableAttentionDropout&, const T*, T*, const SeparableAttentionKept&); \
  template void separable_attention(const PatchedMap&, double, bool, const SeparableAttentionWeights&, const T*, T*);
MVIT3_SEPARABLE_ATTENTION(float)
MVIT3_SEPARABLE_ATTENTION(BFloat16)
MVIT3_SEPARABLE_ATTENTION(Float16)
#undef MVIT3_SEPARABLE_ATTENTION

}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("separable_attention_inference", TORCH_BOX(&mvit3::separable_attention_inference));
  m.impl("separable_attention_training", TORCH_BOX(&mvit3::separable_attention_training));
  m.impl("separable_attention_backward", TORCH_BOX(&mvit3::separable_attention_backward));
}
