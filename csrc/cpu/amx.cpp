#include "amx.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../registration.h"
#include "convert.h"

#if defined(__AVX512BF16__)
#include <cpuid.h>
#endif

#if defined(__AVX512BF16__) && defined(__linux__) && defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define MVIT3_HAS_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MVIT3_AMX __attribute__((target("amx-tile,amx-bf16")))
#endif

namespace mvit3::amx {

#if defined(__AVX512BF16__)
namespace {

// How the registers are set up, as the instruction that does it reads it.
struct alignas(64) Setup {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int number, int64_t of_rows, int64_t of_bytes) {
    rows[number] = uint8_t(of_rows);
    row_bytes[number] = uint16_t(of_bytes);
  }
};

// Registers 0 to 3 hold the sums, two by two; the others a step of 16 pairs of each operand, and the shorter last step.
constexpr int kA = 4, kB = 5, kLastA = 6, kLastB = 7;
constexpr int64_t kMost = 16, kBytes = 64;  // rows, or pairs, of a register; bytes of a row

Setup setup_for(int64_t rows, int64_t last_pairs) {
  Setup setup;
  for (int sums = 0; sums < 4; ++sums) setup.set(sums, rows, kBytes);
  setup.set(kA, rows, kBytes);
  setup.set(kB, kMost, kBytes);
  if (last_pairs > 0) {
    setup.set(kLastA, rows, 4 * last_pairs);
    setup.set(kLastB, last_pairs, kBytes);
  }
  return setup;
}

#if defined(MVIT3_HAS_AMX)
struct Registers {
  MVIT3_AMX static void configure(const Setup& setup) { _tile_loadconfig(&setup); }
  MVIT3_AMX static void release() { _tile_release(); }

  // Numbers are part of the instructions.
#define MVIT3_SUMS(f) f(0) f(1) f(2) f(3)
#define MVIT3_OPERANDS(f) f(4) f(5) f(6) f(7)
#define MVIT3_LOAD(n) \
  if constexpr (Number == n) _tile_loadd(n, from, size_t(row));
#define MVIT3_STORE(n) \
  if constexpr (Number == n) _tile_stored(n, to, size_t(row));
#define MVIT3_ZERO(n) \
  if constexpr (Number == n) _tile_zero(n);
#define MVIT3_ADD(n)           \
  if constexpr (Number == n) { \
    if constexpr (Last)        \
      _tile_dpbf16ps(n, 6, 7); \
    else                       \
      _tile_dpbf16ps(n, 4, 5); \
  }
  template <int Number>
  MVIT3_AMX static void load(const void* from, int64_t row) {
    MVIT3_SUMS(MVIT3_LOAD)
    MVIT3_OPERANDS(MVIT3_LOAD)
  }
  template <int Number>
  MVIT3_AMX static void store(float* to, int64_t row) {
    MVIT3_SUMS(MVIT3_STORE)
  }
  template <int Number>
  MVIT3_AMX static void zero() {
    MVIT3_SUMS(MVIT3_ZERO)
  }
  template <int Number, bool Last>
  MVIT3_AMX static void add() {
    MVIT3_SUMS(MVIT3_ADD)
  }
#undef MVIT3_SUMS
#undef MVIT3_OPERANDS
#undef MVIT3_LOAD
#undef MVIT3_STORE
#undef MVIT3_ZERO
#undef MVIT3_ADD
};
#else
#define MVIT3_AMX
#endif

// What the instructions do, as Intel's manual defines them: rows of different sizes meet an error, numbers below the
// normal ones are zero, and the sums of the first and of the second numbers of all pairs are kept apart.
struct Model {
  static inline thread_local Setup setup;
  static inline thread_local char data[8][kMost][kBytes];

  static void configure(const Setup& to) {
    setup = to;
    std::memset(data, 0, sizeof(data));
  }
  static void release() { configure(Setup()); }

  template <int Number>
  static void load(const void* from, int64_t row) {
    check(setup.rows[Number] > 0);
    std::memset(data[Number], 0, sizeof(data[Number]));
    for (int r = 0; r < setup.rows[Number]; ++r)
      std::memcpy(data[Number][r], static_cast<const char*>(from) + r * row, setup.row_bytes[Number]);
  }
  template <int Number>
  static void store(float* to, int64_t row) {
    for (int r = 0; r < setup.rows[Number]; ++r)
      std::memcpy(reinterpret_cast<char*>(to) + r * row, data[Number][r], setup.row_bytes[Number]);
  }
  template <int Number>
  static void zero() {
    std::memset(data[Number], 0, sizeof(data[Number]));
  }
  template <int Number, bool Last>
  static void add() {
    constexpr int a = Last ? kLastA : kA, b = Last ? kLastB : kB;
    const int pairs = setup.row_bytes[a] / 4, columns = setup.row_bytes[Number] / 4;
    check(
        pairs > 0 && setup.rows[Number] == setup.rows[a] && setup.rows[b] == pairs &&
        setup.row_bytes[b] == setup.row_bytes[Number]);
    for (int r = 0; r < setup.rows[Number]; ++r)
      for (int c = 0; c < columns; ++c) {
        float sums[2] = {};
        for (int k = 0; k < pairs; ++k)
          for (int i = 0; i < 2; ++i)
            sums[i] = normal(sums[i] + normal(value(data[a][r], 2 * k + i)) * normal(value(data[b][k], 2 * c + i)));
        float sum;
        std::memcpy(&sum, data[Number][r] + 4 * c, 4);
        sum = normal(normal(sum) + normal(sums[0] + sums[1]));
        std::memcpy(data[Number][r] + 4 * c, &sum, 4);
      }
  }

 private:
  static void check(bool legal) {
    if (!legal) std::abort();  // where the CPU would end the process
  }
  static float normal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x; }
  static float value(const char* row, int place) {
    BFloat16 x;
    std::memcpy(&x, row + 2 * place, 2);
    return to_float(x);
  }
};

struct Thread {
  bool open = false;
  int64_t rows = 0, last_pairs = 0;  // what the registers are set up for: nothing
};

Thread& thread() {
  thread_local Thread mine;
  return mine;
}

template <typename M>
MVIT3_AMX void set_up(int64_t rows, int64_t last_pairs) {
  Thread& mine = thread();
  if (mine.rows == rows && mine.last_pairs == last_pairs) return;
  mine.rows = rows;
  mine.last_pairs = last_pairs;
  M::configure(setup_for(rows, last_pairs));
}

struct Block {
  int64_t pairs;
  const char *a, *b;
  int64_t a_row, b_pair;
  float* out;
  int64_t out_row;
  bool add;
};

// One or two registers of rows, one or two of outputs.
template <typename M, int Rows, int Vecs>
MVIT3_AMX void block(const Block& x) {
  const auto first = [&](int r, int v) MVIT3_AMX {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(x.out) + r * kMost * x.out_row + v * kBytes);
  };
#define MVIT3_SUM(r, v)                                    \
  if constexpr (r < Rows && v < Vecs) {                    \
    if (x.add)                                             \
      M::template load<2 * r + v>(first(r, v), x.out_row); \
    else                                                   \
      M::template zero<2 * r + v>();                       \
  }
  MVIT3_SUM(0, 0)
  MVIT3_SUM(0, 1)
  MVIT3_SUM(1, 0)
  MVIT3_SUM(1, 1)
#undef MVIT3_SUM
  const char *a = x.a, *b = x.b;
  const int64_t below = kMost * x.a_row;
  for (int64_t left = x.pairs; left >= kMost; left -= kMost, a += kBytes, b += kMost * x.b_pair) {
    M::template load<kB>(b, x.b_pair);
    M::template load<kA>(a, x.a_row);
    M::template add<0, false>();
    if constexpr (Vecs > 1) {
      M::template load<kB>(b + kBytes, x.b_pair);
      M::template add<1, false>();
    }
    if constexpr (Rows > 1) {
      M::template load<kA>(a + below, x.a_row);
      if constexpr (Vecs > 1) {
        M::template add<3, false>();
        M::template load<kB>(b, x.b_pair);
      }
      M::template add<2, false>();
    }
  }
  if (x.pairs % kMost) {
    M::template load<kLastB>(b, x.b_pair);
    M::template load<kLastA>(a, x.a_row);
    M::template add<0, true>();
    if constexpr (Vecs > 1) {
      M::template load<kLastB>(b + kBytes, x.b_pair);
      M::template add<1, true>();
    }
    if constexpr (Rows > 1) {
      M::template load<kLastA>(a + below, x.a_row);
      if constexpr (Vecs > 1) {
        M::template add<3, true>();
        M::template load<kLastB>(b, x.b_pair);
      }
      M::template add<2, true>();
    }
  }
  M::template store<0>(first(0, 0), x.out_row);
  if constexpr (Vecs > 1) M::template store<1>(first(0, 1), x.out_row);
  if constexpr (Rows > 1) {
    M::template store<2>(first(1, 0), x.out_row);
    if constexpr (Vecs > 1) M::template store<3>(first(1, 1), x.out_row);
  }
}

template <typename M>
MVIT3_AMX void multiply_rows(int64_t rows, int64_t vecs, Block& x) {  // a copy of it costs a twentieth of a call
  const int64_t last_pairs = x.pairs % kMost;
  if (rows == kRows) {
    set_up<M>(kMost, last_pairs);
    return vecs > 1 ? block<M, 2, 2>(x) : block<M, 2, 1>(x);
  }
  while (rows > 0) {
    const int64_t count = rows < kMost ? rows : kMost;
    set_up<M>(count, last_pairs);
    vecs > 1 ? block<M, 1, 2>(x) : block<M, 1, 1>(x);
    rows -= count;
    x.a += count * x.a_row;
    x.out = reinterpret_cast<float*>(reinterpret_cast<char*>(x.out) + count * x.out_row);
  }
}

#if defined(MVIT3_HAS_AMX)
// Whether the CPU has the registers and their bfloat16 products, and the system keeps and grants them.
bool granted() {
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kSaves = 1u << 27, kKept = 3u << 17;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaves)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBFloat16) == 0) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kKept) == kKept && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

Use decide() {
  const char* wanted = std::getenv("MVIT3_AMX");
  const std::string value = wanted ? wanted : "";
  if (value == "model") return Use::kModel;
#if defined(MVIT3_HAS_AMX)
  if (value != "0" && granted()) return Use::kRegisters;
#endif
  return Use::kNone;
}

}  // namespace

Use use() {
  static const Use use = decide();
  return use;
}

bool faster() {
  unsigned a, b, c, d;
  constexpr unsigned kIntel = 0x756e6547;  // the first four letters of the maker's name, "Genu"
  return use() == Use::kRegisters || (__get_cpuid(0, &a, &b, &c, &d) && b != kIntel);
}

Share::Share() : outer_(thread().open) { thread() = {use() != Use::kNone, 0, 0}; }

Share::~Share() {
#if defined(MVIT3_HAS_AMX)
  if (thread().rows > 0 && use() == Use::kRegisters) Registers::release();
#endif
  thread() = {outer_, 0, 0};
}

bool Share::open() { return thread().open; }

void multiply(
    int64_t rows, int64_t vecs, int64_t pairs, const void* a, int64_t a_row, const void* b, int64_t b_pair, float* out,
    int64_t out_row, bool add) {
  Block x{pairs, static_cast<const char*>(a), static_cast<const char*>(b), a_row, b_pair, out, out_row, add};
#if defined(MVIT3_HAS_AMX)
  if (use() == Use::kRegisters) return multiply_rows<Registers>(rows, vecs, x);
#endif
  multiply_rows<Model>(rows, vecs, x);
}
#else
Use use() { return Use::kNone; }
bool faster() { return false; }
#endif

std::string amx() { return use() == Use::kRegisters ? "registers" : use() == Use::kModel ? "model" : "none"; }

}  // namespace mvit3::amx

STABLE_TORCH_LIBRARY_FRAGMENT(mvit3, m) {
  m.def("amx() -> str");
  m.def("prefers_bfloat16() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(mvit3, CompositeExplicitAutograd, m) {
  m.impl("amx", TORCH_BOX(&mvit3::amx::amx));
  m.impl("prefers_bfloat16", TORCH_BOX(&mvit3::amx::faster));
}
