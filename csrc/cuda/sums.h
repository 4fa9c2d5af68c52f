// Sums over a whole map: each block keeps its own in a workspace, small kernels add them up in a fixed order.
#pragma once

#include "tile.h"

namespace mvit3 {

// Mean and sum of squared differences from it, of values whose number is kept elsewhere.
struct Moments {
  float mean, squares;
};

MVIT3_DEVICE
Moments merge(Moments a, float count_a, Moments b, float count_b) {
  if (count_b == 0.0f) return a;
  const float share = fast_divide(count_b, count_a + count_b), apart = b.mean - a.mean;
  return {a.mean + apart * share, a.squares + b.squares + apart * apart * count_a * share};
}

// From the moments of `parts` blocks, with n = the sum of their counts:
//   mean = sum(count * mean) / n, var = sum(squares + count * (mean of the block - mean)^2) / n.
// Reads the workspace three times: moments (parts, channels) and counts (parts). Writes mean and var (channels) once.
// A block of threads has 32 channels.
struct FinishMoments {
  struct Arguments {
    const float* workspace;
    float *mean, *var;
    int parts, channels;
  };
  static constexpr int kBlocksAtOnce = 1;

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    double* const sums = reinterpret_cast<double*>(shared_memory());  // (kWarps, 32)
    const Moments* const moments = reinterpret_cast<const Moments*>(a.workspace);
    const float* const counts = a.workspace + int64_t(a.parts) * a.channels * 2;
    const int channel = block() * kWarp + lane();
    const bool there = channel < a.channels;
    const auto add_up = [&](auto value) {
      double sum = 0.0;
      if (there)
        for (int p = warp(); p < a.parts; p += kWarps) sum += value(p);
      synchronize();
      sums[thread()] = sum;
      synchronize();
      sum = 0.0;
      for (int w = 0; w < kWarps; ++w) sum += sums[w * kWarp + lane()];
      return sum;
    };
    const double count = add_up([&](int p) { return double(counts[p]); });
    const double mean =
        add_up([&](int p) { return counts[p] * double(moments[int64_t(p) * a.channels + channel].mean); }) / count;
    const double squares = add_up([&](int p) {
      const Moments part = moments[int64_t(p) * a.channels + channel];
      const double apart = part.mean - mean;
      return part.squares + counts[p] * apart * apart;
    });
    if (there && warp() == 0) {
      a.mean[channel] = float(mean);
      a.var[channel] = float(squares / count);
    }
  }
};

// Sum i of `count` that each of `parts` blocks kept, for the first warp of a block of threads that takes 32 sums;
// shared memory of kThreads floats.
MVIT3_DEVICE
float sum_of_parts(const float* workspace, int parts, int64_t count, int64_t i) {
  float* const sums = reinterpret_cast<float*>(shared_memory());  // (kWarps, 32)
  float sum = 0.0f;
  if (i < count)
#pragma unroll 4
    for (int p = warp(); p < parts; p += kWarps) sum += workspace[p * count + i];
  sums[thread()] = sum;
  synchronize();
  if (warp() == 0)
    for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarp + lane()];
  return sum;
}

}  // namespace mvit3
