// separable_attention, backward.

#include "activation.h"
#include "separable_attention_training.h"

namespace mvit3::separable {
namespace {

// The weights as the backward pass reads them; the norm is folded into those of qkv. As in the forward pass the values
// are products of float, and the other products of all tokens are made of E.
template <typename E>
struct BackwardWeights {
  Scratch<float> score, key_bias, value_bias;
  PackedWeight value, key_back;
  PackedWeightOf<E> value_back, out_back;

  BackwardWeights(const NormLinearParameters& qkv, const FloatMatrix& out)
      : BackwardWeights(qkv, qkv.scale().data(), qkv.folded_bias().data(), out.data(), qkv.inputs) {}

 private:
  BackwardWeights(const NormLinearParameters& qkv, const float* scale, const float* bias, const float* out, int64_t d)
      : score(folded_score(qkv)), key_bias(segment(bias + 1, d)), value_bias(segment(bias + 1 + d, d)),
        value(PackedWeight::rows(value_rows(qkv), d, d, d, scale)),
        key_back(PackedWeight::columns(key_rows(qkv), d, d, d, scale)),
        value_back(PackedWeightOf<E>::columns(value_rows(qkv), d, d, d, scale)),
        out_back(PackedWeightOf<E>::columns(out, d, d, d)) {}
};

template <typename T>
class Backward {
  using E = Multiplied<T>;

 public:
  Backward(
      const PatchedMap& map, bool per_sample, const BackwardWeights<E>& weights,
      const SeparableAttentionDropout& dropout, const T* dy, const T* x, T* dx, const SeparableAttentionKept& kept)
      : map_(map), normed_(x, Tokens(map.samples, map.tokens(), map.channels), per_sample, kept.mean, kept.rstd),
        weights_(weights), dropout_(dropout), dy_(dy), dx_(dx), kept_(kept), places_(places_of(map)),
        plan_(map, count_parts(Plan::products(map), Plan::kLeastProducts)),
        sums_(plan_.parts(), map.channels, map.lanes()), dcontext_(plan_.tasks() * map.positions() * map.lanes()),
        dmean_(map.samples * map.positions() * map.lanes()), dtotal_(map.samples * map.positions()),
        dscores_(map.samples * map.tokens()), slopes_(2 * plan_.tasks() * map.positions()),
        norm_sums_(plan_.tasks() * 2) {
    dnormal_ = workspace<1>((plan_.ranges() == 1 ? plan_.parts() : map.samples) * map.tokens() * map.lanes());
  }

  Sums run() {
    plan_.run(
        [this](const Task& task) { multiply_back(task); }, [this](const Task& task) { context_back(task); },
        [this](const Task& task) { score_back(task); }, [this](const Task& task) { gather(task); },
        [this](const Task& task) { norm_back(task); });
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
    const int64_t tile_rows = std::clamp<int64_t>(kTileFloats / (4 * lanes), 1, kTileRows), tile = tile_rows * lanes;
    float *normal = workspace(4 * tile + positions * lanes), *value = normal + tile, *dvalue = value + tile,
          *sums = dvalue + 2 * tile;
    // operands of products: in the place of the floats that they are made of, which are read before
    E *grad = tile_of<E>(dvalue + tile), *normals = tile_of<E>(normal), *attended = tile_of<E>(value),
      *dvalues = tile_of<E>(dvalue);
    const float *contexts = kept_.context + task.sample * positions * lanes, *bias = weights_.value_bias.data();
    const uint32_t key = dropout_.output.key(task.sample);
    std::fill_n(dcontext(task.index), positions * lanes, 0.0f);
    for (int64_t first = task.rows.begin; first < task.rows.end; first += tile_rows) {
      const int64_t count = std::min(tile_rows, task.rows.end - first);
      normed_.normalise_again(row(task, first), count, normal, lanes);
      multiply_into(normal, lanes, count, weights_.value, value, lanes);
      if constexpr (!std::is_same_v<E, float>) load_rows(normal, lanes, count, lanes, normals, lanes);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < channels; c += kLanes) {
          Vec dy = load_some(dy_ + (row(task, first) + r) * channels + c, channels - c);
          if (dropout_.output.active()) dy = dy * dropout_.output(key, (first + r) * channels + c);
          store(grad + r * lanes + c, dy);
        }
      multiply_into(grad, lanes, count, weights_.out_back, dvalue, lanes);
      std::fill_n(sums, positions * lanes, 0.0f);
      for (int64_t r = 0; r < count; ++r) {
        const float* context = contexts + places_[first + r].position * lanes;
        float* sum = sums + places_[first + r].position * lanes;
        for (int64_t c = 0; c < lanes; c += kLanes) {
          const int64_t at = r * lanes + c;
          const Vec active = activate<kRelu>(load(value + at) + load(bias + c)), dattended = load(dvalue + at),
                    scale = load(context + c);
          store(sum + c, fma(dattended, active, load(sum + c)));
          store(attended + at, active * scale);
          store(dvalues + at, activate_backward<kRelu>(active, dattended * scale));
        }
      }
      for (int64_t p = 0; p < positions; ++p)
        add_scaled(dcontext(task.index) + p * lanes, 1.0f, sums + p * lanes, 1.0f, lanes);
      sums_.add(task.part, grad, attended, dvalues, normals, count);
      add_columns(grad, lanes, count, channels, sums_.out_bias[task.part].data());
      add_columns(dvalues, lanes, count, channels, sums_.qkv_bias[task.part].data() + 1 + channels);
      multiply_into(dvalues, lanes, count, weights_.value_back, dnormal(task, first), lanes);
    }
  }

  // From the gradient of the context to those of the weighted mean, of the sum of the weights, and of W_k.
  void context_back(const Task& task) {
    if (!task.leads()) return;
    const int64_t lanes = map_.lanes(), channels = map_.channels, positions = map_.positions();
    float* grads = dcontext(task.index);
    for (int64_t i = task.first + 1; i < task.first + plan_.ranges(); ++i)
      add_scaled(grads, 1.0f, dcontext(i), 1.0f, positions * lanes);
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
    for (int64_t i = 0; i < patches; i += kLanes)
      total += sum_lanes(load_some(scores + i, patches - i) * dropout_.score(key, first + i));
    return total;
  }

  // The gradient of each weight, and its mean under the softmax. Without dropout the sum of the weights is constant,
  // and its gradient vanishes.
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
      for (int64_t c = 0; c < channels; c += kLanes)
        sum = fma(load_some(x + c, channels - c, mean) - mean, load(grads + c), sum);
      float grad = float(sum_lanes(sum)) * normed_.rstd(r);
      if (dropout_.score.active())
        grad = (grad + dtotal_[task.sample * positions + position]) * kept_score(dropout_.score, key, score);
      dscores_[r] = grad;
      slopes(task.index)[position] += double(scores[score]) * grad;
    }
  }

  // All of the gradient of the normalised tokens: through the values, the scores and the weighted mean; and its sums
  // for the norm.
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
        dscore[i] =
            scores[score] *
            float(dscores_[row(task, first + i)] - slope[position]);  // float64: an error here does not average out
        kept[i] = scores[score] * kept_score(dropout_.score, key, score);
        dbias += dscore[i];
      }
      for (int64_t c = 0; c < channels; c += kLanes) {
        const Vec score_weight = load(weights_.score.data() + c);
        Vec sums = 0.0f, dots = 0.0f, dweight = 0.0f;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t r = row(task, first + i);
          float* p = dnormal(task, first + i) + c;
          const Vec mean = normed_.mean(r),
                    normal = (load_some(normed_.row(r) + c, channels - c, mean) - mean) * normed_.rstd(r);
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
        store_some(
            dx_ + r * channels + c, fma(dx, rstd, load_some(dy_ + r * channels + c, channels - c)), channels - c);
      }
    }
  }

  const PatchedMap& map_;
  const NormedMap<T> normed_;
  const BackwardWeights<E>& weights_;
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

}  // namespace

template <typename T>
Sums backward(
    const PatchedMap& map, bool per_sample, const NormLinearParameters& qkv, const FloatMatrix& out,
    const SeparableAttentionDropout& dropout, const T* dy, const T* x, T* dx, const SeparableAttentionKept& kept) {
  if (map.samples * map.tokens() == 0) return Sums(1, map.channels, map.lanes());
  const BackwardWeights<Multiplied<T>> weights(qkv, out);
  return Backward<T>(map, per_sample, weights, dropout, dy, x, dx, kept).run();
}

#define MVIT3_BACKWARD(T)                                                                                         \
  template Sums backward(                                                                                         \
      const PatchedMap&, bool, const NormLinearParameters&, const FloatMatrix&, const SeparableAttentionDropout&, \
      const T*, const T*, T*, const SeparableAttentionKept&);
MVIT3_BACKWARD(float)
MVIT3_BACKWARD(BFloat16)
MVIT3_BACKWARD(Float16)
#undef MVIT3_BACKWARD

}  // namespace mvit3::separable
