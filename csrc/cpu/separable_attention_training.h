// separable_attention without keys (identity D of the design): the context is linear in the normalised tokens, so their
// weighted mean goes through W_k once for each position inside a patch, and two products remain for each token, W_v and
// W_o, where the definition has three. This is what the forward and the backward pass share.
//
// Forward, for each sample: statistics of the norm; scores, their softmax and the weighted mean in one walk over x; the
// context; then ReLU(W_v n + b_v) * context, W_o and the residual, tile by tile. Backward recomputes the values, has
// the same shape, and walks over x twice more, for the softmax and for the norm.
#pragma once

#include <numeric>

#include "separable_attention.h"

namespace mvit3::separable {

// A token's position inside its patch, and its place among the scores (positions, patches).
struct Place {
  int32_t position, score;
};

inline const Place* places_of(const PatchedMap& map) {
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

// The cut of a call into tasks, the same for a fixed number of threads. Where the samples share out evenly a task is a
// whole sample, which one thread takes through all phases, its tokens in cache; elsewhere samples are cut, and all of
// them go through a phase together.
class Plan {
 public:
  static constexpr int64_t kLeastProducts = 1 << 19;  // of a part
  static int64_t products(const PatchedMap& map) { return map.samples * map.tokens() * map.channels * map.channels; }

  Plan(const PatchedMap& map, int64_t threads) : samples_(map.samples), tokens_(map.tokens()) {
    constexpr int64_t kLeastRows = 16;  // of a task
    const int64_t even = threads / std::gcd(samples_, threads);
    ranges_ = samples_ >= 8 * threads ? 1 : std::clamp<int64_t>(tokens_ / kLeastRows, 1, even);
    parts_ = std::min(threads, tasks());
  }

  // Whether a task is a whole sample.
  bool whole() const { return ranges_ == 1; }
  int64_t ranges() const { return ranges_; }
  int64_t parts() const { return parts_; }
  int64_t tasks() const { return samples_ * ranges_; }

  // Runs the phases on every task, each phase after the earlier ones of the same sample.
  template <typename... Phases>
  void run(const Phases&... phases) const {
    if (whole())
      for_each_task([&](const Task& task) { (phases(task), ...); });
    else
      (for_each_task(phases), ...);
  }

  template <typename F>
  void for_each_task(const F& f) const {
    for_each_part(parts_, [&](int64_t part) {
      const Range mine = part_range(tasks(), part, parts_);
      for (int64_t i = mine.begin; i < mine.end; ++i)
        f(Task{part, i, i - i % ranges_, i / ranges_, part_range(tokens_, i % ranges_, ranges_)});
    });
  }

  // A loop over all tasks, with so many operations for a token.
  Region operations(int64_t of_a_token) const {
    return operations_of(parts_, [&](int64_t part) {
      const Range mine = part_range(tasks(), part, parts_);
      int64_t tokens = 0;
      for (int64_t i = mine.begin; i < mine.end; ++i) tokens += part_range(tokens_, i % ranges_, ranges_).size();
      return tokens * of_a_token;
    });
  }

 private:
  int64_t samples_, tokens_, ranges_, parts_;
};

inline float dot(const float* a, const float* b, int64_t lanes) {
  Vec sum = 0.0f;
  for (int64_t c = 0; c < lanes; c += kLanes) sum = fma(load(a + c), load(b + c), sum);
  return float(sum_lanes(sum));
}

// out = out * factor + in * scale
MVIT3_INLINE void add_scaled(float* out, float factor, const float* in, float scale, int64_t lanes) {
  for (int64_t c = 0; c < lanes; c += kLanes) store(out + c, fma(load(out + c), factor, load(in + c) * scale));
}

// 1 / (1 - p) or 0: what dropout multiplies one score by.
inline float kept_score(const Dropout& dropout, uint32_t key, int64_t score) {
  return dropout.active() ? dropout(key, score).part[0][0] : 1.0f;
}

// `count` values from `from` on, padded with zeros to whole vectors.
inline Scratch<float> segment(const float* from, int64_t count) {
  Scratch<float> out(lanes_of(count), 0.0f);
  std::copy_n(from, count, out.data());
  return out;
}

// W_q norm_weight
inline Scratch<float> folded_score(const NormLinearParameters& qkv) {
  Scratch<float> out = qkv.scale();
  for (int64_t c = 0; c < qkv.inputs; ++c) out[c] *= qkv.weight.data()[c];
  return out;
}

// The rows of W_k and of W_v in the weight of qkv.
inline const float* key_rows(const NormLinearParameters& qkv) { return qkv.weight.data() + qkv.inputs; }
inline const float* value_rows(const NormLinearParameters& qkv) {
  return qkv.weight.data() + (1 + qkv.inputs) * qkv.inputs;
}

// The parameters' gradients, one accumulator a part.
struct Sums {
  int64_t channels, lanes;
  std::vector<Scratch<float>> qkv, out;  // (1 + 2D, L) of the folded weight, score, keys, values; (D, L)
  std::vector<Scratch<double>> score, qkv_bias, out_bias;
  std::vector<char> begun;  // whether a part has values yet: the first product is written, not added

  Sums(int64_t parts, int64_t channels, int64_t lanes)
      : channels(channels), lanes(lanes), score(accumulators<double>(parts, lanes)),
        qkv_bias(accumulators<double>(parts, 1 + 2 * channels + kLanes)), out_bias(accumulators<double>(parts, lanes)),
        begun(parts, false) {
    for (int64_t i = 0; i < parts; ++i) {
      qkv.emplace_back((1 + 2 * channels) * lanes);
      std::fill_n(qkv[i].data(), (1 + channels) * lanes, 0.0f);
      out.emplace_back(channels * lanes);
    }
  }

  float* values(int64_t part) { return qkv[part].data() + (1 + channels) * lanes; }

  void add_key(int64_t part, const float* grads, const float* pooled, int64_t rows) {
    add_outer(grads, lanes, channels, pooled, lanes, lanes, rows, qkv[part].data() + lanes, lanes);
  }

  // Of W_o, from the gradient of its outputs and its inputs, and of W_v from the same.
  template <typename E>
  void add(int64_t part, const E* grads, const E* attended, const E* dvalue, const E* normal, int64_t rows) {
    const auto outer = [&](const E* a, const E* b, float* sums) {
      add_outer_rows<E>({a, lanes}, channels, {b, lanes}, lanes, rows, sums, lanes, begun[part]);
    };
    outer(grads, attended, out[part].data());
    outer(dvalue, normal, values(part));
    begun[part] = true;
  }

  // Completes the gradients of all parts.
  void finish() {
    const Values all = add_up(score, channels);
    std::transform(all.begin(), all.end(), qkv[0].data(), [](double v) { return float(v); });
    for (size_t i = 0; i < qkv.size(); ++i) {
      if (begun[i]) continue;
      std::fill_n(values(i), channels * lanes, 0.0f);
      std::fill_n(out[i].data(), channels * lanes, 0.0f);
    }
  }
};

// Writes the gradient of x to dx; returns the sums of those of the parameters. For float, BFloat16 and Float16.
template <typename T>
Sums backward(
    const PatchedMap& map, bool per_sample, const NormLinearParameters& qkv, const FloatMatrix& out,
    const SeparableAttentionDropout& dropout, const T* dy, const T* x, T* dx, const SeparableAttentionKept& kept);

}  // namespace mvit3::separable
