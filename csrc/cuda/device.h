// What a kernel's body needs of the device: its place in the launch, barriers, shared memory, 16-bit numbers, copies. A
// body uses nothing else, so that it also compiles for the host, where tests/cuda/emulation.h stands for the device.
#pragma once

#include <cstdint>
#include <cstring>

namespace mvit3 {

// Storage types; kernels compute in float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int kWarp = 32;

}  // namespace mvit3

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define MVIT3_DEVICE __device__ __forceinline__
#define MVIT3_BOTH __host__ __device__ __forceinline__

namespace mvit3 {

// Read anew at each use: what follows from it alone is then computed where it is needed, not once for the whole kernel,
// which would keep dozens of registers for it.
MVIT3_DEVICE
int thread() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
// A number in a way that hides from the compiler that it was known before: what follows from it is computed where it is
// needed, as with `thread`.
MVIT3_DEVICE
unsigned anew(unsigned number) {
  asm volatile("" : "+r"(number));
  return number;
}
MVIT3_DEVICE
int block() { return int(blockIdx.x); }
MVIT3_DEVICE
int blocks() { return int(gridDim.x); }
MVIT3_DEVICE
int slice() { return int(blockIdx.y); }
MVIT3_DEVICE
void synchronize() { __syncthreads(); }
MVIT3_DEVICE
float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
// Whether a lane of the warp says so.
MVIT3_DEVICE
bool any(bool value) { return __any_sync(0xffffffffu, value); }

MVIT3_DEVICE
char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Where something lies in shared memory, as the instructions that take matrices want it.
using SharedAddress = uint32_t;
MVIT3_DEVICE
SharedAddress shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies 16 aligned bytes from global to shared memory; they are there for the thread after copies_arrive, for its
// block after a barrier.
MVIT3_DEVICE
void copy_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same where `wanted`, else zeros, without a branch.
MVIT3_DEVICE
void copy_16_or_zeros(bool wanted, void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(wanted ? 16 : 0)
               : "memory");
}
MVIT3_DEVICE
void copies_arrive() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Whether one thread can begin copies of whole runs of bytes. It says how many bytes a phase of an `Arrival` has, of
// which there are two, 0 and 1, by turns.
struct alignas(8) Arrival {
  uint64_t bits;
};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
MVIT3_DEVICE
constexpr bool copies_runs() { return true; }
// By one thread, with a barrier behind it.
MVIT3_DEVICE
void prepare(Arrival& arrival) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.proxy.async.shared::cta;" ::"r"(shared_address(&arrival))
      : "memory");
}
MVIT3_DEVICE
void expect(Arrival& arrival, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&arrival)), "r"(bytes)
               : "memory");
}
// A multiple of 16 bytes, aligned to as many.
MVIT3_DEVICE
void copy_run(void* shared, const void* global, int bytes, Arrival& arrival) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(&arrival))
               : "memory");
}
// A barrier behind which the copies of a phase are there for the block.
MVIT3_DEVICE
void synchronize_after(Arrival& arrival, int phase) {
  asm volatile(
      "{\n\t.reg .pred there;\nagain:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n\t@!there bra again;\n\t}" ::"r"(
          shared_address(&arrival)),
      "r"(phase)
      : "memory");
  synchronize();
}
#else
MVIT3_DEVICE
constexpr bool copies_runs() { return false; }
MVIT3_DEVICE
void prepare(Arrival&) {}
MVIT3_DEVICE
void expect(Arrival&, int) {}
MVIT3_DEVICE
void copy_run(void*, const void*, int, Arrival&) {}
MVIT3_DEVICE
void synchronize_after(Arrival&, int) {}
#endif

MVIT3_DEVICE
float to_float(float x) { return x; }
MVIT3_DEVICE
float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
MVIT3_DEVICE
float to_float(Float16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}

// Two numbers in one register, the first in the low half; rounded to nearest even.
template <typename T>
MVIT3_DEVICE
uint32_t pack(float first, float second);
template <>
MVIT3_DEVICE
uint32_t pack<BFloat16>(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
template <>
MVIT3_DEVICE
uint32_t pack<Float16>(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

// The device's fast exponential and division (errors of a few 2^-23). What would be subnormal is 0: __expf and
// __fdividef keep such results, with three instructions more in every sigmoid, whose 1 + exp(-x) is the same without.
MVIT3_DEVICE
float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}
MVIT3_DEVICE
float fast_divide(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}
// One instruction, with a relative error of at most 2^-11.
MVIT3_DEVICE
float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Marks the two numbers of `sum` that are to say whether all were finite: adds products of those of two registers (of
// bfloat16, which has room for them), or 0 times each.
MVIT3_DEVICE
uint32_t mark(uint32_t first, uint32_t second, uint32_t sum, BFloat16) {
  uint32_t marked;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(marked) : "r"(first), "r"(second), "r"(sum));
  return marked;
}
MVIT3_DEVICE
uint32_t mark(uint32_t first, uint32_t second, uint32_t sum, Float16) {
  asm("fma.rn.f16x2 %0, %1, %3, %0;\n\tfma.rn.f16x2 %0, %2, %3, %0;" : "+r"(sum) : "r"(first), "r"(second), "r"(0));
  return sum;
}
// Whether both of them are finite.
MVIT3_DEVICE
bool finite(uint32_t bits, BFloat16) {
  uint32_t nothing;
  asm("fma.rn.bf16x2 %0, %1, %2, %2;" : "=r"(nothing) : "r"(bits), "r"(0));
  return (nothing & 0x7fff7fffu) == 0;
}
MVIT3_DEVICE
bool finite(uint32_t bits, Float16) { return (bits & 0x7fff7fffu) == 0; }

}  // namespace mvit3

#else

#include "emulation.h"

#endif

namespace mvit3 {

MVIT3_DEVICE
uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The two numbers of a register.
struct alignas(8) Pair {
  float first, second;
};

template <typename T>
MVIT3_DEVICE
T from_float(float x) { return T{uint16_t(pack<T>(x, 0.0f))}; }
template <>
MVIT3_DEVICE
float from_float<float>(float x) { return x; }

template <typename T>
MVIT3_DEVICE
Pair unpack(uint32_t bits) { return {to_float(T{uint16_t(bits & 0xffff)}), to_float(T{uint16_t(bits >> 16)})}; }

}  // namespace mvit3
