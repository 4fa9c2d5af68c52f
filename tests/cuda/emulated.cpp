// The launchers of csrc/cuda on the launch emulation, for a test that calls them through ctypes: pointers are CPU
// memory.
#include <utility>

#include "../../csrc/cuda/depthwise_conv.cu"
#include "../../csrc/cuda/depthwise_conv_backward.cu"
#include "../../csrc/cuda/inverted_residual.cu"
#include "../../csrc/cuda/inverted_residual_backward.cu"
#include "../../csrc/cuda/inverted_residual_inference.cu"

using namespace mvit3;

namespace {

// One layout for all calls of inverted_residual; a test leaves null what an op does not take.
struct Call {
  int64_t batch, height, width, inputs, expanded, outputs, stride, dilation, act;
  int32_t bfloat16, single, processors, backwards, runs;
  const void *x, *expand, *depthwise, *project;
  const float *scale, *shift;
  void* z;
  float *moments, *counts;
  int64_t parts;
  const float* norms;  // weight, bias, mean and variance of the three norms, one after the other
  void* y;
  const void* dp;
  const float* part;
  int64_t parts_of_sums;
  const float *mean, *covariance;
  void *dx, *gradient, *scaled;
  float *correction, *dexpand, *dfirst_weight, *dfirst_bias, *dtaps, *dmiddle_weight, *dmiddle_bias, *dproject;
};

struct DepthwiseCall {
  int64_t batch, height, width, channels, stride, dilation;
  int32_t type, single, processors, backwards;
  const void *x, *dz, *weight;
  void *z, *dx;
  float *moments, *counts;
  int64_t parts;
  void* dweight;
};

ExpansionArguments front_of(const Call& c) {
  const auto out = [&](int64_t n) { return int((n + c.stride - 1) / c.stride); };
  const Maps maps{c.batch,      int(c.height),  int(c.width),    int(c.inputs),  out(c.height),
                  out(c.width), int(c.outputs), int(c.expanded), int(c.dilation)};
  const Norm norm{c.scale, c.shift, {}, {}, {}, {}, 0.0f};
  return {maps,       c.x, {c.expand, bool(c.single)}, norm, {c.depthwise, bool(c.single)}, slice_of(int(c.inputs)),
          int(c.act), {}};
}

// The next norm.
Norm norm_at(const float*& next, int64_t channels) {
  const auto values = [&] { return Values{std::exchange(next, next + channels), true}; };
  const Values weight = values(), bias = values(), mean = values(), var = values();
  return {nullptr, nullptr, weight, bias, mean, var, 1e-5f};
}

// Memory of the exact size, which a sanitizer sees, full of NaN.
std::vector<float> workspace(int64_t floats) { return std::vector<float>(floats, NAN); }

template <typename C>
void prepare(const C& c) {
  emulation::processors = c.processors;
  emulation::backwards = c.backwards;
}

DepthwiseArguments arguments_of(const DepthwiseCall& c) {
  const auto out = [&](int64_t n) { return int((n + c.stride - 1) / c.stride); };
  const Maps maps{c.batch, int(c.height),  int(c.width), int(c.channels), out(c.height), out(c.width), 0,
                  0,       int(c.dilation)};
  return {maps,         c.x,       c.dz,      {c.weight, bool(c.single)},
          c.z,          c.dx,      c.moments, c.counts,
          int(c.parts), c.dweight, nullptr,   int(c.stride),
          Type(c.type)};
}

}  // namespace

extern "C" void run_filter(const Call* c) {
  prepare(*c);
  FilterArguments a{front_of(*c),  c->z,    c->moments,     c->counts,
                    int(c->parts), nullptr, int(c->stride), bool(c->bfloat16)};
  auto memory = workspace(filter_workspace(a));
  a.workspace = memory.data();
  filter(a, nullptr);
}

extern "C" void run_inference(const Call* c) {
  prepare(*c);
  emulation::runs = c->runs;
  const float* next = c->norms;
  ExpansionArguments front = front_of(*c);
  front.norm = norm_at(next, c->expanded);
  const Norm middle = norm_at(next, c->expanded), last = norm_at(next, c->outputs);
  const bool residual = c->stride == 1 && c->inputs == c->outputs;
  InferenceArguments a{front,          middle,           {c->project, bool(c->single)}, last, c->y, nullptr, residual,
                       int(c->stride), bool(c->bfloat16)};
  auto memory = workspace(inference_workspace(a));
  a.workspace = memory.data();
  inference(a, nullptr);
}

extern "C" void run_backward(const Call* c) {
  prepare(*c);
  const float* next = c->norms;
  ExpansionArguments front = front_of(*c);
  front.norm = norm_at(next, c->expanded);
  BackwardArguments a{
      front,
      c->dp,
      c->z,
      {c->project, bool(c->single)},
      norm_at(next, c->expanded),
      c->part,
      int(c->parts_of_sums),
      c->mean,
      c->covariance,
      c->dx,
      c->gradient,
      c->scaled,
      c->correction,
      c->dexpand,
      c->dfirst_weight,
      c->dfirst_bias,
      c->dtaps,
      c->dmiddle_weight,
      c->dmiddle_bias,
      c->dproject,
      nullptr,
      int(c->stride),
      bool(c->bfloat16)};
  auto memory = workspace(backward_workspace(a));
  a.workspace = memory.data();
  backward(a, nullptr);
}

extern "C" void run_depthwise_filter(const DepthwiseCall* c) {
  prepare(*c);
  depthwise_filter(arguments_of(*c), nullptr);
}

extern "C" void run_depthwise_backward(const DepthwiseCall* c) {
  prepare(*c);
  DepthwiseArguments a = arguments_of(*c);
  auto memory = workspace(depthwise_backward_workspace(a));
  a.workspace = memory.data();
  depthwise_backward(a, nullptr);
}
