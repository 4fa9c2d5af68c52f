// pointwise_conv and pointwise_fusion, forward and backward. Meaning:
// mvit3_kernels/ops/pointwise_{conv,fusion}/reference.py.
//
// One file for the two ops, and one registration: they are one computation with one or two inputs.
//
// The statistics of a training norm are taken while a tile of p = W_a a + W_b b + bias is in cache. (The moments of the
// input would give them too, identity A of the design, but only to save the second read of p, which costs less than
// that product of moments.) Backward keeps a, b and p, and p only where the derivative of a norm or an activation needs
// it. p is stored with the bias: where the two cancel, a product rounded alone is wrong by more than their sum is, and
// by its sign, which is what ReLU asks for.

#include "pointwise_conv.h"

#include "../op_arguments.h"

namespace mvit3 {
namespace {

enum class Statistics { kNone, kFixed, kBatch };  // no norm; from running statistics; of the batch

// One or two inputs, the convolution, and the norm behind it, which a call may leave out.
struct LayerArguments {
  Tensor a;
  OptionalTensor b;
  LinearArguments conv;
  OptionalTensor norm_weight, norm_bias;

  // Checks those that say how large the others must be.
  void check() const {
    check_map("a", a);
    if (b) {
      check_map("b", *b);
      contiguous_map("b", *b, a, {a.size(0), a.size(1), a.size(2), b->size(3)});
    }
    outputs_of("weight", conv.weight);
    MVIT3_CHECK(norm_weight.has_value() == norm_bias.has_value(), "norm_weight and norm_bias must be given together");
  }
};

// The arguments of the op, made contiguous.
template <typename T>
struct Layer {
  using E = Multiplied<T>;  // of the operands of products

  Tensor a, b;
  int64_t rows, outputs;
  PointwiseInputs<T> inputs;
  Statistics statistics;
  FloatMatrix weight;
  bool biased;
  Values bias;
  Norm norm;  // of p

  Layer(const LayerArguments& given, bool training, double eps)
      : a(torch::stable::contiguous(given.a)), b(given.b ? torch::stable::contiguous(*given.b) : a),
        rows(a.size(0) * a.size(1) * a.size(2)), outputs(given.conv.weight.size(0)),
        inputs{data_of<T>(a), given.b ? data_of<T>(b) : nullptr, a.size(3), given.b ? b.size(3) : 0},
        statistics(
            !given.norm_weight ? Statistics::kNone
            : training         ? Statistics::kBatch
                               : Statistics::kFixed),
        weight("weight", given.conv.weight, outputs, inputs.channels()), biased(given.conv.bias.has_value()),
        bias(given.conv.bias ? read_channels("bias", *given.conv.bias, outputs) : Values(outputs, 0.0)),
        norm(
            given.norm_weight ? Norm("norm_", *given.norm_weight, *given.norm_bias, outputs, eps)
                              : Norm(Values(outputs, 1.0), Values(outputs, 0.0))) {}

  // `mean` and `var`, arguments whose names begin with `prefix`.
  void set_statistics(const std::string& prefix, const std::optional<Tensor>& mean, const std::optional<Tensor>& var) {
    if (statistics == Statistics::kNone) return;
    MVIT3_CHECK(mean && var, prefix, "mean and ", prefix, "var must be given");
    norm.read_statistics(prefix, *mean, *var);
  }

  // Bias and norm in one: of the product that is never stored.
  ScaleShift affine_of_product() const {
    Norm moved = norm;
    for (int64_t c = 0; c < outputs; ++c) moved.mean[c] -= bias[c];
    return moved.affine();
  }
  Scratch<float> padded_bias() const {
    Scratch<float> out(lanes_of(outputs), 0.0f);
    std::transform(bias.begin(), bias.end(), out.data(), [](double v) { return float(v); });
    return out;
  }

  PackedWeightOf<E> packed() const {
    return PackedWeightOf<E>::rows(weight.data(), outputs, inputs.channels(), inputs.channels());
  }
  // The columns of `channels` inputs as a weight from outputs to inputs.
  PackedWeightOf<E> transposed(int64_t first, int64_t channels) const {
    return PackedWeightOf<E>::columns(weight.data() + first, channels, outputs, inputs.channels());
  }

  Tensor new_map(int64_t channels) const {
    return new_output(torch::stable::new_empty(a, {a.size(0), a.size(1), a.size(2), channels}));
  }
  MapDropout dropout(double p, const OptionalTensor& seed) const {
    return {Dropout("dropout", p, seed, 0), a.size(1) * a.size(2)};
  }
  Tensor nothing() const { return torch::stable::new_empty(a, {0}); }
};

// Calls f(storage type, activation).
template <typename F>
auto dispatch(const Tensor& a, int64_t act, const F& f) {
  return dispatch_dtype(
      "a", a, [&](auto type) { return dispatch_activation(act, [&](auto code) { return f(type, code); }); });
}

// p and y; the statistics where they are of the batch. Where they are known, y follows p tile by tile.
template <int Act, typename T>
void forward(Layer<T>& layer, const T* residual, const MapDropout& dropout, T* p, T* y) {
  const int64_t outputs = layer.outputs, lanes = lanes_of(outputs);
  using E = Multiplied<T>;
  const PackedWeightOf<E> weight = layer.packed();
  const int64_t parts = product_parts(layer.rows, weight);
  const bool of_batch = layer.statistics == Statistics::kBatch;
  const auto finish = [&](const ScaleShift& affine, int64_t first, int64_t count) {
    const int64_t at = first * outputs;
    finish_rows<Act>(
        p + at, outputs, count, {0, outputs}, outputs, affine, residual ? residual + at : nullptr, y + at,
        dropout.of_tile(first, count, outputs));
  };
  auto sums = channel_sums(parts, outputs);
  const ScaleShift known = layer.norm.affine();
  const Scratch<float> bias = layer.padded_bias();
  for_each_tile(layer.rows, parts, [&](int64_t part, int64_t first, int64_t count) {
    float* tile = workspace(kTileRows * lanes + layer.inputs.tile_floats(kTileRows));
    multiply_to(
        layer.inputs.rows(first, count, tile_of<E>(tile + kTileRows * lanes)), count, weight, p + first * outputs, tile,
        layer.biased ? bias.data() : nullptr);
    if (of_batch)
      sums[part].add(p + first * outputs, count, outputs);
    else
      finish(known, first, count);
  });
  if (!of_batch) return;
  ChannelSums::combine(sums, layer.norm.mean, layer.norm.var);
  const ScaleShift affine = layer.norm.affine();
  for_each_tile(layer.rows, parts, [&](int64_t, int64_t first, int64_t count) { finish(affine, first, count); });
}

template <typename E>
struct Gradients {
  OuterSumsOf<E> weight;
  Values bias, norm_weight, norm_bias;
};

template <int Act, typename T>
class Backward {
  using E = Multiplied<T>;

 public:
  Backward(const Layer<T>& layer, const MapDropout& dropout, const T* dy, const T* p)
      : layer_(layer), dropout_(dropout), dy_(dy), p_(p), affine_(layer.norm.affine()), mean_(layer.norm.means()),
        lanes_(lanes_of(layer.outputs)),
        parts_(count_parts(layer.rows * layer.outputs * layer.inputs.channels(), 1 << 18)),
        sums_(accumulators<double>(parts_, 2 * lanes_)) {}

  // The gradients of a and b, in da and db, and those of the parameters.
  Gradients<E> run(T* da, T* db) {
    if (layer_.statistics == Statistics::kBatch) {
      sum_up();
      norm_ = NormBackward::from(layer_.norm, sums_, layer_.rows);
    }
    const auto& x = layer_.inputs;
    const PackedWeightOf<E> to_a = layer_.transposed(0, x.a_channels),
                            to_b = layer_.transposed(x.a_channels, x.b_channels);
    OuterSumsOf<E> products(parts_, layer_.outputs, x.stride());
    for_each_tile(layer_.rows, parts_, [&](int64_t part, int64_t first, int64_t count) {
      float* gradient = workspace(kTileRows * (lanes_ + x.stride()) + x.tile_floats(kTileRows));
      float *tile = gradient + kTileRows * lanes_, *gathered = tile + kTileRows * x.stride();
      const RowsOf<E> dp = product_gradient(part, first, count, gradient);
      products.add(part, dp, x.rows(first, count, tile_of<E>(gathered)), count);
      multiply_to(dp, count, to_a, da + first * x.a_channels, tile);
      if (db) multiply_to(dp, count, to_b, db + first * x.b_channels, tile);
    });
    if (!norm_) norm_ = NormBackward::from(layer_.norm, sums_, 1);
    Values bias = norm_->dbias;
    for (int64_t c = 0; c < layer_.outputs; ++c) {
      if (layer_.statistics == Statistics::kFixed) bias[c] *= norm_->scale[c];
      if (layer_.statistics == Statistics::kBatch)
        bias[c] = 0 * (bias[c] + norm_->dweight[c]);  // the norm takes it away again; NaN stays NaN
    }
    return {std::move(products), bias, norm_->dweight, norm_->dbias};
  }

 private:
  // emit(tile position, value of p, gradient of the norm's output) for `count` rows.
  template <typename Emit>
  void norm_gradient(int64_t first, int64_t count, const Emit& emit) const {
    const int64_t outputs = layer_.outputs;
    const TileMask mask = dropout_.of_tile(first, count, outputs);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < outputs; c += kLanes) {
        const int64_t at = (first + r) * outputs + c, left = outputs - c;
        const Vec value = load_some(p_ + at, left), grad = mask(load_some(dy_ + at, left), r, c);
        emit(r * lanes_ + c, c, value, activate_backward<Act>(affine_(value, c), grad));
      }
  }

  // The sums of a norm of the batch.
  void sum_up() {
    for_each_tile(layer_.rows, parts_, [&](int64_t part, int64_t first, int64_t count) {
      constexpr int64_t kRun = 16;  // few rows at a time: they stay in first-level cache
      float* tile = workspace(kRun * lanes_);
      for (int64_t end = first + count; first < end; first += kRun) {
        const int64_t run = std::min(kRun, end - first);
        norm_gradient(first, run, [&](int64_t at, int64_t, Vec, Vec grad) { store(tile + at, grad); });
        add_sums(part, {tile, lanes_}, first, run);
      }
    });
  }

  void add_sums(int64_t part, FloatRows grads, int64_t first, int64_t count) {
    add_sum_and_dot(
        grads.data, grads.stride, p_ + first * layer_.outputs, layer_.outputs, mean_, layer_.outputs, count,
        sums_[part]);
  }

  // The gradient of the product; its sums too where they are not known yet.
  RowsOf<E> product_gradient(int64_t part, int64_t first, int64_t count, float* tile) {
    const int64_t outputs = layer_.outputs;
    E* rounded = tile_of<E>(tile);  // in the place of the floats, which are read before their place is needed
    if (!p_) {                      // neither norm nor activation
      const TileMask mask = dropout_.of_tile(first, count, outputs);
      const RowsOf<E> dp = masked_rows(dy_ + first * outputs, count, outputs, mask, rounded);
      add_columns(dp.data, dp.stride, count, outputs, sums_[part].data());
      return dp;
    }
    if (norm_) {
      norm_gradient(first, count, [&](int64_t at, int64_t c, Vec value, Vec grad) {
        store(rounded + at, (*norm_)(grad, value, c));
      });
      return {rounded, lanes_};
    }
    norm_gradient(first, count, [&](int64_t at, int64_t, Vec, Vec grad) { store(tile + at, grad); });
    add_sums(part, {tile, lanes_}, first, count);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < outputs; c += kLanes)
        store(rounded + r * lanes_ + c, load(tile + r * lanes_ + c) * load(affine_.scale.data() + c));
    return {rounded, lanes_};
  }

  const Layer<T>& layer_;
  const MapDropout& dropout_;
  const T *dy_, *p_;
  const ScaleShift affine_;
  const Scratch<float> mean_;
  const int64_t lanes_, parts_;
  std::vector<Scratch<double>> sums_;
  std::optional<NormBackward> norm_;
};

struct InferenceArguments {
  LayerArguments layer;
  OptionalTensor running_mean, running_var;
  double eps;
  int64_t act;
  OptionalTensor residual;
};

Tensor pointwise_conv_inference(const InferenceArguments& a) {
  a.layer.check();
  return dispatch(a.layer.a, a.act, [&](auto type, auto code) {
    using T = decltype(type);
    Layer<T> layer(a.layer, false, a.eps);
    layer.set_statistics("running_", a.running_mean, a.running_var);
    const Tensor y = layer.new_map(layer.outputs), added = a.residual ? contiguous_like("residual", *a.residual, y) : y;
    const PointwiseWeightsOf<Multiplied<T>> weights{layer.packed(), layer.affine_of_product()};
    pointwise_conv<code>(
        weights, layer.inputs, a.residual ? data_of<T>(added) : nullptr, mutable_data_of<T>(y), layer.rows);
    return y;
  });
}

struct ForwardArguments {
  LayerArguments layer;
  OptionalTensor running_mean, running_var;
  bool training;
  double eps;
  int64_t act;
  double dropout;
  OptionalTensor seed, residual;
};

// y, the batch's mean and variance where the norm is in training, and p where backward needs it; empty tensors where
// not.
std::array<Tensor, 4> pointwise_conv_forward(const ForwardArguments& a) {
  a.layer.check();
  return dispatch(a.layer.a, a.act, [&](auto type, auto code) {
    using T = decltype(type);
    Layer<T> layer(a.layer, a.training, a.eps);
    if (layer.statistics == Statistics::kFixed) layer.set_statistics("running_", a.running_mean, a.running_var);
    const MapDropout dropout = layer.dropout(a.dropout, a.seed);
    const Tensor y = layer.new_map(layer.outputs), added = a.residual ? contiguous_like("residual", *a.residual, y) : y;
    const T* add = a.residual ? data_of<T>(added) : nullptr;
    Tensor p = layer.nothing();
    if (layer.statistics == Statistics::kNone && code == kIdentity) {
      const PointwiseWeightsOf<Multiplied<T>> weights{layer.packed(), layer.affine_of_product()};
      pointwise_conv<code>(weights, layer.inputs, add, mutable_data_of<T>(y), layer.rows, dropout);
    } else {
      p = layer.new_map(layer.outputs);
      forward<code>(layer, add, dropout, mutable_data_of<T>(p), mutable_data_of<T>(y));
    }
    Values mean, var;
    if (layer.statistics == Statistics::kBatch) {
      mean = layer.norm.mean;
      var = layer.norm.var;
    }
    const Tensor like = torch::stable::new_empty(a.layer.a, {0}, ScalarType::Float);
    return std::array<Tensor, 4>{y, write_channels(mean, like), write_channels(var, like), p};
  });
}

// `mean` and `var` are what the norm used.
struct BackwardArguments {
  Tensor dy;
  LayerArguments layer;
  OptionalTensor mean, var;
  Tensor p;
  bool training;
  double eps;
  int64_t act;
  double dropout;
  OptionalTensor seed;
};

// Gradients of a, b, weight, bias, norm_weight and norm_bias; empty tensors for what is not there.
std::array<Tensor, 6> pointwise_conv_backward(const BackwardArguments& args) {
  args.layer.check();
  const Tensor& a = args.layer.a;
  const OptionalTensor& b = args.layer.b;
  return dispatch(a, args.act, [&](auto type, auto code) {
    using T = decltype(type);
    Layer<T> layer(args.layer, args.training, args.eps);
    layer.set_statistics("", args.mean, args.var);
    const bool kept = layer.statistics != Statistics::kNone || code != kIdentity;
    const std::vector<int64_t> shape{a.size(0), a.size(1), a.size(2), layer.outputs};
    const Tensor dy = contiguous_map("dy", args.dy, a, shape),
                 p = kept ? contiguous_map("p", args.p, a, shape) : args.p;
    const Tensor da = layer.new_map(a.size(3)), db = b ? layer.new_map(b->size(3)) : layer.nothing();
    const MapDropout dropout = layer.dropout(args.dropout, args.seed);
    Backward<code, T> backward(layer, dropout, data_of<T>(dy), kept ? data_of<T>(p) : nullptr);
    Gradients<Multiplied<T>> grads = backward.run(mutable_data_of<T>(da), b ? mutable_data_of<T>(db) : nullptr);
    const Tensor dweight =
        write_weight("weight", grads.weight.parts(), layer.outputs, layer.inputs.channels(), args.layer.conv.weight);
    const auto channels = [&](const Values& values, const OptionalTensor& like) {
      return like ? write_channels(values, *like) : layer.nothing();
    };
    return std::array<Tensor, 6>{
        da,
        db,
        dweight,
        channels(grads.bias, args.layer.conv.bias),
        channels(grads.norm_weight, args.layer.norm_weight),
        channels(grads.norm_bias, args.layer.norm_bias)};
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("pointwise_conv_inference", mvit3::boxed<mvit3::pointwise_conv_inference>);
  m.impl("pointwise_conv_forward", mvit3::boxed<mvit3::pointwise_conv_forward>);
  m.impl("pointwise_conv_backward", mvit3::boxed<mvit3::pointwise_conv_backward>);
}
