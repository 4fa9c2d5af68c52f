// y = x + dropout(W2 dropout(SiLU(W1 norm(x) + b1)) + b2). The hidden tensor exists in tiles only, unless training
// keeps it.
#pragma once

#include "activation.h"
#include "norm_linear.h"
#include "random.h"

namespace mvit3 {

// What the forward pass reads: packed once for a version of the parameters.
template <typename E>
struct FeedForwardWeightsOf {
  NormLinearWeightsOf<E> first;
  PackedWeightOf<E> second;
  Scratch<float> bias;

  FeedForwardWeightsOf(const NormLinearParameters& first, const FloatMatrix& second, Scratch<float> bias)
      : first(first), second(PackedWeightOf<E>::rows(second.data(), first.inputs, first.outputs, first.outputs)),
        bias(std::move(bias)) {}
};

// The two dropouts of a call.
struct FeedForwardDropout {
  Dropout hidden, output;

  FeedForwardDropout() = default;
  explicit FeedForwardDropout(const DropoutArguments& a)
      : hidden("hidden_dropout", a.first, a.seed, 0), output("output_dropout", a.output, a.seed, 1) {}
};

// The part of a mask that belongs to the rows of a tile.
class TileMask {
 public:
  TileMask(const Dropout& dropout, int64_t first, int64_t count, int64_t rows_per_sample, int64_t width)
      : dropout_(dropout) {
    if (!dropout.active()) return;
    for (int64_t r = 0; r < count; ++r) {
      keys_[r] = dropout.key((first + r) / rows_per_sample);
      elements_[r] = (first + r) % rows_per_sample * width;
    }
  }

  // `value` times the mask of row r of the tile, from column c.
  MVIT3_INLINE Vec operator()(Vec value, int64_t r, int64_t c) const {
    return dropout_.active() ? value * dropout_(keys_[r], elements_[r] + c) : value;
  }

 private:
  const Dropout& dropout_;
  uint32_t keys_[kTileRows];
  int64_t elements_[kTileRows];
};

// Statistics that the map has no memory for are not kept; nor is W1 norm(x) + b1 without memory of its own.
template <typename E, typename T>
void feed_forward(
    const NormedMap<T>& x, double eps, const FeedForwardWeightsOf<E>& w, const FeedForwardDropout& dropout, T* y,
    T* kept = nullptr) {
  const int64_t channels = x.tokens().channels, lanes = lanes_of(channels), width = w.second.inputs(),
                hidden_lanes = lanes_of(width);
  const int64_t tile = tile_rows(lanes + hidden_lanes);
  x.measure(eps);
  for_each_tile(
      x.tokens().total(), count_parts(x.tokens().total() * channels * width, 1 << 19),
      [&](int64_t, int64_t first, int64_t count) {
        E* normalised = tile_of<E>(workspace(tile * (lanes + hidden_lanes)));
        E* hidden = normalised + tile * lanes;
        const TileMask hidden_mask(dropout.hidden, first, count, x.tokens().rows, width),
            mask(dropout.output, first, count, x.tokens().rows, channels);
        x.normalise(first, count, eps, normalised, lanes);
        multiply(normalised, lanes, count, w.first.weight, [&](int64_t r, int64_t c, Vec sums) {
          const Vec value = sums + load(w.first.bias.data() + c);
          if (kept) {
            T* out = kept + (first + r) * width + c;
            prefetch_to_write(out + kPanel);
            store_some(out, value, width - c);
          }
          store(hidden + r * hidden_lanes + c, hidden_mask(activate<kSilu>(value), r, c));
        });
        multiply(hidden, hidden_lanes, count, w.second, [&](int64_t r, int64_t c, Vec sums) {
          const int64_t left = channels - c;
          T* out = y + (first + r) * channels + c;
          prefetch_to_write(out + kPanel);
          store_some(out, load_some(x.row(first + r) + c, left) + mask(sums + load(w.bias.data() + c), r, c), left);
        });
      },
      tile);
}

}  // namespace mvit3
