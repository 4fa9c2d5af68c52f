// Stands for the device where a kernel's body is compiled for the host: csrc/cuda/device.h, mma.h and launch.h in plain
// C++.
//
// The threads of a block are fibers on one thread of the system. A fiber runs until a barrier or until it takes part in
// an operation of its warp; then the next lane runs. Lanes must meet in the same operation and warps at the same
// barrier: anything else ends the process. Warps run one after the other between two barriers, in either order
// (`emulation::backwards`), so that a missing barrier gives results that depend on the order. Shared memory has the
// size of the launch, starts as NaN, and is its own allocation, which a sanitizer sees.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define MVIT3_DEVICE inline
#define MVIT3_BOTH inline

#if defined(__x86_64__)
extern "C" void mvit3_switch_fiber(void** from, void* to);
asm(R"(
.text
.weak mvit3_switch_fiber
.type mvit3_switch_fiber, @function
mvit3_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mvit3_switch_fiber, .-mvit3_switch_fiber
)");
#endif

namespace emulation {

inline bool backwards = false;  // warps run from the last to the first
inline int processors = 3;      // blocks that the device runs at once
inline bool runs = true;        // whether one thread can begin copies of runs of bytes

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "launch emulation: %s\n", why);
  std::abort();
}

enum class State { kRunning, kWarp, kBarrier, kFinished };

constexpr size_t kStack = 256 * 1024;

// One place where execution can be: of a thread of the block, or of the scheduler.
struct Fiber {
  char* stack = nullptr;
  State state = State::kRunning;
  int operations = 0;                                 // of its warp, so far
  std::vector<std::pair<void*, const void*>> copies;  // begun, not arrived: they are made as late as they may be
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context;
#endif
};

// What a lane shows to the others of its warp, in turns of two: nobody is two operations ahead.
struct Exchange {
  const void* address[32];
  float numbers[32][12];
};

// A copy of a run of bytes that was begun: made behind the barrier that waits for it.
struct Run {
  const void* arrival;
  void* to;
  const void* from;
  int bytes;
};

struct Block {
  int block, blocks, slice, thread = 0;
  char* shared;
  std::vector<Fiber> fibers;
  Fiber scheduler;
  std::vector<Exchange> exchange;  // two for each warp
  std::vector<Run> runs;
  void (*body)(const void*);
  const void* arguments;
};

inline Block* current = nullptr;

inline void switch_fiber(Fiber& from, Fiber& to, bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  static const void* main_stack = nullptr;
  static size_t main_size = 0;
  void* fake = nullptr;
  const bool to_main = to.stack == nullptr;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake, to_main ? main_stack : to.stack, to_main ? main_size : kStack);
#else
  (void)ends;
#endif
#if defined(__x86_64__)
  mvit3_switch_fiber(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* left = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(fake, &left, &size);
  if (from.stack != nullptr && main_stack == nullptr) main_stack = left, main_size = size;
#endif
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  const void* left = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &left, &size);
#endif
  Block& b = *current;
  b.body(b.arguments);
  Fiber& fiber = b.fibers[b.thread];
  fiber.state = State::kFinished;
  switch_fiber(fiber, b.scheduler, true);
  fail("a thread ran on after its end");
}

inline void start(Fiber& fiber) {
#if defined(__x86_64__)
  void** slot = reinterpret_cast<void**>(
      fiber.stack + kStack - 16);  // 8 bytes off 16 after the return into it, as in any function
  *slot = reinterpret_cast<void*>(&run_thread);
  fiber.top = slot - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
#endif
}

inline void stop(State state) {
  Block& b = *current;
  Fiber& fiber = b.fibers[b.thread];
  fiber.state = state;
  switch_fiber(fiber, b.scheduler);
}

// Shows this lane's part of an operation of the warp, and returns what all lanes showed.
template <typename F>
const Exchange& meet(const F& show) {
  Block& b = *current;
  Exchange& shown = b.exchange[b.thread / 32 * 2 + b.fibers[b.thread].operations++ % 2];
  show(shown, b.thread % 32);
  stop(State::kWarp);
  return shown;
}

// Runs a warp until all its lanes stand at a barrier, or have finished.
inline State run_warp(Block& b, int warp) {
  while (true) {
    for (int lane = 0; lane < 32; ++lane) {
      b.thread = warp * 32 + lane;
      Fiber& fiber = b.fibers[b.thread];
      fiber.state = State::kRunning;
      switch_fiber(b.scheduler, fiber);
    }
    const State state = b.fibers[warp * 32].state;
    for (int lane = 1; lane < 32; ++lane)
      if (b.fibers[warp * 32 + lane].state != state) fail("the lanes of a warp do not meet in the same operation");
    if (state != State::kWarp) return state;
  }
}

inline void run_block(Block& b, int threads) {
  static char* stacks = nullptr;
  static int count = 0;
  if (count < threads) {
    const size_t bytes = size_t(threads) * kStack;
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    stacks = static_cast<char*>(memory);
    count = threads;
  }
  const int warps = threads / 32;
  b.fibers.assign(threads, Fiber{});
  b.exchange.resize(2 * warps);
  current = &b;
  for (int t = 0; t < threads; ++t) {
    b.fibers[t].stack = stacks + t * kStack;
    start(b.fibers[t]);
  }
  while (true) {
    State first = State::kRunning;
    for (int i = 0; i < warps; ++i) {
      const State state = run_warp(b, backwards ? warps - 1 - i : i);
      if (i && state != first) fail("the warps of a block do not meet at the same barrier");
      first = state;
    }
    if (first == State::kFinished) break;
  }
  current = nullptr;
}

}  // namespace emulation

namespace mvit3 {

inline int thread() { return emulation::current->thread; }
inline unsigned anew(unsigned number) { return number; }
inline int block() { return emulation::current->block; }
inline int blocks() { return emulation::current->blocks; }
inline int slice() { return emulation::current->slice; }
inline char* shared_memory() { return emulation::current->shared; }
inline void synchronize() { emulation::stop(emulation::State::kBarrier); }

inline float shuffle_xor(float value, int mask) {
  const int lane = thread() % 32;
  return emulation::meet([&](auto& shown, int l) { shown.numbers[l][0] = value; }).numbers[lane ^ mask][0];
}

inline bool any(bool value) {
  const auto& shown = emulation::meet([&](auto& s, int l) { s.numbers[l][0] = value; });
  for (int l = 0; l < 32; ++l)
    if (shown.numbers[l][0] != 0.0f) return true;
  return false;
}

using SharedAddress = const char*;
inline SharedAddress shared_address(const void* p) { return static_cast<const char*>(p); }

inline void copy_16(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulation::fail("a copy is not aligned");
  emulation::current->fibers[thread()].copies.emplace_back(shared, global);
}
inline void copy_16_or_zeros(bool wanted, void* shared, const void* global) {
  alignas(16) static const uint32_t zeros[4] = {};
  copy_16(shared, wanted ? global : zeros);
}
inline void copies_arrive() {
  auto& copies = emulation::current->fibers[thread()].copies;
  for (const auto& [to, from] : copies) std::memcpy(to, from, 16);
  copies.clear();
}

struct alignas(8) Arrival {
  int phase, expected;  // bytes, or -1
};
inline bool copies_runs() { return emulation::runs; }
inline void prepare(Arrival& arrival) { arrival = {0, -1}; }
inline void expect(Arrival& arrival, int bytes) {
  if (arrival.expected >= 0) emulation::fail("a phase of copies begins before the last one has arrived");
  arrival.expected = bytes;
}
inline void copy_run(void* shared, const void* global, int bytes, Arrival& arrival) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16)
    emulation::fail("a run is not aligned");
  emulation::current->runs.push_back({&arrival, shared, global, bytes});
}
inline void synchronize_after(Arrival& arrival, int phase) {
  synchronize();
  if (arrival.phase != phase) return;  // another thread has been here
  int bytes = 0;
  std::vector<emulation::Run> others;
  for (const emulation::Run& run : emulation::current->runs) {
    if (run.arrival != &arrival) {
      others.push_back(run);
      continue;
    }
    std::memcpy(run.to, run.from, run.bytes);
    bytes += run.bytes;
  }
  if (bytes != arrival.expected) emulation::fail("other bytes arrive than are expected");
  emulation::current->runs = others;
  arrival = {phase ^ 1, -1};
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline uint16_t round_to(float x, BFloat16) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_to(float x, Float16) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000)                                   // subnormal: adding 0.5 rounds at 2^-24
    return uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
  return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
template <typename T>
uint32_t pack(float first, float second) {
  return round_to(first, T{}) | uint32_t(round_to(second, T{})) << 16;
}

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float a, float b) { return a / b; }

// With eleven bits: the relative error that the device's has at most.
inline float fast_tanh(float x) {
  const float y = std::tanh(x);
  if (std::isnan(y)) return y;
  int exponent;
  const float mantissa = std::frexp(y, &exponent);
  return std::ldexp(std::nearbyint(mantissa * 2048.0f) / 2048.0f, exponent);
}

inline uint32_t mark(uint32_t first, uint32_t second, uint32_t sum, BFloat16) {
  const auto add = [](uint32_t a, uint32_t b, uint32_t c) {
    return to_float(BFloat16{uint16_t(a)}) * to_float(BFloat16{uint16_t(b)}) + to_float(BFloat16{uint16_t(c)});
  };
  return pack<BFloat16>(add(first & 0xffff, second & 0xffff, sum & 0xffff), add(first >> 16, second >> 16, sum >> 16));
}
inline uint32_t mark(uint32_t first, uint32_t second, uint32_t sum, Float16) {
  const auto of = [](uint32_t a) { return to_float(Float16{uint16_t(a)}); };
  const auto add = [&](uint32_t a, uint32_t b, uint32_t c) { return of(a) * 0.0f + of(b) * 0.0f + of(c); };
  return pack<Float16>(add(first & 0xffff, second & 0xffff, sum & 0xffff), add(first >> 16, second >> 16, sum >> 16));
}
template <typename T>
bool finite(uint32_t bits, T) {
  return std::isfinite(to_float(T{uint16_t(bits)})) && std::isfinite(to_float(T{uint16_t(bits >> 16)}));
}

// ---- mma.h: what lane 4 g + t gives and gets

inline void check_row(SharedAddress row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("a row of a matrix is not aligned");
}

inline void load_matrices(uint32_t (&out)[4], SharedAddress row) {
  check_row(row);
  const int g = thread() % 32 / 4, t = thread() % 4;
  const auto& shown = emulation::meet([&](auto& s, int l) { s.address[l] = row; });
  for (int m = 0; m < 4; ++m) std::memcpy(&out[m], static_cast<const char*>(shown.address[8 * m + g]) + 4 * t, 4);
}

inline void load_matrices(uint32_t (&out)[2], SharedAddress row) {
  if (thread() % 32 < 16) check_row(row);
  const int g = thread() % 32 / 4, t = thread() % 4;
  const auto& shown = emulation::meet([&](auto& s, int l) { s.address[l] = row; });
  for (int m = 0; m < 2; ++m) std::memcpy(&out[m], static_cast<const char*>(shown.address[8 * m + g]) + 4 * t, 4);
}

inline void load_transposed(uint32_t (&out)[4], SharedAddress row) {
  check_row(row);
  const int g = thread() % 32 / 4, t = thread() % 4;
  const auto& shown = emulation::meet([&](auto& s, int l) { s.address[l] = row; });
  for (int m = 0; m < 4; ++m) {
    uint16_t half[2];
    for (int i = 0; i < 2; ++i)
      std::memcpy(&half[i], static_cast<const char*>(shown.address[8 * m + 2 * t + i]) + 2 * g, 2);
    out[m] = half[0] | uint32_t(half[1]) << 16;
  }
}

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  const int g = thread() % 32 / 4, t = thread() % 4;
  const auto& shown = emulation::meet([&](auto& s, int l) {
    const uint32_t registers[6] = {a[0], a[1], a[2], a[3], b0, b1};
    for (int r = 0; r < 6; ++r)
      for (int i = 0; i < 2; ++i) s.numbers[l][2 * r + i] = to_float(T{uint16_t(registers[r] >> 16 * i & 0xffff)});
  });
  for (int k = 0; k < 16; ++k) {
    const int from = k % 8 / 2, high = k / 8, half = k % 2;
    const float upper = shown.numbers[4 * g + from][4 * high + half],
                lower = shown.numbers[4 * g + from][4 * high + 2 + half];
    for (int i = 0; i < 2; ++i) {
      const float b = shown.numbers[4 * (2 * t + i) + from][8 + 2 * high + half];
      sum[i] += upper * b;
      sum[2 + i] += lower * b;
    }
  }
}

template <typename T>
void multiply_add(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, T) {
  const int g = thread() % 32 / 4, t = thread() % 4;
  const auto& shown = emulation::meet([&](auto& s, int l) {
    const uint32_t registers[3] = {a0, a1, b};
    for (int r = 0; r < 3; ++r)
      for (int i = 0; i < 2; ++i) s.numbers[l][2 * r + i] = to_float(T{uint16_t(registers[r] >> 16 * i & 0xffff)});
  });
  for (int k = 0; k < 8; ++k)
    for (int i = 0; i < 2; ++i) {
      const float* const of_a = &shown.numbers[4 * g + k / 2][k % 2];
      const float b_number = shown.numbers[4 * (2 * t + i) + k / 2][4 + k % 2];
      sum[i] += of_a[0] * b_number;
      sum[2 + i] += of_a[2] * b_number;
    }
}

template <typename T>
void multiply_and_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&to)[4], T type) {
  std::memcpy(sum, to, sizeof(sum));
  multiply_add(sum, a, b0, b1, type);
}

// ---- launch.h

template <typename K>
int resident_blocks(int) {
  return emulation::processors;
}

template <typename K>
void launch(const typename K::Arguments& arguments, int blocks, int slices, int shared, void*) {
  constexpr int kThreads = 256;
  if (shared > 99 * 1024) emulation::fail("more shared memory than sm_86 has");
  for (int s = 0; s < slices; ++s)
    for (int i = 0; i < blocks; ++i) {
      std::unique_ptr<char, decltype(&std::free)> memory(
          static_cast<char*>(std::aligned_alloc(16, (shared + 15) / 16 * 16)), &std::free);
      std::memset(memory.get(), 0xff, shared);
      const auto run = [](const void* a) { K::run(*static_cast<const typename K::Arguments*>(a)); };
      emulation::Block b{i, blocks, s, 0, memory.get(), {}, {}, {}, {}, run, &arguments};
      emulation::run_block(b, kThreads);
    }
}

}  // namespace mvit3
