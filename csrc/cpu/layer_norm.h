// Layer normalisation of each token over its channels, or of each sample over all of its values (one-group group
// normalisation), in front of a linear map: the scale and the shift of the norm are folded into the map (identity C of
// the design), so what a tile holds is (x - mean) / deviation.
#pragma once

#include <array>

#include "moments.h"

namespace mvit3 {

// A map (samples, rows, channels) of tokens.
struct Tokens {
  int64_t samples, rows, channels;

  explicit Tokens(const Tensor& x) : samples(x.size(0)), rows(x.size(1) * x.size(2)), channels(x.size(3)) {}
  Tokens(int64_t samples, int64_t rows, int64_t channels) : samples(samples), rows(rows), channels(channels) {}
  int64_t total() const { return samples * rows; }
  int64_t norms(bool per_sample) const { return per_sample ? samples : total(); }

  // How the statistics of samples are computed: each sample in pieces, all pieces in parts.
  int64_t pieces() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t measure_parts() const { return std::min(samples * pieces(), count_parts(total() * channels)); }
  void add_measure_to(std::vector<Region>& regions, bool per_sample) const {
    constexpr int64_t kOperations = 3;  // of a value
    if (per_sample)
      regions.push_back(even_region(samples * pieces(), measure_parts(), rows / pieces() * channels * kOperations));
  }
};

// Mean and 1 / deviation of each token or sample, float32: an output forward, an argument backward.
struct NormStatistics {
  Tensor mean, rstd;

  static NormStatistics empty(const Tensor& x, int64_t count) {
    const auto floats = [&] { return torch::stable::new_empty(x, {count}, ScalarType::Float); };
    return {floats(), floats()};
  }
  NormStatistics checked(int64_t count) const {
    return {contiguous_kept("mean", mean, {count}), contiguous_kept("rstd", rstd, {count})};
  }
};

// The sum of the lanes, in float64.
MVIT3_INLINE double sum_lanes(DoubleVec v) {
  NativeDouble sum = v.part[0];
  for (int i = 1; i < 2 * kParts; ++i) sum += v.part[i];
  double total = 0;
  for (int i = 0; i < kWidth / 2; ++i) total += sum[i];
  return total;
}

MVIT3_INLINE double sum_lanes(Vec v) { return sum_lanes(to_doubles(v)); }

// Of the last values of a row, less than a vector.
template <typename T>
MVIT3_INLINE RunMoments tail_moments(const T* values, int64_t count, Vec pivot) {
  return RunMoments::of(
      1, pivot, [&](int64_t) { return load_some(values, count, pivot); });  // the padding has no distance
}

// Of one row: the mean first, then the distances to it, which a large mean does not harm.
template <typename T>
MVIT3_INLINE Moments row_moments(const T* row, int64_t channels) {
  const int64_t full = channels / kLanes * kLanes, left = channels - full;
  Vec sum = 0.0f;
  for (int64_t c = 0; c < full; c += kLanes) sum += load(row + c);
  if (left) sum += load_some(row + full, left);
  const float first = float(sum_lanes(sum) / double(channels)), centre = std::isfinite(first) ? first : 0.0f;
  RunMoments all = RunMoments::of(full / kLanes, centre, [&](int64_t i) { return load(row + i * kLanes); });
  if (left) {
    const RunMoments tail = tail_moments(row + full, left, centre);
    all.sum += tail.sum;
    all.square += tail.square;
  }
  return Moments::about(centre, double(channels), sum_lanes(all.sum), sum_lanes(all.square));
}

// Of `count` values that lie one behind the other, by their distances to the first one.
template <typename T>
Moments moments_of(const T* x, int64_t count) {
  constexpr int64_t kRun = 64,
                    kChains = 4;  // vectors that float32 sums up; independent sums, for the latency of an addition
  const float first = count > 0 ? to_float(x[0]) : 0.0f, pivot = std::isfinite(first) ? first : 0.0f;
  const int64_t vectors = count / kLanes, left = count % kLanes;
  RunMoments all{};
  const auto add = [&](const RunMoments& run) {
    all.sum += run.sum;
    all.square += run.square;
  };
  for (int64_t begin = 0; begin < vectors; begin += kRun)
    add(RunMoments::of<kChains>(
        std::min(kRun, vectors - begin), pivot, [&](int64_t i) { return load(x + (begin + i) * kLanes); }));
  if (left) add(tail_moments(x + vectors * kLanes, left, pivot));
  return Moments::about(pivot, double(count), sum_lanes(all.sum), sum_lanes(all.square));
}

// A map and the statistics of its norm: `mean` and `rstd` of each token or of each sample.
template <typename T>
class NormedMap {
 public:
  // Where the norm is per token, `mean` and `rstd` may be null: nothing is kept then.
  NormedMap(const T* x, const Tokens& tokens, bool per_sample, float* mean, float* rstd)
      : x_(x), tokens_(tokens), per_sample_(per_sample), mean_(mean), rstd_(rstd) {}
  NormedMap(const T* x, const Tokens& tokens, bool per_sample, const NormStatistics& kept)
      : NormedMap(x, tokens, per_sample, mutable_data_of<float>(kept.mean), mutable_data_of<float>(kept.rstd)) {}

  const Tokens& tokens() const { return tokens_; }
  const T* row(int64_t r) const { return x_ + r * tokens_.channels; }
  bool per_sample() const { return per_sample_; }

  // Computes the statistics of the samples, over all threads; those of tokens are computed tile by tile.
  void measure(double eps) const {
    if (!per_sample_ || tokens_.total() == 0) return;
    const int64_t pieces = tokens_.pieces(), tasks = tokens_.samples * pieces;
    thread_local std::vector<Moments> memory;
    memory.assign(tasks, Moments{});
    Moments* moments = memory.data();  // a thread_local would be another one in each thread
    const int64_t parts = tokens_.measure_parts();
    for_each_part(parts, [&](int64_t part) {
      const Range mine = part_range(tasks, part, parts);
      for (int64_t task = mine.begin; task < mine.end; ++task) {
        const Range range = part_range(tokens_.rows, task % pieces, pieces);
        moments[task] = moments_of(row(task / pieces * tokens_.rows + range.begin), range.size() * tokens_.channels);
      }
    });
    for (int64_t sample = 0; sample < tokens_.samples; ++sample) {
      Moments whole;
      for (int64_t piece = 0; piece < pieces; ++piece) whole.join(moments[sample * pieces + piece]);
      mean_[sample] = float(whole.mean);
      rstd_[sample] = whole.rstd(eps);
    }
  }

  // The normalised rows, `stride` apart, zero from the last channel to the next whole vector. The first time, tokens
  // are measured.
  template <typename E>
  void normalise(int64_t first, int64_t count, double eps, E* out, int64_t stride) const {
    for (int64_t r = first; r < first + count; ++r, out += stride) {
      if (per_sample_) {
        write(r, mean_[r / tokens_.rows], rstd_[r / tokens_.rows], out);
        continue;
      }
      const Moments moments = row_moments(row(r), tokens_.channels);
      const float mean = float(moments.mean), rstd = moments.rstd(eps);
      if (mean_) {
        mean_[r] = mean;
        rstd_[r] = rstd;
      }
      write(r, mean, rstd, out);
    }
  }

  // The same from the statistics that were kept.
  template <typename E>
  void normalise_again(int64_t first, int64_t count, E* out, int64_t stride) const {
    for (int64_t r = first; r < first + count; ++r, out += stride) write(r, mean(r), rstd(r), out);
  }

  float mean(int64_t r) const { return mean_[per_sample_ ? r / tokens_.rows : r]; }
  float rstd(int64_t r) const { return rstd_[per_sample_ ? r / tokens_.rows : r]; }

 private:
  template <typename E>
  MVIT3_INLINE void write(int64_t r, float mean, float rstd, E* out) const {
    for (int64_t c = 0; c < tokens_.channels; c += kLanes)
      store(out + c, (load_some(row(r) + c, tokens_.channels - c, mean) - mean) * rstd);
  }

  const T* x_;
  Tokens tokens_;
  bool per_sample_;
  float *mean_, *rstd_;
};

// The gradient of the normalised rows to that of x: rstd (grad - mean(grad) - normalised mean(grad normalised)), and a
// residual's gradient on top where there is one. Per sample the two means are known only at the end: until then dx
// holds the incoming gradient.
template <typename T>
class NormedMapBackward {
 public:
  NormedMapBackward(const NormedMap<T>& map, const T* residual, T* dx, int64_t parts)
      : map_(map), residual_(residual), dx_(dx),
        sums_(accumulators<double>(parts, map.per_sample() ? 2 * map.tokens().samples : 1)) {}

  // Rows `stride` apart: grads zero behind the last channel.
  template <typename E>
  void tile(int64_t part, int64_t first, int64_t count, const float* grads, const E* normalised, int64_t stride) {
    const int64_t channels = map_.tokens().channels;
    for (int64_t r = first; r < first + count; ++r, grads += stride, normalised += stride) {
      Vec sum = 0.0f, dot = 0.0f;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const Vec grad = load(grads + c);
        sum += grad;
        dot = fma(grad, load_some(normalised + c, channels - c), dot);
      }
      if (map_.per_sample()) {
        double* sums = sums_[part].data() + r / map_.tokens().rows * 2;
        sums[0] += sum_lanes(sum);
        sums[1] += sum_lanes(dot);
        for (int64_t c = 0; c < channels; c += kLanes)
          store_some(dx_ + r * channels + c, load(grads + c), channels - c);
      } else {
        const float offset = float(sum_lanes(sum) / double(channels)), slope = float(sum_lanes(dot) / double(channels));
        correct(
            r, offset, slope, [&](int64_t c) { return load(grads + c); },
            [&](int64_t c) { return load(normalised + c); });
      }
    }
  }

  void finish() {
    const Tokens& tokens = map_.tokens();
    if (!map_.per_sample() || tokens.total() == 0) return;
    const Values sums = add_up(sums_, 2 * tokens.samples);
    const int64_t channels = tokens.channels;
    const double values = double(tokens.rows) * double(channels);
    for_each_tile(tokens.total(), count_parts(tokens.total() * channels), [&](int64_t, int64_t first, int64_t count) {
      for (int64_t r = first; r < first + count; ++r) {
        const int64_t sample = r / tokens.rows;
        const Vec mean = map_.mean(r), rstd = map_.rstd(r);
        correct(
            r, float(sums[2 * sample] / values), float(sums[2 * sample + 1] / values),
            [&](int64_t c) { return load_some(dx_ + r * channels + c, channels - c); },
            [&](int64_t c) { return (load_some(map_.row(r) + c, channels - c, mean) - mean) * rstd; });
      }
    });
  }

 private:
  template <typename Grad, typename Normalised>
  MVIT3_INLINE void correct(int64_t r, float offset, float slope, const Grad& grad, const Normalised& normalised) {
    const int64_t channels = map_.tokens().channels;
    const Vec rstd = map_.rstd(r);
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vec dx = fnma(normalised(c), slope, grad(c) - offset) * rstd;
      if (residual_) dx += load_some(residual_ + r * channels + c, channels - c);
      store_some(dx_ + r * channels + c, dx, channels - c);
    }
  }

  const NormedMap<T>& map_;
  const T* residual_;
  T* dx_;
  std::vector<Scratch<double>> sums_;
};

}  // namespace mvit3
