// What the files of steps of the inference engine share.
#pragma once

#include "engine.h"
#include "inverted_residual.h"
#include "step_source.h"

namespace mvit3 {

using Shapes = std::vector<MapShape>;
using Maps = std::vector<Map>;

inline void check_channels(const char* kind, int64_t got, int64_t wanted) {
  MVIT3_CHECK(got == wanted, "step ", kind, " takes ", wanted, " channels, got ", got);
}

inline void check_same_size(const char* kind, const MapShape& one, const MapShape& other) {
  MVIT3_CHECK(
      one.height == other.height && one.width == other.width, "step ", kind, " takes maps of one size, got ",
      one.height, " x ", one.width, " and ", other.height, " x ", other.width);
}

// A convolution's weight, and scale and shift of its outputs: batch norm and bias, already folded together.
struct Folded : ConvNorm {
  int64_t outputs, inputs;

  Folded(const char* name, const Tensor& weight, const Tensor& scale, const Tensor& shift, int64_t inputs)
      : ConvNorm(name, weight, outputs_of(name, weight), inputs, scale, shift, 0), outputs(weight.size(0)),
        inputs(inputs) {
    std::fill(var.begin(), var.end(), 1.0);
  }
  static Folded take(Source& from, const char* name) {
    const Tensor &weight = from.weight(), &scale = from.vector(), &shift = from.vector();
    return Folded(name, weight, scale, shift, weight.numel() / outputs_of(name, weight));
  }
};

using StepMaker = std::unique_ptr<Step> (*)(Source&);
using StepKind = std::pair<const char*, StepMaker>;

template <typename T>
std::unique_ptr<Step> make(Source& from) {
  return std::make_unique<T>(from);
}

// The type that the products of steps are made of, where bfloat16 was asked for.
using HalfProducts = Multiplied<BFloat16>;

// The steps between ops (map_steps.cpp).
std::vector<StepKind> map_step_kinds();

// The steps of the heads of dense prediction (dense_steps.cpp), with products of float or of HalfProducts.
template <typename E>
std::vector<StepKind> dense_step_kinds();

}  // namespace mvit3
