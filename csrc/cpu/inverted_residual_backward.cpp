// inverted_residual in training, backward: through the last norm and the projection; through the second norm, the taps
// and the activation; through the first norm and the expansion.

#include "inverted_residual_taps.h"

namespace mvit3::inverted_residual {
namespace {

// The last norm: sums of dy and of dy * (p - mean).
template <typename T>
NormBackward last_norm_backward(const Block& b, const T* dy, const T* p) {
  const int64_t rows = b.shape.out_rows(), c = b.shape.outputs, parts = count_parts(rows * c);
  const Scratch<float> mean = b.project.means();
  auto sums = accumulators<double>(parts, 2 * lanes_of(c));
  for_each_tile(rows, parts, [&](int64_t part, int64_t first, int64_t count) {
    // A part goes on at the next tile, which its products do not hide: it is fetched as a whole.
    const int64_t after = (first + count) * c, next = next_tile(rows, first, count, c);
    Ahead(dy + after, next, 1).step();
    Ahead(p + after, next, 1).step();
    add_sum_and_dot(dy + first * c, c, p + first * c, c, mean, c, count, sums[part]);
  });
  return NormBackward::from(b.project, sums, rows);
}

// The sums of all parts as the gradient of a weight, in its own dtype; rows padded to whole vectors.
void write_matrix(const std::vector<Scratch<float>>& parts, int64_t rows, int64_t columns, const Tensor& out) {
  dispatch_dtype("gradient", out, [&](auto type) {
    add_up_rows(parts, rows, columns, lanes_of(columns), mutable_data_of<decltype(type)>(out));
  });
}

// Through the last norm, the projection and the activation: dn2, the gradient of the second norm's output, with the
// sums that this norm's own gradient needs; and the gradient of the projection's weight.
template <typename T, int Act>
NormBackward project_backward(
    const Block& b, const NormBackward& last, const T* dy, const T* z, const T* p, T* dn2, const Tensor& dweight) {
  using E = Multiplied<T>;
  const Shape& s = b.shape;
  const auto transposed = PackedWeightOf<E>::columns(b.project.matrix.data(), s.expanded, s.outputs, s.expanded);
  const ScaleShift norm = b.depthwise.affine();
  const Scratch<float> mean = b.depthwise.means();
  const int64_t parts = count_parts(s.out_rows() * s.expanded), lanes = lanes_of(s.expanded);
  const int64_t stride = tile_stride(s.expanded), out_stride = lanes_of(s.outputs);
  const bool past_cache = streams(dn2, s.out_rows(), s.expanded);
  auto sums = accumulators<double>(parts, 2 * lanes);
  OuterSumsOf<E> products(parts, s.outputs, lanes);
  for_each_tile(s.out_rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* grads = workspace(kTileRows * (out_stride + stride) + steps_floats(kTileRows, s.expanded));
    E *dp = tile_of<E>(grads + kTileRows * stride), *hidden = dp + kTileRows * out_stride;
    for_each_vec(count, s.outputs, [&](int64_t r, int64_t c) {
      const int64_t at = (first + r) * s.outputs + c, left = s.outputs - c;
      store(dp + r * out_stride + c, last(load_some(dy + at, left), load_some(p + at, left), c));
    });
    const T* values = z + first * s.expanded;
    const int64_t after = (first + count) * s.outputs, next = next_tile(s.out_rows(), first, count, s.outputs),
                  steps = count * lanes / kLanes;
    Ahead ahead_z(values + count * s.expanded, next_tile(s.out_rows(), first, count, s.expanded), steps);
    Ahead ahead_dy(dy + after, next, steps), ahead_p(p + after, next, steps);
    multiply(dp, out_stride, count, transposed, [&](int64_t r, int64_t c, Vec product) {
      store(grads + r * stride + c, product);
      ahead_z.step();
      ahead_dy.step();
      ahead_p.step();
    });
    for_each_step<E>(count, s.expanded, hidden, stride, [&](int64_t r, int64_t c) {
      const int64_t at = r * stride + c, left = s.expanded - c;
      Vec value, slope;
      activate_with_slope<Act, kRoughly<E>>(norm(load_some(values + r * s.expanded + c, left), c), value, slope);
      const Vec grad = load(grads + at) * slope;
      store(grads + at, grad);
      T* out = dn2 + (first + r) * s.expanded + c;  // beside the arithmetic: alone it would wait for memory
      past_cache ? stream(out, grad) : store_some(out, grad, left);
      return value;
    });
    if (past_cache) stream_fence();
    products.add(part, {dp, out_stride}, StepsOf<E>{hidden, stride * Dot<E>::kDepth}, count);
    add_sum_and_dot(grads, stride, values, s.expanded, mean, s.expanded, count, sums[part]);
  });
  write_matrix(products.parts(), s.outputs, s.expanded, dweight);
  return NormBackward::from(b.depthwise, sums, s.out_rows());
}

// What a part gathers where it passes the gradient of the first norm's output, dn1.
struct ExpansionSums {
  Scratch<double> taps;  // gradients of the taps, [lanes / 16][9][16]
  Scratch<double> dn1;   // sums of dn1, and of dn1 * (e - mean) where e is stored

  explicit ExpansionSums(const Shape& s) : taps(9 * lanes_of(s.expanded), 0.0), dn1(2 * lanes_of(s.expanded), 0.0) {}
};

template <typename E>
struct ExpansionGradients {
  std::vector<ExpansionSums> sums;
  OuterSumsOf<E> products;  // (x - mean)^T dn1, (inputs, lanes), where e is recomputed
};

// Through the second norm, the taps and the activation. Where e is stored, `dn1` gets the gradient of the first norm's
// output; else dx gets what the expansion's weight makes of it, without that norm's correction.
//
// A part walks down its rows in tiles of a few rows. A ring holds the rows of dz, the gradient of z, that a tile reads;
// a tile has the activated e, the activation's slopes there, and dn1.
template <typename T, int Act>
class DepthwiseBackward {
  using E = Multiplied<T>;

 public:
  DepthwiseBackward(
      const Block& b, const NormBackward& middle, const T* x, const Kept<T>& kept, const NormGradients<T>& grads, T* dx)
      : s_(b.shape), middle_(middle), x_(x), kept_(kept), grads_(grads), dx_(dx), norm_(b.expand.affine()),
        expand_(b.expand_weight<E>()), back_(scaled_transpose(b, norm_)),
        taps_(pack_taps(b.depthwise.matrix.data(), s_.expanded)), mean_(b.expand.means()),
        pixel_(tile_stride(s_.expanded)), in_stride_(lanes_of(s_.inputs)),
        past_cache_(kept.stored() && streams(grads.of_e, s_.rows(), s_.expanded)) {}

  ExpansionGradients<E> run() const {
    const int64_t ranges = ranges_of(s_, s_.height), parts = parts_for(s_.batch * ranges);
    ExpansionGradients<E> out{{}, OuterSumsOf<E>(parts, kept_.stored() ? 0 : s_.inputs, lanes_of(s_.expanded))};
    out.sums.reserve(parts);
    for (int64_t i = 0; i < parts; ++i) out.sums.emplace_back(s_);
    for_each_range(s_.batch, s_.height, ranges, parts, [&](int64_t part, int64_t image, Range range) {
      walk(part, image, range, out);
      if (past_cache_) stream_fence();
    });
    return out;
  }

 private:
  // Rows first..last-1 of an image; `next` is the row of dz that its tile needs last, and one more.
  struct Tile {
    int64_t part, image, first, last, next;
  };

  // A thread's memory for a tile: the activated e and the slopes there, dn1; and where e is recomputed, dn1 times the
  // weight, and x and x - mean as operands.
  struct Buffers {
    float *values, *slopes, *grads, *product;
    E *in, *centred;

    Buffers(float* memory, int64_t expanded, int64_t inputs)
        : values(memory), slopes(values + expanded), grads(slopes + expanded), product(grads + expanded),
          in(tile_of<E>(product + inputs)), centred(in + inputs) {}
  };

  // What the next tile reads, on its way into the cache while this one is computed.
  struct NextTile {
    Ahead dn2, z, in;  // in: e where it is stored, else x

    MVIT3_INLINE void step() {
      dn2.step();
      z.step();
      in.step();
    }
  };

  // diag(scale) W, from the expanded channels back to the inputs.
  static PackedWeightOf<E> scaled_transpose(const Block& b, const ScaleShift& norm) {
    const int64_t inputs = b.shape.inputs;
    const float *w = b.expand.matrix.data(), *scale = norm.scale.data();
    return PackedWeightOf<E>(
        inputs, b.shape.expanded, [=](int64_t i, int64_t e) { return w[e * inputs + i] * scale[e]; });
  }

  // The rows of z that read rows before `last` end here.
  int64_t rows_of_z(int64_t last) const { return std::min((last - 1 + s_.dilation) / s_.stride + 1, s_.out_height()); }

  void walk(int64_t part, int64_t image, Range range, ExpansionGradients<E>& out) const {
    const int64_t row_floats = s_.width * pixel_, d = s_.dilation;
    const int64_t rows =
        std::clamp<int64_t>(kTileFloats / (3 * row_floats), std::min<int64_t>(s_.stride, range.size()), range.size());
    const int64_t slots = (rows + 2 * d) / s_.stride + 2, ring_floats = Ring::floats(slots, s_.out_width(), d, pixel_);
    float* memory = workspace(ring_floats + 3 * rows * row_floats + 3 * rows * s_.width * in_stride_);
    const Buffers buffers(memory + ring_floats, rows * row_floats, rows * s_.width * in_stride_);
    const Ring ring(memory, slots, s_.out_height(), s_.out_width(), d, pixel_);
    const TapsBackward taps_backward(s_, taps_, ring);
    int64_t next = 0;  // the first row of dz that the ring does not hold yet
    for (int64_t first = range.begin; first < range.end; first += rows) {
      const int64_t last = std::min(first + rows, range.end);
      next = std::max({next, (first - d) / s_.stride, int64_t(0)});
      for (const int64_t end = rows_of_z(last); next < end; ++next) fill(ring, image, next);
      const Tile tile{part, image, first, last, next};
      const RowsOf<E> in = activate(tile, std::min(rows, range.end - last), buffers);
      for (int64_t row = first; row < last; ++row) {
        const int64_t at = (row - first) * row_floats;
        taps_backward.run(row, buffers.values + at, buffers.slopes + at, buffers.grads + at, out.sums[part].taps);
      }
      if (kept_.stored())
        finish_stored(tile, buffers, out);
      else
        finish_recomputed(tile, in, buffers, out);
    }
  }

  // A row of dz from those of dn2 and z.
  void fill(const Ring& ring, int64_t image, int64_t row) const {
    float* out = ring.row(row);
    const int64_t at = (image * s_.out_height() + row) * s_.out_width() * s_.expanded;
    const T *grad = grads_.of_z + at, *value = kept_.z + at;
    for_each_vec(s_.out_width(), s_.expanded, [&](int64_t r, int64_t i) {
      const int64_t left = s_.expanded - i, from = r * s_.expanded + i;
      store(out + r * pixel_ + i, middle_(load_some(grad + from, left), load_some(value + from, left), i));
    });
  }

  int64_t start(const Tile& tile) const { return tile.image * s_.pixels() + tile.first * s_.width; }
  int64_t pixels(const Tile& tile) const { return (tile.last - tile.first) * s_.width; }

  NextTile ahead(const Tile& tile, int64_t next_rows) const {
    const int64_t steps = pixels(tile) * pixel_ / kLanes, next_pixels = next_rows * s_.width;
    const int64_t rows = next_rows > 0 ? rows_of_z(tile.last + next_rows) - tile.next : 0;
    const int64_t at = (tile.image * s_.out_height() + tile.next) * s_.out_width() * s_.expanded,
                  count = rows * s_.out_width() * s_.expanded, first = start(tile) + pixels(tile);
    return {
        Ahead(grads_.of_z + at, count, steps), Ahead(kept_.z + at, count, steps),
        kept_.stored() ? Ahead(kept_.e + first * s_.expanded, next_pixels * s_.expanded, steps)
                       : Ahead(x_ + first * s_.inputs, next_pixels * s_.inputs, steps)};
  }

  // The activated e and the slopes there, of the stored e or made again. Returns the rows of x as the product's
  // operand, for the latter.
  RowsOf<E> activate(const Tile& tile, int64_t next_rows, const Buffers& to) const {
    const int64_t pixels = this->pixels(tile), pixel = pixel_, inputs = s_.inputs, expanded = s_.expanded;
    float *values = to.values, *slopes = to.slopes;
    NextTile next = ahead(tile, next_rows);
    const auto activate_both = [&](int64_t r, int64_t i, Vec v) {
      Vec value, slope;
      activate_with_slope<Act, kRoughly<E>>(norm_(v, i), value, slope);
      store(values + r * pixel + i, value);
      store(slopes + r * pixel + i, slope);
      next.step();
    };
    if (kept_.stored()) {
      const T* e = kept_.e + start(tile) * expanded;
      for_each_vec(pixels, expanded, [&](int64_t r, int64_t i) {
        activate_both(r, i, load_some(e + r * expanded + i, expanded - i));
      });
      return {};
    }
    const RowsOf<E> in = as_rows(x_ + start(tile) * inputs, inputs, pixels, inputs, to.in);
    multiply(in.data, in.stride, pixels, expand_, activate_both);
    return in;
  }

  void finish_stored(const Tile& tile, const Buffers& from, ExpansionGradients<E>& out) const {
    const int64_t pixels = this->pixels(tile), expanded = s_.expanded, at = start(tile) * expanded;
    add_sum_and_dot(from.grads, pixel_, kept_.e + at, expanded, mean_, expanded, pixels, out.sums[tile.part].dn1);
    store_rows(from.grads, pixel_, pixels, expanded, grads_.of_e + at, expanded, past_cache_);
  }

  void finish_recomputed(const Tile& tile, RowsOf<E> in, const Buffers& from, ExpansionGradients<E>& out) const {
    const int64_t pixels = this->pixels(tile), inputs = s_.inputs;
    double* sums = out.sums[tile.part].dn1.data();
    for (int64_t i = 0; i < s_.expanded; i += kLanes)
      for_each_run(pixels, [&](int64_t begin, int64_t end) {
        Vec sum = 0.0f;
        for (int64_t r = begin; r < end; ++r) sum += load(from.grads + r * pixel_ + i);
        accumulate(sums + i, sum);
      });
    for_each_vec(pixels, inputs, [&](int64_t r, int64_t i) {
      const Vec value = load_some(in.data + r * in.stride + i, inputs - i);
      store(from.centred + r * in_stride_ + i, value - load_some(kept_.mean + i, inputs - i));
    });
    // In the place of the activated e, which is read.
    const RowsOf<E> dn1 = as_rows(from.grads, pixel_, pixels, s_.expanded, tile_of<E>(from.values));
    out.products.add(tile.part, {from.centred, in_stride_}, dn1, pixels);
    multiply_into(dn1.data, dn1.stride, pixels, back_, from.product, in_stride_);
    store_rows(from.product, in_stride_, pixels, inputs, dx_ + start(tile) * inputs, inputs);
  }

  const Shape& s_;
  const NormBackward& middle_;
  const T* x_;
  const Kept<T>& kept_;
  const NormGradients<T>& grads_;
  T* dx_;
  const ScaleShift norm_;
  const PackedWeightOf<E> expand_, back_;
  const Scratch<float> taps_, mean_;
  const int64_t pixel_, in_stride_;
  const bool past_cache_;
};

// Stored: through the first norm and the expansion.
template <typename T>
void expand_backward(
    const Block& b, const NormBackward& norm, const T* dy, const T* x, const T* e, const T* dn1, T* dx,
    const Tensor& dweight) {
  using E = Multiplied<T>;
  const Shape& s = b.shape;
  const auto transposed = PackedWeightOf<E>::columns(b.expand.matrix.data(), s.inputs, s.expanded, s.inputs);
  const int64_t parts = count_parts(s.rows() * s.expanded), stride = tile_stride(s.expanded),
                in_lanes = lanes_of(s.inputs), in_stride = tile_stride(s.inputs), depth = Dot<E>::kDepth;
  OuterSumsOf<E> products(parts, s.expanded, in_lanes);
  for_each_tile(s.rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* grads = workspace((2 * kTileRows + 1) * stride + 2 * kTileRows * in_stride);
    E *de = tile_of<E>(grads + kTileRows * in_stride), *converted = de + kTileRows * stride;
    E* steps_of_de = depth > 1 ? converted + kTileRows * in_stride : de;  // both operands from one walk
    for_each_step<E>(count, s.expanded, steps_of_de, stride, [&](int64_t r, int64_t c) {
      const int64_t at = (first + r) * s.expanded + c, left = s.expanded - c;
      const Vec value = norm(load_some(dn1 + at, left), load_some(e + at, left), c);
      if (depth > 1) store(de + r * stride + c, value);
      return value;
    });
    load_rows(x + first * s.inputs, s.inputs, count, s.inputs, converted, in_stride);
    products.add(part, StepsOf<E>{steps_of_de, stride * depth}, {converted, in_stride}, count);
    const int64_t after = (first + count) * s.expanded, next = next_tile(s.rows(), first, count, s.expanded),
                  steps = count * in_lanes / kLanes;
    Ahead ahead_dn1(dn1 + after, next, steps), ahead_e(e + after, next, steps);
    multiply(de, stride, count, transposed, [&](int64_t r, int64_t c, Vec product) {
      store(grads + r * in_stride + c, product);
      ahead_dn1.step();
      ahead_e.step();
    });
    for_each_vec(count, s.inputs, [&](int64_t r, int64_t c) {
      const int64_t at = (first + r) * s.inputs + c, left = s.inputs - c;
      Vec value = load(grads + r * in_stride + c);
      if (s.skip()) value += load_some(dy + at, left);
      store_some(dx + at, value, left);
    });
  });
  write_matrix(products.parts(), s.expanded, s.inputs, dweight);
}

// Recomputed, identity B: the gradients of the expansion and its norm from the sums, and the correction of dx, which
// reads and writes maps of `inputs` channels alone. Returns the gradient of the norm's weight.
template <typename T>
Values correct_expansion(
    const Block& b, const std::vector<Scratch<float>>& sums, const Values& dnorm_bias, const T* dy, const T* x,
    const Kept<T>& kept, T* dx, const Tensor& dexpand) {
  const Shape& s = b.shape;
  const ConvNorm& expand = b.expand;
  const int64_t c = s.inputs, lanes = lanes_of(s.expanded), in_lanes = lanes_of(c);
  const double rows = double(s.rows());
  const Values products = add_up(sums, c * lanes);
  const float* w = expand.matrix.data();
  Values dnorm_weight(s.expanded, 0.0);
  for (int64_t e = 0; e < s.expanded; ++e) {
    for (int64_t i = 0; i < c; ++i) dnorm_weight[e] += w[e * c + i] * products[i * lanes + e];
    dnorm_weight[e] *= expand.rstd(e);
  }
  // dW = norm_weight r (products - dnorm_weight r W S)
  std::vector<Scratch<float>> dweight = accumulators<float>(1, s.expanded * in_lanes);
  const Covariance units(kept.covariance, c, c + 1);
  const Scratch<float> in_units = units.scaled(w, s.expanded, c);
  multiply(in_units.data(), c, s.expanded, units.pack(kept.covariance, c), [&](int64_t e, int64_t column, Vec product) {
    float* values = dweight[0].data() + e * in_lanes + column;
    store(values, product);
    const double r = expand.rstd(e), scale = expand.weight[e] * r;
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, c - column); ++i)
      values[i] = float(
          scale * (products[(column + i) * lanes + e] - dnorm_weight[e] * r * units.unit(column + i) * values[i]));
  });
  write_matrix(dweight, s.expanded, c, dexpand);

  // dx -= (x - mean) K + shift, with K = W^T diag(norm_weight r^2 dnorm_weight / M) W and shift = (norm_weight r
  // dnorm_bias / M) W. K holds the inverse of a variance: where that is extreme, the two factors of the product meet in
  // the middle.
  const float unit = units.largest(), per_unit = 1 / unit;
  Scratch<float> scaled(s.expanded * in_lanes, 0.0f), k(c * in_lanes, 0.0f), shift(in_lanes, 0.0f),
      centre(in_lanes, 0.0f);
  Values shift64(c, 0.0);
  for (int64_t e = 0; e < s.expanded; ++e) {
    const double r = expand.rstd(e), scale = expand.weight[e] * r;
    for (int64_t i = 0; i < c; ++i) {
      scaled[e * in_lanes + i] = float(scale * r * unit * dnorm_weight[e] / rows * w[e * c + i]);
      shift64[i] += scale * dnorm_bias[e] / rows * w[e * c + i];
    }
  }
  for (int64_t i = 0; i < c; ++i) {
    shift[i] = float(shift64[i]);
    centre[i] = kept.mean[i];
  }
  add_outer(w, c, c, scaled.data(), in_lanes, in_lanes, s.expanded, k.data(), in_lanes);
  const PackedWeight correction = PackedWeight::columns(k.data(), c, c, in_lanes);
  for_each_tile(s.rows(), count_parts(s.rows() * c), [&](int64_t, int64_t first, int64_t count) {
    float* tile = workspace(kTileRows * in_lanes);
    for_each_vec(count, c, [&](int64_t r, int64_t i) {
      store(tile + r * in_lanes + i, (load_some(x + (first + r) * c + i, c - i) - load(centre.data() + i)) * per_unit);
    });
    const int64_t after = (first + count) * c, next = next_tile(s.rows(), first, count, c),
                  steps = count * in_lanes / kLanes;
    Ahead ahead_x(x + after, next, steps), ahead_dx(dx + after, next, steps),
        ahead_dy(dy + after, s.skip() ? next : 0, steps);
    multiply(tile, in_lanes, count, correction, [&](int64_t r, int64_t i, Vec product) {
      const int64_t at = (first + r) * c + i, left = c - i;
      Vec value = load_some(dx + at, left) - load(shift.data() + i) - product;
      if (s.skip()) value += load_some(dy + at, left);
      store_some(dx + at, value, left);
      ahead_x.step();
      ahead_dx.step();
      ahead_dy.step();
    });
  });
  return dnorm_weight;
}

void write_taps(const std::vector<ExpansionSums>& sums, int64_t channels, const Tensor& out) {
  Values total(channels * 9, 0.0);
  for (const ExpansionSums& part : sums)
    for (int64_t e = 0; e < channels; ++e)
      for (int64_t t = 0; t < 9; ++t) total[e * 9 + t] += part.taps[(e / kLanes * 9 + t) * kLanes + e % kLanes];
  dispatch_dtype("gradient", out, [&](auto type) {
    using T = decltype(type);
    T* data = mutable_data_of<T>(out);
    for (int64_t i = 0; i < channels * 9; ++i) data[i] = from_float<T>(float(total[i]));
  });
}

template <typename T, int Act>
void run(
    const Block& b, const T* dy, const T* x, const Kept<T>& kept, const NormGradients<T>& memory, T* dx,
    Gradients& out) {
  const Shape& s = b.shape;
  const NormBackward last = last_norm_backward(b, dy, kept.p);
  const NormBackward middle = project_backward<T, Act>(b, last, dy, kept.z, kept.p, memory.of_z, out.project);
  auto expansion = DepthwiseBackward<T, Act>(b, middle, x, kept, memory, dx).run();
  const int64_t lanes = lanes_of(s.expanded);
  Values total(2 * lanes, 0.0);
  for (const ExpansionSums& part : expansion.sums)
    for (int64_t i = 0; i < 2 * lanes; ++i) total[i] += part.dn1[i];
  const auto at = [&](int64_t i) { return total.begin() + i; };
  out.norm_biases[0].assign(at(0), at(s.expanded));
  if (kept.stored()) {
    const NormBackward first(b.expand, out.norm_biases[0], Values(at(lanes), at(lanes + s.expanded)), double(s.rows()));
    expand_backward(b, first, dy, x, kept.e, memory.of_e, dx, out.expand);
    out.norm_weights[0] = first.dweight;
  } else {
    out.norm_weights[0] =
        correct_expansion(b, expansion.products.parts(), out.norm_biases[0], dy, x, kept, dx, out.expand);
  }
  write_taps(expansion.sums, s.expanded, out.depthwise);
  out.norm_weights[1] = middle.dweight;
  out.norm_biases[1] = middle.dbias;
  out.norm_weights[2] = last.dweight;
  out.norm_biases[2] = last.dbias;
}

}  // namespace

template <typename T>
void backward(
    const Block& b, int64_t act, const T* dy, const T* x, const Kept<T>& kept, const NormGradients<T>& memory, T* dx,
    Gradients& out) {
  dispatch_activation(act, [&](auto code) { run<T, code>(b, dy, x, kept, memory, dx, out); });
}

#define MVIT3_BACKWARD(T) \
  template void backward( \
      const Block&, int64_t, const T*, const T*, const Kept<T>&, const NormGradients<T>&, T*, Gradients&);
MVIT3_BACKWARD(float)
MVIT3_BACKWARD(BFloat16)
MVIT3_BACKWARD(Float16)
#undef MVIT3_BACKWARD

}  // namespace mvit3::inverted_residual
