// The micro-kernels of gemm.h, one for each size of a block, compiled once.
#include "gemm.h"

#include <array>
#include <utility>

namespace mvit3 {
namespace {

// Hides where a pointer came from: GCC would otherwise keep one register for each row's distance, and spill them.
template <typename E>
MVIT3_INLINE void forget(E*& p) {
  asm("" : "+r"(p));
}

// One step of all sums. Loops over them are unrolled and no lambda captures them: GCC would keep them on the stack.
template <typename E, int Rows, int Vecs, typename At>
MVIT3_INLINE void add_step(Vec (&sums)[Rows][Vecs], const E* b, const At& a) {
  using D = Dot<E>;
  typename D::Operand w[Vecs];
#pragma GCC unroll 4
  for (int v = 0; v < Vecs; ++v) w[v] = D::load(b + v * kLanes * D::kDepth);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const auto value = D::broadcast(a(r));
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) sums[r][v] = D::add(sums[r][v], value, w[v]);
  }
}

// A sum of sums: a running one over all rows of a map errs 3 times as much.
template <int Rows, int Vecs, bool Add>
MVIT3_INLINE void write(const Vec (&sums)[Rows][Vecs], float* p, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r, p += stride) {
    forget(p);
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) store(p + v * kLanes, Add ? load(p + v * kLanes) + sums[r][v] : sums[r][v]);
  }
}

template <typename E, int Rows, int Vecs, bool AlongRows>
void block(const OperandsOf<E>& in, float* out, int64_t out_stride, bool add) {
  constexpr int64_t kDepth = Dot<E>::kDepth;
  Vec sums[Rows][Vecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) sums[r][v] = 0.0f;
  const E* b = in.b;
  if constexpr (AlongRows) {  // step is kDepth: three rows share a pointer, the others are one or two strides from it
    constexpr int kPointers = (Rows + 2) / 3;
    const E* p[kPointers];
    for (int i = 0; i < kPointers; ++i) {
      p[i] = in.a + 3 * i * in.row_step;
      forget(p[i]);
    }
    const int64_t stride = in.row_step, ahead = in.ahead;
    for (int64_t k = 0; k < in.depth; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) prefetch(b + ahead + v * kLanes * kDepth);
      add_step(sums, b, [&](int r) { return p[r / 3] + r % 3 * stride; });
      b += in.b_step;
      for (int i = 0; i < kPointers; ++i) p[i] += kDepth;
    }
  } else {  // row_step is kDepth
    const E* a = in.a;
    for (int64_t k = 0; k < in.depth; ++k, a += in.step, b += in.b_step)
      add_step(sums, b, [&](int r) { return a + r * kDepth; });
  }
  if (add)
    write<Rows, Vecs, true>(sums, out, out_stride);
  else
    write<Rows, Vecs, false>(sums, out, out_stride);
}

template <typename E>
using Block = void (*)(const OperandsOf<E>&, float*, int64_t, bool);

template <typename E, int Vecs, bool AlongRows, int... Less>
constexpr std::array<Block<E>, kBlockRows> blocks(std::integer_sequence<int, Less...>) {
  return {block<E, Less + 1, Vecs, AlongRows>...};
}

constexpr std::make_integer_sequence<int, kBlockRows> kSizes;
template <typename E>
constexpr std::array<Block<E>, kBlockRows> kBlocks[2][2] = {
    {blocks<E, 1, false>(kSizes), blocks<E, kPanelVecs, false>(kSizes)},
    {blocks<E, 1, true>(kSizes), blocks<E, kPanelVecs, true>(kSizes)}};

}  // namespace

template <typename E>
void multiply_block(int64_t rows, int64_t vecs, const OperandsOf<E>& in, float* out, int64_t out_stride, bool add) {
  if (in_registers(in)) {
    constexpr int64_t kBytes = sizeof(E);
    return amx::multiply(
        rows, vecs, in.depth, in.a, in.row_step * kBytes, in.b, in.b_step * kBytes, out,
        out_stride * int64_t(sizeof(float)), add);
  }
  kBlocks<E>[in.row_step != Dot<E>::kDepth][vecs - 1][rows - 1](in, out, out_stride, add);
}

template void multiply_block(int64_t, int64_t, const OperandsOf<float>&, float*, int64_t, bool);
#if defined(__AVX512BF16__)
template void multiply_block(int64_t, int64_t, const OperandsOf<BFloat16>&, float*, int64_t, bool);
#endif

}  // namespace mvit3
