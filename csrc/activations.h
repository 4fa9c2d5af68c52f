// The activations, by their position in mvit3_kernels.ops.types.ACTIVATIONS.
#pragma once

namespace mvit3 {

enum Activation : int { kIdentity, kSilu, kRelu, kActivations };

}  // namespace mvit3
