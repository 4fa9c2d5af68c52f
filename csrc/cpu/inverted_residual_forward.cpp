// inverted_residual in training, forward.

#include <cmath>

#include "inverted_residual_training.h"

namespace mvit3::inverted_residual {
namespace {

// e = x W^T and its mean and variance.
template <typename T>
void expand_stored(Block& b, const T* x, T* e) {
  using E = Multiplied<T>;
  const Shape& s = b.shape;
  const PackedWeightOf<E> weight = b.expand_weight<E>();
  const int64_t parts = count_parts(s.rows() * s.expanded), stride = tile_stride(s.expanded);
  const bool past_cache = streams(e, s.rows(), s.expanded);
  auto sums = channel_sums(parts, s.expanded);
  for_each_tile(s.rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* tile = workspace(kTileRows * (stride + lanes_of(s.inputs)));
    const RowsOf<E> in =
        as_rows(x + first * s.inputs, s.inputs, count, s.inputs, tile_of<E>(tile + kTileRows * stride));
    multiply_into(in.data, in.stride, count, weight, tile, stride);
    sums[part].add(tile, count, stride);
    store_rows(tile, stride, count, s.expanded, e + first * s.expanded, s.expanded, past_cache);
    if (past_cache) stream_fence();
  });
  ChannelSums::combine(sums, b.expand.mean, b.expand.var);
}

// Identity A: mean and variance of x W^T from the mean and the covariance of the rows of x.
template <typename T>
void expansion_moments(Block& b, const T* x, float* mean, double* covariance) {
  const Shape& s = b.shape;
  const int64_t parts = count_parts(s.rows() * s.inputs), c = s.inputs, lanes = lanes_of(c);
  auto sums = channel_sums(parts, c);
  for_each_tile(
      s.rows(), parts, [&](int64_t part, int64_t first, int64_t count) { sums[part].add(x + first * c, count, c); });
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

  // Each channel's weights as a row: its mean is their product with mu, its variance the quadratic form of the
  // covariance.
  const float* w = b.expand.matrix.data();
  const Scratch<float> scaled = units.scaled(w, s.expanded, c);
  std::fill(b.expand.var.begin(), b.expand.var.end(), 0.0);
  multiply(scaled.data(), c, s.expanded, units.pack(covariance, c), [&](int64_t channel, int64_t column, Vec product) {
    alignas(64) float values[kLanes];
    store(values, product);
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, c - column); ++i)
      b.expand.var[channel] += double(values[i]) * scaled[channel * c + column + i];
  });
  for (int64_t e = 0; e < s.expanded; ++e) {
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
  const Scratch<float> taps = pack_taps(b.depthwise.matrix.data(), s.expanded);
  const int64_t pixel = tile_stride(s.expanded), out_width = s.out_width(), d = s.dilation, slots = 2 * d + 1;
  const int64_t ranges = ranges_of(s, s.out_height()), parts = parts_for(s.batch * ranges);
  const bool past_cache = streams(kept.z, s.out_rows(), s.expanded);
  auto sums = channel_sums(parts, s.expanded);
  for_each_range(s.batch, s.out_height(), ranges, parts, [&](int64_t part, int64_t image, Range range) {
    const int64_t ring_floats = Ring::floats(slots, s.width, d, pixel);
    float* memory = workspace(ring_floats + out_width * pixel + s.width * lanes_of(s.inputs));
    float* filtered = memory + ring_floats;
    E* converted = tile_of<E>(filtered + out_width * pixel);
    const Ring ring(memory, slots, s.height, s.width, d, pixel);
    int64_t next = 0;  // the first row that the ring does not hold yet
    for (int64_t row = range.begin; row < range.end; ++row) {
      next = std::max({next, row * s.stride - d, int64_t(0)});
      for (const int64_t end = std::min(row * s.stride + d + 1, s.height); next < end; ++next) {
        const int64_t first = (image * s.height + next) * s.width;
        float* out = ring.row(next);
        if (kept.stored()) {
          const T* e = kept.e + first * s.expanded;
          Ahead ahead(
              e + s.width * s.expanded, next + 1 < s.height ? s.width * s.expanded : 0, s.width * pixel / kLanes);
          for_each_vec(s.width, s.expanded, [&](int64_t r, int64_t c) {
            store(
                out + r * pixel + c,
                activate<Act, kRoughly<E>>(norm(load_some(e + r * s.expanded + c, s.expanded - c), c)));
            ahead.step();
          });
        } else {
          const RowsOf<E> in = as_rows(x + first * s.inputs, s.inputs, s.width, s.inputs, converted);
          Ahead ahead(
              x + (first + s.width) * s.inputs, next + 1 < s.height ? s.width * s.inputs : 0, s.width * pixel / kLanes);
          multiply(in.data, in.stride, s.width, weight, [&](int64_t r, int64_t c, Vec product) {
            store(out + r * pixel + c, activate<Act, kRoughly<E>>(norm(product, c)));
            ahead.step();
          });
        }
      }
      const float* rows[3];
      for (int64_t t = 0; t < 3; ++t) rows[t] = ring.bordered(row * s.stride + (t - 1) * d);
      filter_row(
          rows, pixel, lanes_of(s.expanded), out_width, s.stride, d, taps.data(),
          [=](int64_t column, int64_t c, Vec sum) { store(filtered + column * pixel + c, sum); });
      sums[part].add(filtered, out_width, pixel);
      T* out = kept.z + (image * s.out_height() + row) * out_width * s.expanded;
      store_rows(filtered, pixel, out_width, s.expanded, out, s.expanded, past_cache);
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
  const int64_t parts = count_parts(s.out_rows() * s.expanded), stride = tile_stride(s.expanded),
                out_stride = lanes_of(s.outputs);
  auto sums = channel_sums(parts, s.outputs);
  for_each_tile(s.out_rows(), parts, [&](int64_t part, int64_t first, int64_t count) {
    float* product = workspace(kTileRows * (stride + out_stride));
    E* tile = tile_of<E>(product + kTileRows * out_stride);
    const T* values = z + first * s.expanded;
    for_each_vec(count, s.expanded, [&](int64_t r, int64_t c) {
      store(
          tile + r * stride + c,
          activate<Act, kRoughly<E>>(norm(load_some(values + r * s.expanded + c, s.expanded - c), c)));
    });
    Ahead ahead(
        values + count * s.expanded, next_tile(s.out_rows(), first, count, s.expanded), count * out_stride / kLanes);
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
void run(Block& b, const T* x, T* y, const Kept<T>& kept) {
  if (kept.stored())
    expand_stored(b, x, kept.e);
  else
    expansion_moments(b, x, kept.mean, kept.covariance);
  filter<T, Act>(b, x, kept);
  project<T, Act>(b, x, kept.z, kept.p, y);
}

}  // namespace

template <typename T>
void forward(Block& b, int64_t act, const T* x, T* y, const Kept<T>& kept) {
  dispatch_activation(act, [&](auto code) { run<T, code>(b, x, y, kept); });
}

template void forward(Block&, int64_t, const float*, float*, const Kept<float>&);
template void forward(Block&, int64_t, const BFloat16*, BFloat16*, const Kept<BFloat16>&);
template void forward(Block&, int64_t, const Float16*, Float16*, const Kept<Float16>&);

}  // namespace mvit3::inverted_residual
