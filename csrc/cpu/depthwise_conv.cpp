// depthwise_conv: depth-wise 3x3, batch normalisation, activation. Meaning:
// mvit3_kernels/ops/depthwise_conv/reference.py.
//
// The filtered map z is never written. Nine products for sixteen channels cost about what reading z back from memory
// would, so training reads x for the statistics and again for y; backward reads x and dy for the sums of the norm, and
// again for dx and the gradient of the taps, with the gradient of z in a ring of a few rows. Only x is kept for
// backward. The second walk of each pass goes against the first: what was read last is still in the cache.

#include "../op_arguments.h"
#include "depthwise_conv.h"

namespace mvit3 {
namespace {

constexpr int64_t kRun = 16;  // values that float32 sums up before float64 takes over

// Sums of two values in float32 for short runs, handed over to `flush(first, second)`.
template <typename F>
class Runs {
 public:
  explicit Runs(const F& flush) : flush_(flush) {}

  MVIT3_INLINE void add(Vec first, Vec second) {
    first_ += first;
    second_ += second;
    if (++count_ == kRun) end();
  }

  MVIT3_INLINE void end() {
    flush_(first_, second_);
    first_ = second_ = 0.0f;
    count_ = 0;
  }

 private:
  const F& flush_;
  Vec first_ = 0.0f, second_ = 0.0f;
  int64_t count_ = 0;
};

struct Layer : DepthwiseGeometry, Norm {
  FloatMatrix taps;  // (channels, 9)

  const DepthwiseGeometry& geometry() const { return *this; }

  static DepthwiseGeometry measure(const Tensor& x, const StrideArguments& a) {
    check_map("x", x);
    check_pixels("x", x.size(1), x.size(2));
    a.check();
    return {x.size(0), x.size(1), x.size(2), x.size(3), a.stride, a.dilation};
  }

  // `norm` is a BatchNormArguments or a BatchNormBackwardArguments.
  template <typename N>
  Layer(const Tensor& x, const Tensor& w, const N& norm, const StrideArguments& a)
      : DepthwiseGeometry(measure(x, a)), Norm("norm_", norm.weight, norm.bias, channels, norm.eps),
        taps("weight", w, channels, 9) {}
};

// Mean and variance of each channel of the filtered map.
template <typename T>
void filtered_moments(Layer& layer, const T* x) {
  const DepthwiseGeometry& g = layer.geometry();
  const Scratch<float> taps = pack_taps(layer.taps.data(), g.channels);
  const int64_t parts = count_parts(g.out_image_rows() * g.out_row_size());
  auto sums = channel_sums(parts, g.channels);
  dispatch_shift(g, [&](auto shift) {
    for_each_part(parts, [&](int64_t part) {
      const Range range = part_range(g.out_image_rows(), part, parts);
      for (int64_t row = range.end - 1; row >= range.begin; --row) {
        const Window<T> window(g, x, row, -1);
        for_each_lanes(g.channels, [&](int64_t c, auto whole) {
          if (row == range.end - 1)
            filter_row<shift, whole>(
                g, window, taps, c, 0.0f, 1, [&](int64_t, Vec value) { sums[part].set_pivot(c, value); });
          const Vec pivot = sums[part].pivot(c);
          alignas(64) float run[kRun * kLanes];
          int64_t count = 0;
          const auto end_run = [&] {
            sums[part].add_run(c, RunMoments::of(count, pivot, [&](int64_t i) { return load(run + i * kLanes); }));
            count = 0;
          };
          filter_row<shift, whole>(g, window, taps, c, 0.0f, g.out_width, [&](int64_t, Vec value) {
            store(run + count * kLanes, value);
            if (++count == kRun) end_run();
          });
          end_run();
        });
      }
      sums[part].count(range.size() * g.out_width);
    });
  });
  ChannelSums::combine(sums, layer.mean, layer.var);
}

// The gradient of the norm's output: the filtered map again, and the activation's derivative.
template <typename T>
class Gradient {
 public:
  Gradient(const Layer& layer, const T* x, const T* dy)
      : g_(layer.geometry()), norm_(layer.affine()), taps_(pack_taps(layer.taps.data(), g_.channels)), x_(x), dy_(dy) {}

  // f(column, gradient, filtered value) along a row of the output, at the sixteen channels from c.
  template <int Act, int Shift, bool Whole, typename F>
  MVIT3_INLINE void row(int64_t index, const Window<T>& window, int64_t c, const F& f) const {
    const T* dy = dy_ + index * g_.out_row_size() + c;
    const int64_t ahead = window.direction * g_.out_row_size();
    const Vec scale = load(norm_.scale.data() + c), shift = load(norm_.shift.data() + c);
    filter_row<Shift, Whole>(g_, window, taps_, c, 0.0f, g_.out_width, [&](int64_t column, Vec value) {
      const T* at = dy + column * g_.channels;
      prefetch(at + ahead);
      f(column, activate_backward<Act>(fma(value, scale, shift), load_lanes<Whole>(at, g_.channels - c)), value);
    });
  }

  Window<T> window(int64_t index, int64_t direction) const { return Window<T>(g_, x_, index, direction); }

 private:
  const DepthwiseGeometry& g_;
  ScaleShift norm_;
  Scratch<float> taps_;
  const T *x_, *dy_;
};

// First walk: sums of the gradient, and of the gradient times the distance of the filtered value to its mean.
template <int Act, int Shift, typename T>
NormBackward norm_backward(const Layer& layer, const Gradient<T>& gradient, bool training) {
  const DepthwiseGeometry& g = layer.geometry();
  const int64_t parts = count_parts(g.out_image_rows() * g.out_row_size());
  const Scratch<float> mean = layer.means();
  auto sums = accumulators<double>(parts, 2 * g.lanes());
  for_each_part(parts, [&](int64_t part) {
    const Range range = part_range(g.out_image_rows(), part, parts);
    double *sum = sums[part].data(), *dot = sum + g.lanes();
    for (int64_t row = range.end - 1; row >= range.begin; --row) {
      const Window<T> window = gradient.window(row, -1);
      for_each_lanes(g.channels, [&](int64_t c, auto whole) {
        const auto flush = [&](Vec first, Vec second) {
          accumulate(sum + c, first);
          accumulate(dot + c, second);
        };
        Runs runs(flush);
        const Vec centre = load(mean.data() + c);
        gradient.template row<Act, Shift, whole>(
            row, window, c, [&](int64_t, Vec grad, Vec value) { runs.add(grad, grad * (value - centre)); });
        runs.end();
      });
    }
  });
  NormBackward backward = NormBackward::from(layer, sums, std::max<int64_t>(g.out_image_rows() * g.out_width, 1));
  if (!training) {  // the statistics are constants
    std::fill_n(backward.offset.data(), g.lanes(), 0.0f);
    std::fill_n(backward.slope.data(), g.lanes(), 0.0f);
  }
  return backward;
}

// The outputs that read an input row, or the columns of one class (those equal modulo the stride): which taps, and from
// which position.
struct Readers {
  int64_t count = 0, tap[3], at[3];

  // For input `i` with outputs `stride` apart.
  Readers(int64_t i, int64_t stride, int64_t dilation) {
    for (int64_t t = 0; t < 3; ++t) {
      const int64_t first = i - (t - 1) * dilation;  // = stride * output
      if (first % stride) continue;
      tap[count] = t;
      at[count++] = first / stride;
    }
  }
};

// The pixels of one class of a row, as the transposed convolution sees them: `count` taps, each with the gradient of z
// that it meets.
struct Taps {
  int64_t count = 0, tap[9];
  const float* grad[9];
};

// Sixteen channels of the pixels of one class of a row of x and of dx, `step` elements apart.
template <typename T>
struct Pixels {
  const T* x;
  T* dx;
  int64_t step, count, left;  // channels from the first of the sixteen on
  bool past_cache;
};

// dx = the sum of w * gradient, of which `pixel` floats are one pixel; adds the gradients of the taps to dtaps.
template <int N, bool Whole, typename T>
MVIT3_INLINE void gather(
    const Taps& in, int64_t channel, int64_t pixel, const float* taps, const Pixels<T>& pixels, float* dtaps) {
  Vec w[N], dw[N];
  const float* grads[N];
  for (int n = 0; n < N; ++n) {
    w[n] = load(taps + in.tap[n] * kLanes);
    dw[n] = 0.0f;
    grads[n] = in.grad[n] + channel;
  }
  for (int64_t i = 0; i < pixels.count; ++i) {
    const Vec value = load_lanes<Whole>(pixels.x + i * pixels.step, pixels.left);
    Vec sum = 0.0f;
    for (int n = 0; n < N; ++n) {
      const Vec grad = load(grads[n] + i * pixel);
      sum = fma(grad, w[n], sum);
      dw[n] = fma(grad, value, dw[n]);
    }
    store_lanes<Whole>(pixels.dx + i * pixels.step, sum, pixels.left, pixels.past_cache);
  }
  for (int n = 0; n < N; ++n) {
    float* sum = dtaps + in.tap[n] * kLanes;
    store(sum, load(sum) + dw[n]);
  }
}

// Second walk: rows of the gradient of z into a ring, and from there dx and the gradient of the taps.
template <int Act, int Shift, typename T>
Values taps_backward(const Layer& layer, const Gradient<T>& gradient, const NormBackward& norm, const T* x, T* dx) {
  const DepthwiseGeometry& g = layer.geometry();
  const int64_t lanes = g.lanes(), pixel = tile_stride(g.channels), parts = count_parts(g.image_rows() * g.row_size());
  const Scratch<float> taps = pack_taps(layer.taps.data(), g.channels);
  const bool past_cache = writes_past_cache(dx, g.image_rows() * g.row_size(), g.channels);
  auto sums = accumulators<double>(parts, 9 * lanes);
  for_each_part(parts, [&](int64_t part) {
    const int64_t slots = 2 * g.dilation / g.stride + 2,
                  ring_floats = Ring::floats(slots, g.out_width, g.dilation, pixel);
    float *memory = workspace(ring_floats + 9 * lanes),
          *recent = memory + ring_floats;  // the taps' sums of a few rows, in float32
    std::fill_n(recent, 9 * lanes, 0.0f);
    const Ring ring(memory, slots, g.out_height, g.out_width, g.dilation, pixel);
    const Range range = part_range(g.image_rows(), part, parts);
    int64_t image = -1, next = 0,
            pixels = 0;  // `next` is the first row of the gradient that the ring does not hold yet
    for (int64_t index = range.begin; index < range.end; ++index) {
      const int64_t row = index % g.height;
      if (image != index / g.height) {
        image = index / g.height;
        next = std::max<int64_t>((row - g.dilation) / g.stride, 0);
      }
      for (const int64_t end = std::min((row + g.dilation) / g.stride + 1, g.out_height); next < end; ++next) {
        const int64_t out_index = image * g.out_height + next;
        const Window<T> window = gradient.window(out_index, 1);
        float* out = ring.row(next);
        for_each_lanes(g.channels, [&](int64_t c, auto whole) {
          gradient.template row<Act, Shift, whole>(out_index, window, c, [&](int64_t column, Vec grad, Vec value) {
            store(out + column * pixel + c, norm(grad, value, c));
          });
        });
      }
      const Readers vertical(row, g.stride, g.dilation);
      for (int64_t first = 0; first < std::min(g.stride, g.width); ++first) {
        const Readers horizontal(first, g.stride, g.dilation);
        Taps in;
        for (int64_t i = 0; i < vertical.count; ++i)
          for (int64_t j = 0; j < horizontal.count; ++j, ++in.count) {
            in.grad[in.count] = ring.bordered(vertical.at[i]) + (g.dilation + horizontal.at[j]) * pixel;
            in.tap[in.count] = vertical.tap[i] * 3 + horizontal.tap[j];
          }
        const int64_t columns = (g.width - first + g.stride - 1) / g.stride,
                      at = index * g.row_size() + first * g.channels;
        const auto run = [&](auto count) {
          for_each_lanes(g.channels, [&](int64_t c, auto whole) {
            const Pixels<T> pixels{x + at + c, dx + at + c, g.stride * g.channels, columns, g.channels - c, past_cache};
            gather<count, whole>(in, c, pixel, taps.data() + c * 9, pixels, recent + c * 9);
          });
        };
        if (in.count == 9) run(std::integral_constant<int, 9>{});
        if (in.count == 4) run(std::integral_constant<int, 4>{});
        if (in.count == 2) run(std::integral_constant<int, 2>{});
        if (in.count == 1) run(std::integral_constant<int, 1>{});
        if (in.count == 0) run(std::integral_constant<int, 0>{});
      }
      pixels += g.width;
      if (pixels < 64 && index + 1 < range.end) continue;
      for (int64_t i = 0; i < 9 * lanes; i += kLanes) accumulate(sums[part].data() + i, load(recent + i));
      std::fill_n(recent, 9 * lanes, 0.0f);
      pixels = 0;
    }
    if (past_cache) stream_fence();
  });
  const Values packed = add_up(sums, 9 * lanes);
  Values dweight(g.channels * 9);
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t t = 0; t < 9; ++t) dweight[c * 9 + t] = packed[(c / kLanes * 9 + t) * kLanes + c % kLanes];
  return dweight;
}

struct ForwardArguments {
  Tensor x, weight;
  BatchNormArguments norm;
  int64_t act;
  StrideArguments geometry;
};

// y; mean and variance of the filtered map, empty unless in training.
std::array<Tensor, 3> depthwise_conv_forward(const ForwardArguments& a) {
  return dispatch_dtype("x", a.x, [&](auto type) {
    using T = decltype(type);
    const Tensor dense = torch::stable::contiguous(a.x);
    Layer layer(dense, a.weight, a.norm, a.geometry);
    const DepthwiseGeometry& g = layer.geometry();
    const T* input = data_of<T>(dense);
    if (a.norm.training)
      filtered_moments(layer, input);
    else
      layer.read_running("norm_", a.norm.running_mean, a.norm.running_var);
    const Tensor y = new_output(torch::stable::new_empty(dense, {g.batch, g.out_height, g.out_width, g.channels}));
    const DepthwiseWeights weights(layer.taps.data(), g.channels, layer.affine());
    dispatch_activation(a.act, [&](auto code) { depthwise_conv<code>(g, weights, input, mutable_data_of<T>(y)); });
    const auto [mean, var] = layer.of_batch(a.norm.training, a.x);
    return std::array<Tensor, 3>{y, mean, var};
  });
}

struct BackwardArguments {
  Tensor dy, x, weight;
  BatchNormBackwardArguments norm;
  int64_t act;
  StrideArguments geometry;
};

// Gradients of x, weight, norm weight and norm bias.
std::array<Tensor, 4> depthwise_conv_backward(const BackwardArguments& a) {
  return dispatch_dtype("x", a.x, [&](auto type) {
    using T = decltype(type);
    const Tensor dense = torch::stable::contiguous(a.x);
    Layer layer(dense, a.weight, a.norm, a.geometry);
    const DepthwiseGeometry& g = layer.geometry();
    const Tensor dy = contiguous_map("dy", a.dy, a.x, {g.batch, g.out_height, g.out_width, g.channels});
    layer.read_statistics("", a.norm.mean, a.norm.var);
    const T *input = data_of<T>(dense), *grad = data_of<T>(dy);
    const Tensor dx = new_output(dense), dweight = torch::stable::new_empty(a.weight, a.weight.sizes());
    const Gradient<T> gradient(layer, input, grad);
    Values dtaps, dnorm_weight, dnorm_bias;
    dispatch_activation(a.act, [&](auto code) {
      dispatch_shift(g, [&](auto shift) {
        const NormBackward norm = norm_backward<code, shift>(layer, gradient, a.norm.training);
        dtaps = taps_backward<code, shift>(layer, gradient, norm, input, mutable_data_of<T>(dx));
        dnorm_weight = norm.dweight;
        dnorm_bias = norm.dbias;
      });
    });
    dispatch_dtype("weight", dweight, [&](auto parameter) {
      using P = decltype(parameter);
      std::transform(
          dtaps.begin(), dtaps.end(), mutable_data_of<P>(dweight), [](double v) { return from_float<P>(float(v)); });
    });
    return std::array<Tensor, 4>{
        dx, dweight, write_channels(dnorm_weight, a.norm.weight), write_channels(dnorm_bias, a.norm.bias)};
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("depthwise_conv_forward", mvit3::boxed<mvit3::depthwise_conv_forward>);
  m.impl("depthwise_conv_backward", mvit3::boxed<mvit3::depthwise_conv_backward>);
}
