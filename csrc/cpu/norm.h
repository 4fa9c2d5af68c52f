// Batch normalisation as kernels use it: a scale and a shift of each channel forward, a few sums of each channel backward.
#pragma once

#include <cmath>

#include "activation.h"
#include "moments.h"

namespace mvit3 {

// A norm as value * scale + shift, padded to whole vectors.
struct ScaleShift {
  Scratch<float> scale, shift;

  ScaleShift(const Values& weight, const Values& bias, const Values& mean, const Values& var, double eps)
      : scale(lanes_of(weight.size()), 0.0f), shift(lanes_of(weight.size()), 0.0f) {
    for (size_t c = 0; c < weight.size(); ++c) {
      const double s = weight[c] / std::sqrt(var[c] + eps);
      scale[c] = float(s);
      shift[c] = float(bias[c] - mean[c] * s);
    }
  }

  MVIT3_INLINE Vec operator()(Vec v, int64_t c) const { return fma(v, load(scale.data() + c), load(shift.data() + c)); }
};

// The parameters of a batch normalisation and the statistics that it uses, in float64.
struct Norm {
  Values gamma, beta, mean, var;
  double eps;

  // `prefix` is what stands before "weight", "bias" and "eps" in the names of the arguments.
  Norm(const std::string& prefix, const Tensor& weight, const Tensor& bias, int64_t channels, double eps)
      : gamma(read_channels(prefix + "weight", weight, channels)), beta(read_channels(prefix + "bias", bias, channels)), mean(channels),
        var(channels), eps(eps) {
    check_eps(prefix + "eps", eps);
  }

  // value * gamma + beta, without statistics.
  Norm(const Values& gamma, const Values& beta) : gamma(gamma), beta(beta), mean(gamma.size(), 0.0), var(gamma.size(), 1.0), eps(0) {}

  ScaleShift affine() const { return ScaleShift(gamma, beta, mean, var, eps); }
  double rstd(int64_t c) const { return 1 / std::sqrt(var[c] + eps); }

  Scratch<float> means() const {
    Scratch<float> out(lanes_of(mean.size()), 0.0f);
    std::transform(mean.begin(), mean.end(), out.data(), [](double v) { return float(v); });
    return out;
  }
};

// Adds to sums[c] and sums[lanes + c] the rows of a gradient, and of the gradient times the distance of `values` to the mean.
template <typename T, typename U>
void add_sum_and_dot(
    const T* grads,
    int64_t grad_stride,
    const U* values,
    int64_t value_stride,
    const Scratch<float>& mean,
    int64_t channels,
    int64_t count,
    Scratch<double>& sums) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Vec centre = load(mean.data() + c);
    for_each_run(count, [&](int64_t first, int64_t last) {
      Vec sum = 0.0f, dot = 0.0f;
      for (int64_t r = first; r < last; ++r) {
        const Vec grad = load_some(grads + r * grad_stride + c, channels - c);
        sum += grad;
        dot = fma(grad, load_some(values + r * value_stride + c, channels - c) - centre, dot);
      }
      accumulate(sums.data() + c, sum);
      accumulate(sums.data() + lanes_of(channels) + c, dot);
    });
  }
}

// The gradient of a norm's input from the gradient of its output, (grad - offset - (value - mean) * slope) * scale, padded to whole
// vectors; and the gradients of the norm's own parameters. Slope and scale are about 1 / deviation each: their product, for a deviation of
// 1e19, is below what float32 holds.
struct NormBackward {
  Scratch<float> mean, scale, offset, slope;
  Values dgamma, dbeta;

  // `sum` of the gradient and `dot` of the gradient with value - float32(mean), over `rows` rows.
  NormBackward(const Norm& norm, const Values& sum, const Values& dot, double rows)
      : mean(norm.means()), scale(lanes_of(sum.size()), 0.0f), offset(lanes_of(sum.size()), 0.0f), slope(lanes_of(sum.size()), 0.0f),
        dgamma(sum.size()), dbeta(sum) {
    for (size_t c = 0; c < sum.size(); ++c) {
      const double r = norm.rstd(c), rest = double(mean[c]) - norm.mean[c];
      dgamma[c] = r * (dot[c] + rest * sum[c]);
      scale[c] = float(norm.gamma[c] * r);
      slope[c] = float(r * dgamma[c] / rows);
      offset[c] = float((sum[c] + rest * r * dgamma[c]) / rows);
    }
  }

  // From what `add_sum_and_dot` left, one accumulator a part.
  static NormBackward from(const Norm& norm, const std::vector<Scratch<double>>& sums, double rows) {
    const int64_t channels = norm.mean.size(), lanes = lanes_of(channels);
    const Values all = add_up(sums, 2 * lanes);
    const auto dot = all.begin() + lanes;
    return NormBackward(norm, Values(all.begin(), all.begin() + channels), Values(dot, dot + channels), rows);
  }

  MVIT3_INLINE Vec operator()(Vec grad, Vec value, int64_t c) const {
    return fnma(value - load(mean.data() + c), load(slope.data() + c), grad - load(offset.data() + c)) * load(scale.data() + c);
  }
};

}  // namespace mvit3
