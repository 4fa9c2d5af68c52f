// The device as csrc/cuda/inverted_residual_backward.h wants it.
#pragma once

#include "emulation.h"

namespace mvit3 {

template <typename T>
void multiply_first(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  for (float& number : sum) number = 0.0f;
  multiply_add(sum, a, b0, b1, T{});
}

template <int At>
void copy_16_behind(bool wanted, void* shared, const void* global) {
  if (wanted) copy_16(static_cast<char*>(shared) + At, static_cast<const char*>(global) + At);
}

inline void synchronize_warp() {
  emulation::meet([](auto&, int) {});
}

inline void add_in_memory(float* to, float first, float second) {
  if (reinterpret_cast<uintptr_t>(to) % 8) emulation::fail("a pair in memory is not aligned");
  to[0] += first;
  to[1] += second;
}

inline void store_matrices(SharedAddress row, const uint32_t (&in)[4]) {
  check_row(row);
  const int g = thread() % 32 / 4, t = thread() % 4;
  const auto& shown = emulation::meet([&](auto& s, int l) { s.address[l] = row; });
  for (int m = 0; m < 4; ++m)
    std::memcpy(const_cast<char*>(static_cast<const char*>(shown.address[8 * m + g])) + 4 * t, &in[m], 4);
}

}  // namespace mvit3
