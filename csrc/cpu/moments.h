// Mean and variance of the channels of a map, by a method that a large mean does not harm.
#pragma once

#include <cmath>

#include "tile.h"

namespace mvit3 {

// Number, mean and sum of squared distances to the mean of some values; sets of values join by the formula of Chan, Golub and LeVeque.
struct Spread {
  double count = 0, mean = 0, squares = 0;

  // From the sums of the values' distances to a pivot and of the distances squared.
  static Spread about(double pivot, double count, double sum, double square) {
    const double offset = count > 0 ? sum / count : 0;
    return {count, pivot + offset, square - sum * offset};
  }

  void join(const Spread& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    squares += other.squares + delta * delta * (count * other.count / total);
    mean += delta * (other.count / total);
    count = total;
  }

  double variance() const { return count > 0 ? std::max(squares, 0.0) / count : 0; }
  float rstd(double eps) const { return float(1 / std::sqrt(variance() + eps)); }
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

// Sums of one thread, in float64, of each channel's distance to its pivot and of the distance squared. The pivot is about the mean, so
// that little is left to cancel: the mean of the first run of rows, taken by distances to the first row, which leaves a constant exact.
class ChannelSums {
 public:
  explicit ChannelSums(int64_t channels) : channels_(channels), pivot_(lanes(), 0.0f), sum_(lanes(), 0.0), square_(lanes(), 0.0) {}

  // `count` rows, the first at `rows`.
  template <typename T>
  void add(const T* rows, int64_t count, int64_t stride) {
    if (count_ == 0 && count > 0) set_pivot(rows, std::min<int64_t>(count, 16), stride);
    count_ += count;
    for (int64_t c = 0; c < channels_; c += kLanes) {
      const Vec pivot = load(pivot_.data() + c);
      for_each_run(count, [&](int64_t first, int64_t last) {
        Vec sum = 0.0f, square = 0.0f;
        for (int64_t r = first; r < last; ++r) {
          const Vec distance = load_some(rows + r * stride + c, channels_ - c) - pivot;
          sum += distance;
          square = fma(distance, distance, square);
        }
        accumulate(sum_.data() + c, sum);
        accumulate(square_.data() + c, square);
      });
    }
  }

  // The same in steps, for a kernel that has the values in registers: how many rows will follow, beginning with a first row that gives the
  // pivots (only `add_run` for the first time needs them), then the sums of short runs of rows.
  bool empty() const { return count_ == 0; }
  void count(int64_t rows) { count_ += rows; }
  void set_pivot(int64_t c, Vec value) { store(pivot_.data() + c, value); }
  Vec pivot(int64_t c) const { return load(pivot_.data() + c); }
  void add_run(int64_t c, Vec sum, Vec square) {
    accumulate(sum_.data() + c, sum);
    accumulate(square_.data() + c, square);
  }

  // Puts the sums of all threads together.
  static void combine(const std::vector<ChannelSums>& parts, Values& mean, Values& var) {
    for (size_t c = 0; c < mean.size(); ++c) {
      Spread all;
      for (const ChannelSums& part : parts) all.join(Spread::about(part.pivot_[c], double(part.count_), part.sum_[c], part.square_[c]));
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
      store(pivot_.data() + c, fma(sum, 1.0f / count, first));
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
