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

// y = norm(act(middle(depth-wise(act(norm(x expand^T))))) project^T) + x where `residual`.
struct InferenceArguments {
  ExpansionArguments front;
  Norm middle;
  Values project;
  Norm last;
  void* y;
  bool residual;
  int stride;
  bool bfloat16;
};

void inference(const InferenceArguments& a, void* stream);

// The gradient dp of the projection to that of x, without the correction of the first norm (identity B of the design), and what that needs.
//   g = (dp project) * act'(z_scale z + z_shift), dz = c0 g + c1 + c2 z, da = depth-wise^T dz, pre = norm(x expand^T), G = da * act'(pre);
//   dx = (G * scale) expand, n1 = G^T x, g1 = sum of G, dtaps = the gradient of the depth-wise weights.
struct BackwardArguments {
  ExpansionArguments front;
  const void *dp, *z;
  Values project;
  const float *z_scale, *z_shift, *c0, *c1, *c2;
  void* dx;
  float *n1, *g1, *dtaps;
  float* workspace;  // backward_workspace floats
  int stride;
  bool bfloat16;
};

int64_t backward_workspace(const BackwardArguments& a);
void backward(const BackwardArguments& a, void* stream);

}  // namespace mvit3
