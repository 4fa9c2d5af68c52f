// inverted_residual: 1x1 expansion, depth-wise 3x3, 1x1 projection, each with batch normalisation, in float32.
//
// The expanded tensor lives in a few rows of second-level cache and never reaches memory. In training the statistics of the expansion
// come from the moments of its narrow input (identity A of the design), the filtered tensor z is the one wide tensor that is written,
// and the backward pass reads it twice, recomputes the expanded rows, and corrects the gradient of the expansion's norm on the narrow
// side (identity B). What is kept for backward: x, z, and the narrow product p that the last norm reads.
//
// A task is a range of rows of one image; tasks are cut the same way for a fixed number of threads, so results repeat from run to run.

#include <tuple>

#include "norm.h"

namespace mvit3 {
namespace {

// One of the three convolutions and its norm, as the op receives them.
struct ConvNorm : Norm {
  Tensor weight;

  ConvNorm(const char* name, const Tensor& w, int64_t outputs, const Tensor& norm_weight, const Tensor& norm_bias, double eps)
      : Norm(name, norm_weight, norm_bias, outputs, eps), weight(torch::stable::contiguous(w)) {
    STD_TORCH_CHECK(w.is_cpu() && w.scalar_type() == ScalarType::Float, name, " must be a float32 weight on the CPU");
  }

  const float* data() const { return static_cast<const float*>(weight.data_ptr()); }
};

struct Geometry {
  int64_t batch, height, width, inputs, wide, outputs, stride, dilation;

  int64_t out_height() const { return (height + stride - 1) / stride; }
  int64_t out_width() const { return (width + stride - 1) / stride; }
  int64_t rows() const { return batch * height * width; }
  int64_t out_rows() const { return batch * out_height() * out_width(); }
  int64_t lanes() const { return lanes_of(wide); }                                // floats of an expanded pixel
  bool skip() const { return stride == 1 && inputs == outputs; }

  Geometry(const Tensor& x, const Tensor& expand, const Tensor& depthwise, const Tensor& project, int64_t stride, int64_t dilation)
      : batch(x.size(0)), height(x.size(1)), width(x.size(2)), inputs(x.size(3)), wide(expand.size(0)), outputs(project.size(0)),
        stride(stride), dilation(dilation) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32");
    STD_TORCH_CHECK(stride >= 1 && dilation >= 1, "stride and dilation must be at least 1, got ", stride, " and ", dilation);
    STD_TORCH_CHECK(expand.numel() == wide * inputs, "expand must have shape (E, C) with the C channels of x");
    STD_TORCH_CHECK(depthwise.numel() == wide * 9, "depthwise must have shape (E, 1, 3, 3)");
    STD_TORCH_CHECK(project.numel() == outputs * wide, "project must have shape (O, E)");
  }

  // How many ranges of rows an image of `height` rows is cut into: none where whole images share out evenly.
  int64_t ranges(int64_t height) const {
    const int64_t threads = torch::stable::get_num_threads();
    return batch % threads == 0 ? 1 : std::clamp<int64_t>(height / 4, 1, threads);
  }
};

// A window of rows of a wide map, each with a border of zero pixels: row i lives in slot i modulo the number of slots.
class Ring {
 public:
  static int64_t floats(int64_t slots, int64_t width, int64_t border, int64_t lanes) { return (slots + 1) * (width + 2 * border) * lanes; }

  Ring(float* memory, int64_t slots, int64_t height, int64_t width, int64_t border, int64_t lanes)
      : memory_(memory), slots_(slots), height_(height), border_(border * lanes), row_((width + 2 * border) * lanes) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      std::fill_n(memory_ + slot * row_, border_, 0.0f);
      std::fill_n(memory_ + (slot + 1) * row_ - border_, border_, 0.0f);
    }
    std::fill_n(memory_ + slots * row_, row_, 0.0f);
  }

  // The first pixel of row i.
  float* row(int64_t i) const { return memory_ + i % slots_ * row_ + border_; }
  // The first pixel of the border before row i; of a row of zeros where the map has no row i.
  const float* bordered(int64_t i) const { return memory_ + (i < 0 || i >= height_ ? slots_ : i % slots_) * row_; }

 private:
  float* memory_;
  int64_t slots_, height_, border_, row_;
};

// The taps of 3x3 weights (channels, 1, 3, 3): [channels / 16][9][16].
Scratch<float> pack_taps(const ConvNorm& depthwise, int64_t channels) {
  Scratch<float> taps(lanes_of(channels) * 9, 0.0f);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < 9; ++t) taps[(c / kLanes * 9 + t) * kLanes + c % kLanes] = depthwise.data()[c * 9 + t];
  return taps;
}

// The first half of the forward pass: rows of x to rows of the filtered map, through a ring of expanded rows.
template <int Act>
class Filter {
 public:
  Filter(const Geometry& g, const PackedWeight& expand, const ScaleShift& norm, const Scratch<float>& taps, const float* x, int64_t slots, float* ring)
      : g_(g), expand_(expand), norm_(norm), taps_(taps), x_(x), slots_(slots), ring_(ring, slots, g.height, g.width, g.dilation, g.lanes()) {}

  // The number of slots that lets `rows` filtered rows be made at once.
  static int64_t slots_for(const Geometry& g, int64_t rows) { return (rows - 1) * g.stride + 2 * g.dilation + 1; }

  // Expands what filtered rows first..last-1 need and the ring does not hold yet; calls must move down the image.
  void advance(int64_t first, int64_t last) {
    next_ = std::max({next_, first * g_.stride - g_.dilation, int64_t(0)});
    const int64_t end = std::min((last - 1) * g_.stride + g_.dilation + 1, g_.height), lanes = g_.lanes();
    for (; next_ < end; ++next_) {
      float* out = ring_.row(next_);
      multiply(x_ + next_ * g_.width * g_.inputs, g_.inputs, g_.width, expand_, [&](int64_t column, int64_t channel, Vec sums) {
        store(out + column * lanes + channel, activate<Act>(norm_(sums, channel)));
      });
    }
  }

  // emit(column, channel, sums) for every pixel of a filtered row, channel by channel.
  template <typename Emit>
  void filter(int64_t row, const Emit& emit) const {
    const int64_t lanes = g_.lanes(), step = g_.dilation * lanes;
    const float* rows[3];
    for (int64_t t = 0; t < 3; ++t) rows[t] = ring_.bordered(row * g_.stride + (t - 1) * g_.dilation);
    for (int64_t channel = 0; channel < lanes; channel += kLanes) {
      Vec w[9];
      for (int t = 0; t < 9; ++t) w[t] = load(taps_.data() + channel * 9 + t * kLanes);
      for (int64_t column = 0; column < g_.out_width(); ++column) {
        const int64_t at = column * g_.stride * lanes + channel;
        Vec sum = load(rows[0] + at) * w[0];
        for (int t = 1; t < 9; ++t) sum = fma(load(rows[t / 3] + at + t % 3 * step), w[t], sum);
        emit(column, channel, sum);
      }
    }
  }

 private:
  const Geometry& g_;
  const PackedWeight& expand_;
  const ScaleShift& norm_;
  const Scratch<float>& taps_;
  const float* x_;
  int64_t slots_, next_ = 0;
  Ring ring_;
};

// Calls f(part, image, range of rows) for every task; `rows` is the height that is cut into ranges.
template <typename F>
void for_each_task(const Geometry& g, int64_t rows, int64_t parts, const F& f) {
  const int64_t ranges = g.ranges(rows), tasks = g.batch * ranges;
  for_each_part(parts, [&](int64_t part) {
    const Range mine = part_range(tasks, part, parts);
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const Range range = part_range(rows, task % ranges, ranges);
      if (range.size() > 0) f(part, task / ranges, range);
    }
  });
}

PackedWeight pack(const ConvNorm& conv, int64_t outputs, int64_t inputs) { return PackedWeight::rows(conv.data(), outputs, inputs, inputs); }

// Evaluation: everything between x and y stays in cache.
template <int Act>
void infer(const Geometry& g, const ConvNorm& expand, const ConvNorm& depthwise, const ConvNorm& project, const float* x, float* y) {
  const PackedWeight expand_weight = pack(expand, g.wide, g.inputs), project_weight = pack(project, g.outputs, g.wide);
  const ScaleShift expand_norm = expand.affine(), depthwise_norm = depthwise.affine(), project_norm = project.affine();
  const Scratch<float> taps = pack_taps(depthwise, g.wide);
  const int64_t lanes = g.lanes(), row_floats = g.width * lanes;
  const int64_t tasks = g.batch * g.ranges(g.out_height());
  for_each_task(g, g.out_height(), parts_for(tasks), [&](int64_t, int64_t image, Range range) {
    const int64_t tile = std::clamp<int64_t>((kTileFloats / row_floats - 2 * g.dilation) / g.stride, 1, range.size());
    const int64_t slots = Filter<Act>::slots_for(g, tile), ring = Ring::floats(slots, g.width, g.dilation, lanes);
    float* memory = workspace(ring + tile * g.out_width() * lanes);
    float* filtered = memory + ring;
    const float* input = x + image * g.height * g.width * g.inputs;
    Filter<Act> filter(g, expand_weight, expand_norm, taps, input, slots, memory);
    for (int64_t first = range.begin; first < range.end; first += tile) {
      const int64_t last = std::min(first + tile, range.end);
      filter.advance(first, last);
      for (int64_t row = first; row < last; ++row) {
        float* out = filtered + (row - first) * g.out_width() * lanes;
        filter.filter(row, [&](int64_t column, int64_t channel, Vec sum) {
          store(out + column * lanes + channel, activate<Act>(depthwise_norm(sum, channel)));
        });
      }
      const int64_t pixel = first * g.out_width();
      const float* residual = g.skip() ? input + pixel * g.inputs : nullptr;
      float* out = y + (image * g.out_height() * g.out_width() + pixel) * g.outputs;
      multiply(filtered, lanes, (last - first) * g.out_width(), project_weight, [&](int64_t row, int64_t channel, Vec sums) {
        const int64_t left = g.outputs - channel, at = row * g.outputs + channel;
        Vec value = project_norm(sums, channel);
        if (residual) value += load_some(residual + at, left);
        store_some(out + at, value, left);
      });
    }
  });
}

// Identity A: mean and variance of x W^T from the mean and the covariance of the rows of x.
void expansion_moments(const Geometry& g, const float* x, ConvNorm& expand, float* mean, float* covariance) {
  const int64_t parts = count_parts(g.rows() * g.inputs), lanes = lanes_of(g.inputs), c = g.inputs;
  auto sums = channel_sums(parts, c);
  for_each_tile(g.rows(), parts, [&](int64_t part, int64_t first, int64_t count) { sums[part].add(x + first * c, count, c); });
  Values mu(c), var(c);
  ChannelSums::combine(sums, mu, var);
  Scratch<float> centre(lanes, 0.0f);
  for (int64_t i = 0; i < c; ++i) mean[i] = centre[i] = float(mu[i]);

  auto products = accumulators<float>(parts, c * lanes);
  for_each_tile(g.rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* tile = workspace(kTileRows * lanes);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < c; i += kLanes) store(tile + r * lanes + i, load_some(x + (first + r) * c + i, c - i) - load(centre.data() + i));
    add_outer(tile, lanes, c, tile, lanes, c, count, products[part].data(), lanes);
  });
  const Values product = add_up(products, c * lanes);
  for (int64_t i = 0; i < c; ++i)
    for (int64_t j = 0; j < c; ++j) covariance[i * c + j] = float(product[i * lanes + j] / g.rows());

  // Each channel's weights as a row: its mean is their product with mu, its variance the quadratic form of the covariance.
  const float* w = expand.data();
  const PackedWeight packed(c, c, [=](int64_t o, int64_t i) { return covariance[o * c + i]; });
  std::fill(expand.var.begin(), expand.var.end(), 0.0);
  multiply(w, c, g.wide, packed, [&](int64_t channel, int64_t column, Vec product) {
    alignas(64) float values[kLanes];
    store(values, product);
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, c - column); ++i) expand.var[channel] += double(values[i]) * w[channel * c + column + i];
  });
  for (int64_t e = 0; e < g.wide; ++e) {
    expand.var[e] = std::max(expand.var[e], 0.0);
    expand.mean[e] = 0;
    for (int64_t i = 0; i < c; ++i) expand.mean[e] += mu[i] * w[e * c + i];
  }
}

// Training: z is the filtered map, p the projection before its norm.
template <int Act>
void forward(const Geometry& g, ConvNorm& expand, ConvNorm& depthwise, ConvNorm& project, const float* x, float* y, float* z, float* p, float* mean, float* covariance) {
  expansion_moments(g, x, expand, mean, covariance);
  const PackedWeight expand_weight = pack(expand, g.wide, g.inputs), project_weight = pack(project, g.outputs, g.wide);
  const ScaleShift expand_norm = expand.affine();
  const Scratch<float> taps = pack_taps(depthwise, g.wide);
  const int64_t lanes = g.lanes(), out_width = g.out_width();

  const int64_t parts = parts_for(g.batch * g.ranges(g.out_height()));
  auto z_sums = channel_sums(parts, g.wide);
  for_each_task(g, g.out_height(), parts, [&](int64_t part, int64_t image, Range range) {
    const int64_t slots = Filter<Act>::slots_for(g, 1);
    float* memory = workspace(Ring::floats(slots, g.width, g.dilation, lanes));
    Filter<Act> filter(g, expand_weight, expand_norm, taps, x + image * g.height * g.width * g.inputs, slots, memory);
    for (int64_t row = range.begin; row < range.end; ++row) {
      filter.advance(row, row + 1);
      float* out = z + (image * g.out_height() + row) * out_width * g.wide;
      filter.filter(row, [&](int64_t column, int64_t channel, Vec sum) { store_some(out + column * g.wide + channel, sum, g.wide - channel); });
      z_sums[part].add(out, out_width, g.wide);
    }
  });
  ChannelSums::combine(z_sums, depthwise.mean, depthwise.var);

  const ScaleShift depthwise_norm = depthwise.affine();
  const int64_t row_parts = count_parts(g.out_rows() * g.wide);
  auto p_sums = channel_sums(row_parts, g.outputs);
  for_each_tile(g.out_rows(), row_parts, [&](int64_t part, int64_t first, int64_t count) {
    float* tile = workspace(kTileRows * lanes);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < lanes; c += kLanes)
        store(tile + r * lanes + c, activate<Act>(depthwise_norm(load_some(z + (first + r) * g.wide + c, g.wide - c), c)));
    float* out = p + first * g.outputs;
    multiply(tile, lanes, count, project_weight, [&](int64_t row, int64_t c, Vec sums) { store_some(out + row * g.outputs + c, sums, g.outputs - c); });
    p_sums[part].add(out, count, g.outputs);
  });
  ChannelSums::combine(p_sums, project.mean, project.var);

  const ScaleShift project_norm = project.affine();
  for_each_tile(g.out_rows(), row_parts, [&](int64_t, int64_t first, int64_t count) {
    for (int64_t r = first; r < first + count; ++r)
      for (int64_t c = 0; c < g.outputs; c += kLanes) {
        const int64_t at = r * g.outputs + c, left = g.outputs - c;
        Vec value = project_norm(load_some(p + at, left), c);
        if (g.skip()) value += load_some(x + at, left);
        store_some(y + at, value, left);
      }
  });
}

struct Gradients {
  float *dx, *dexpand, *ddepthwise, *dproject;
  Values *expand_gamma, *expand_beta, *depthwise_gamma, *depthwise_beta, *project_gamma, *project_beta;
};

// The last norm: sums of dy and of dy * (p - mean).
NormBackward project_norm_backward(const Geometry& g, const ConvNorm& project, const float* dy, const float* p) {
  const int64_t parts = count_parts(g.out_rows() * g.outputs), lanes = lanes_of(g.outputs);
  const Scratch<float> mean = project.means();
  auto sums = accumulators<double>(parts, 2 * lanes);
  for_each_tile(g.out_rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    add_sum_and_dot(dy + first * g.outputs, g.outputs, p + first * g.outputs, g.outputs, mean, g.outputs, count, sums[part]);
  });
  return NormBackward::from(project, sums, g.out_rows());
}

// The gradient of the middle norm's output, for any run of rows: the last norm backward, the projection's weight transposed, and the
// activation's derivative. Both reads of z compute it: keeping it would cost a wide tensor.
template <int Act>
class WideGradient {
 public:
  WideGradient(const Geometry& g, const ConvNorm& depthwise, const ConvNorm& project, const NormBackward& last, const float* dy, const float* z, const float* p)
      : g_(g), last_(last), norm_(depthwise.affine()), dy_(dy), z_(z), p_(p),
        transposed_(PackedWeight::columns(project.data(), g.wide, g.outputs, g.wide)) {}

  // emit(row, channel, gradient, value of z, activated value) for `count` rows; dp, (count, lanes of the outputs), gets the gradient of
  // the projection's output.
  template <typename Emit>
  void rows(int64_t first, int64_t count, float* dp, const Emit& emit) const {
    const int64_t out_lanes = lanes_of(g_.outputs);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < g_.outputs; c += kLanes) {
        const int64_t at = (first + r) * g_.outputs + c, left = g_.outputs - c;
        store(dp + r * out_lanes + c, last_(load_some(dy_ + at, left), load_some(p_ + at, left), c));
      }
    const float* values = z_ + first * g_.wide;
    multiply(dp, out_lanes, count, transposed_, [&](int64_t r, int64_t c, Vec product) {
      const Vec value = load_some(values + r * g_.wide + c, g_.wide - c);
      Vec activated, slope;
      activate_with_slope<Act>(norm_(value, c), activated, slope);
      emit(r, c, product * slope, value, activated);
    });
  }

 private:
  const Geometry& g_;
  const NormBackward& last_;
  ScaleShift norm_;
  const float *dy_, *z_, *p_;
  PackedWeight transposed_;
};

// First read of z: the sums of the middle norm, and the gradient of the projection's weight.
template <int Act>
NormBackward project_backward(const Geometry& g, const ConvNorm& depthwise, const WideGradient<Act>& gradient, const float* z, float* dproject) {
  const int64_t parts = count_parts(g.out_rows() * g.wide), lanes = g.lanes(), out_lanes = lanes_of(g.outputs);
  const Scratch<float> mean = depthwise.means();
  auto sums = accumulators<double>(parts, 2 * lanes);
  auto products = accumulators<float>(parts, g.outputs * lanes);
  for_each_tile(g.out_rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* dp = workspace(kTileRows * (out_lanes + 2 * lanes));
    float *activated = dp + kTileRows * out_lanes, *grads = activated + kTileRows * lanes;
    gradient.rows(first, count, dp, [&](int64_t r, int64_t c, Vec grad, Vec, Vec value) {
      store(activated + r * lanes + c, value);
      store(grads + r * lanes + c, grad);
    });
    add_outer(dp, out_lanes, g.outputs, activated, lanes, lanes, count, products[part].data(), lanes);
    add_sum_and_dot(grads, lanes, z + first * g.wide, g.wide, mean, g.wide, count, sums[part]);
  });
  add_up_rows(products, g.outputs, g.wide, lanes, dproject);
  return NormBackward::from(depthwise, sums, g.out_rows());
}

// What a part gathers in the second read of z.
struct WideSums {
  Scratch<double> taps, bias;  // gradients of the depth-wise weight [lanes / 16][9][16] and of the first norm's bias
  Scratch<float> products;     // (x - mean)^T gradient, (C, lanes)

  explicit WideSums(const Geometry& g) : taps(9 * g.lanes(), 0.0), bias(g.lanes(), 0.0), products(g.inputs * g.lanes(), 0.0f) {}
};

// Gradient of the depth-wise convolution for rows first..last-1 of its input: `values` and `slopes` hold the activated expansion and the
// activation's derivative there, `ring` the gradient of the convolution's output; writes the gradient of the first norm's output.
class TapsBackward {
 public:
  TapsBackward(const Geometry& g, const Scratch<float>& taps, const Ring& ring) : g_(g), taps_(taps), ring_(ring) {}

  void run(int64_t first, int64_t last, const float* values, const float* slopes, float* grads, WideSums& sums) const {
    const int64_t floats = g_.width * g_.lanes();
    if (g_.stride == 1) {
      for (int64_t row = first; row < last; ++row, values += floats, slopes += floats, grads += floats) gather(row, values, slopes, grads, sums);
    } else {
      std::fill_n(grads, (last - first) * floats, 0.0f);
      scatter(first, last, values, grads, sums);
      finish((last - first) * g_.width, slopes, grads, sums);
    }
  }

 private:
  // Stride 1: every input pixel collects from the nine outputs that read it.
  void gather(int64_t row, const float* values, const float* slopes, float* grads, WideSums& sums) const {
    const int64_t lanes = g_.lanes(), step = g_.dilation * lanes;
    const float* rows[3];
    for (int64_t t = 0; t < 3; ++t) rows[t] = ring_.bordered(row - (t - 1) * g_.dilation);
    for (int64_t channel = 0; channel < lanes; channel += kLanes) {
      Vec w[9], dw[9], bias = 0.0f;
      for (int t = 0; t < 9; ++t) {
        w[t] = load(taps_.data() + channel * 9 + t * kLanes);
        dw[t] = 0.0f;
      }
      for (int64_t at = channel; at < g_.width * lanes; at += lanes) {
        const Vec value = load(values + at);
        Vec sum = 0.0f;
        for (int t = 0; t < 9; ++t) {
          const Vec grad = load(rows[t / 3] + at + (2 - t % 3) * step);
          sum = fma(grad, w[t], sum);
          dw[t] = fma(grad, value, dw[t]);
        }
        sum = sum * load(slopes + at);
        bias += sum;
        store(grads + at, sum);
      }
      for (int t = 0; t < 9; ++t) accumulate(sums.taps.data() + channel * 9 + t * kLanes, dw[t]);
      accumulate(sums.bias.data() + channel, bias);
    }
  }

  // Other strides: every output pixel adds to the inputs that it read.
  void scatter(int64_t first, int64_t last, const float* values, float* grads, WideSums& sums) const {
    const int64_t lanes = g_.lanes(), s = g_.stride, d = g_.dilation;
    const int64_t begin = std::max<int64_t>((first - d + s - 1) / s, 0), end = std::min((last - 1 + d) / s + 1, g_.out_height());
    for (int64_t row = begin; row < end; ++row) {
      const float* gradient = ring_.row(row);
      for (int64_t ty = 0; ty < 3; ++ty) {
        const int64_t source = row * s + (ty - 1) * d - first;
        if (source < 0 || source >= last - first) continue;
        for (int64_t tx = 0; tx < 3; ++tx) {
          const int64_t shift = (tx - 1) * d;
          const int64_t left = shift < 0 ? (s - 1 - shift) / s : 0, reach = g_.width - 1 - shift;
          const int64_t right = reach < 0 ? 0 : std::min(reach / s + 1, g_.out_width());
          for (int64_t channel = 0; channel < lanes; channel += kLanes) {
            const int64_t tap = channel * 9 + (ty * 3 + tx) * kLanes;
            const Vec w = load(taps_.data() + tap);
            Vec dw = 0.0f;
            for (int64_t column = left; column < right; ++column) {
              const Vec grad = load(gradient + column * lanes + channel);
              const int64_t at = (source * g_.width + column * s + shift) * lanes + channel;
              store(grads + at, fma(grad, w, load(grads + at)));
              dw = fma(grad, load(values + at), dw);
            }
            accumulate(sums.taps.data() + tap, dw);
          }
        }
      }
    }
  }

  void finish(int64_t pixels, const float* slopes, float* grads, WideSums& sums) const {
    const int64_t lanes = g_.lanes();
    for (int64_t channel = 0; channel < lanes; channel += kLanes) {
      Vec bias = 0.0f;
      for (int64_t at = channel; at < pixels * lanes; at += lanes) {
        const Vec grad = load(grads + at) * load(slopes + at);
        bias += grad;
        store(grads + at, grad);
      }
      accumulate(sums.bias.data() + channel, bias);
    }
  }

  const Geometry& g_;
  const Scratch<float>& taps_;
  const Ring& ring_;
};

// Second read of z: the gradient before the middle norm, through the taps and the activation, recomputing the expanded rows from x.
// Leaves in dx what the expansion's weight makes of it, without the first norm's correction.
template <int Act>
std::vector<WideSums> expand_backward(
    const Geometry& g, const ConvNorm& expand, const ConvNorm& depthwise, const NormBackward& middle, const WideGradient<Act>& gradient, const float* x, const float* mean, float* dx) {
  const int64_t lanes = g.lanes(), row_floats = g.width * lanes, out_width = g.out_width(), out_height = g.out_height();
  const PackedWeight expand_weight = pack(expand, g.wide, g.inputs);
  const float* w = expand.data();
  const ScaleShift norm = expand.affine();
  const PackedWeight back(g.inputs, g.wide, [&](int64_t c, int64_t e) { return w[e * g.inputs + c] * norm.scale[e]; });
  const Scratch<float> taps = pack_taps(depthwise, g.wide);

  const int64_t parts = parts_for(g.batch * g.ranges(g.height));
  std::vector<WideSums> sums;
  sums.reserve(parts);
  for (int64_t i = 0; i < parts; ++i) sums.emplace_back(g);
  for_each_task(g, g.height, parts, [&](int64_t part, int64_t image, Range range) {
    const int64_t tile = std::clamp<int64_t>(kTileFloats / (3 * row_floats), std::min<int64_t>(g.stride, range.size()), range.size());
    const int64_t slots = (tile + 2 * g.dilation) / g.stride + 2, ring_floats = Ring::floats(slots, out_width, g.dilation, lanes);
    const int64_t in_lanes = lanes_of(g.inputs);
    float* memory = workspace(ring_floats + 3 * tile * row_floats + out_width * lanes_of(g.outputs) + tile * g.width * in_lanes);
    float *values = memory + ring_floats, *slopes = values + tile * row_floats, *grads = slopes + tile * row_floats;
    float *dp = grads + tile * row_floats, *centred = dp + out_width * lanes_of(g.outputs);
    const Ring ring(memory, slots, out_height, out_width, g.dilation, lanes);
    const TapsBackward taps_backward(g, taps, ring);
    const float* input = x + image * g.height * g.width * g.inputs;
    int64_t next = 0;  // the first row of the gradient before the middle norm that the ring does not hold yet
    for (int64_t first = range.begin; first < range.end; first += tile) {
      const int64_t last = std::min(first + tile, range.end);
      next = std::max({next, (first - g.dilation) / g.stride, int64_t(0)});
      for (const int64_t end = std::min((last - 1 + g.dilation) / g.stride + 1, out_height); next < end; ++next) {
        float* out = ring.row(next);
        gradient.rows((image * out_height + next) * out_width, out_width, dp, [&](int64_t column, int64_t c, Vec grad, Vec value, Vec) {
          store(out + column * lanes + c, middle(grad, value, c));
        });
      }
      const float* rows = input + first * g.width * g.inputs;
      const int64_t pixels = (last - first) * g.width;
      multiply(rows, g.inputs, pixels, expand_weight, [&](int64_t r, int64_t c, Vec product) {
        Vec value, slope;
        activate_with_slope<Act>(norm(product, c), value, slope);
        store(values + r * lanes + c, value);
        store(slopes + r * lanes + c, slope);
      });
      taps_backward.run(first, last, values, slopes, grads, sums[part]);
      for (int64_t r = 0; r < pixels; ++r)
        for (int64_t c = 0; c < g.inputs; c += kLanes)
          store(centred + r * in_lanes + c, load_some(rows + r * g.inputs + c, g.inputs - c) - load_some(mean + c, g.inputs - c));
      add_outer(centred, in_lanes, g.inputs, grads, lanes, lanes, pixels, sums[part].products.data(), lanes);
      float* out = dx + (image * g.height + first) * g.width * g.inputs;
      multiply(grads, lanes, pixels, back, [&](int64_t r, int64_t c, Vec product) { store_some(out + r * g.inputs + c, product, g.inputs - c); });
    }
  });
  return sums;
}

// Identity B: the parameters' gradients from the sums, and the correction of dx, which touches narrow tensors alone.
void correct_expansion(
    const Geometry& g, const ConvNorm& expand, const std::vector<WideSums>& sums, const float* x, const float* mean, const float* covariance, const float* dy, Gradients& out) {
  const int64_t c = g.inputs, lanes = g.lanes();
  const double rows = double(g.rows());
  Values n1(c * lanes, 0.0), g1(g.wide, 0.0);
  for (const WideSums& part : sums) {
    for (int64_t i = 0; i < c * lanes; ++i) n1[i] += part.products[i];
    for (int64_t e = 0; e < g.wide; ++e) g1[e] += part.bias[e];
  }
  const float* w = expand.data();
  const auto centred = [&](int64_t e, int64_t i) { return n1[i * lanes + e]; };
  Values dgamma(g.wide, 0.0);
  for (int64_t e = 0; e < g.wide; ++e) {
    for (int64_t i = 0; i < c; ++i) dgamma[e] += w[e * c + i] * centred(e, i);
    dgamma[e] *= expand.rstd(e);
  }
  // dW = gamma r (centred - dgamma r W S)
  const PackedWeight packed(c, c, [=](int64_t o, int64_t i) { return covariance[o * c + i]; });
  multiply(w, c, g.wide, packed, [&](int64_t e, int64_t column, Vec product) {
    alignas(64) float values[kLanes];
    store(values, product);
    const double r = expand.rstd(e), scale = expand.gamma[e] * r;
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, c - column); ++i)
      out.dexpand[e * c + column + i] = float(scale * (centred(e, column + i) - dgamma[e] * r * values[i]));
  });

  // dx -= (x - mean) K + shift, with K = W^T diag(gamma r^2 dgamma / M) W and shift = (gamma r g1 / M) W.
  Scratch<float> scaled(g.wide * lanes_of(c), 0.0f), k(c * lanes_of(c), 0.0f), shift(lanes_of(c), 0.0f), centre(lanes_of(c), 0.0f);
  Values shift64(c, 0.0);
  for (int64_t e = 0; e < g.wide; ++e) {
    const double r = expand.rstd(e), s = expand.gamma[e] * r;
    for (int64_t i = 0; i < c; ++i) {
      scaled[e * lanes_of(c) + i] = float(s * r * dgamma[e] / rows * w[e * c + i]);
      shift64[i] += s * g1[e] / rows * w[e * c + i];
    }
  }
  for (int64_t i = 0; i < c; ++i) {
    shift[i] = float(shift64[i]);
    centre[i] = mean[i];
  }
  add_outer(w, c, c, scaled.data(), lanes_of(c), lanes_of(c), g.wide, k.data(), lanes_of(c));
  const PackedWeight correction(c, c, [&](int64_t o, int64_t i) { return k[i * lanes_of(c) + o]; });
  for_each_tile(g.rows(), count_parts(g.rows() * c), [&](int64_t, int64_t first, int64_t count) {
    float* tile = workspace(kTileRows * lanes_of(c));
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < c; i += kLanes)
        store(tile + r * lanes_of(c) + i, load_some(x + (first + r) * c + i, c - i) - load(centre.data() + i));
    multiply(tile, lanes_of(c), count, correction, [&](int64_t r, int64_t i, Vec product) {
      const int64_t at = (first + r) * c + i, left = c - i;
      Vec value = load_some(out.dx + at, left) - load(shift.data() + i) - product;
      if (g.skip()) value += load_some(dy + at, left);
      store_some(out.dx + at, value, left);
    });
  });

  *out.expand_gamma = dgamma;
  *out.expand_beta = g1;
  for (int64_t e = 0; e < g.wide; ++e)
    for (int64_t t = 0; t < 9; ++t) {
      double sum = 0;
      for (const WideSums& part : sums) sum += part.taps[(e / kLanes * 9 + t) * kLanes + e % kLanes];
      out.ddepthwise[e * 9 + t] = float(sum);
    }
}

template <int Act>
void backward(
    const Geometry& g, const ConvNorm& expand, const ConvNorm& depthwise, const ConvNorm& project, const float* dy, const float* x, const float* z, const float* p, const float* mean,
    const float* covariance, Gradients& out) {
  const NormBackward last = project_norm_backward(g, project, dy, p);
  const WideGradient<Act> gradient(g, depthwise, project, last, dy, z, p);
  const NormBackward middle = project_backward<Act>(g, depthwise, gradient, z, out.dproject);
  const auto sums = expand_backward<Act>(g, expand, depthwise, middle, gradient, x, mean, out.dx);
  correct_expansion(g, expand, sums, x, mean, covariance, dy, out);
  *out.depthwise_gamma = middle.dgamma;
  *out.depthwise_beta = middle.dbeta;
  *out.project_gamma = last.dgamma;
  *out.project_beta = last.dbeta;
}

const float* data_of(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
float* mutable_data_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor inverted_residual_inference(
    const Tensor& x,
    const Tensor& expand, const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& expand_mean, const Tensor& expand_var, double expand_eps,
    const Tensor& depthwise, const Tensor& depthwise_weight, const Tensor& depthwise_bias, const Tensor& depthwise_mean, const Tensor& depthwise_var, double depthwise_eps,
    const Tensor& project, const Tensor& project_weight, const Tensor& project_bias, const Tensor& project_mean, const Tensor& project_var, double project_eps,
    int64_t stride, int64_t dilation, int64_t act) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be a feature map (B, H, W, C)");
  const Tensor dense = torch::stable::contiguous(x);
  const Geometry g(dense, expand, depthwise, project, stride, dilation);
  ConvNorm first("expand", expand, g.wide, expand_weight, expand_bias, expand_eps);
  ConvNorm second("depthwise", depthwise, g.wide, depthwise_weight, depthwise_bias, depthwise_eps);
  ConvNorm third("project", project, g.outputs, project_weight, project_bias, project_eps);
  first.mean = read_channels("expand.running_mean", expand_mean, g.wide);
  first.var = read_channels("expand.running_var", expand_var, g.wide);
  second.mean = read_channels("depthwise.running_mean", depthwise_mean, g.wide);
  second.var = read_channels("depthwise.running_var", depthwise_var, g.wide);
  third.mean = read_channels("project.running_mean", project_mean, g.outputs);
  third.var = read_channels("project.running_var", project_var, g.outputs);
  Tensor y = torch::stable::new_empty(dense, {g.batch, g.out_height(), g.out_width(), g.outputs});
  if (y.numel() == 0) return y;
  dispatch_activation(act, [&](auto code) { infer<code>(g, first, second, third, data_of(dense), mutable_data_of(y)); });
  return y;
}

// y; mean and variance of the three convolutions; then what backward needs: z, p, mean and covariance of x.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inverted_residual_training(
    const Tensor& x,
    const Tensor& expand, const Tensor& expand_weight, const Tensor& expand_bias, double expand_eps,
    const Tensor& depthwise, const Tensor& depthwise_weight, const Tensor& depthwise_bias, double depthwise_eps,
    const Tensor& project, const Tensor& project_weight, const Tensor& project_bias, double project_eps,
    int64_t stride, int64_t dilation, int64_t act) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be a feature map (B, H, W, C)");
  const Tensor dense = torch::stable::contiguous(x);
  const Geometry g(dense, expand, depthwise, project, stride, dilation);
  ConvNorm first("expand", expand, g.wide, expand_weight, expand_bias, expand_eps);
  ConvNorm second("depthwise", depthwise, g.wide, depthwise_weight, depthwise_bias, depthwise_eps);
  ConvNorm third("project", project, g.outputs, project_weight, project_bias, project_eps);
  const Tensor y = new_output(torch::stable::new_empty(dense, {g.batch, g.out_height(), g.out_width(), g.outputs}));
  const Tensor p = new_output(y);
  const Tensor z = new_output(torch::stable::new_empty(dense, {g.batch, g.out_height(), g.out_width(), g.wide}));
  const Tensor mean = torch::stable::new_empty(dense, {g.inputs}), covariance = torch::stable::new_empty(dense, {g.inputs, g.inputs});
  STD_TORCH_CHECK(y.numel() > 0, "x must not be empty");
  dispatch_activation(act, [&](auto code) {
    forward<code>(
        g, first, second, third, data_of(dense), mutable_data_of(y), mutable_data_of(z), mutable_data_of(p), mutable_data_of(mean), mutable_data_of(covariance));
  });
  const auto channels = [&](const Values& v) { return write_channels(v, mean); };
  return std::make_tuple(
      y, channels(first.mean), channels(first.var), channels(second.mean), channels(second.var), channels(third.mean), channels(third.var), z, p, mean, covariance);
}

// Gradients of x, then of weight, norm weight and norm bias of the three convolutions.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inverted_residual_backward(
    const Tensor& dy, const Tensor& x,
    const Tensor& expand, const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& expand_mean, const Tensor& expand_var, double expand_eps,
    const Tensor& depthwise, const Tensor& depthwise_weight, const Tensor& depthwise_bias, const Tensor& depthwise_mean, const Tensor& depthwise_var, double depthwise_eps,
    const Tensor& project, const Tensor& project_weight, const Tensor& project_bias, const Tensor& project_mean, const Tensor& project_var, double project_eps,
    const Tensor& z, const Tensor& p, const Tensor& mean, const Tensor& covariance,
    int64_t stride, int64_t dilation, int64_t act) {
  const Tensor dense = torch::stable::contiguous(x), dense_dy = torch::stable::contiguous(dy);
  const Geometry g(dense, expand, depthwise, project, stride, dilation);
  STD_TORCH_CHECK(dy.scalar_type() == ScalarType::Float && dy.numel() == g.out_rows() * g.outputs, "dy must be float32 of the shape of y");
  ConvNorm first("expand", expand, g.wide, expand_weight, expand_bias, expand_eps);
  ConvNorm second("depthwise", depthwise, g.wide, depthwise_weight, depthwise_bias, depthwise_eps);
  ConvNorm third("project", project, g.outputs, project_weight, project_bias, project_eps);
  first.mean = read_channels("expand_mean", expand_mean, g.wide);
  first.var = read_channels("expand_var", expand_var, g.wide);
  second.mean = read_channels("depthwise_mean", depthwise_mean, g.wide);
  second.var = read_channels("depthwise_var", depthwise_var, g.wide);
  third.mean = read_channels("project_mean", project_mean, g.outputs);
  third.var = read_channels("project_var", project_var, g.outputs);
  const Tensor dx = new_output(dense);
  const Tensor dexpand = torch::stable::new_empty(expand, expand.sizes()), ddepthwise = torch::stable::new_empty(depthwise, depthwise.sizes());
  const Tensor dproject = torch::stable::new_empty(project, project.sizes());
  Values gammas[3], betas[3];
  Gradients out{mutable_data_of(dx), mutable_data_of(dexpand), mutable_data_of(ddepthwise), mutable_data_of(dproject),
                &gammas[0], &betas[0], &gammas[1], &betas[1], &gammas[2], &betas[2]};
  dispatch_activation(act, [&](auto code) {
    backward<code>(
        g, first, second, third, data_of(dense_dy), data_of(dense), data_of(z), data_of(p), data_of(mean), data_of(covariance), out);
  });
  return std::make_tuple(
      dx, dexpand, write_channels(gammas[0], expand_weight), write_channels(betas[0], expand_bias), ddepthwise,
      write_channels(gammas[1], depthwise_weight), write_channels(betas[1], depthwise_bias), dproject,
      write_channels(gammas[2], project_weight), write_channels(betas[2], project_bias));
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("inverted_residual_inference", TORCH_BOX(&mvit3::inverted_residual_inference));
  m.impl("inverted_residual_training", TORCH_BOX(&mvit3::inverted_residual_training));
  m.impl("inverted_residual_backward", TORCH_BOX(&mvit3::inverted_residual_backward));
}
