// Blocks of sixteen by sixteen floats, transposed in registers.
#pragma once

#include <utility>

#include "vec.h"

namespace mvit3 {

#if defined(__clang__) || __GNUC__ >= 12
#define MVIT3_SHUFFLE(a, b, lane) __builtin_shufflevector(a, b, lane...)
#else
#define MVIT3_SHUFFLE(a, b, lane) __builtin_shuffle(a, b, NativeInt{lane...})
#endif

// One step of the transposition of a block: swaps the lanes of `a` that have the bit `Step` with those of `b` that lack
// it.
template <int Step, int... Lane>
MVIT3_INLINE void exchange(NativeFloat& a, NativeFloat& b, std::integer_sequence<int, Lane...>) {
  const auto low = [](NativeFloat x, NativeFloat y) {
    return MVIT3_SHUFFLE(x, y, (Lane & Step ? kWidth + Lane - Step : Lane));
  };
  const auto high = [](NativeFloat x, NativeFloat y) {
    return MVIT3_SHUFFLE(x, y, (Lane & Step ? kWidth + Lane : Lane + Step));
  };
  const NativeFloat first = low(a, b);
  b = high(a, b);
  a = first;
}
#undef MVIT3_SHUFFLE

template <int Step>
MVIT3_INLINE void exchange_all(NativeFloat* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i)
    if (!(i & Step)) exchange<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kWidth>{});
}

// A block of kWidth rows of one native vector each.
MVIT3_INLINE void transpose_native(NativeFloat* rows) {
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  if constexpr (kWidth > 4) exchange_all<4>(rows);
  if constexpr (kWidth > 8) exchange_all<8>(rows);
}

// out[c][r] = in[r][c] for `rows` x `columns` words, floats or pairs of bfloat16. A row of `in` must be readable, one
// of `out` is written, up to a whole number of vectors; what is written beyond `rows` is zero.
inline void transpose(
    const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += kWidth)
    for (int64_t c = 0; c < columns; c += kWidth) {
      NativeFloat block[kWidth];  // unrolled, or the block would not stay in registers
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i)
        block[i] =
            r + i < rows ? *reinterpret_cast<const UnalignedFloat*>(in + (r + i) * in_stride + c) : NativeFloat{};
      transpose_native(block);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i)
        if (c + i < columns) *reinterpret_cast<UnalignedFloat*>(out + (c + i) * out_stride + r) = block[i];
    }
  if constexpr (kWidth < kLanes)  // the rest of the last vector
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = (rows + kWidth - 1) / kWidth * kWidth; r % kLanes; r += kWidth)
        *reinterpret_cast<UnalignedFloat*>(out + c * out_stride + r) = NativeFloat{};
}

}  // namespace mvit3
