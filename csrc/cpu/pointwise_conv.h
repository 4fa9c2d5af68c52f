// 1x1 convolution of one input or of two, forward: y = dropout(act(norm(W_a a + W_b b + bias))) + residual.
//
// The two inputs are the halves of a concatenation that is built for a tile of rows at a time, in cache: that costs a
// copy of the tile, one part in hundreds of its product, and lets one packed weight and one loop serve both ops.
#pragma once

#include "norm.h"
#include "random.h"

namespace mvit3 {

// Rows of a, or of a|b where there is a second input, as products of E read them.
template <typename T, typename E = Multiplied<T>>
struct PointwiseInputs {
  const T *a, *b;
  int64_t a_channels, b_channels;

  int64_t channels() const { return a_channels + b_channels; }
  int64_t stride() const { return lanes_of(channels()); }
  // Of a tile for `rows`. Padding a row of b may run into the next row, before that is written, and behind the last
  // one.
  int64_t tile_floats(int64_t rows) const { return rows * stride() + kLanes; }

  // Rows padded to whole vectors with zeros: where they lie, if they are such rows, or in `tile`.
  RowsOf<E> rows(int64_t first, int64_t count, E* tile) const {
    if constexpr (std::is_same_v<T, E>)
      if (!b && a_channels % kLanes == 0) return {a + first * a_channels, a_channels};
    for (int64_t r = 0; r < count; ++r) {
      load_rows(a + (first + r) * a_channels, 0, 1, a_channels, tile + r * stride(), 0);
      if (b) load_rows(b + (first + r) * b_channels, 0, 1, b_channels, tile + r * stride() + a_channels, 0);
    }
    return {tile, stride()};
  }
};

// out = x W^T + bias, dense rows of any storage type; `tile` takes them in float32 where they cannot be written at
// once. `bias` may be null, and is padded to whole vectors.
template <typename E, typename T>
void multiply_to(
    RowsOf<E> x, int64_t rows, const PackedWeightOf<E>& weight, T* out, float* tile, const float* bias = nullptr) {
  const int64_t channels = weight.outputs(), stride = lanes_of(channels);
  if constexpr (std::is_same_v<T, float>)
    if (channels == stride && !bias) return multiply_into(x.data, x.stride, rows, weight, out, stride);
  multiply_into(x.data, x.stride, rows, weight, tile, stride);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += kLanes) {
      const Vec sum = load(tile + r * stride + c);
      store_some(out + r * channels + c, bias ? sum + load(bias + c) : sum, channels - c);
    }
}

// y = mask * act(affine(product)) + residual for some channels of rows of the product, which lie `stride` apart; y and
// residual are dense. What follows a product is a walk of its own over a tile in second-level cache: it costs a few
// cycles beside the hundreds of a sum over 128 and more inputs, and reads the residual in order.
template <int Act, typename U, typename T, typename Mask = NoMask>
void finish_rows(
    const U* product, int64_t stride, int64_t rows, Range columns, int64_t channels, const ScaleShift& affine,
    const T* residual, T* y, const Mask& mask = {}) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = columns.begin; c < columns.end; c += kLanes) {
      const int64_t left = channels - c, at = r * channels + c;
      Vec value = mask(activate<Act>(affine(load_some(product + r * stride + c, left), c)), r, c);
      if (residual) value += load_some(residual + at, left);
      store_some(y + at, value, left);
    }
}

// What does not change from call to call.
template <typename E>
struct PointwiseWeightsOf {
  PackedWeightOf<E> weight;  // (outputs, channels of a and of b)
  ScaleShift affine;         // bias and norm
};

// What follows the activation: a dropout that counts the elements of samples of so many rows.
struct MapDropout {
  Dropout dropout;
  int64_t rows_per_sample = 1;

  TileMask of_tile(int64_t first, int64_t count, int64_t channels) const {
    return {dropout, first, count, rows_per_sample, channels};
  }
};

// Where the product needs no pass of its own.
template <int Act, typename E, typename T>
void pointwise_conv(
    const PointwiseWeightsOf<E>& weights, const PointwiseInputs<T, E>& x, const T* residual, T* y, int64_t rows,
    const MapDropout& dropout = {}) {
  const int64_t outputs = weights.weight.outputs(), stride = lanes_of(outputs);
  for_each_block(rows, weights.weight, [&](Range mine, Range panels) {
    float* product = workspace(kTileRows * stride + x.tile_floats(kTileRows));
    const Range columns{panels.begin * kPanel, std::min(panels.end * kPanel, outputs)};
    for (int64_t first = mine.begin; first < mine.end; first += kTileRows) {
      const int64_t count = std::min(kTileRows, mine.end - first), at = first * outputs;
      const auto in = x.rows(first, count, tile_of<E>(product + kTileRows * stride));
      if (Act == kIdentity && !residual && !dropout.dropout.active()) {  // nothing to read: straight from the product
        multiply(in.data, in.stride, count, weights.weight, panels, [&](int64_t r, int64_t c, Vec sums) {
          store_some(y + at + r * outputs + c, weights.affine(sums, c), outputs - c);
        });
        continue;
      }
      multiply_into(in.data, in.stride, count, weights.weight, panels, product, stride);
      finish_rows<Act>(
          product, stride, count, columns, outputs, weights.affine, residual ? residual + at : nullptr, y + at,
          dropout.of_tile(first, count, outputs));
    }
  });
}

// How many parts a product of this size is worth.
template <typename E>
int64_t product_parts(int64_t rows, const PackedWeightOf<E>& weight) {
  return count_parts(rows * weight.outputs() * std::max<int64_t>(weight.inputs(), 1), 1 << 18);
}

}  // namespace mvit3
