// Sixteen floats at a time, on every instruction set: one 512-bit register, two of 256 bits or four of 128.
//
// A kernel is written once against `Vec`; the compiler flags of the variant decide what it becomes. The layout of
// blocks and periods (always multiples of sixteen lanes) is therefore the same in all variants.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__SSE2__)
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
  // Not `NativeFloat{} + value`: GCC would keep the addition, for the sake of a negative zero.
  MVIT3_INLINE Vec(float value) {
#if defined(__AVX512F__)
    part[0] = NativeFloat(_mm512_set1_ps(value));
#elif defined(__AVX2__)
    for (int i = 0; i < kParts; ++i) part[i] = NativeFloat(_mm256_set1_ps(value));
#else
    for (int i = 0; i < kParts; ++i) part[i] = NativeFloat{value, value, value, value};
#endif
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

// test >= bound ? yes : no, lane by lane; false for NaN.
MVIT3_INLINE Vec select_at_least(Vec test, Vec bound, Vec yes, Vec no) {
  Vec r;
  for (int i = 0; i < kParts; ++i) r.part[i] = test.part[i] >= bound.part[i] ? yes.part[i] : no.part[i];
  return r;
}

// Whether no lane is infinite or NaN.
MVIT3_INLINE bool all_finite(Vec v) {
#if defined(__AVX512F__)
  constexpr int kInfinite = 0x10 | 0x08, kNan = 0x80 | 0x01;
  return _mm512_fpclass_ps_mask(__m512(v.part[0]), kInfinite | kNan) == 0;
#else
  NativeInt finite = v.part[0] - v.part[0] == NativeFloat{};
  for (int i = 1; i < kParts; ++i) finite &= v.part[i] - v.part[i] == NativeFloat{};
#if defined(__AVX2__)
  return _mm256_movemask_ps(__m256(finite)) == 0xff;
#elif defined(__SSE2__)
  return _mm_movemask_ps(__m128(finite)) == 0xf;
#else
  return finite[0] & finite[1] & finite[2] & finite[3];
#endif
#endif
}

// v, zero where it is infinite or NaN.
MVIT3_INLINE Vec finite_or_zero(Vec v) {
  for (int i = 0; i < kParts; ++i)
    v.part[i] = NativeFloat(NativeInt(v.part[i]) & (v.part[i] - v.part[i] == NativeFloat{}));
  return v;
}

// Part by part: GCC would take a copy of the whole struct through the stack.
typedef NativeFloat UnalignedFloat __attribute__((aligned(4), may_alias));

MVIT3_INLINE Vec load(const float* p) {
  Vec r;
  for (int i = 0; i < kParts; ++i) r.part[i] = *reinterpret_cast<const UnalignedFloat*>(p + i * kWidth);
  return r;
}

MVIT3_INLINE void store(float* p, Vec v) {
  for (int i = 0; i < kParts; ++i) *reinterpret_cast<UnalignedFloat*>(p + i * kWidth) = v.part[i];
}

MVIT3_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
MVIT3_INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 2); }

// Two halves of a transposition: lanes whose number has the bit `Distance` change places between rows that lie
// `Distance` apart.
template <int Distance>
MVIT3_INLINE void exchange(NativeFloat* rows) {
  NativeInt low, high;
  for (int lane = 0; lane < kWidth; ++lane) {  // constants
    low[lane] = lane & Distance ? kWidth + lane - Distance : lane;
    high[lane] = lane & Distance ? kWidth + lane : lane + Distance;
  }
  for (int i = 0; i < kWidth; ++i) {
    if (i & Distance) continue;
    const NativeFloat a = rows[i], b = rows[i + Distance];
#if defined(__clang__)
    for (int lane = 0; lane < kWidth; ++lane) {
      rows[i][lane] = lane & Distance ? b[lane - Distance] : a[lane];
      rows[i + Distance][lane] = lane & Distance ? b[lane] : a[lane + Distance];
    }
#else
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + Distance] = __builtin_shuffle(a, b, high);
#endif
  }
}

// Transposes a square of kLanes x kLanes floats in place.
MVIT3_INLINE void transpose(float* square) {
  const auto read = [&](int row, int column, NativeFloat* rows) {
    for (int i = 0; i < kWidth; ++i)
      rows[i] = *reinterpret_cast<const UnalignedFloat*>(square + (row + i) * kLanes + column);
    exchange<1>(rows);
    exchange<2>(rows);
    if constexpr (kWidth > 4) exchange<4>(rows);
    if constexpr (kWidth > 8) exchange<8>(rows);
  };
  const auto write = [&](int row, int column, const NativeFloat* rows) {
    for (int i = 0; i < kWidth; ++i) *reinterpret_cast<UnalignedFloat*>(square + (row + i) * kLanes + column) = rows[i];
  };
  for (int row = 0; row < kLanes; row += kWidth)
    for (int column = row; column < kLanes; column += kWidth) {
      NativeFloat above[kWidth], below[kWidth];
      read(row, column, above);
      if (column > row) {
        read(column, row, below);
        write(row, column, below);
      }
      write(column, row, above);
    }
}

// The same sixteen lanes in float64, for sums over many rows.
typedef double NativeDouble __attribute__((vector_size(kWidth * 4)));

struct DoubleVec {
  NativeDouble part[2 * kParts];
};

MVIT3_INLINE DoubleVec to_doubles(Vec v) {
  DoubleVec r;
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    const __m512 part = __m512(v.part[i]);
    r.part[2 * i] = NativeDouble(_mm512_cvtps_pd(_mm512_castps512_ps256(part)));
    r.part[2 * i + 1] = NativeDouble(_mm512_cvtps_pd(_mm512_extractf32x8_ps(part, 1)));
#elif defined(__AVX2__)
    const __m256 part = __m256(v.part[i]);
    r.part[2 * i] = NativeDouble(_mm256_cvtps_pd(_mm256_castps256_ps128(part)));
    r.part[2 * i + 1] = NativeDouble(_mm256_cvtps_pd(_mm256_extractf128_ps(part, 1)));
#elif defined(__SSE2__)
    const __m128 part = __m128(v.part[i]);
    r.part[2 * i] = NativeDouble(_mm_cvtps_pd(part));
    r.part[2 * i + 1] = NativeDouble(_mm_cvtps_pd(_mm_movehl_ps(part, part)));
#else
    r.part[2 * i] = NativeDouble{v.part[i][0], v.part[i][1]};
    r.part[2 * i + 1] = NativeDouble{v.part[i][2], v.part[i][3]};
#endif
  }
  return r;
}

typedef NativeDouble UnalignedDouble __attribute__((aligned(8), may_alias));

MVIT3_INLINE DoubleVec load(const double* p) {
  DoubleVec r;
  for (int i = 0; i < 2 * kParts; ++i) r.part[i] = *reinterpret_cast<const UnalignedDouble*>(p + i * (kWidth / 2));
  return r;
}

MVIT3_INLINE void store(double* p, DoubleVec v) {
  for (int i = 0; i < 2 * kParts; ++i) *reinterpret_cast<UnalignedDouble*>(p + i * (kWidth / 2)) = v.part[i];
}

MVIT3_INLINE DoubleVec operator+(DoubleVec a, DoubleVec b) {
  for (int i = 0; i < 2 * kParts; ++i) a.part[i] += b.part[i];
  return a;
}

MVIT3_INLINE DoubleVec operator-(DoubleVec a, DoubleVec b) {
  for (int i = 0; i < 2 * kParts; ++i) a.part[i] -= b.part[i];
  return a;
}

MVIT3_INLINE DoubleVec& operator+=(DoubleVec& a, DoubleVec b) { return a = a + b; }

MVIT3_INLINE DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) {
  for (int i = 0; i < 2 * kParts; ++i) c.part[i] += a.part[i] * b.part[i];
  return c;
}

MVIT3_INLINE void accumulate(double* p, DoubleVec v) { store(p, load(p) + v); }
MVIT3_INLINE void accumulate(double* p, Vec v) { accumulate(p, to_doubles(v)); }

// x limited to low..high; NaN stays NaN.
MVIT3_INLINE Vec clamp(Vec x, Vec low, Vec high) {
#if defined(__AVX512F__)  // min and max return their second operand where one of the two is NaN
  x.part[0] = NativeFloat(_mm512_max_ps(__m512(low.part[0]), _mm512_min_ps(__m512(high.part[0]), __m512(x.part[0]))));
  return x;
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; ++i)
    x.part[i] = NativeFloat(_mm256_max_ps(__m256(low.part[i]), _mm256_min_ps(__m256(high.part[i]), __m256(x.part[i]))));
  return x;
#elif defined(__SSE2__)
  for (int i = 0; i < kParts; ++i)
    x.part[i] = NativeFloat(_mm_max_ps(__m128(low.part[i]), _mm_min_ps(__m128(high.part[i]), __m128(x.part[i]))));
  return x;
#else
  x = select_greater(x, high, high, x);
  return select_greater(low, x, low, x);
#endif
}

// 2^r for 0 .. 1: minimax, relative error 9e-8; roughly, 8e-5, a 26th of what rounding to bfloat16 errs at most.
template <bool Roughly = false>
MVIT3_INLINE Vec exp2_fraction(Vec r) {
  if constexpr (Roughly) {
    const Vec p = fma(fma(7.80245192e-2f, r, 0.226067163f), r, 0.695833540f);
    return fma(p, r, 0.999925224f);
  }
  Vec p = 1.87757669e-3f;
  p = fma(p, r, 8.98933969e-3f);
  p = fma(p, r, 5.58263175e-2f);
  p = fma(p, r, 0.240153626f);
  p = fma(p, r, 0.693153083f);
  return fma(p, r, 0.99999994f);
}

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits

// The largest integer up to x, for |x| up to 2^21; without AVX-512, at an integer, perhaps the one below.
MVIT3_INLINE Vec floor(Vec x) {
#if defined(__AVX512F__)
  x.part[0] = NativeFloat(_mm512_roundscale_ps(__m512(x.part[0]), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  return x;
#else
  return (x - 0.5f + kMagic) - kMagic;
#endif
}

// 2^(floor(x) + r) for r of 0 .. 1, NaN where r is NaN. Without AVX-512 x must be an integer of -126 .. 127, or NaN
// with r.
template <bool Roughly = false>
MVIT3_INLINE Vec exp2_parts(Vec x, Vec r) {
  Vec p = exp2_fraction<Roughly>(r);
#if defined(__AVX512F__)
  p.part[0] = NativeFloat(_mm512_scalef_ps(__m512(p.part[0]), __m512(x.part[0])));
#else
  x += kMagic;
  for (int i = 0; i < kParts; ++i) {
    const NativeInt number = p.part[i] == p.part[i];  // what a NaN carries in its low bits is no exponent
    p.part[i] = NativeFloat(NativeInt(p.part[i]) + ((NativeInt(x.part[i]) << 23) & number));
  }
#endif
  return p;
}

// 2^x, within 2 ulp, or roughly; inf above 128 (127 without AVX-512), at most 2^-125 below -125 and 0 for -inf, NaN for
// NaN.
template <bool Roughly = false>
MVIT3_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  Vec r;
  r.part[0] = NativeFloat(_mm512_reduce_ps(__m512(x.part[0]), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  return exp2_parts<Roughly>(x, r);
#else
  constexpr float kMax = 127.0f;
  const Vec v = clamp(x, -125.0f, kMax), n = floor(v);
  const Vec in_range = select_greater(x, kMax, std::numeric_limits<float>::infinity(), exp2_parts<Roughly>(n, v - n));
  return select_greater(-125.0f, x, 0.0f, in_range);
#endif
}

// The greater of two; `b` where one of them is NaN.
MVIT3_INLINE Vec max(Vec a, Vec b) { return select_greater(a, b, a, b); }

// The sum of the lanes, in a fixed order.
MVIT3_INLINE float sum_of_lanes(Vec v) {
  NativeFloat sum = v.part[0];
  for (int i = 1; i < kParts; ++i) sum += v.part[i];
  float lanes[kWidth];
  *reinterpret_cast<UnalignedFloat*>(lanes) = sum;
  for (int width = kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

constexpr float kLog2e = 1.44269504f;

// exp(x), within 2 ulp, for -86 .. 88; 0 below, the value at 88 above, NaN for NaN.
MVIT3_INLINE Vec exp(Vec x) {
  constexpr float kLn2High = 0.693359375f, kLn2Rest = -2.12194440e-4f;  // a multiple of the first is exact
  const Vec v = clamp(x, -86.0f, 88.0f), n = floor(v * kLog2e);
  return select_greater(-86.0f, x, 0.0f, exp2_parts(n, fnma(n, kLn2Rest, fnma(n, kLn2High, v)) * kLog2e));
}

// 1 + exp(-x), relative error up to 2e-7 + 6e-8 |x|. A division by it beats an estimate refined by Newton's method: it
// has a unit of its own.
template <bool Roughly = false>
MVIT3_INLINE Vec sigmoid_divisor(Vec x) {
  return Vec(1.0f) + exp2<Roughly>(x * -kLog2e);
}

// 1 / x within 6e-5 where there is an instruction for it, else rounded.
MVIT3_INLINE Vec reciprocal_roughly(Vec x) {
#if defined(__AVX512F__)
  x.part[0] = NativeFloat(_mm512_rcp14_ps(__m512(x.part[0])));
  return x;
#else
  return Vec(1.0f) / x;
#endif
}

MVIT3_INLINE Vec sigmoid(Vec x) { return Vec(1.0f) / sigmoid_divisor(x); }

}  // namespace mvit3
