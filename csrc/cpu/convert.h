// Storage types: float32, bfloat16 and float16 in memory, float32 in registers.
#pragma once

#include <cstring>
#include <type_traits>

#include "vec.h"

namespace mvit3 {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// One element. Conversions to 16 bits round to nearest even; NaN stays NaN.
MVIT3_INLINE float to_float(float x) { return x; }

MVIT3_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float r;
  std::memcpy(&r, &bits, sizeof(r));
  return r;
}

MVIT3_INLINE float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals; inf and NaN are set by hand.
  float r;
  std::memcpy(&r, &magnitude, sizeof(r));
  r *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &r, sizeof(bits));
  if (magnitude >= 0x0f800000) bits |= 0x7f800000;
  bits |= sign;
  std::memcpy(&r, &bits, sizeof(r));
  return r;
}

template <typename T>
T from_float(float x);

template <>
MVIT3_INLINE float from_float<float>(float x) {
  return x;
}

template <>
MVIT3_INLINE BFloat16 from_float<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
MVIT3_INLINE Float16 from_float<Float16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (bits < 0x38800000) {                                   // subnormal: adding 0.5 lets the hardware round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  return {uint16_t(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13))};
}

// Sixteen elements.
MVIT3_INLINE Vec load(const BFloat16* p) {
  Vec r;
#if defined(__AVX512BW__)
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  r.part[0] = NativeFloat(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
    r.part[i] = NativeFloat(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
  }
#else
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = to_float(p[i]);
  r = load(values);
#endif
  return r;
}

MVIT3_INLINE Vec load(const Float16* p) {
  Vec r;
#if defined(__AVX512F__)
  r.part[0] = NativeFloat(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i)
    r.part[i] = NativeFloat(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i))));
#else
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = to_float(p[i]);
  r = load(values);
#endif
  return r;
}

#if defined(__AVX2__)
// Sixteen floats rounded to 16 bits, in one register.
MVIT3_INLINE __m256i round_to(Vec v, BFloat16) {
#if defined(__AVX512BF16__)  // takes subnormal numbers for zero
  return __m256i(_mm512_cvtneps_pbh(__m512(v.part[0])));
#elif defined(__AVX512BW__)
  const __m512 value = __m512(v.part[0]);
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc00000)), 16));
#else
  __m256i rounded[2];
  for (int i = 0; i < 2; ++i) {
    const __m256 value = __m256(v.part[i]);
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    rounded[i] = _mm256_srli_epi32(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), nan), 16);
  }
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded[0], rounded[1]), 0xd8);
#endif
}

MVIT3_INLINE __m256i round_to(Vec v, Float16) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
  return _mm512_cvtps_ph(__m512(v.part[0]), kNearest);
#else
  return _mm256_set_m128i(_mm256_cvtps_ph(__m256(v.part[1]), kNearest), _mm256_cvtps_ph(__m256(v.part[0]), kNearest));
#endif
}

template <typename Half>
MVIT3_INLINE void store(Half* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to(v, Half{}));
}
#else
template <typename Half>
MVIT3_INLINE void store(Half* p, Vec v) {
  float values[kLanes];
  store(values, v);
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Half>(values[i]);
}
#endif

// The first `count` lanes (all, where there are more), zero behind them.
MVIT3_INLINE Vec load_some(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
#if defined(__AVX512F__)
  Vec r;
  r.part[0] = NativeFloat(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
  return r;
#else
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load(values);
#endif
}

// The same with `fill` behind them.
template <typename T>
MVIT3_INLINE Vec load_some(const T* p, int64_t count, Vec fill) {
  if (count >= kLanes) return load(p);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    Vec r;
    r.part[0] = NativeFloat(_mm512_mask_loadu_ps(__m512(fill.part[0]), __mmask16((1u << count) - 1), p));
    return r;
  }
#endif
  float values[kLanes];
  store(values, fill);
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(p[i]);
  return load(values);
}

template <typename Half>
MVIT3_INLINE Vec load_some(const Half* p, int64_t count) {
  if (count >= kLanes) return load(p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (std::is_same_v<Half, BFloat16>) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
    Vec r;
    r.part[0] = NativeFloat(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
    return r;
  }
#endif
  Half values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load(values);
}

MVIT3_INLINE void store_some(float* p, Vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), __m512(v.part[0]));
#else
  float values[kLanes];
  store(values, v);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
#endif
}

template <typename Half>
MVIT3_INLINE void store_some(Half* p, Vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  Half values[kLanes];
  store(values, v);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
}

// A store that goes past the cache: for an output so large that it would only push out what is still needed. `p` must
// be aligned to 64 bytes, and `stream_fence` must run before another thread reads what was written.
MVIT3_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, __m512(v.part[0]));
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; ++i) _mm256_stream_ps(p + kWidth * i, __m256(v.part[i]));
#elif defined(__SSE2__)
  for (int i = 0; i < kParts; ++i) _mm_stream_ps(p + kWidth * i, __m128(v.part[i]));
#else
  store(p, v);
#endif
}

template <typename Half>
MVIT3_INLINE void stream(Half* p, Vec v) {
#if defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round_to(v, Half{}));
#else
  store(p, v);
#endif
}

MVIT3_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace mvit3
