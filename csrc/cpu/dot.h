// One step of a product, for each type that products are made of: sixteen multiply-adds of float32, or of pairs of
// bfloat16 where the CPU has the instruction for them (twice the work in the same time). Sums are float32 in both.
#pragma once

#include <type_traits>

#include "convert.h"

namespace mvit3 {

// `kDepth` neighbours along the reduction make one step: they lie side by side in both operands.
template <typename E>
struct Dot;

template <>
struct Dot<float> {
  static constexpr int64_t kDepth = 1;
  using Operand = Vec;

  static MVIT3_INLINE Vec load(const float* p) { return mvit3::load(p); }
  static MVIT3_INLINE Vec broadcast(const float* p) { return *p; }
  static MVIT3_INLINE Vec add(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }
  // Writes what `load` reads, from one vector for each neighbour.
  static MVIT3_INLINE void store(float* p, const Vec* values) { mvit3::store(p, values[0]); }
};

#if defined(__AVX512BF16__)
constexpr bool kMultipliesBFloat16 = true;

// The instruction takes subnormal numbers for zero, as the rounding in `store` does.
template <>
struct Dot<BFloat16> {
  static constexpr int64_t kDepth = 2;
  using Operand = __m512i;

  static MVIT3_INLINE __m512i load(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static MVIT3_INLINE __m512i broadcast(const BFloat16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static MVIT3_INLINE Vec add(Vec sum, __m512i a, __m512i b) {
    sum.part[0] = NativeFloat(_mm512_dpbf16_ps(__m512(sum.part[0]), __m512bh(a), __m512bh(b)));
    return sum;
  }
  static MVIT3_INLINE void store(BFloat16* p, const Vec* values) {
    alignas(64) static constexpr int16_t kInPairs[2 * kLanes] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i rounded = __m512i(_mm512_cvtne2ps_pbh(__m512(values[1].part[0]), __m512(values[0].part[0])));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kInPairs), rounded));
  }
};
#else
constexpr bool kMultipliesBFloat16 = false;
#endif

// Whether what stands between products of E may be rough: rounding their operands errs 25 times as much.
template <typename E>
constexpr bool kRoughly = !std::is_same_v<E, float>;

// What products of rows stored as T are made of.
template <typename T>
using Multiplied = std::conditional_t<kMultipliesBFloat16 && std::is_same_v<T, BFloat16>, BFloat16, float>;

}  // namespace mvit3
