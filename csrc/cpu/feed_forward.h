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

// How a call is cut over threads: rows, each part of which goes through both products in tiles. Where that leaves a
// thread less than a block of rows, for which it would read both weights, each product is cut on its own, and the
// hidden tensor goes from one to the other.
struct FeedForwardCut {
  int64_t rows, parts;
  bool by_products;

  FeedForwardCut(int64_t rows, int64_t channels, int64_t width)
      : rows(rows), parts(spread_parts(rows * channels * width, 1 << 19)),
        by_products(parts > 1 && rows < kBlockRows * torch::stable::get_num_threads()) {}

  template <typename E>
  void add_to(std::vector<Region>& regions, const FeedForwardWeightsOf<E>& w) const {
    const PackedWeightOf<E>&first = w.first.weight, &second = w.second;
    if (by_products) {
      regions.push_back(BlockCut(rows, first).operations(first));
      regions.push_back(BlockCut(rows, second).operations(second));
    } else {
      regions.push_back(even_region(
          rows, parts, first.inputs() * first.lanes(first.panels()) + second.inputs() * second.lanes(second.panels())));
    }
  }
};

// Statistics that the map has no memory for are not kept; nor is W1 norm(x) + b without memory of its own.
template <typename E, typename T>
void feed_forward(
    const NormedMap<T>& x, double eps, const FeedForwardWeightsOf<E>& w, const FeedForwardDropout& dropout, T* y,
    T* kept = nullptr) {
  const int64_t channels = x.tokens().channels, lanes = lanes_of(channels), width = w.second.inputs(),
                hidden_lanes = lanes_of(width), total = x.tokens().total();
  const auto hide = [&](int64_t first, int64_t count, Range panels, E* normalised, E* hidden) {
    const TileMask mask(dropout.hidden, first, count, x.tokens().rows, width);
    x.normalise(first, count, eps, normalised, lanes);
    multiply(normalised, lanes, count, w.first.weight, panels, [&](int64_t r, int64_t c, Vec sums) {
      const Vec value = sums + load(w.first.bias.data() + c);
      if (kept) {
        T* out = kept + (first + r) * width + c;
        prefetch_to_write(out + kPanel);
        store_some(out, value, width - c);
      }
      store(hidden + r * hidden_lanes + c, mask(activate<kSilu, kRoughly<E>>(value), r, c));
    });
  };
  const auto add = [&](int64_t first, int64_t count, Range panels, const E* hidden) {
    const TileMask mask(dropout.output, first, count, x.tokens().rows, channels);
    multiply(hidden, hidden_lanes, count, w.second, panels, [&](int64_t r, int64_t c, Vec sums) {
      const int64_t left = channels - c;
      T* out = y + (first + r) * channels + c;
      prefetch_to_write(out + kPanel);
      store_some(out, load_some(x.row(first + r) + c, left) + mask(sums + load(w.bias.data() + c), r, c), left);
    });
  };
  x.measure(eps);
  const FeedForwardCut cut(total, channels, width);
  if (cut.by_products) {
    E* hidden = tile_of<E>(workspace<1>(total * hidden_lanes));
    for_each_block_tile(total, w.first.weight, [&](int64_t first, int64_t count, Range panels) {
      hide(first, count, panels, tile_of<E>(workspace(kTileRows * lanes)), hidden + first * hidden_lanes);
    });
    for_each_block_tile(total, w.second, [&](int64_t first, int64_t count, Range panels) {
      add(first, count, panels, hidden + first * hidden_lanes);
    });
    return;
  }
  const int64_t tile = tile_rows(lanes + hidden_lanes);
  for_each_tile(
      total, cut.parts,
      [&](int64_t, int64_t first, int64_t count) {
        E* normalised = tile_of<E>(workspace(tile * (lanes + hidden_lanes)));
        E* hidden = normalised + tile * lanes;
        hide(first, count, w.first.weight.panels(), normalised, hidden);
        add(first, count, w.second.panels(), hidden);
      },
      tile);
}

}  // namespace mvit3
