// Sixteen floats at a time, on every instruction set: one 512-bit register, two of 256 bits or four of 128.
//
// A kernel is written once against `Vec`; the compiler flags of the variant decide what it becomes. The layout of blocks and
// periods (always multiples of sixteen lanes) is therefore the same in all variants.
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

// Two halves of a transposition: lanes whose number has the bit `Distance` change places between rows that lie `Distance` apart.
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
    for (int i = 0; i < kWidth; ++i) rows[i] = *reinterpret_cast<const UnalignedFloat*>(square + (row + i) * kLanes + column);
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

struct Wide {
  NativeDouble part[2 * kParts];
};

MVIT3_INLINE Wide widen(Vec v) {
  Wide r;
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

MVIT3_INLINE Wide load(const double* p) {
  Wide r;
  for (int i = 0; i < 2 * kParts; ++i) r.part[i] = *reinterpret_cast<const UnalignedDouble*>(p + i * (kWidth / 2));
  return r;
}

MVIT3_INLINE void store(double* p, Wide v) {
  for (int i = 0; i < 2 * kParts; ++i) *reinterpret_cast<UnalignedDouble*>(p + i * (kWidth / 2)) = v.part[i];
}

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

MVIT3_INLINE void accumulate(double* p, Vec v) {
  Wide sum = load(p);
  sum += widen(v);
  store(p, sum);
}

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

// 2^r for -1/2 .. 1/2: minimax, relative error 2e-9.
MVIT3_INLINE Vec exp2_fraction(Vec r) {
  Vec p = 1.53532572e-4f;
  p = fma(p, r, 1.33990031e-3f);
  p = fma(p, r, 9.61843878e-3f);
  p = fma(p, r, 5.55033199e-2f);
  p = fma(p, r, 0.240226477f);
  p = fma(p, r, 0.693147182f);
  return fma(p, r, 1.0f);
}

// 2^(x * factor) for |x * factor| up to 126, and beyond: inf above 128 (127.5 without AVX-512), about 1e-38 below, NaN for NaN. `rest` is
// what float32 lacks of the factor: without it the result of a large |x| is off by up to |x| * 2e-8, relatively.
template <bool Exact>
MVIT3_INLINE Vec exp2_scaled(Vec x, float factor, float rest) {
  const Vec low = factor > 0 ? -87.33f : -104.0f, high = factor > 0 ? 104.0f : 87.33f;
#if defined(__AVX512F__)
  const Vec v = clamp(x, low, high);
  Vec n = v * factor;
  n.part[0] = NativeFloat(_mm512_roundscale_ps(__m512(n.part[0]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  constexpr float kMax = 88.37f;
  const Vec v = factor > 0 ? clamp(x, low, kMax) : clamp(x, -kMax, high);
  const Vec magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits
  const Vec shifted = fma(v, factor, magic);
  const Vec n = shifted - magic;
#endif
  Vec r = fma(v, factor, Vec(0.0f) - n);
  if constexpr (Exact) r = fma(v, rest, r);
  Vec p = exp2_fraction(r);
#if defined(__AVX512F__)
  p.part[0] = NativeFloat(_mm512_scalef_ps(__m512(p.part[0]), __m512(n.part[0])));
  return p;
#else
  for (int i = 0; i < kParts; ++i) p.part[i] = NativeFloat(NativeInt(p.part[i]) + (NativeInt(shifted.part[i]) << 23));
  const Vec infinity = std::numeric_limits<float>::infinity();
  return factor > 0 ? select_greater(x, kMax, infinity, p) : select_greater(-kMax, x, infinity, p);
#endif
}

// 2^x, within 2 ulp, for -126 .. 126; the value at the nearer end beyond, NaN for NaN.
MVIT3_INLINE Vec exp2(Vec x) {
  const Vec v = clamp(x, -126.0f, 126.0f);
#if defined(__AVX512F__)
  Vec n;
  n.part[0] = NativeFloat(_mm512_roundscale_ps(__m512(v.part[0]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  Vec p = exp2_fraction(v - n);
  p.part[0] = NativeFloat(_mm512_scalef_ps(__m512(p.part[0]), __m512(n.part[0])));
#else
  const Vec magic = 12582912.0f, shifted = v + magic;
  Vec p = exp2_fraction(v - (shifted - magic));
  for (int i = 0; i < kParts; ++i) p.part[i] = NativeFloat(NativeInt(p.part[i]) + (NativeInt(shifted.part[i]) << 23));
#endif
  return p;
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

constexpr float kLog2e = 1.442695f, kLog2eRest = 1.925963e-8f;

// exp(x), within 2 ulp.
MVIT3_INLINE Vec exp(Vec x) { return exp2_scaled<true>(x, kLog2e, kLog2eRest); }

// 1 / (1 + exp(-x)). A division beats an estimate refined by Newton's method: it has a unit of its own.
MVIT3_INLINE Vec sigmoid(Vec x) { return Vec(1.0f) / (Vec(1.0f) + exp2_scaled<false>(x, -kLog2e, -kLog2eRest)); }

}  // namespace mvit3
