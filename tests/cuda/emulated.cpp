// The launchers of csrc/cuda on the launch emulation, for a test that calls them through ctypes: pointers are CPU memory.
#include "../../csrc/cuda/inverted_residual.cu"

using namespace mvit3;

namespace {

// One layout for all calls; a test leaves null what an op does not take.
struct Call {
  int64_t batch, height, width, inputs, wide, outputs, stride, act;
  int32_t bfloat16, single, processors, backwards;
  const void *x, *expand, *depthwise, *project;
  const float *scale, *shift;
  void* z;
  float *mean, *var;
};

ExpansionArguments front_of(const Call& c) {
  const auto out = [&](int64_t n) { return int((n + c.stride - 1) / c.stride); };
  const Maps maps{c.batch, int(c.height), int(c.width), int(c.inputs), out(c.height), out(c.width), int(c.outputs), int(c.wide)};
  const Norm norm{c.scale, c.shift, {}, {}, {}, {}, 0.0f};
  return {maps, c.x, {c.expand, bool(c.single)}, norm, {c.depthwise, bool(c.single)}, slice_of(int(c.inputs)), int(c.act)};
}

// Memory of the exact size, which a sanitizer sees, full of NaN.
std::vector<float> workspace(int64_t floats) { return std::vector<float>(floats, NAN); }

void prepare(const Call& c) {
  emulation::processors = c.processors;
  emulation::backwards = c.backwards;
}

}  // namespace

extern "C" void run_filter(const Call* c) {
  prepare(*c);
  FilterArguments a{front_of(*c), c->z, c->mean, c->var, nullptr, int(c->stride), bool(c->bfloat16)};
  auto memory = workspace(filter_workspace(a));
  a.workspace = memory.data();
  filter(a, nullptr);
}
