// y = W norm(x) + b. The norm's scale and shift are part of the weight and the bias (identity C of the design); the
// normalised rows exist in tiles only.
#pragma once

#include "../op_arguments.h"
#include "layer_norm.h"

namespace mvit3 {

// The parameters of a norm and of the linear map behind it, as the op receives them.
struct NormLinearParameters {
  int64_t inputs, outputs;
  Values norm_weight, norm_bias;
  FloatMatrix weight;
  Scratch<float> bias;

  // `weight_name` and `bias_name` are those of the linear map.
  NormLinearParameters(
      const LayerNormArguments& norm, const std::string& weight_name, const std::string& bias_name,
      const LinearArguments& linear, int64_t inputs)
      : inputs(inputs), outputs(outputs_of(weight_name, linear.weight)),
        norm_weight(read_channels("norm_weight", norm.weight, inputs)),
        norm_bias(read_channels("norm_bias", norm.bias, inputs)), weight(weight_name, linear.weight, outputs, inputs),
        bias(read_vector(bias_name, linear.bias, outputs)) {}

  // Scale and shift as float32, padded with zeros.
  Scratch<float> scale() const { return padded(norm_weight); }
  Scratch<float> shift() const { return padded(norm_bias); }

  // b + W norm_bias
  Scratch<float> folded_bias() const {
    Scratch<float> out(std::max<int64_t>(lanes_of(outputs), 1), 0.0f);
    const Scratch<float> shift = this->shift();
    for_each_output([&](int64_t o) {
      Vec sum = 0.0f;
      for (int64_t c = 0; c < inputs; c += kLanes)
        sum = fma(load_some(weight.data() + o * inputs + c, inputs - c), load(shift.data() + c), sum);
      out[o] = float(bias[o] + sum_lanes(sum));
    });
    return out;
  }

  // W norm_weight and its transpose.
  template <typename E>
  PackedWeightOf<E> packed() const {
    return PackedWeightOf<E>::rows(weight.data(), outputs, inputs, inputs, scale().data());
  }
  template <typename E>
  PackedWeightOf<E> transposed() const {
    return PackedWeightOf<E>::columns(weight.data(), inputs, outputs, inputs, scale().data());
  }

 private:
  static Scratch<float> padded(const Values& values) {
    Scratch<float> out(lanes_of(values.size()), 0.0f);
    std::transform(values.begin(), values.end(), out.data(), [](double v) { return float(v); });
    return out;
  }

  template <typename F>
  void for_each_output(const F& f) const {
    const int64_t parts = count_parts(outputs * inputs);
    for_each_part(parts, [&](int64_t part) {
      const Range mine = part_range(outputs, part, parts);
      for (int64_t o = mine.begin; o < mine.end; ++o) f(o);
    });
  }
};

// What the forward pass reads: packed once for a version of the parameters.
template <typename E>
struct NormLinearWeightsOf {
  PackedWeightOf<E> weight;
  Scratch<float> bias;

  explicit NormLinearWeightsOf(const NormLinearParameters& p) : weight(p.packed<E>()), bias(p.folded_bias()) {}
};

// y, (rows of the map, outputs). Statistics that the map has no memory for are not kept.
template <typename E, typename T, typename Y>
void norm_linear(const NormedMap<T>& x, double eps, const NormLinearWeightsOf<E>& w, Y* y) {
  const int64_t lanes = lanes_of(x.tokens().channels), outputs = w.weight.outputs();
  x.measure(eps);
  for_each_block_tile(x.tokens().total(), w.weight, [&](int64_t first, int64_t count, Range panels) {
    E* tile = tile_of<E>(workspace(kTileRows * lanes));
    x.normalise(first, count, eps, tile, lanes);
    multiply(tile, lanes, count, w.weight, panels, [&](int64_t r, int64_t o, Vec sums) {
      Y* out = y + (first + r) * outputs + o;
      prefetch_to_write(
          out + kPanel);  // of the panel that comes next: waiting for its lines would cost a tenth of the product
      store_some(out, sums + load(w.bias.data() + o), outputs - o);
    });
  });
}

// Gradients of the parameters from those of the folded ones: `products` (one a part, outputs x lanes of the inputs) sum
// to the gradient of the folded weight, dbias is that of the bias. As W norm_weight is the folded weight and b + W
// norm_bias the folded bias, every part of the norm's own gradient is a sum over a column of the weight.
struct NormLinearGradients {
  Tensor dweight;
  Values dnorm_weight, dnorm_bias;

  NormLinearGradients(
      const NormLinearParameters& p, const std::vector<Scratch<float>>& products, const Values& dbias,
      const Tensor& like)
      : dweight(torch::stable::new_empty(like, like.sizes())) {
    const int64_t lanes = lanes_of(p.inputs), ranges = count_parts(p.outputs * p.inputs);
    const Scratch<float> scale = p.scale(), shift = p.shift();
    auto sums = accumulators<double>(ranges, 2 * lanes);
    dispatch_dtype("weight", like, [&](auto type) {
      auto* out = mutable_data_of<decltype(type)>(dweight);
      for_each_part(ranges, [&](int64_t range) {
        const Range mine = part_range(p.outputs, range, ranges);
        double* dscale = sums[range].data();
        double* dshift = dscale + lanes;
        for (int64_t o = mine.begin; o < mine.end; ++o) {
          const Vec bias = float(dbias[o]);
          for (int64_t c = 0; c < p.inputs; c += kLanes) {
            Vec product = load(products[0].data() + o * lanes + c);
            for (size_t i = 1; i < products.size(); ++i) product += load(products[i].data() + o * lanes + c);
            const Vec weight = load_some(p.weight.data() + o * p.inputs + c, p.inputs - c);
            accumulate(dscale + c, weight * product);
            accumulate(dshift + c, weight * bias);
            store_some(
                out + o * p.inputs + c, fma(product, load(scale.data() + c), bias * load(shift.data() + c)),
                p.inputs - c);
          }
        }
      });
    });
    const Values all = add_up(sums, 2 * lanes);
    dnorm_weight.assign(all.begin(), all.begin() + p.inputs);
    dnorm_bias.assign(all.begin() + lanes, all.begin() + lanes + p.inputs);
  }
};

// The gradient of an optional bias: empty where there is none.
inline Tensor write_bias(const Values& dbias, const std::optional<Tensor>& bias, const Tensor& x) {
  return bias ? write_channels(dbias, *bias) : torch::stable::new_empty(x, {0});
}

}  // namespace mvit3
