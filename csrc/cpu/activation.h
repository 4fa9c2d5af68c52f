// The activations and their derivatives on vectors.
#pragma once

#include <type_traits>

#include "../activations.h"
#include "../check.h"
#include "vec.h"

namespace mvit3 {

// `Roughly` (kRoughly<E>): within 8e-5 of it, a fifth of the time less.
template <int Act, bool Roughly = false>
MVIT3_INLINE Vec activate(Vec x) {
  if constexpr (Act == kSilu) return x / sigmoid_divisor<Roughly>(x);
  if constexpr (Act == kRelu) return select_greater(Vec(0.0f), x, 0.0f, x);  // NaN stays NaN
  return x;
}

// The gradient of activate(x) for the gradient `dy` of its result.
template <int Act>
MVIT3_INLINE Vec activate_backward(Vec x, Vec dy) {
  if constexpr (Act == kSilu) {
    const Vec s = sigmoid(x);
    return dy * (s * fma(x, Vec(1.0f) - s, 1.0f));
  }
  if constexpr (Act == kRelu)
    return select_at_least(0.0f, x, 0.0f, dy);  // NaN lets the gradient through, as in PyTorch
  return dy;
}

// The activation of v and its derivative. `Roughly` as above, both within 2e-4.
template <int Act, bool Roughly = false>
MVIT3_INLINE void activate_with_slope(Vec v, Vec& value, Vec& slope) {
  if constexpr (Act == kSilu && Roughly) {
    const Vec power = exp2<true>(v * -kLog2e), s = reciprocal_roughly(Vec(1.0f) + power);
    const Vec finite = select_greater(power, 0x1p100f, 0x1p100f, power);  // beyond, s is as good as zero
    value = v * s;
    slope = s * fma(v, finite * s, 1.0f);  // power * s is 1 - s, without an error that a large v would multiply
  } else if constexpr (Act == kSilu) {
    const Vec s = sigmoid(v);
    value = v * s;
    slope = s * fma(v, Vec(1.0f) - s, 1.0f);
  } else {
    value = activate<Act>(v);
    slope = activate_backward<Act>(v, 1.0f);
  }
}

// Calls f with the activation as a compile-time constant.
template <typename F>
auto dispatch_activation(int64_t act, F&& f) {
  MVIT3_CHECK(0 <= act && act < kActivations, "act must be 0 (identity), 1 (silu) or 2 (relu), got ", act);
  if (act == kSilu) return f(std::integral_constant<int, kSilu>{});
  if (act == kRelu) return f(std::integral_constant<int, kRelu>{});
  return f(std::integral_constant<int, kIdentity>{});
}

}  // namespace mvit3
