// Products in matrix registers: AMX has eight of them, of up to 16 rows of 64 bytes, and multiplies two of bfloat16 in
// one instruction, sixteen times as fast as vectors do. Where the CPU and the system allow it, products of bfloat16
// (gemm.h) run on it; what is packed and where it lies is the same.
#pragma once

#include <cstdint>

namespace mvit3::amx {

// kModel: the same walk over a model of the registers in plain C++, for tests on any CPU that has the vectors.
enum class Use { kNone, kRegisters, kModel };

// Decided once a process: MVIT3_AMX=0 is kNone, MVIT3_AMX=model is kModel, else what the machine has. Always kNone in
// the variants that do not multiply bfloat16.
Use use();

// Whether products of bfloat16 are faster than those of float32: in registers, or by the vectors of a CPU that makes
// two in the time of one. Intel's do not (v3-S takes 1.4 times as long).
bool faster();

// The rows of a block: two registers of them.
constexpr int64_t kRows = 32;

// A thread's share of a parallel loop, in which matrix registers may be used. Other libraries use them too: how they
// are set up is known only from the first product of a share to its end.
class Share {
 public:
#if defined(__AVX512BF16__)
  Share();
  ~Share();
#else
  Share() {}
#endif
  Share(const Share&) = delete;

  // Whether this thread is inside of one and there are registers.
  static bool open();

 private:
  bool outer_ = false;
};

// A block of 1..kRows rows and 1..2 vectors of outputs, as multiply_block has it (gemm.h), inside of a Share. Distances
// are in bytes: from row to row of a and of out, and from pair to pair of inputs of b.
void multiply(
    int64_t rows, int64_t vecs, int64_t pairs, const void* a, int64_t a_row, const void* b, int64_t b_pair, float* out,
    int64_t out_row, bool add);

}  // namespace mvit3::amx
