// Launching kernels. A kernel is a type with `Arguments`, `kBlocksAtOnce` (blocks that share a multiprocessor at least,
// which limits its registers) and `run`.
#pragma once

#include "shared_memory.h"
#include "tile.h"

#if defined(__CUDACC__)

#include <stdexcept>
#include <string>

namespace mvit3 {

inline void check(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("mvit3_kernels, CUDA C++ kernels: ") + cudaGetErrorString(status));
}

template <typename K>
__global__ void __launch_bounds__(kThreads, K::kBlocksAtOnce)
    kernel(const __grid_constant__ typename K::Arguments arguments) {
  K::run(arguments);
}

// Blocks that the current device runs at once. The last answer is kept: asking takes longer than a launch.
template <typename K>
int resident_blocks(int shared) {
  thread_local int of_device = -1, of_shared = 0, answer = 0;
  static SharedMemoryLimit limit;
  int device, processors, blocks;
  check(cudaGetDevice(&device));
  if (device == of_device && shared == of_shared) return answer;
  limit.raise(device, shared, [](int bytes) {
    check(cudaFuncSetAttribute(kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  });
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel<K>, kThreads, shared));
  if (blocks == 0) throw std::runtime_error("mvit3_kernels, CUDA C++ kernels: the device has too little shared memory");
  of_device = device;
  of_shared = shared;
  return answer = processors * blocks;
}

// More than 48 KB of shared memory only after resident_blocks has asked for it.
template <typename K>
void launch(const typename K::Arguments& arguments, int blocks, int slices, int shared, void* stream) {
  kernel<K><<<dim3(blocks, slices), kThreads, shared, static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError());
}

}  // namespace mvit3

#endif
