// Counter-based dropout: the hash of mvit3_kernels/ops/random.py, sixteen elements at a time.
//
// Whether an element is kept is a function of (seed, site, sample, element), so forward and backward compute the same
// mask, and no mask is ever stored.
#pragma once

#include "tile.h"

namespace mvit3 {

typedef uint32_t NativeWord __attribute__((vector_size(kWidth * 4)));

// One dropout of a call. `site` separates the dropouts of one call; a sample's elements are counted from 0.
class Dropout {
 public:
  // Active with probability `p`, the argument `name`; `seed` is read only where that is positive.
  Dropout(const char* name, double p, const std::optional<Tensor>& seed, uint32_t site) : site_(site), active_(p > 0) {
    MVIT3_CHECK(p >= 0 && p < 1, name, " must be at least 0 and below 1, got ", p);
    if (!active_) return;
    MVIT3_CHECK(
        seed && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
        "seed must be one int64 on the CPU where ", name, " is positive");
    const uint64_t bits = uint64_t(*static_cast<const int64_t*>(seed->data_ptr()));
    low_ = uint32_t(bits);
    high_ = uint32_t(bits >> 32);
    threshold_ = uint32_t(p * 0x1p32);
    scale_ = float(1 / (1 - p));
  }

  // Drops nothing.
  Dropout() : site_(0), active_(false) {}

  bool active() const { return active_; }

  uint32_t key(int64_t sample) const {
    return mix(mix(low_ + uint32_t(sample) * kGolden, 16, kFirst) ^ high_ ^ site_, 15, kSecond);
  }

  // Of sixteen elements, `step` apart, of the sample with this key: 1 / (1 - p) where the element is kept, 0 where it
  // is dropped.
  MVIT3_INLINE Vec operator()(uint32_t key, int64_t element, int64_t step = 1) const {
    const uint32_t first = uint32_t(element) * kGolden, stride = uint32_t(step) * kGolden;
    Vec kept;
    for (int i = 0; i < kParts; ++i) {
      NativeWord word;
      for (int lane = 0; lane < kWidth; ++lane)
        word[lane] = uint32_t(i * kWidth + lane) * stride;  // constant in a loop
      word = mix((word + first) ^ key, 16, kFirst);
      word = mix(word ^ key * kGolden, 15, kSecond);
      word ^= word >> 16;
      kept.part[i] = word >= threshold_ ? NativeFloat{} + scale_ : NativeFloat{};
    }
    return kept;
  }

 private:
  static constexpr uint32_t kGolden = 0x9E3779B1u, kFirst = 0x7FEB352Du, kSecond = 0x846CA68Bu;

  template <typename Word>
  static MVIT3_INLINE Word mix(Word word, int shift, uint32_t multiplier) {
    return (word ^ (word >> shift)) * multiplier;
  }

  uint32_t site_, low_ = 0, high_ = 0, threshold_ = 0;
  float scale_ = 1;
  bool active_;
};

// A mask that keeps all.
struct NoMask {
  MVIT3_INLINE Vec operator()(Vec value, int64_t, int64_t) const { return value; }
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

  bool active() const { return dropout_.active(); }

  // `value` times the mask of row r of the tile, from column c.
  MVIT3_INLINE Vec operator()(Vec value, int64_t r, int64_t c) const {
    return active() ? value * dropout_(keys_[r], elements_[r] + c) : value;
  }

 private:
  const Dropout& dropout_;
  uint32_t keys_[kTileRows];
  int64_t elements_[kTileRows];
};

// `as_rows` of dense rows times a mask.
template <typename E, typename T>
RowsOf<E> masked_rows(const T* x, int64_t rows, int64_t channels, const TileMask& mask, E* tile) {
  if (!mask.active()) return as_rows(x, channels, rows, channels, tile);
  const int64_t lanes = lanes_of(channels);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += kLanes)
      store(tile + r * lanes + c, mask(load_some(x + r * channels + c, channels - c), r, c));
  return {tile, lanes};
}

}  // namespace mvit3
