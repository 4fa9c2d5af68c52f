// The gradient of a depth-wise 3x3 convolution on rows in cache.
#pragma once

#include "inverted_residual_training.h"

namespace mvit3::inverted_residual {

// From `ring`, which holds the gradient of z, to the rows of the activated e.
class TapsBackward {
 public:
  TapsBackward(const Shape& s, const Scratch<float>& taps, const Ring& ring)
      : s_(s), lanes_(lanes_of(s.expanded)), pixel_(tile_stride(s.expanded)), taps_(taps), ring_(ring) {}

  // `values` is a row of the activated e and `slopes` the activation's derivative there. Writes the gradient
  // before the activation to `grads` and adds that of the taps, [channels / 16][9][16].
  void run(int64_t row, const float* values, const float* slopes, float* grads, Scratch<double>& dtaps) const {
    const bool halves = s_.stride == 2 && s_.dilation == 1;
    for (int64_t c = 0; c < lanes_; c += kLanes) {
      Taps taps(taps_.data() + c * 9);
      const Row pixels{values + c, slopes + c, grads + c, pixel_};
      if (s_.stride == 1)
        dense(row, c, pixels, taps);
      else if (halves && row % 2 == 0)
        pairs<1>(row, c, pixels, taps);
      else if (halves)
        pairs<2>(row, c, pixels, taps);
      else
        any(row, c, pixels, taps);
      for (int t = 0; t < 9; ++t) accumulate(dtaps.data() + c * 9 + t * kLanes, taps.dw[t]);
    }
  }

 private:
  // Sixteen channels of a row of the map: the activated e, the slopes and the gradients.
  struct Row {
    const float *values, *slopes;
    float* grads;
    int64_t pixel;

    MVIT3_INLINE Vec value(int64_t column) const { return load(values + column * pixel); }
    MVIT3_INLINE void finish(int64_t column, Vec sum) const {
      store(grads + column * pixel, sum * load(slopes + column * pixel));
    }
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
  void dense(int64_t row, int64_t c, const Row& pixels, Taps& taps) const {
    const int64_t step = s_.dilation * pixel_;
    const float* grads[3];
    for (int t = 0; t < 3; ++t) grads[t] = ring_.bordered(row - (t - 1) * s_.dilation) + c;
    for (int64_t column = 0; column < s_.width; ++column) {
      const Vec value = pixels.value(column);
      Vec sum = 0.0f;
      for (int t = 0; t < 9; ++t) taps.pull(t, grads[t / 3] + column * pixel_ + (2 - t % 3) * step, value, sum);
      pixels.finish(column, sum);
    }
  }

  // Stride 2: one row of taps reads a pixel of an even row and two read one of an odd row; the same for columns.
  template <int TapRows>
  void pairs(int64_t row, int64_t c, const Row& pixels, Taps& taps) const {
    constexpr int kFirst = TapRows == 1 ? 3 : 0;
    const float* grads[TapRows];
    for (int i = 0; i < TapRows; ++i)
      grads[i] = ring_.bordered(TapRows == 1 ? row / 2 : (row + 1) / 2 - i) + pixel_ + c;
    for (int64_t column = 0; column < s_.width; ++column) {
      Vec value = pixels.value(column), sum = 0.0f;
      for (int i = 0; i < TapRows; ++i) taps.pull(kFirst + 6 * i + 1, grads[i] + column / 2 * pixel_, value, sum);
      pixels.finish(column, sum);
      if (++column == s_.width) break;
      value = pixels.value(column);
      sum = 0.0f;
      for (int i = 0; i < TapRows; ++i) {
        taps.pull(kFirst + 6 * i, grads[i] + (column / 2 + 1) * pixel_, value, sum);
        taps.pull(kFirst + 6 * i + 2, grads[i] + column / 2 * pixel_, value, sum);
      }
      pixels.finish(column, sum);
    }
  }

  // Any stride and dilation: every tap asks whether there is an output at its other end.
  void any(int64_t row, int64_t c, const Row& pixels, Taps& taps) const {
    for (int64_t column = 0; column < s_.width; ++column) {
      const Vec value = pixels.value(column);
      Vec sum = 0.0f;
      for (int t = 0; t < 9; ++t) {
        const int64_t y = row - (t / 3 - 1) * s_.dilation, x = column - (t % 3 - 1) * s_.dilation;
        if (y < 0 || x < 0 || y % s_.stride || x % s_.stride || y / s_.stride >= s_.out_height() ||
            x / s_.stride >= s_.out_width())
          continue;
        taps.pull(t, ring_.row(y / s_.stride) + x / s_.stride * pixel_ + c, value, sum);
      }
      pixels.finish(column, sum);
    }
  }

  const Shape& s_;
  const int64_t lanes_, pixel_;
  const Scratch<float>& taps_;
  const Ring& ring_;
};

}  // namespace mvit3::inverted_residual
