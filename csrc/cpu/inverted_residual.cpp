// inverted_residual: 1x1 expansion, depth-wise 3x3, 1x1 projection, each with batch normalisation; training forward and backward.
//
// Two ways through training, which share all passes over the filtered tensor z:
//   stored      the expanded tensor e is written once; its sums, and later those of its gradient, are taken from tiles in cache.
//   recomputed  e lives in a few rows of second-level cache and never reaches memory. Its statistics come from the moments of the narrow x
//               (identity A of the design); backward makes its rows again and corrects the gradient on the narrow side (identity B).
// Recomputing costs 2 C operations for each wide element and saves reading and writing e and its gradient, so it pays for narrow x.
// What is kept for backward: x, z, the narrow product p that the last norm reads, and e or the moments of x.
//
// Rows are cut into tiles, images into ranges of rows, the same way for a fixed number of threads: results repeat from run to run.

#include "inverted_residual.h"

#include <cmath>
#include <tuple>

namespace mvit3 {
namespace {

using Shape = InvertedResidualShape;

struct Block {
  Shape shape;
  ConvNorm expand, depthwise, project;

  template <typename E>
  PackedWeightOf<E> expand_weight() const { return expand.pack<E>(shape.wide, shape.inputs); }
  template <typename E>
  PackedWeightOf<E> project_weight() const { return project.pack<E>(shape.outputs, shape.wide); }
};

// What forward computes and backward reads: of e and the moments of x only one is there.
template <typename T>
struct Kept {
  T *e, *z, *p;
  float* mean;
  double* covariance;

  bool stored() const { return e != nullptr; }
};

// Into how many ranges the rows of an image are cut: as few as give all threads about the same, for rows around a border are made twice.
int64_t ranges_of(const Shape& s, int64_t height) {
  const int64_t threads = torch::stable::get_num_threads(), most = std::max<int64_t>(height / 4, 1);
  int64_t ranges = 1;
  while (ranges < std::min(threads, most) && round_up(s.batch * ranges, threads) * 9 > s.batch * ranges * 10) ++ranges;
  return ranges;
}

// Rows of a tile through a function of value and channel, in place or not.
template <typename F>
MVIT3_INLINE void for_each_vec(int64_t rows, int64_t channels, const F& f) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += kLanes) f(r, c);
}

// Brings `bytes` of memory into the second-level cache in `steps` steps, which a product takes in turns with its own work: the product waits
// for arithmetic, what follows it for memory.
class Ahead {
 public:
  template <typename T>
  Ahead(const T* first, int64_t count, int64_t steps)
      : next_(reinterpret_cast<const char*>(first)), end_(reinterpret_cast<const char*>(first + count)),
        step_(round_up((end_ - next_ + steps - 1) / steps, kLine)) {}

  MVIT3_INLINE void step() {
    for (const char* last = std::min(next_ + step_, end_); next_ < last; next_ += kLine) prefetch(next_);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *next_, *end_;
  int64_t step_;
};

// The number of elements of the tile that follows rows first..first+count-1.
int64_t next_tile(int64_t rows, int64_t first, int64_t count, int64_t channels) {
  return std::min(kTileRows, rows - first - count) * channels;
}

// ---- Forward

// e = x W^T and its mean and variance.
template <typename T>
void expand_stored(Block& b, const T* x, T* e) {
  using E = Multiplied<T>;
  const Shape& s = b.shape;
  const PackedWeightOf<E> weight = b.expand_weight<E>();
  const int64_t parts = count_parts(s.rows() * s.wide), stride = tile_stride(s.wide);
  const bool past_cache = streams(e, s.rows(), s.wide);
  auto sums = channel_sums(parts, s.wide);
  for_each_tile(s.rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* tile = workspace(kTileRows * (stride + lanes_of(s.inputs)));
    const RowsOf<E> in = as_rows(x + first * s.inputs, s.inputs, count, s.inputs, tile_of<E>(tile + kTileRows * stride));
    multiply_into(in.data, in.stride, count, weight, tile, stride);
    sums[part].add(tile, count, stride);
    store_rows(tile, stride, count, s.wide, e + first * s.wide, s.wide, past_cache);
    if (past_cache) stream_fence();
  });
  ChannelSums::combine(sums, b.expand.mean, b.expand.var);
}

// The covariance of the channels of x as float32 can hold it: of the channels in units of their own, powers of two about their deviation.
// The unit is 1 in all but extreme cases, where a product of two values of the channel, as of 1e19, or the sum of many would overflow.
class Covariance {
 public:
  // The diagonal of a covariance, one value every `step`.
  Covariance(const double* variance, int64_t channels, int64_t step = 1) : units_(lanes_of(channels), 1.0f) {
    for (int64_t c = 0; c < channels; ++c)
      if (std::isfinite(variance[c * step]) && variance[c * step] > 0x1p80) units_[c] = float(std::exp2(std::min(std::ilogb(variance[c * step]) / 2, 126)));
  }

  float unit(int64_t c) const { return units_[c]; }
  float largest() const { return *std::max_element(units_.begin(), units_.end()); }

  // The rows of a weight in these units.
  Scratch<float> scaled(const float* weight, int64_t count, int64_t channels) const {
    Scratch<float> out(count * channels);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < channels; ++c) out[r * channels + c] = weight[r * channels + c] * units_[c];
    return out;
  }

  // The covariance itself, in float64, as the operand of a product.
  PackedWeight pack(const double* covariance, int64_t channels) const {
    return PackedWeight(channels, channels, [&](int64_t i, int64_t j) {
      return float(covariance[i * channels + j] / (double(units_[i]) * units_[j]));
    });
  }

 private:
  std::vector<float> units_;
};

// Identity A: mean and variance of x W^T from the mean and the covariance of the rows of x.
template <typename T>
void expansion_moments(Block& b, const T* x, float* mean, double* covariance) {
  const Shape& s = b.shape;
  const int64_t parts = count_parts(s.rows() * s.inputs), c = s.inputs, lanes = lanes_of(c);
  auto sums = channel_sums(parts, c);
  for_each_tile(s.rows(), parts, [&](int64_t part, int64_t first, int64_t count) { sums[part].add(x + first * c, count, c); });
  Values mu(c), var(c);
  ChannelSums::combine(sums, mu, var);
  Scratch<float> centre(lanes, 0.0f);
  for (int64_t i = 0; i < c; ++i) mean[i] = centre[i] = float(mu[i]);
  const Covariance units(var.data(), c);
  Scratch<float> per_unit(lanes, 0.0f);
  for (int64_t i = 0; i < c; ++i) per_unit[i] = 1 / units.unit(i);

  auto products = accumulators<float>(parts, c * lanes);
  for_each_tile(s.rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* tile = workspace(kTileRows * lanes);
    for_each_vec(count, c, [&](int64_t r, int64_t i) {
      const Vec distance = load_some(x + (first + r) * c + i, c - i) - load(centre.data() + i);
      store(tile + r * lanes + i, distance * load(per_unit.data() + i));
    });
    add_outer(tile, lanes, c, tile, lanes, c, count, products[part].data(), lanes);
  });
  const Values product = add_up(products, c * lanes);
  for (int64_t i = 0; i < c; ++i)
    for (int64_t j = 0; j < c; ++j)
      covariance[i * c + j] = product[i * lanes + j] / double(s.rows()) * (double(units.unit(i)) * units.unit(j));

  // Each channel's weights as a row: its mean is their product with mu, its variance the quadratic form of the covariance.
  const float* w = b.expand.weight.data();
  const Scratch<float> scaled = units.scaled(w, s.wide, c);
  std::fill(b.expand.var.begin(), b.expand.var.end(), 0.0);
  multiply(scaled.data(), c, s.wide, units.pack(covariance, c), [&](int64_t channel, int64_t column, Vec product) {
    alignas(64) float values[kLanes];
    store(values, product);
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, c - column); ++i)
      b.expand.var[channel] += double(values[i]) * scaled[channel * c + column + i];
  });
  for (int64_t e = 0; e < s.wide; ++e) {
    b.expand.var[e] = std::max(b.expand.var[e], 0.0);
    b.expand.mean[e] = 0;
    for (int64_t i = 0; i < c; ++i) b.expand.mean[e] += mu[i] * w[e * c + i];
  }
}

// z, the filtered map, and its mean and variance.
template <typename T, int Act>
void filter(Block& b, const T* x, const Kept<T>& kept) {
  using E = Multiplied<T>;
  const Shape& s = b.shape;
  const PackedWeightOf<E> weight = b.expand_weight<E>();
  const ScaleShift norm = b.expand.affine();
  const Scratch<float> taps = pack_taps(b.depthwise.weight.data(), s.wide);
  const int64_t pixel = tile_stride(s.wide), out_width = s.out_width(), d = s.dilation, slots = 2 * d + 1;
  const int64_t ranges = ranges_of(s, s.out_height()), parts = parts_for(s.batch * ranges);
  const bool past_cache = streams(kept.z, s.out_rows(), s.wide);
  auto sums = channel_sums(parts, s.wide);
  for_each_range(s.batch, s.out_height(), ranges, parts, [&](int64_t part, int64_t image, Range range) {
    const int64_t ring_floats = Ring::floats(slots, s.width, d, pixel);
    float* memory = workspace(ring_floats + out_width * pixel + s.width * lanes_of(s.inputs));
    float* filtered = memory + ring_floats;
    E* narrow = tile_of<E>(filtered + out_width * pixel);
    const Ring ring(memory, slots, s.height, s.width, d, pixel);
    int64_t next = 0;  // the first row that the ring does not hold yet
    for (int64_t row = range.begin; row < range.end; ++row) {
      next = std::max({next, row * s.stride - d, int64_t(0)});
      for (const int64_t end = std::min(row * s.stride + d + 1, s.height); next < end; ++next) {
        const int64_t first = (image * s.height + next) * s.width;
        float* out = ring.row(next);
        if (kept.stored()) {
          const T* e = kept.e + first * s.wide;
          for_each_vec(s.width, s.wide, [&](int64_t r, int64_t c) {
            store(out + r * pixel + c, activate<Act>(norm(load_some(e + r * s.wide + c, s.wide - c), c)));
          });
        } else {
          const RowsOf<E> in = as_rows(x + first * s.inputs, s.inputs, s.width, s.inputs, narrow);
          Ahead ahead(x + (first + s.width) * s.inputs, next + 1 < s.height ? s.width * s.inputs : 0, s.width * pixel / kLanes);
          multiply(in.data, in.stride, s.width, weight, [&](int64_t r, int64_t c, Vec product) {
            store(out + r * pixel + c, activate<Act>(norm(product, c)));
            ahead.step();
          });
        }
      }
      const float* rows[3];
      for (int64_t t = 0; t < 3; ++t) rows[t] = ring.bordered(row * s.stride + (t - 1) * d);
      filter_row(rows, pixel, lanes_of(s.wide), out_width, s.stride, d, taps.data(), [=](int64_t column, int64_t c, Vec sum) {
        store(filtered + column * pixel + c, sum);
      });
      sums[part].add(filtered, out_width, pixel);
      T* out = kept.z + (image * s.out_height() + row) * out_width * s.wide;
      store_rows(filtered, pixel, out_width, s.wide, out, s.wide, past_cache);
    }
    if (past_cache) stream_fence();
  });
  ChannelSums::combine(sums, b.depthwise.mean, b.depthwise.var);
}

// p, the projection before its norm, with its mean and variance; then y.
template <typename T, int Act>
void project(Block& b, const T* x, const T* z, T* p, T* y) {
  using E = Multiplied<T>;
  const Shape& s = b.shape;
  const PackedWeightOf<E> weight = b.project_weight<E>();
  const ScaleShift norm = b.depthwise.affine();
  const int64_t parts = count_parts(s.out_rows() * s.wide), stride = tile_stride(s.wide), out_stride = lanes_of(s.outputs);
  auto sums = channel_sums(parts, s.outputs);
  for_each_tile(s.out_rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* product = workspace(kTileRows * (stride + out_stride));
    E* tile = tile_of<E>(product + kTileRows * out_stride);
    const T* values = z + first * s.wide;
    for_each_vec(count, s.wide, [&](int64_t r, int64_t c) {
      store(tile + r * stride + c, activate<Act>(norm(load_some(values + r * s.wide + c, s.wide - c), c)));
    });
    Ahead ahead(values + count * s.wide, next_tile(s.out_rows(), first, count, s.wide), count * out_stride / kLanes);
    multiply(tile, stride, count, weight, [&](int64_t r, int64_t c, Vec sums) {
      store(product + r * out_stride + c, sums);
      ahead.step();
    });
    sums[part].add(product, count, out_stride);
    store_rows(product, out_stride, count, s.outputs, p + first * s.outputs, s.outputs);
  });
  ChannelSums::combine(sums, b.project.mean, b.project.var);

  const ScaleShift last = b.project.affine();
  for_each_tile(s.out_rows(), parts, [&](int64_t, int64_t first, int64_t count) {
    for_each_vec(count, s.outputs, [&](int64_t r, int64_t c) {
      const int64_t at = (first + r) * s.outputs + c, left = s.outputs - c;
      Vec value = last(load_some(p + at, left), c);
      if (s.skip()) value += load_some(x + at, left);
      store_some(y + at, value, left);
    });
  });
}

template <typename T, int Act>
void forward(Block& b, const T* x, T* y, const Kept<T>& kept) {
  if (kept.stored())
    expand_stored(b, x, kept.e);
  else
    expansion_moments(b, x, kept.mean, kept.covariance);
  filter<T, Act>(b, x, kept);
  project<T, Act>(b, x, kept.z, kept.p, y);
}

// ---- Backward

template <typename T>
struct Gradients {
  T* dx;
  Tensor expand, depthwise, project;  // of the weights; float32 accumulates, their own dtype is written
  Values gammas[3], betas[3];
};

// The last norm: sums of dy and of dy * (p - mean).
template <typename T>
NormBackward last_norm_backward(const Block& b, const T* dy, const T* p) {
  const int64_t rows = b.shape.out_rows(), c = b.shape.outputs, parts = count_parts(rows * c);
  const Scratch<float> mean = b.project.means();
  auto sums = accumulators<double>(parts, 2 * lanes_of(c));
  for_each_tile(rows, parts, [&](int64_t part, int64_t first, int64_t count) {
    add_sum_and_dot(dy + first * c, c, p + first * c, c, mean, c, count, sums[part]);
  });
  return NormBackward::from(b.project, sums, rows);
}

template <typename T>
void write_matrix(const std::vector<Scratch<float>>& parts, int64_t rows, int64_t columns, int64_t stride, const Tensor& out) {
  dispatch_dtype("gradient", out, [&](auto type) {
    add_up_rows(parts, rows, columns, stride, mutable_data_of<decltype(type)>(out));
  });
}

// Through the last norm, the projection and the activation: dn, the gradient of the middle norm's output, with the sums that this norm's
// own gradient needs; and the gradient of the projection's weight.
template <typename T, int Act>
NormBackward project_backward(const Block& b, const NormBackward& last, const T* dy, const T* z, const T* p, T* dn, const Tensor& dweight) {
  using E = Multiplied<T>;
  const Shape& s = b.shape;
  const auto transposed = PackedWeightOf<E>::columns(b.project.weight.data(), s.wide, s.outputs, s.wide);
  const ScaleShift norm = b.depthwise.affine();
  const Scratch<float> mean = b.depthwise.means();
  const int64_t parts = count_parts(s.out_rows() * s.wide), lanes = lanes_of(s.wide);
  const int64_t stride = tile_stride(s.wide), out_stride = lanes_of(s.outputs);
  const bool past_cache = streams(dn, s.out_rows(), s.wide);
  auto sums = accumulators<double>(parts, 2 * lanes);
  OuterSumsOf<E> products(parts, s.outputs, lanes);
  for_each_tile(s.out_rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* grads = workspace(kTileRows * (out_stride + 2 * stride));
    E *dp = tile_of<E>(grads + kTileRows * stride), *hidden = dp + kTileRows * out_stride;
    for_each_vec(count, s.outputs, [&](int64_t r, int64_t c) {
      const int64_t at = (first + r) * s.outputs + c, left = s.outputs - c;
      store(dp + r * out_stride + c, last(load_some(dy + at, left), load_some(p + at, left), c));
    });
    const T* values = z + first * s.wide;
    const int64_t after = (first + count) * s.outputs, next = next_tile(s.out_rows(), first, count, s.outputs), steps = count * lanes / kLanes;
    Ahead ahead_z(values + count * s.wide, next_tile(s.out_rows(), first, count, s.wide), steps);
    Ahead ahead_dy(dy + after, next, steps), ahead_p(p + after, next, steps);
    multiply(dp, out_stride, count, transposed, [&](int64_t r, int64_t c, Vec product) {
      store(grads + r * stride + c, product);
      ahead_z.step();
      ahead_dy.step();
      ahead_p.step();
    });
    for_each_vec(count, s.wide, [&](int64_t r, int64_t c) {
      const int64_t at = r * stride + c, left = s.wide - c;
      Vec value, slope;
      activate_with_slope<Act>(norm(load_some(values + r * s.wide + c, left), c), value, slope);
      const Vec grad = load(grads + at) * slope;
      store(hidden + at, value);
      store(grads + at, grad);
      T* out = dn + (first + r) * s.wide + c;  // beside the arithmetic: alone it would wait for memory
      past_cache ? stream(out, grad) : store_some(out, grad, left);
    });
    if (past_cache) stream_fence();
    products.add(part, {dp, out_stride}, {hidden, stride}, count);
    add_sum_and_dot(grads, stride, values, s.wide, mean, s.wide, count, sums[part]);
  });
  write_matrix<T>(products.parts(), s.outputs, s.wide, lanes, dweight);
  return NormBackward::from(b.depthwise, sums, s.out_rows());
}

// The gradient of the depth-wise convolution: from `ring`, which holds that of the filtered map, to a row of the activated expansion.
class TapsBackward {
 public:
  TapsBackward(const Shape& s, const Scratch<float>& taps, const Ring& ring)
      : s_(s), lanes_(lanes_of(s.wide)), pixel_(tile_stride(s.wide)), taps_(taps), ring_(ring) {}

  // `values` is a row of the activated expansion and `slopes` the activation's derivative there. Writes the gradient before the activation
  // to `grads` and adds that of the taps, [channels / 16][9][16].
  void run(int64_t row, const float* values, const float* slopes, float* grads, Scratch<double>& dtaps) const {
    const bool halves = s_.stride == 2 && s_.dilation == 1;
    for (int64_t c = 0; c < lanes_; c += kLanes) {
      Taps taps(taps_.data() + c * 9);
      const Rows rows{values + c, slopes + c, grads + c, pixel_};
      if (s_.stride == 1)
        dense(row, c, rows, taps);
      else if (halves && row % 2 == 0)
        pairs<1>(row, c, rows, taps);
      else if (halves)
        pairs<2>(row, c, rows, taps);
      else
        any(row, c, rows, taps);
      for (int t = 0; t < 9; ++t) accumulate(dtaps.data() + c * 9 + t * kLanes, taps.dw[t]);
    }
  }

 private:
  // Sixteen channels of the three rows.
  struct Rows {
    const float *values, *slopes;
    float* grads;
    int64_t pixel;

    MVIT3_INLINE Vec value(int64_t column) const { return load(values + column * pixel); }
    MVIT3_INLINE void finish(int64_t column, Vec sum) const { store(grads + column * pixel, sum * load(slopes + column * pixel)); }
  };

  // The weights of sixteen channels and the sums of their gradients.
  struct Taps {
    Vec w[9], dw[9];

    explicit Taps(const float* weights) {
      for (int t = 0; t < 9; ++t) {
        w[t] = load(weights + t * kLanes);
        dw[t] = 0.0f;
      }
    }

    // What comes back through tap t from an output with the gradient `grad` to an input with `value`.
    MVIT3_INLINE void pull(int t, const float* grad, Vec value, Vec& sum) {
      const Vec g = load(grad);
      sum = fma(g, w[t], sum);
      dw[t] = fma(g, value, dw[t]);
    }
  };

  // Stride 1: nine outputs read every pixel.
  void dense(int64_t row, int64_t c, const Rows& rows, Taps& taps) const {
    const int64_t step = s_.dilation * pixel_;
    const float* grads[3];
    for (int t = 0; t < 3; ++t) grads[t] = ring_.bordered(row - (t - 1) * s_.dilation) + c;
    for (int64_t column = 0; column < s_.width; ++column) {
      const Vec value = rows.value(column);
      Vec sum = 0.0f;
      for (int t = 0; t < 9; ++t) taps.pull(t, grads[t / 3] + column * pixel_ + (2 - t % 3) * step, value, sum);
      rows.finish(column, sum);
    }
  }

  // Stride 2: one row of taps reads a pixel of an even row and two read one of an odd row; the same for columns.
  template <int TapRows>
  void pairs(int64_t row, int64_t c, const Rows& rows, Taps& taps) const {
    constexpr int kFirst = TapRows == 1 ? 3 : 0;
    const float* grads[TapRows];
    for (int i = 0; i < TapRows; ++i) grads[i] = ring_.bordered(TapRows == 1 ? row / 2 : (row + 1) / 2 - i) + pixel_ + c;
    for (int64_t column = 0; column < s_.width; ++column) {
      Vec value = rows.value(column), sum = 0.0f;
      for (int i = 0; i < TapRows; ++i) taps.pull(kFirst + 6 * i + 1, grads[i] + column / 2 * pixel_, value, sum);
      rows.finish(column, sum);
      if (++column == s_.width) break;
      value = rows.value(column);
      sum = 0.0f;
      for (int i = 0; i < TapRows; ++i) {
        taps.pull(kFirst + 6 * i, grads[i] + (column / 2 + 1) * pixel_, value, sum);
        taps.pull(kFirst + 6 * i + 2, grads[i] + column / 2 * pixel_, value, sum);
      }
      rows.finish(column, sum);
    }
  }

  // Any stride and dilation: every tap asks whether there is an output at its other end.
  void any(int64_t row, int64_t c, const Rows& rows, Taps& taps) const {
    for (int64_t column = 0; column < s_.width; ++column) {
      const Vec value = rows.value(column);
      Vec sum = 0.0f;
      for (int t = 0; t < 9; ++t) {
        const int64_t y = row - (t / 3 - 1) * s_.dilation, x = column - (t % 3 - 1) * s_.dilation;
        if (y < 0 || x < 0 || y % s_.stride || x % s_.stride || y / s_.stride >= s_.out_height() || x / s_.stride >= s_.out_width()) continue;
        taps.pull(t, ring_.row(y / s_.stride) + x / s_.stride * pixel_ + c, value, sum);
      }
      rows.finish(column, sum);
    }
  }

  const Shape& s_;
  const int64_t lanes_, pixel_;
  const Scratch<float>& taps_;
  const Ring& ring_;
};

// What a part gathers where it passes the gradient of the first norm's output, dn.
struct WideSums {
  Scratch<double> taps, dn;  // gradients of the taps [lanes / 16][9][16]; sums of dn, and of dn * (e - mean) where e is stored

  explicit WideSums(const Shape& s) : taps(9 * lanes_of(s.wide), 0.0), dn(2 * lanes_of(s.wide), 0.0) {}
};

template <typename E>
struct WideGradients {
  std::vector<WideSums> sums;
  OuterSumsOf<E> products;  // (x - mean)^T dn, (C, lanes), where e is recomputed
};

// Through the middle norm, the taps and the activation. Where e is stored, `dn` gets the gradient of the first norm's output; else dx gets
// what the expansion's weight makes of it, without that norm's correction.
template <typename T, int Act>
WideGradients<Multiplied<T>> depthwise_backward(
    const Block& b, const NormBackward& middle, const T* x, const Kept<T>& kept, const T* filtered_dn, T* dn, T* dx) {
  using E = Multiplied<T>;
  const Shape& s = b.shape;
  const int64_t pixel = tile_stride(s.wide), row_floats = s.width * pixel, out_width = s.out_width(), out_height = s.out_height();
  const int64_t d = s.dilation, c = s.inputs, in_stride = lanes_of(c);
  const bool stored = kept.stored(), past_cache = stored && streams(dn, s.rows(), s.wide);
  const float* w = b.expand.weight.data();
  const ScaleShift norm = b.expand.affine();
  const PackedWeightOf<E> expand = b.expand_weight<E>();
  const PackedWeightOf<E> back(c, s.wide, [&](int64_t i, int64_t e) { return w[e * c + i] * norm.scale[e]; });
  const Scratch<float> taps = pack_taps(b.depthwise.weight.data(), s.wide), mean = b.expand.means();

  const int64_t ranges = ranges_of(s, s.height), parts = parts_for(s.batch * ranges);
  WideGradients<E> out{{}, OuterSumsOf<E>(parts, stored ? 0 : c, lanes_of(s.wide))};
  std::vector<WideSums>& sums = out.sums;
  sums.reserve(parts);
  for (int64_t i = 0; i < parts; ++i) sums.emplace_back(s);
  for_each_range(s.batch, s.height, ranges, parts, [&](int64_t part, int64_t image, Range range) {
    const int64_t tile = std::clamp<int64_t>(kTileFloats / (3 * row_floats), std::min<int64_t>(s.stride, range.size()), range.size());
    const int64_t slots = (tile + 2 * d) / s.stride + 2, ring_floats = Ring::floats(slots, out_width, d, pixel);
    float* memory = workspace(ring_floats + 3 * tile * row_floats + 3 * tile * s.width * in_stride);
    float *values = memory + ring_floats, *slopes = values + tile * row_floats, *grads = slopes + tile * row_floats;
    float* product = grads + tile * row_floats;
    E *narrow = tile_of<E>(product + tile * s.width * in_stride), *centred = narrow + tile * s.width * in_stride;
    const Ring ring(memory, slots, out_height, out_width, d, pixel);
    const TapsBackward taps_backward(s, taps, ring);
    int64_t next = 0;  // the first row of the gradient before the middle norm that the ring does not hold yet
    for (int64_t first = range.begin; first < range.end; first += tile) {
      const int64_t last = std::min(first + tile, range.end);
      next = std::max({next, (first - d) / s.stride, int64_t(0)});
      for (const int64_t end = std::min((last - 1 + d) / s.stride + 1, out_height); next < end; ++next) {
        float* out = ring.row(next);
        const int64_t at = (image * out_height + next) * out_width * s.wide;
        const T *grad = filtered_dn + at, *value = kept.z + at;
        for_each_vec(out_width, s.wide, [&](int64_t r, int64_t i) {
          const int64_t left = s.wide - i;
          store(out + r * pixel + i, middle(load_some(grad + r * s.wide + i, left), load_some(value + r * s.wide + i, left), i));
        });
      }
      const int64_t start = image * s.pixels() + first * s.width, pixels = (last - first) * s.width;
      const int64_t next_pixels = std::min(tile, range.end - last) * s.width, steps = pixels * pixel / kLanes;
      const int64_t following = next_pixels > 0 ? std::min((std::min(last + tile, range.end) - 1 + d) / s.stride + 1, out_height) - next : 0;
      const int64_t at = (image * out_height + next) * out_width * s.wide, count = following * out_width * s.wide;
      Ahead ahead_dn(filtered_dn + at, count, steps), ahead_z(kept.z + at, count, steps);
      Ahead ahead_x(x + (start + pixels) * c, stored ? 0 : next_pixels * c, steps);
      const T* e = kept.e + start * s.wide;
      const auto activate_both = [&](int64_t r, int64_t i, Vec v) {
        Vec value, slope;
        activate_with_slope<Act>(norm(v, i), value, slope);
        store(values + r * pixel + i, value);
        store(slopes + r * pixel + i, slope);
        ahead_dn.step();
        ahead_z.step();
        ahead_x.step();
      };
      RowsOf<E> in{};
      if (stored) {
        for_each_vec(pixels, s.wide, [&](int64_t r, int64_t i) { activate_both(r, i, load_some(e + r * s.wide + i, s.wide - i)); });
      } else {
        in = as_rows(x + start * c, c, pixels, c, narrow);
        multiply(in.data, in.stride, pixels, expand, activate_both);
      }
      for (int64_t row = first; row < last; ++row) {
        const int64_t at = (row - first) * row_floats;
        taps_backward.run(row, values + at, slopes + at, grads + at, sums[part].taps);
      }
      if (stored) {
        add_sum_and_dot(grads, pixel, e, s.wide, mean, s.wide, pixels, sums[part].dn);
        store_rows(grads, pixel, pixels, s.wide, dn + start * s.wide, s.wide, past_cache);
      } else {
        for (int64_t i = 0; i < s.wide; i += kLanes)
          for_each_run(pixels, [&](int64_t begin, int64_t end) {
            Vec sum = 0.0f;
            for (int64_t r = begin; r < end; ++r) sum += load(grads + r * pixel + i);
            accumulate(sums[part].dn.data() + i, sum);
          });
        for_each_vec(pixels, c, [&](int64_t r, int64_t i) {
          store(centred + r * in_stride + i, load_some(in.data + r * in.stride + i, c - i) - load_some(kept.mean + i, c - i));
        });
        const RowsOf<E> dn_rows = as_rows(grads, pixel, pixels, s.wide, tile_of<E>(values));  // the values are read
        out.products.add(part, {centred, in_stride}, dn_rows, pixels);
        multiply_into(dn_rows.data, dn_rows.stride, pixels, back, product, in_stride);
        store_rows(product, in_stride, pixels, c, dx + start * c, c);
      }
    }
    if (past_cache) stream_fence();
  });
  return out;
}

// Stored: through the first norm and the expansion.
template <typename T>
void expand_backward(const Block& b, const NormBackward& first_norm, const T* dy, const T* x, const T* e, const T* dn, Gradients<T>& out) {
  using E = Multiplied<T>;
  const Shape& s = b.shape;
  const auto transposed = PackedWeightOf<E>::columns(b.expand.weight.data(), s.inputs, s.wide, s.inputs);
  const int64_t parts = count_parts(s.rows() * s.wide), stride = tile_stride(s.wide), in_lanes = lanes_of(s.inputs);
  const int64_t in_stride = tile_stride(s.inputs);
  OuterSumsOf<E> products(parts, s.wide, in_lanes);
  for_each_tile(s.rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* dx = workspace(kTileRows * (stride + 2 * in_stride));
    E *de = tile_of<E>(dx + kTileRows * in_stride), *narrow = de + kTileRows * stride;
    for_each_vec(count, s.wide, [&](int64_t r, int64_t c) {
      const int64_t at = (first + r) * s.wide + c, left = s.wide - c;
      store(de + r * stride + c, first_norm(load_some(dn + at, left), load_some(e + at, left), c));
    });
    load_rows(x + first * s.inputs, s.inputs, count, s.inputs, narrow, in_stride);
    products.add(part, {de, stride}, {narrow, in_stride}, count);
    const int64_t after = (first + count) * s.wide, next = next_tile(s.rows(), first, count, s.wide), steps = count * in_lanes / kLanes;
    Ahead ahead_dn(dn + after, next, steps), ahead_e(e + after, next, steps);
    multiply(de, stride, count, transposed, [&](int64_t r, int64_t c, Vec product) {
      store(dx + r * in_stride + c, product);
      ahead_dn.step();
      ahead_e.step();
    });
    for_each_vec(count, s.inputs, [&](int64_t r, int64_t c) {
      const int64_t at = (first + r) * s.inputs + c, left = s.inputs - c;
      Vec value = load(dx + r * in_stride + c);
      if (s.skip()) value += load_some(dy + at, left);
      store_some(out.dx + at, value, left);
    });
  });
  write_matrix<T>(products.parts(), s.wide, s.inputs, in_lanes, out.expand);
}

// Recomputed, identity B: the gradients of the expansion and its norm from the sums, and the correction of dx, which touches narrow
// tensors alone.
template <typename T>
void correct_expansion(
    const Block& b, const std::vector<Scratch<float>>& sums, const Values& dbeta, const T* dy, const T* x, const Kept<T>& kept, Gradients<T>& out) {
  const Shape& s = b.shape;
  const ConvNorm& expand = b.expand;
  const int64_t c = s.inputs, lanes = lanes_of(s.wide), in_lanes = lanes_of(c);
  const double rows = double(s.rows());
  const Values products = add_up(sums, c * lanes);
  const float* w = expand.weight.data();
  Values dgamma(s.wide, 0.0);
  for (int64_t e = 0; e < s.wide; ++e) {
    for (int64_t i = 0; i < c; ++i) dgamma[e] += w[e * c + i] * products[i * lanes + e];
    dgamma[e] *= expand.rstd(e);
  }
  // dW = gamma r (products - dgamma r W S)
  std::vector<Scratch<float>> dweight = accumulators<float>(1, s.wide * in_lanes);
  const Covariance units(kept.covariance, c, c + 1);
  const Scratch<float> in_units = units.scaled(w, s.wide, c);
  multiply(in_units.data(), c, s.wide, units.pack(kept.covariance, c), [&](int64_t e, int64_t column, Vec product) {
    float* values = dweight[0].data() + e * in_lanes + column;
    store(values, product);
    const double r = expand.rstd(e), scale = expand.gamma[e] * r;
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, c - column); ++i)
      values[i] = float(scale * (products[(column + i) * lanes + e] - dgamma[e] * r * units.unit(column + i) * values[i]));
  });
  write_matrix<T>(dweight, s.wide, c, in_lanes, out.expand);

  // dx -= (x - mean) K + shift, with K = W^T diag(gamma r^2 dgamma / M) W and shift = (gamma r dbeta / M) W. K holds the inverse of a variance:
  // where that is extreme, the two factors of the product meet in the middle.
  const float unit = units.largest(), per_unit = 1 / unit;
  Scratch<float> scaled(s.wide * in_lanes, 0.0f), k(c * in_lanes, 0.0f), shift(in_lanes, 0.0f), centre(in_lanes, 0.0f);
  Values shift64(c, 0.0);
  for (int64_t e = 0; e < s.wide; ++e) {
    const double r = expand.rstd(e), scale = expand.gamma[e] * r;
    for (int64_t i = 0; i < c; ++i) {
      scaled[e * in_lanes + i] = float(scale * r * unit * dgamma[e] / rows * w[e * c + i]);
      shift64[i] += scale * dbeta[e] / rows * w[e * c + i];
    }
  }
  for (int64_t i = 0; i < c; ++i) {
    shift[i] = float(shift64[i]);
    centre[i] = kept.mean[i];
  }
  add_outer(w, c, c, scaled.data(), in_lanes, in_lanes, s.wide, k.data(), in_lanes);
  const PackedWeight correction = PackedWeight::columns(k.data(), c, c, in_lanes);
  for_each_tile(s.rows(), count_parts(s.rows() * c), [&](int64_t, int64_t first, int64_t count) {
    float* tile = workspace(kTileRows * in_lanes);
    for_each_vec(count, c, [&](int64_t r, int64_t i) {
      store(tile + r * in_lanes + i, (load_some(x + (first + r) * c + i, c - i) - load(centre.data() + i)) * per_unit);
    });
    const int64_t after = (first + count) * c, next = next_tile(s.rows(), first, count, c), steps = count * in_lanes / kLanes;
    Ahead ahead_x(x + after, next, steps), ahead_dx(out.dx + after, next, steps), ahead_dy(dy + after, s.skip() ? next : 0, steps);
    multiply(tile, in_lanes, count, correction, [&](int64_t r, int64_t i, Vec product) {
      const int64_t at = (first + r) * c + i, left = c - i;
      Vec value = load_some(out.dx + at, left) - load(shift.data() + i) - product;
      if (s.skip()) value += load_some(dy + at, left);
      store_some(out.dx + at, value, left);
      ahead_x.step();
      ahead_dx.step();
      ahead_dy.step();
    });
  });
  out.gammas[0] = dgamma;
}

void write_taps(const std::vector<WideSums>& sums, int64_t channels, const Tensor& out) {
  Values total(channels * 9, 0.0);
  for (const WideSums& part : sums)
    for (int64_t e = 0; e < channels; ++e)
      for (int64_t t = 0; t < 9; ++t) total[e * 9 + t] += part.taps[(e / kLanes * 9 + t) * kLanes + e % kLanes];
  dispatch_dtype("gradient", out, [&](auto type) {
    using T = decltype(type);
    T* data = mutable_data_of<T>(out);
    for (int64_t i = 0; i < channels * 9; ++i) data[i] = from_float<T>(float(total[i]));
  });
}

// `wide` and `filtered` are scratch of the shapes of e (where it is stored) and z.
template <typename T, int Act>
void backward(const Block& b, const T* dy, const T* x, const Kept<T>& kept, T* wide, T* filtered, Gradients<T>& out) {
  const Shape& s = b.shape;
  const NormBackward last = last_norm_backward(b, dy, kept.p);
  const NormBackward middle = project_backward<T, Act>(b, last, dy, kept.z, kept.p, filtered, out.project);
  auto wide_gradients = depthwise_backward<T, Act>(b, middle, x, kept, filtered, wide, out.dx);
  const std::vector<WideSums>& sums = wide_gradients.sums;
  const int64_t lanes = lanes_of(s.wide);
  Values total(2 * lanes, 0.0);
  for (const WideSums& part : sums)
    for (int64_t i = 0; i < 2 * lanes; ++i) total[i] += part.dn[i];
  const auto at = [&](int64_t i) { return total.begin() + i; };
  out.betas[0].assign(at(0), at(s.wide));
  if (kept.stored()) {
    const NormBackward first(b.expand, out.betas[0], Values(at(lanes), at(lanes + s.wide)), double(s.rows()));
    expand_backward(b, first, dy, x, kept.e, wide, out);
    out.gammas[0] = first.dgamma;
  } else {
    correct_expansion(b, wide_gradients.products.parts(), out.betas[0], dy, x, kept, out);
  }
  write_taps(sums, s.wide, out.depthwise);
  out.gammas[1] = middle.dgamma;
  out.betas[1] = middle.dbeta;
  out.gammas[2] = last.dgamma;
  out.betas[2] = last.dbeta;
}

// ---- The registered functions

// One convolution and its norm, as the op's flat arguments give them; without statistics in training.
struct Layer {
  const Tensor &weight, &norm_weight, &norm_bias;
  double eps;
  const Tensor *mean = nullptr, *var = nullptr;
};

ConvNorm read(const std::string& name, const Layer& layer, int64_t outputs, int64_t inputs) {
  ConvNorm conv(name, layer.weight, outputs, inputs, layer.norm_weight, layer.norm_bias, layer.eps);
  if (layer.mean) {
    conv.mean = read_channels(name + "_mean", *layer.mean, outputs);
    conv.var = read_channels(name + "_var", *layer.var, outputs);
  }
  return conv;
}

Block read_block(
    const Tensor& x, const Layer& expand, const Layer& depthwise, const Layer& project, int64_t stride, int64_t dilation) {
  check_map("x", x);
  check_pixels("x", x.size(1), x.size(2));
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(dilation >= 1, "dilation must be at least 1, got ", dilation);
  const int64_t inputs = x.size(3), wide = outputs_of("expand", expand.weight), outputs = outputs_of("project", project.weight);
  return {
      {x.size(0), x.size(1), x.size(2), inputs, wide, outputs, stride, nearest_dilation(dilation, x.size(1), x.size(2))},
      read("expand", expand, wide, inputs),
      read("depthwise", depthwise, wide, 9),
      read("project", project, outputs, wide)};
}

Tensor empty_map(const Tensor& x, const Shape& s, int64_t channels) {
  return torch::stable::new_empty(x, {s.batch, s.out_height(), s.out_width(), channels});
}

Tensor inverted_residual_inference(
    const Tensor& x,
    const Tensor& expand, const Tensor& expand_weight, const Tensor& expand_bias,
    const Tensor& expand_mean, const Tensor& expand_var, double expand_eps,
    const Tensor& depthwise, const Tensor& depthwise_weight, const Tensor& depthwise_bias,
    const Tensor& depthwise_mean, const Tensor& depthwise_var, double depthwise_eps,
    const Tensor& project, const Tensor& project_weight, const Tensor& project_bias,
    const Tensor& project_mean, const Tensor& project_var, double project_eps,
    int64_t stride, int64_t dilation, int64_t act) {
  const Block b = read_block(
      x, {expand, expand_weight, expand_bias, expand_eps, &expand_mean, &expand_var},
      {depthwise, depthwise_weight, depthwise_bias, depthwise_eps, &depthwise_mean, &depthwise_var},
      {project, project_weight, project_bias, project_eps, &project_mean, &project_var}, stride, dilation);
  const Shape& s = b.shape;
  const Tensor dense = torch::stable::contiguous(x);
  const Tensor y = empty_map(dense, s, s.outputs);
  dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    const InvertedResidualWeightsOf<Multiplied<T>> weights(s, b.expand, b.depthwise, b.project, act);
    inverted_residual_forward(weights, data_of<T>(dense), s.batch, s.height, s.width, mutable_data_of<T>(y));
  });
  return y;
}

// y; mean and variance of the three convolutions; then what backward needs: e or nothing, z, p, mean and covariance of x or nothing.
using Trained = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Trained inverted_residual_training(
    const Tensor& x,
    const Tensor& expand, const Tensor& expand_weight, const Tensor& expand_bias, double expand_eps,
    const Tensor& depthwise, const Tensor& depthwise_weight, const Tensor& depthwise_bias, double depthwise_eps,
    const Tensor& project, const Tensor& project_weight, const Tensor& project_bias, double project_eps,
    int64_t stride, int64_t dilation, int64_t act, bool store) {
  Block b = read_block(
      x, {expand, expand_weight, expand_bias, expand_eps}, {depthwise, depthwise_weight, depthwise_bias, depthwise_eps},
      {project, project_weight, project_bias, project_eps}, stride, dilation);
  const Shape& s = b.shape;
  STD_TORCH_CHECK(x.numel() > 0, "x must not be empty");
  const Tensor dense = torch::stable::contiguous(x);
  const Tensor y = new_output(empty_map(dense, s, s.outputs)), p = new_output(y), z = new_output(empty_map(dense, s, s.wide));
  const Tensor e = store ? new_output(torch::stable::new_empty(dense, {s.batch, s.height, s.width, s.wide}))
                         : torch::stable::new_empty(dense, {0});
  const int64_t moments = store ? 0 : s.inputs;
  const Tensor mean = torch::stable::new_empty(dense, {moments}, ScalarType::Float);
  const Tensor covariance = torch::stable::new_empty(dense, {moments, moments}, ScalarType::Double);
  dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    const Kept<T> kept{mutable_data_of<T>(e), mutable_data_of<T>(z), mutable_data_of<T>(p),
                       mutable_data_of<float>(mean), mutable_data_of<double>(covariance)};
    dispatch_activation(act, [&](auto code) { forward<T, code>(b, data_of<T>(dense), mutable_data_of<T>(y), kept); });
  });
  const auto channels = [&](const Values& v) { return write_channels(v, mean); };
  return {
      y, channels(b.expand.mean), channels(b.expand.var), channels(b.depthwise.mean), channels(b.depthwise.var),
      channels(b.project.mean), channels(b.project.var), e, z, p, mean, covariance};
}

// Gradients of x, then of weight, norm weight and norm bias of the three convolutions.
using Gradient = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradient inverted_residual_backward(
    const Tensor& dy, const Tensor& x,
    const Tensor& expand, const Tensor& expand_weight, const Tensor& expand_bias,
    const Tensor& expand_mean, const Tensor& expand_var, double expand_eps,
    const Tensor& depthwise, const Tensor& depthwise_weight, const Tensor& depthwise_bias,
    const Tensor& depthwise_mean, const Tensor& depthwise_var, double depthwise_eps,
    const Tensor& project, const Tensor& project_weight, const Tensor& project_bias,
    const Tensor& project_mean, const Tensor& project_var, double project_eps,
    const Tensor& e, const Tensor& z, const Tensor& p, const Tensor& mean, const Tensor& covariance,
    int64_t stride, int64_t dilation, int64_t act) {
  const Block b = read_block(
      x, {expand, expand_weight, expand_bias, expand_eps, &expand_mean, &expand_var},
      {depthwise, depthwise_weight, depthwise_bias, depthwise_eps, &depthwise_mean, &depthwise_var},
      {project, project_weight, project_bias, project_eps, &project_mean, &project_var}, stride, dilation);
  const Shape& s = b.shape;
  const bool stored = e.numel() > 0;
  STD_TORCH_CHECK(x.numel() > 0, "x must not be empty");
  const auto map = [&](int64_t height, int64_t width, int64_t channels) { return std::vector<int64_t>{s.batch, height, width, channels}; };
  const Tensor dense = torch::stable::contiguous(x), dense_dy = contiguous_map("dy", dy, x, map(s.out_height(), s.out_width(), s.outputs));
  const Tensor kept_e = contiguous_map("e", e, x, stored ? map(s.height, s.width, s.wide) : std::vector<int64_t>{0});
  const Tensor kept_z = contiguous_map("z", z, x, map(s.out_height(), s.out_width(), s.wide));
  const Tensor kept_p = contiguous_map("p", p, x, map(s.out_height(), s.out_width(), s.outputs));
  const int64_t moments = stored ? 0 : s.inputs;
  const Tensor kept_mean = contiguous_kept("mean", mean, {moments});
  const Tensor kept_covariance = contiguous_kept("covariance", covariance, {moments, moments}, ScalarType::Double);
  const Tensor dx = new_output(dense), filtered = new_output(kept_z), wide = stored ? new_output(kept_e) : kept_e;
  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  const Tensor dexpand = like(expand), ddepthwise = like(depthwise), dproject = like(project);
  return dispatch_dtype("x", dense, [&](auto type) {
    using T = decltype(type);
    const Kept<T> kept{mutable_data_of<T>(kept_e), mutable_data_of<T>(kept_z), mutable_data_of<T>(kept_p),
                       mutable_data_of<float>(kept_mean), mutable_data_of<double>(kept_covariance)};
    Gradients<T> out{mutable_data_of<T>(dx), dexpand, ddepthwise, dproject, {}, {}};
    dispatch_activation(act, [&](auto code) {
      backward<T, code>(b, data_of<T>(dense_dy), data_of<T>(dense), kept, mutable_data_of<T>(wide), mutable_data_of<T>(filtered), out);
    });
    return Gradient{
        dx, dexpand, write_channels(out.gammas[0], expand_weight), write_channels(out.betas[0], expand_bias),
        ddepthwise, write_channels(out.gammas[1], depthwise_weight), write_channels(out.betas[1], depthwise_bias),
        dproject, write_channels(out.gammas[2], project_weight), write_channels(out.betas[2], project_bias)};
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("inverted_residual_inference", TORCH_BOX(&mvit3::inverted_residual_inference));
  m.impl("inverted_residual_training", TORCH_BOX(&mvit3::inverted_residual_training));
  m.impl("inverted_residual_backward", TORCH_BOX(&mvit3::inverted_residual_backward));
}
