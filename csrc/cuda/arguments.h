// The arguments of the launchers, which the bindings fill in. Maps are contiguous (B, H, W, channels) in bfloat16 or
// float16; those of the depth-wise convolution by itself in float32 too.
#pragma once

#include <cstdint>

namespace mvit3 {

// A parameter in float32 (`single`) or in the 16-bit type of the map.
struct Values {
  const void* data;
  bool single;
};

// Batch normalisation, as a scale and a shift, or by its parameters and statistics.
struct Norm {
  const float *scale, *shift;  // null: fold the rest
  Values weight, bias, mean, var;
  float eps;
};

// The maps of a launch.
struct Maps {
  int64_t batch;
  int height, width, inputs;           // x
  int out_height, out_width, outputs;  // the map behind the depth-wise convolution; channels of the projection
  int expanded;                        // channels between
  int dilation;
};

// The parameters of a forward kernel as it copies them into shared memory, for each step of `channels` expanded ones in
// a run (`StepParameters`), and the last norm. A launcher fills it in its workspace.
struct Packed {
  const char* steps;
  const float* last;     // (outputs, 2): scale and shift of the last norm
  int bytes, expansion;  // of a step, and of its part for the expansion
};

// What makes the expanded map and the taps that filter it.
struct ExpansionArguments {
  Maps maps;
  const void* x;
  Values expand;
  Norm norm;
  Values depthwise;
  int slice;  // input channels in shared memory at a time
  int act;
  Packed packed;
};

constexpr int kMostInputs = 128;  // in shared memory at a time

// All input channels at a time, or equal parts of them.
inline int slice_of(int inputs) {
  const int slices = (inputs + kMostInputs - 1) / kMostInputs, each = (inputs + slices - 1) / slices;
  return (each + 15) / 16 * 16;
}

// z = depth-wise(act(norm(x expand^T))), and of each of its parts and channels the mean and the sum of squared
// differences from it, (2, parts, expanded), and the number of values (parts). A part is a block's, and may be empty.
struct FilterArguments {
  ExpansionArguments front;
  void* z;
  float *moments, *counts;
  int parts;
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
  float* workspace;  // inference_workspace floats, aligned to 16 bytes like that of the others
  bool residual;
  int stride;
  bool bfloat16;
};

int64_t inference_workspace(const InferenceArguments& a);
void inference(const InferenceArguments& a, void* stream);

// From the gradient dp of the projection to that of x without the correction of the first norm (identity B of the
// design), to those of all parameters, and to what the correction is made of.
//   g = (dp project) * act'(middle(z)), dz = its gradient through the middle norm, da = depth-wise^T dz,
//   pre = norm(x expand^T), G = da * act'(pre); dx = (G * scale) expand, dtaps = the gradient of the depth-wise
//   weights.
// The middle norm's sums are there, in parts of the pixels: `part` (parts, outputs + 2, expanded) has dp^T
// act(middle(z)) and the sums of g and of g z. dexpand, dfirst_* and correction (2, expanded) are what
// expand_gradient_kernel makes of G^T x, sum of G, and mean and covariance of x. With more than kMostGradientInputs
// inputs G itself is written, `gradient` (B, H, W, expanded), and `scaled`, the expansion times its norm's scale, and
// neither dx nor what follows from sums of G.
constexpr int kMostGradientInputs = 64;

struct BackwardArguments {
  ExpansionArguments front;
  const void *dp, *z;
  Values project;
  Norm middle;
  const float* part;
  int parts;
  const float *mean, *covariance;
  void *dx, *gradient, *scaled;
  float *correction, *dexpand, *dfirst_weight, *dfirst_bias, *dtaps, *dmiddle_weight, *dmiddle_bias, *dproject;
  float* workspace;  // backward_workspace floats
  int stride;
  bool bfloat16;
};

int64_t backward_workspace(const BackwardArguments& a);
void backward(const BackwardArguments& a, void* stream);

enum class Type { kFloat, kBFloat16, kFloat16 };

// z = depth-wise(x), and moments and counts of its parts, as above; and the gradients of x and of the taps, from dz. Of
// `maps` inputs are the channels, and outputs and expanded have no part. Neither map is empty, and the dilation is not
// larger than the map.
struct DepthwiseArguments {
  Maps maps;
  const void *x, *dz;
  Values weight;  // (channels, 9)
  void *z, *dx;
  float *moments, *counts;
  int parts;
  void* dweight;     // in the type of the weight
  float* workspace;  // depthwise_backward_workspace floats
  int stride;        // 1, or 2 without dilation
  Type type;
};

void depthwise_filter(const DepthwiseArguments& a, void* stream);
int64_t depthwise_backward_workspace(const DepthwiseArguments& a);
void depthwise_backward(const DepthwiseArguments& a, void* stream);

}  // namespace mvit3
