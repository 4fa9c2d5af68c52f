// Products of matrices in shared memory, by one warp, into sums in registers: the only place that knows how the tensor
// cores take their operands. m16n8k16 of 16-bit numbers is the widest instruction that every device from sm_80 on has.
//
// A warp holds blocks of 16 x 8 sums; lane 4 g + t has columns 2 t and 2 t + 1 of rows g (sums 0 and 1) and g + 8 (sums
// 2 and 3).
#pragma once

#include "device.h"

namespace mvit3 {

#if defined(__CUDACC__)

// Four 8 x 8 matrices: lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix columns 2 t and 2
// t + 1 of row g.
MVIT3_DEVICE
void load_matrices(uint32_t (&out)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// The same of the transposed matrices.
MVIT3_DEVICE
void load_transposed(uint32_t (&out)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

MVIT3_DEVICE
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

MVIT3_DEVICE
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same product and other sums, not changed.
MVIT3_DEVICE
void multiply_and_add(
    float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&to)[4], BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
      "%12, %13};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(to[0]), "f"(to[1]), "f"(to[2]), "f"(to[3]));
}

MVIT3_DEVICE
void multiply_and_add(
    float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&to)[4], Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
      "%12, %13};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(to[0]), "f"(to[1]), "f"(to[2]), "f"(to[3]));
}

// Two matrices, their rows given by lanes 0 to 15.
MVIT3_DEVICE
void load_matrices(uint32_t (&out)[2], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(row)
               : "memory");
}

// The half of multiply_add that has 8 summed entries: m16n8k8.
MVIT3_DEVICE
void multiply_add(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, BFloat16) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a0), "r"(a1), "r"(b));
}

MVIT3_DEVICE
void multiply_add(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, Float16) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a0), "r"(a1), "r"(b));
}

#endif

// Of unsigned numbers: for others a division rounds towards zero, in four instructions more.
MVIT3_DEVICE
int lane() { return int(unsigned(thread()) % kWarp); }
MVIT3_DEVICE
int warp() { return int(unsigned(thread()) / kWarp); }

// A matrix of 16-bit numbers in shared memory. A pitch of 8 more than a multiple of 16 keeps rows that are read
// together in different banks.
template <typename T>
struct Matrix {
  T* data;
  int pitch;

  MVIT3_DEVICE
  T* row(int r) const { return data + r * pitch; }
};

// How an operand lies in memory: with rows along its own dimension (A: m, B: n) and the summed one inside, or the other
// way round.
enum class Rows { kOwn, kSummed };

// Where a lane reads its part of an operand of 16 rows (A) or of 16 columns (B), and how far it is to the next 16
// summed entries.
template <typename T, Rows R>
MVIT3_DEVICE
SharedAddress operand_a(Matrix<T> m, int first, int limit) {
  const int l = lane();
  if (R == Rows::kOwn) {
    const int row = first + l % 16;
    return shared_address(m.row(row < limit ? row : limit - 1) + l / 16 * 8);
  }
  return shared_address(m.row(l % 8 + l / 16 * 8) + first + l / 8 % 2 * 8);
}

template <typename T, Rows R>
MVIT3_DEVICE
SharedAddress operand_b(Matrix<T> m, int first) {
  const int l = lane();
  if (R == Rows::kOwn) return shared_address(m.row(first + l % 8 + l / 16 * 8) + l / 8 % 2 * 8);
  return shared_address(m.row(l % 16) + first + l / 16 * 8);
}

template <typename T, Rows R>
MVIT3_DEVICE
int step_bytes(Matrix<T> m) { return int(sizeof(T)) * 16 * (R == Rows::kOwn ? 1 : m.pitch); }

// sum += A B over 16 * steps summed entries: rows first_row..+16 M of A (those from `rows` on repeat the last one),
// columns first_column..+8 N of B, of which those from `columns` on, a multiple of 16, are left out.
template <typename T, Rows A, Rows B, int M, int N>
MVIT3_DEVICE
void multiply(
    float (&sum)[M][N][4], Matrix<T> a, int first_row, int rows, Matrix<T> b, int first_column, int columns,
    int steps) {
  static_assert(N % 2 == 0, "a lane loads two blocks of B at a time");
  SharedAddress from_a[M], from_b = operand_b<T, B>(b, first_column);
#pragma unroll
  for (int i = 0; i < M; ++i) from_a[i] = operand_a<T, A>(a, first_row + 16 * i, rows);
  const int step_a = step_bytes<T, A>(a), step_b = step_bytes<T, B>(b);
  const int next_b = int(sizeof(T)) * 16 * (B == Rows::kOwn ? b.pitch : 1);
#pragma unroll 1
  for (int k = 0; k < steps; ++k) {
    uint32_t part_a[M][4];
#pragma unroll
    for (int i = 0; i < M; ++i) {
      A == Rows::kOwn ? load_matrices(part_a[i], from_a[i]) : load_transposed(part_a[i], from_a[i]);
      from_a[i] += step_a;
    }
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      if (first_column + 16 * j >= columns) break;  // the same for all lanes
      uint32_t part_b[4];
      B == Rows::kOwn ? load_matrices(part_b, from_b + j * next_b) : load_transposed(part_b, from_b + j * next_b);
#pragma unroll
      for (int i = 0; i < M; ++i) {
        multiply_add(sum[i][2 * j], part_a[i], part_b[0], part_b[1], T{});
        multiply_add(sum[i][2 * j + 1], part_a[i], part_b[2], part_b[3], T{});
      }
    }
    from_b += step_b;
  }
}

template <int M, int N>
MVIT3_DEVICE
void clear(float (&sum)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[i][j][k] = 0.0f;
}

}  // namespace mvit3
