// Launching kernels. A kernel is a type with `Arguments`, `kBlocksAtOnce` (blocks that share a multiprocessor at least, which limits its
// registers) and `run`.
#pragma once

#include "tile.h"

#if defined(__CUDACC__)

#include <stdexcept>
#include <string>

namespace mvit3 {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("mvit3_kernels, CUDA C++ kernels: ") + cudaGetErrorString(status));
}

template <typename K>
__global__ void __launch_bounds__(kThreads, K::kBlocksAtOnce) kernel(const __grid_constant__ typename K::Arguments arguments) {
  K::run(arguments);
}

template <typename K>
void allow_shared(int bytes) {
  if (bytes > 48 * 1024) check(cudaFuncSetAttribute(kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Blocks that the current device runs at once.
template <typename K>
int resident_blocks(int shared) {
  int device, processors, blocks;
  allow_shared<K>(shared);
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel<K>, kThreads, shared));
  return processors * blocks;
}

template <typename K>
void launch(const typename K::Arguments& arguments, int blocks, int slices, int shared, void* stream) {
  allow_shared<K>(shared);
  kernel<K><<<dim3(blocks, slices), kThreads, shared, static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError());
}

}  // namespace mvit3

#endif
