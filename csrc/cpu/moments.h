// Mean and variance of the channels of a map, by a method that a large mean does not harm.
#pragma once

#include <cmath>
#include <limits>

#include "tile.h"

namespace mvit3 {

// Number, mean and sum of squared distances to the mean of some values; sets of values join by the formula of Chan,
// Golub and LeVeque.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // From the sums of the values' distances to a pivot and of the distances squared.
  static Moments about(double pivot, double count, double sum, double square) {
    const double offset = count > 0 ? sum / count : 0;
    return {count, pivot + offset, square - sum * offset};
  }

  void join(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    if (std::isfinite(delta)) {
      squares += other.squares + delta * delta * (count * other.count / total);
      mean += delta * (other.count / total);
    } else {  // the mean that a sum of all values gives: infinite with one infinity among them, NaN with both
      squares = std::numeric_limits<double>::quiet_NaN();
      mean += other.mean;
    }
    count = total;
  }

  double variance() const { return count > 0 ? std::max(squares, 0.0) / count : 0; }
  float rstd(double eps) const { return float(1 / std::sqrt(variance() + eps)); }
};

// Sums over a run of values, for each lane, of the distance to a pivot and of the distance squared.
struct RunMoments {
  DoubleVec sum, square;

  // Of value(0) .. value(count - 1), in float64.
  template <typename Value>
  static MVIT3_INLINE RunMoments in_float64(int64_t count, DoubleVec pivot, const Value& value) {
    RunMoments run{};
    for (int64_t i = 0; i < count; ++i) {
      const DoubleVec distance = to_doubles(value(i)) - pivot;
      run.sum += distance;
      run.square = fma(distance, distance, run.square);
    }
    return run;
  }

  // The same of a short run in float32, which is exact enough for it, in `Chains` independent sums. Where float32
  // cannot hold the squares, as of values about 1e19 apart, they are taken again in float64: this is what every norm of
  // a kernel but batch_norm_act's is made from.
  template <int Chains = 1, typename Value>
  static MVIT3_INLINE RunMoments of(int64_t count, Vec pivot, const Value& value) {
    Vec sum[Chains], square[Chains];
    for (int k = 0; k < Chains; ++k) sum[k] = square[k] = 0.0f;
    const auto add = [&](Vec distance, int k) {
      sum[k] += distance;
      square[k] = fma(distance, distance, square[k]);
    };
    int64_t i = 0;
    for (; i + Chains <= count; i += Chains)
      for (int k = 0; k < Chains; ++k) add(value(i + k) - pivot, k);
    for (; i < count; ++i) add(value(i) - pivot, 0);
    for (int width = Chains / 2; width > 0; width /= 2)
      for (int k = 0; k < width; ++k) {
        sum[k] += sum[k + width];
        square[k] += square[k + width];
      }
    if (__builtin_expect(all_finite(square[0]), true)) return {to_doubles(sum[0]), to_doubles(square[0])};
    return in_float64(count, to_doubles(pivot), value);
  }
};

// Calls f(first, last) for short runs of `count` rows: float32 holds the sum of a run, float64 that of the runs.
template <typename F>
MVIT3_INLINE void for_each_run(int64_t count, const F& f) {
  for (int64_t first = 0; first < count; first += 16) f(first, std::min<int64_t>(first + 16, count));
}

// Adds to sums[c] the column c of `count` rows.
template <typename T>
void add_columns(const T* rows, int64_t stride, int64_t count, int64_t columns, double* sums) {
  for (int64_t c = 0; c < columns; c += kLanes)
    for_each_run(count, [&](int64_t first, int64_t last) {
      Vec sum = 0.0f;
      for (int64_t r = first; r < last; ++r) sum += load_some(rows + r * stride + c, columns - c);
      accumulate(sums + c, sum);
    });
}

// Sums of one thread, in float64, of each channel's distance to its pivot and of the distance squared. The pivot is
// about the mean, so that little is left to cancel: the mean of the first run of rows, taken by distances to the first
// row, which leaves a constant exact.
class ChannelSums {
 public:
  explicit ChannelSums(int64_t channels)
      : channels_(channels), pivot_(lanes(), 0.0f), sum_(lanes(), 0.0), square_(lanes(), 0.0) {}

  // `count` rows, the first at `rows`.
  template <typename T>
  void add(const T* rows, int64_t count, int64_t stride) {
    if (count_ == 0 && count > 0) set_pivot(rows, std::min<int64_t>(count, 16), stride);
    count_ += count;
    for (int64_t c = 0; c < channels_; c += kLanes) {
      const Vec pivot = load(pivot_.data() + c);
      for_each_run(count, [&](int64_t first, int64_t last) {
        add_run(c, RunMoments::of(last - first, pivot, [&](int64_t i) {
                  return load_some(rows + (first + i) * stride + c, channels_ - c);
                }));
      });
    }
  }

  // The same in steps, for a kernel that has the values in registers: how many rows will follow, beginning with a first
  // row that gives the pivots (only `add_run` for the first time needs them), then the sums of short runs of rows.
  bool empty() const { return count_ == 0; }
  void count(int64_t rows) { count_ += rows; }
  void set_pivot(int64_t c, Vec value) { store(pivot_.data() + c, finite_or_zero(value)); }
  Vec pivot(int64_t c) const { return load(pivot_.data() + c); }
  void add_run(int64_t c, const RunMoments& run) {
    accumulate(sum_.data() + c, run.sum);
    accumulate(square_.data() + c, run.square);
  }

  // Puts the sums of all threads together.
  static void combine(const std::vector<ChannelSums>& parts, Values& mean, Values& var) {
    for (size_t c = 0; c < mean.size(); ++c) {
      Moments all;
      for (const ChannelSums& part : parts)
        all.join(Moments::about(part.pivot_[c], double(part.count_), part.sum_[c], part.square_[c]));
      mean[c] = all.mean;
      var[c] = all.variance();
    }
  }

 private:
  int64_t lanes() const { return lanes_of(channels_); }

  template <typename T>
  void set_pivot(const T* rows, int64_t count, int64_t stride) {
    for (int64_t c = 0; c < channels_; c += kLanes) {
      const Vec first = load_some(rows + c, channels_ - c);
      Vec sum = 0.0f;
      for (int64_t r = 1; r < count; ++r) sum += load_some(rows + r * stride + c, channels_ - c) - first;
      set_pivot(c, fma(sum, 1.0f / count, first));
    }
  }

  int64_t channels_, count_ = 0;
  Scratch<float> pivot_;
  Scratch<double> sum_, square_;
};

// One a part.
inline std::vector<ChannelSums> channel_sums(int64_t parts, int64_t channels) {
  std::vector<ChannelSums> sums;
  sums.reserve(parts);
  for (int64_t i = 0; i < parts; ++i) sums.emplace_back(channels);
  return sums;
}

}  // namespace mvit3
