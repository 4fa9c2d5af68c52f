// inverted_residual: the kernels' arguments and launchers. Maps are contiguous (B, H, W, channels) in bfloat16 or float16.
#pragma once

#include "expansion.h"

namespace mvit3 {

// z = depth-wise(act(norm(x expand^T))), and its mean and variance.
struct FilterArguments {
  ExpansionArguments front;
  void* z;
  float *mean, *var;
  float* workspace;  // filter_workspace floats
  int stride;
  bool bfloat16;
};

int64_t filter_workspace(const FilterArguments& a);
void filter(const FilterArguments& a, void* stream);

}  // namespace mvit3
