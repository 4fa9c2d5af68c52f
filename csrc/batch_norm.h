// The one formula of a folded batch normalisation.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MVIT3_HOST_AND_DEVICE __host__ __device__ __forceinline__
#else
#define MVIT3_HOST_AND_DEVICE inline
#endif

namespace mvit3 {

// What a batch normalisation with fixed statistics does to a channel: value * scale + shift.
template <typename Number>
struct FoldedNorm {
  Number scale, shift;
};

template <typename Number>
MVIT3_HOST_AND_DEVICE FoldedNorm<Number> fold_norm(Number weight, Number bias, Number mean, Number var, Number eps) {
  using std::sqrt;
  const Number scale = weight / sqrt(var + eps);
  return {scale, bias - mean * scale};
}

}  // namespace mvit3
