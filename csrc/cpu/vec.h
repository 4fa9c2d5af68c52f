// Sixteen floats at a time, on every instruction set: one 512-bit register, two of 256 bits or four of 128.
//
// A kernel is written once against `Vec`; the compiler flags of the variant decide what it becomes. The layout of blocks and
// periods (always multiples of sixteen lanes) is therefore the same in all variants.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__F16C__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#define MVIT3_INLINE inline __attribute__((always_inline))

namespace mvit3 {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;

typedef float NativeFloat __attribute__((vector_size(kWidth * 4)));
typedef int32_t NativeInt __attribute__((vector_size(kWidth * 4)));

// The whole-vector operations below are loops over `kParts`, a constant of at most four: they unroll to straight code.
struct Vec {
  NativeFloat part[kParts];

  Vec() = default;
  MVIT3_INLINE Vec(float value) {
    for (int i = 0; i < kParts; ++i) part[i] = NativeFloat{} + value;
  }
};

#define MVIT3_BINARY(op)                                                 \
  MVIT3_INLINE Vec operator op(Vec a, Vec b) {                           \
    Vec r;                                                               \
    for (int i = 0; i < kParts; ++i) r.part[i] = a.part[i] op b.part[i]; \
    return r;                                                            \
  }
MVIT3_BINARY(+)
MVIT3_BINARY(-)
MVIT3_BINARY(*)
MVIT3_BINARY(/)
#undef MVIT3_BINARY

MVIT3_INLINE Vec& operator+=(Vec& a, Vec b) { return a = a + b; }

// a * b + c, one rounding where the instruction set has it (the variants are compiled with -ffp-contract=fast).
MVIT3_INLINE Vec fma(Vec a, Vec b, Vec c) {
  Vec r;
  for (int i = 0; i < kParts; ++i) r.part[i] = a.part[i] * b.part[i] + c.part[i];
  return r;
}

// c - a * b
MVIT3_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  Vec r;
  for (int i = 0; i < kParts; ++i) r.part[i] = c.part[i] - a.part[i] * b.part[i];
  return r;
}

// test > bound ? yes : no, lane by lane; false for NaN.
MVIT3_INLINE Vec select_greater(Vec test, Vec bound, Vec yes, Vec no) {
  Vec r;
  for (int i = 0; i < kParts; ++i) r.part[i] = test.part[i] > bound.part[i] ? yes.part[i] : no.part[i];
  return r;
}

MVIT3_INLINE Vec load(const float* p) {
  Vec r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}

MVIT3_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

MVIT3_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The same sixteen lanes in float64, for sums over many rows.
typedef double NativeDouble __attribute__((vector_size(kWidth * 4)));

struct Wide {
  NativeDouble part[2 * kParts];
};

MVIT3_INLINE Wide widen(Vec v) {
  typedef float Half __attribute__((vector_size(kWidth * 2)));
  Half halves[2 * kParts];
  std::memcpy(halves, &v, sizeof(v));
  Wide r;
  for (int i = 0; i < 2 * kParts; ++i) r.part[i] = __builtin_convertvector(halves[i], NativeDouble);
  return r;
}

MVIT3_INLINE Wide load(const double* p) {
  Wide r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}

MVIT3_INLINE void store(double* p, Wide v) { std::memcpy(p, &v, sizeof(v)); }

MVIT3_INLINE Wide operator-(Wide a, Wide b) {
  for (int i = 0; i < 2 * kParts; ++i) a.part[i] -= b.part[i];
  return a;
}

MVIT3_INLINE Wide& operator+=(Wide& a, Wide b) {
  for (int i = 0; i < 2 * kParts; ++i) a.part[i] += b.part[i];
  return a;
}

MVIT3_INLINE Wide fma(Wide a, Wide b, Wide c) {
  for (int i = 0; i < 2 * kParts; ++i) c.part[i] += a.part[i] * b.part[i];
  return c;
}

// exp(x), within 2 ulp; inf from 88.38 up (the largest finite results are lost), 1.2e-38 below -87.3, NaN for NaN.
MVIT3_INLINE Vec exp(Vec x) {
  constexpr float kMax = 88.376f, kMin = -87.336f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits
  Vec clamped = select_greater(x, kMax, kMax, x);
  clamped = select_greater(Vec(kMin), clamped, kMin, clamped);
  const Vec shifted = fma(clamped, 1.44269504088896341f, kMagic);
  const Vec n = shifted - kMagic;
  Vec r = fnma(n, 0.693145751953125f, clamped);  // ln 2 in two parts
  r = fnma(n, 1.42860682030941723212e-6f, r);
  Vec p = 1.38888889e-3f;
  p = fma(p, r, 8.33333333e-3f);
  p = fma(p, r, 4.16666667e-2f);
  p = fma(p, r, 1.66666667e-1f);
  p = fma(p, r, 0.5f);
  p = fma(p, r, 1.0f);
  p = fma(p, r, 1.0f);
  Vec scaled;
  for (int i = 0; i < kParts; ++i) {
    NativeInt exponent, bits;
    std::memcpy(&exponent, &shifted.part[i], sizeof(exponent));
    std::memcpy(&bits, &p.part[i], sizeof(bits));
    bits += exponent << 23;
    std::memcpy(&scaled.part[i], &bits, sizeof(bits));
  }
  return select_greater(x, kMax, std::numeric_limits<float>::infinity(), scaled);
}

MVIT3_INLINE Vec sigmoid(Vec x) { return Vec(1.0f) / (Vec(1.0f) + exp(Vec(0.0f) - x)); }

}  // namespace mvit3
