// Groups of arguments that several ops take, in the order of the schemas.
#pragma once

#include "registration.h"

namespace mvit3 {

// A batch normalisation forward: with its running statistics, which training does not read.
struct BatchNormArguments {
  Tensor weight, bias;
  OptionalTensor running_mean, running_var;
  bool training;
  double eps;
};

// The same backward: with the statistics that forward used.
struct BatchNormBackwardArguments {
  Tensor weight, bias, mean, var;
  bool training;
  double eps;
};

// A layer normalisation.
struct LayerNormArguments {
  Tensor weight, bias;
};

// A linear map: weight (outputs, inputs), bias (outputs).
struct LinearArguments {
  Tensor weight;
  OptionalTensor bias;
};

// Of a 3x3 convolution.
struct StrideArguments {
  int64_t stride, dilation;

  void check() const {
    MVIT3_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
    MVIT3_CHECK(dilation >= 1, "dilation must be at least 1, got ", dilation);
  }
};

// A convolution of the inverted residual and its norm: with the statistics of the batch, and with given ones.
struct ConvArguments {
  Tensor weight, norm_weight, norm_bias;
  double eps;
};
struct FixedConvArguments {
  Tensor weight, norm_weight, norm_bias, mean, var;
  double eps;
};

// Its three convolutions, and what else it does.
template <typename Conv>
struct LayersArguments {
  Conv expand, depthwise, project;
};
struct BlockArguments {
  StrideArguments taps;
  int64_t act;
};

struct PatchArguments {
  int64_t height, width;
};

// Two dropouts of a call and the seed of both, which is read only where one of them is active.
struct DropoutArguments {
  double first, output;
  OptionalTensor seed;
};

}  // namespace mvit3
