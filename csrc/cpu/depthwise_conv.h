// Depth-wise 3x3 convolution on NHWC maps: what its kernels, the inverted residual and the inference engine share.
//
// The channels are the lanes: a walk down a row of the output keeps the nine taps of sixteen channels and the 3x3 window of the input in
// registers, so a pixel of the input is read once a row. Zero padding is index arithmetic: a row outside of the map is one vector of
// zeros with step 0, a column outside of it a zero register.
#pragma once

#include <numeric>

#include "norm.h"

namespace mvit3 {

struct DepthwiseGeometry {
  int64_t batch, height, width, channels, stride, dilation;

  int64_t out_height() const { return (height + stride - 1) / stride; }
  int64_t out_width() const { return (width + stride - 1) / stride; }
  int64_t out_rows() const { return batch * out_height(); }  // of pixels, over all images
  int64_t row_size() const { return width * channels; }
  int64_t out_row_size() const { return out_width() * channels; }
  int64_t lanes() const { return lanes_of(channels); }

  // Output columns that lie `classes` apart share inputs: the window moves by `shift` of its own columns from one to the next.
  int64_t shift() const { return stride / std::gcd(stride, dilation); }
  int64_t classes() const { return dilation / std::gcd(stride, dilation); }
};

// The taps of 3x3 weights (channels, 1, 3, 3), times a scale of each channel where one is given: [channels / 16][9][16].
inline Scratch<float> pack_taps(const float* weight, int64_t channels, const float* scale = nullptr) {
  Scratch<float> taps(lanes_of(channels) * 9, 0.0f);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < 9; ++t) taps[(c / kLanes * 9 + t) * kLanes + c % kLanes] = weight[c * 9 + t] * (scale ? scale[c] : 1.0f);
  return taps;
}

// Calls f(first channel, std::true_type) for every sixteen channels, with std::false_type where there are fewer.
template <typename F>
MVIT3_INLINE void for_each_lanes(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, std::true_type{});
  if (c < channels) f(c, std::false_type{});
}

template <bool Whole, typename T>
MVIT3_INLINE Vec load_lanes(const T* p, int64_t left) {
  if constexpr (Whole) return load(p);
  return load_some(p, left);
}

template <bool Whole, typename T>
MVIT3_INLINE void store_lanes(T* p, Vec v, int64_t left, bool past_cache = false) {
  if constexpr (!Whole)
    store_some(p, v, left);
  else if (past_cache)
    stream(p, v);
  else
    store(p, v);
}

// Whether an output of rows of `channels` is written past the cache: it is large, and a vector is a whole cache line of it.
template <typename T>
bool writes_past_cache(const T* out, int64_t elements, int64_t channels) {
  return sizeof(T) == sizeof(float) && channels % kLanes == 0 && is_aligned(out) && exceeds_cache(elements * int64_t(sizeof(T)));
}

template <typename T>
alignas(64) inline constexpr T kZeroLanes[kLanes] = {};

// The three rows of a map x that an output row reads.
template <typename T>
struct Window {
  const T *row[3], *ahead[2];  // `ahead` will be read by the next output row for the first time
  int64_t step[3];             // from a column to the next: 0 in a row outside of the map

  // Row `index` of all images' output rows; the next one will be `index` + `direction`.
  Window(const DepthwiseGeometry& g, const T* x, int64_t index, int64_t direction = 1) {
    const int64_t out_row = index % g.out_height();
    const T* first = x + index / g.out_height() * g.height * g.row_size();
    for (int64_t t = 0; t < 3; ++t) {
      const int64_t i = out_row * g.stride + (t - 1) * g.dilation;
      const bool inside = 0 <= i && i < g.height;
      row[t] = inside ? first + i * g.row_size() : kZeroLanes<T>;
      step[t] = inside ? g.channels : 0;
    }
    for (int64_t t = 0; t < 2; ++t) ahead[t] = first + ((out_row + direction) * g.stride + direction * (1 - t) * g.dilation) * g.row_size();
  }
};

// f(output column, filtered value) for `columns` columns of an output row, at the sixteen channels from `channel`. The value is
// start + the sum of the taps.
template <int Shift, bool Whole, typename T, typename F>
MVIT3_INLINE void filter_row(const DepthwiseGeometry& g, const Window<T>& in, const Scratch<float>& taps, int64_t channel, Vec start, int64_t columns, const F& f) {
  const int64_t left = g.channels - channel, classes = g.classes();
  Vec w[9];
  for (int t = 0; t < 9; ++t) w[t] = load(taps.data() + channel * 9 + t * kLanes);
  const T* rows[3];
  for (int t = 0; t < 3; ++t) rows[t] = in.step[t] ? in.row[t] + channel : in.row[t];
  Vec window[3][3];  // [column][row]
  const auto read = [&](int64_t column, Vec(&to)[3]) {
    if (column < 0 || column >= g.width) {
      for (int t = 0; t < 3; ++t) to[t] = 0.0f;
      return;
    }
    for (int t = 0; t < 3; ++t) to[t] = load_lanes<Whole>(rows[t] + column * in.step[t], left);
    for (int t = 0; t < Shift; ++t) prefetch(in.ahead[t] + column * g.channels + channel);
  };
  for (int64_t first = 0; first < std::min(classes, columns); ++first) {
    for (int k = Shift; k < 3; ++k) read(first * g.stride + (k - Shift - 1) * g.dilation, window[k]);
    for (int64_t column = first; column < columns; column += classes) {
      for (int k = 0; k < 3 - Shift; ++k)
        for (int t = 0; t < 3; ++t) window[k][t] = window[k + Shift][t];
      for (int k = 3 - Shift; k < 3; ++k) read(column * g.stride + (k - 1) * g.dilation, window[k]);
      Vec sum = start;
      for (int t = 0; t < 9; ++t) sum = fma(window[t % 3][t / 3], w[t], sum);
      f(column, sum);
    }
  }
}

// Calls f with the geometry's shift as a compile-time constant.
template <typename F>
void dispatch_shift(const DepthwiseGeometry& g, const F& f) {
  if (g.shift() == 1)
    f(std::integral_constant<int, 1>{});
  else
    f(std::integral_constant<int, 2>{});
}

// Convolution and norm together: act(taps * x + shift).
struct DepthwiseWeights {
  Scratch<float> taps, shift;

  DepthwiseWeights(const float* weight, int64_t channels, ScaleShift norm)
      : taps(pack_taps(weight, channels, norm.scale.data())), shift(std::move(norm.shift)) {}
};

// y = act(norm(conv(x))) in one pass.
template <int Act, typename T>
void depthwise_conv(const DepthwiseGeometry& g, const DepthwiseWeights& weights, const T* x, T* y) {
  const int64_t parts = count_parts(g.out_rows() * g.out_row_size());
  const bool past_cache = writes_past_cache(y, g.out_rows() * g.out_row_size(), g.channels);
  dispatch_shift(g, [&](auto shift) {
    for_each_part(parts, [&](int64_t part) {
      const Range range = part_range(g.out_rows(), part, parts);
      for (int64_t row = range.begin; row < range.end; ++row) {
        const Window<T> window(g, x, row);
        T* out = y + row * g.out_row_size();
        for_each_lanes(g.channels, [&](int64_t c, auto whole) {
          filter_row<shift, whole>(g, window, weights.taps, c, load(weights.shift.data() + c), g.out_width(), [&](int64_t column, Vec value) {
            store_lanes<whole>(out + column * g.channels + c, activate<Act>(value), g.channels - c, past_cache);
          });
        });
      }
      if (past_cache) stream_fence();
    });
  });
}

}  // namespace mvit3
