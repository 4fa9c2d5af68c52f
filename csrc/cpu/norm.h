// Batch normalisation as kernels use it: a scale and a shift of each channel forward, a few sums of each channel
// backward.
#pragma once

#include "../batch_norm.h"
#include "activation.h"
#include "moments.h"

namespace mvit3 {

// A folded norm as value * scale + shift, padded to whole vectors.
struct ScaleShift {
  Scratch<float> scale, shift;

  explicit ScaleShift(int64_t channels) : scale(lanes_of(channels), 0.0f), shift(lanes_of(channels), 0.0f) {}

  MVIT3_INLINE Vec operator()(Vec v, int64_t c) const { return fma(v, load(scale.data() + c), load(shift.data() + c)); }
};

// The parameters of a batch normalisation and the statistics that it uses, in float64.
struct Norm {
  Values weight, bias, mean, var;
  double eps;

  // `prefix` is what stands before "weight", "bias" and "eps" in the names of the arguments.
  Norm(const std::string& prefix, const Tensor& weight, const Tensor& bias, int64_t channels, double eps)
      : weight(read_channels(prefix + "weight", weight, channels)),
        bias(read_channels(prefix + "bias", bias, channels)), mean(channels), var(channels), eps(eps) {
    check_eps(prefix + "eps", eps);
  }

  // The statistics that a call gives, under the names `prefix` mean and var.
  void read_statistics(const std::string& prefix, const Tensor& given_mean, const Tensor& given_var) {
    mean = read_channels(prefix + "mean", given_mean, mean.size());
    var = read_channels(prefix + "var", given_var, var.size());
  }

  // The running ones, which `prefix`training = False needs.
  void read_running(
      const std::string& prefix, const std::optional<Tensor>& given_mean, const std::optional<Tensor>& given_var) {
    MVIT3_CHECK(
        given_mean && given_var, prefix, "running_mean and ", prefix, "running_var must be given when ", prefix,
        "training is False");
    read_statistics(prefix + "running_", *given_mean, *given_var);
  }

  // Mean and variance for the caller: float32 tensors, without elements where they are not of this batch.
  std::pair<Tensor, Tensor> of_batch(bool training, const Tensor& x) const {
    const Tensor like = torch::stable::new_empty(x, {0}, ScalarType::Float);
    return {write_channels(training ? mean : Values(), like), write_channels(training ? var : Values(), like)};
  }

  // value * weight + bias, without statistics.
  Norm(const Values& weight, const Values& bias)
      : weight(weight), bias(bias), mean(weight.size(), 0.0), var(weight.size(), 1.0), eps(0) {}

  FoldedNorm<double> folded(int64_t c) const { return fold_norm(weight[c], bias[c], mean[c], var[c], eps); }
  ScaleShift affine() const {
    ScaleShift out(weight.size());
    for (size_t c = 0; c < weight.size(); ++c) {
      const auto [scale, shift] = folded(c);
      out.scale[c] = float(scale);
      out.shift[c] = float(shift);
    }
    return out;
  }
  double rstd(int64_t c) const { return 1 / std::sqrt(var[c] + eps); }

  Scratch<float> means() const {
    Scratch<float> out(lanes_of(mean.size()), 0.0f);
    std::transform(mean.begin(), mean.end(), out.data(), [](double v) { return float(v); });
    return out;
  }
};

// Adds to sums[c] and sums[lanes + c] the rows of a gradient, and of the gradient times the distance of `values` to the
// mean.
template <typename T, typename U>
void add_sum_and_dot(
    const T* grads, int64_t grad_stride, const U* values, int64_t value_stride, const Scratch<float>& mean,
    int64_t channels, int64_t count, Scratch<double>& sums) {
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

// The gradient of a norm's input from the gradient of its output, (grad - offset - (value - mean) * slope) * scale,
// padded to whole vectors; and the gradients of the norm's own parameters. Slope and scale are about 1 / deviation
// each: their product, for a deviation of 1e19, is below what float32 holds.
struct NormBackward {
  Scratch<float> mean, scale, offset, slope;
  Values dweight, dbias;

  // `sum` of the gradient and `dot` of the gradient with value - float32(mean), over `rows` rows.
  NormBackward(const Norm& norm, const Values& sum, const Values& dot, double rows)
      : mean(norm.means()), scale(lanes_of(sum.size()), 0.0f), offset(lanes_of(sum.size()), 0.0f),
        slope(lanes_of(sum.size()), 0.0f), dweight(sum.size()), dbias(sum) {
    for (size_t c = 0; c < sum.size(); ++c) {
      const double r = norm.rstd(c), rest = double(mean[c]) - norm.mean[c];
      dweight[c] = r * (dot[c] + rest * sum[c]);
      scale[c] = float(norm.weight[c] * r);
      slope[c] = float(r * dweight[c] / rows);
      offset[c] = float((sum[c] + rest * r * dweight[c]) / rows);
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
    return fnma(value - load(mean.data() + c), load(slope.data() + c), grad - load(offset.data() + c)) *
           load(scale.data() + c);
  }
};

}  // namespace mvit3
