// The micro-kernels of gemm.h, one for each size of a block, compiled once.
#include "gemm.h"

#include <array>
#include <utility>

namespace mvit3 {
namespace {

// Hides where a pointer came from: GCC would otherwise keep one register for each row's distance, and spill them.
MVIT3_INLINE void forget(const float*& p) { asm("" : "+r"(p)); }

template <int Rows, int Vecs, bool AlongRows>
void block(const Operands& in, float* out, int64_t out_stride, bool add) {
  Vec sums[Rows][Vecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) sums[r][v] = 0.0f;
  const float* b = in.b;
  const auto step = [&](const auto& a) {
    Vec w[Vecs];
    for (int v = 0; v < Vecs; ++v) w[v] = load(b + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Vec value = a(r);
      for (int v = 0; v < Vecs; ++v) sums[r][v] = fma(value, w[v], sums[r][v]);
    }
    b += in.b_step;
  };
  if constexpr (AlongRows) {  // step is 1: three rows share a pointer, the others are one or two strides from it
    constexpr int kPointers = (Rows + 2) / 3;
    const float* p[kPointers];
    for (int i = 0; i < kPointers; ++i) {
      p[i] = in.a + 3 * i * in.row_step;
      forget(p[i]);
    }
    const int64_t stride = in.row_step;
    for (int64_t k = 0; k < in.depth; ++k) {
      step([&](int r) { return p[r / 3][r % 3 * stride]; });
      for (int i = 0; i < kPointers; ++i) ++p[i];
    }
  } else {  // row_step is 1
    const float* a = in.a;
    for (int64_t k = 0; k < in.depth; ++k, a += in.step) step([&](int r) { return a[r]; });
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) {
      float* p = out + r * out_stride + v * kLanes;
      store(p, add ? load(p) + sums[r][v] : sums[r][v]);  // a sum of sums: a running one over all rows of a map errs 3 times as much
    }
}

using Block = void (*)(const Operands&, float*, int64_t, bool);

template <int Vecs, bool AlongRows, int... Less>
constexpr std::array<Block, kBlockRows> blocks(std::integer_sequence<int, Less...>) {
  return {block<Less + 1, Vecs, AlongRows>...};
}

constexpr std::make_integer_sequence<int, kBlockRows> kSizes;
constexpr std::array<Block, kBlockRows> kBlocks[2][2] = {
    {blocks<1, false>(kSizes), blocks<kPanelVecs, false>(kSizes)}, {blocks<1, true>(kSizes), blocks<kPanelVecs, true>(kSizes)}};

}  // namespace

void multiply_block(int64_t rows, int64_t vecs, const Operands& in, float* out, int64_t out_stride, bool add) {
  kBlocks[in.row_step != 1][vecs - 1][rows - 1](in, out, out_stride, add);
}

}  // namespace mvit3
