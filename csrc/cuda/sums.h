// Sums over a whole map: each block keeps its own in a workspace, and whoever needs them adds them up in a fixed order.
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

// Writes those of a channel over the part of this block, and how many values they are of; Triton's load_moments joins
// the parts.
template <typename Arguments>
MVIT3_DEVICE
void store_moments(const Arguments& a, int channels, int channel, Moments sum, float count) {
  float* const to = a.moments + int64_t(block()) * channels + channel;
  to[0] = sum.mean;
  to[int64_t(blocks()) * channels] = sum.squares;
  if (channel == 0) a.counts[block()] = count;
}

// Number i of `parts` parts, one behind the other in steps of `step`, added up where it is `wanted`; for the first warp
// of a block of threads that takes 32 sums. Shared memory of kThreads floats.
MVIT3_DEVICE
float sum_of_parts(const float* from, int parts, int64_t step, int64_t i, bool wanted) {
  float* const sums = reinterpret_cast<float*>(shared_memory());  // (kWarps, 32)
  float sum = 0.0f;
  if (wanted)
#pragma unroll 4
    for (int p = warp(); p < parts; p += kWarps) sum += from[p * step + i];
  sums[thread()] = sum;
  synchronize();
  if (warp() == 0)
    for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarp + lane()];
  return sum;
}

}  // namespace mvit3
