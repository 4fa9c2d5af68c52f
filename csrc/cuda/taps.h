// The depth-wise taps by tensor cores: sums over the channels of a product whose other side is a diagonal matrix, eight
// channels at a time. An output of nine taps takes 2.25 instructions of a thread so, and float32 sums; nine packed
// multiply-adds of two channels would take 4.5 and round each sum to 16 bits.
//
// The expanded map of a tile lies in groups of 32 channels, of which position 8 t + 2 j + i holds channel 8 j + 2 t + i
// (t, j < 4, i < 2). So both what a lane gets from the expansion's product and what it gets from this one is a run of
// channels, which it stores at once.
#pragma once

#include "expansion.h"

namespace mvit3 {

constexpr int kTapWords = 9 * 4;  // words of the taps of a row of diagonals: tap, block of eight positions

// The word of the packed diagonals (`Packed`) that holds the first tap of a channel, in its half c % 2.
MVIT3_DEVICE
int diagonal_of(int c) {
  const int group = c / kChunk, t = c % kChunk / 8, j = c % 8 / 2, i = c % 2;
  return (group * 8 + 2 * t + i) * kTapWords + j;
}

// Which outputs of a tile and of `Groups` groups of channels a warp has: strips, and blocks of eight positions of a
// group.
template <int Stride, int Groups>
struct TapWarps {
  using Tile = OutputTile<Stride>;
  static constexpr int kOfGroup = kWarps / Groups;
  static constexpr int kStrips = Tile::kStrips > kOfGroup ? Tile::kStrips / kOfGroup : 1;
  static constexpr int kOfStrip = kOfGroup * kStrips / Tile::kStrips, kBlocks = 4 / kOfStrip;

  static MVIT3_DEVICE
  int group() { return warp() / kOfGroup; }
  static MVIT3_DEVICE
  int strip() { return warp() % kOfGroup / kOfStrip * kStrips; }
  static MVIT3_DEVICE
  int block() { return warp() % kOfStrip * kBlocks; }
  // The lane's first channel; it has 2 * kBlocks of them.
  static MVIT3_DEVICE
  int channel() { return group() * kChunk + lane() % 4 * 8 + 2 * block(); }
};

// Where a lane finds its part of both factors.
struct TapsFrom {
  SharedAddress expanded;     // the row under the first tap of a pixel
  const uint32_t* diagonals;  // its words of the matrices
};

// Of its warp's outputs. Eight lanes have a word of each diagonal, the others `zeros`.
template <int Stride, int Groups, typename T>
MVIT3_DEVICE
TapsFrom taps_from(const T* expanded, const uint32_t* diagonals, const uint32_t* zeros) {
  using Tile = OutputTile<Stride>;
  using Own = TapWarps<Stride, Groups>;
  const int l = lane(), second = Own::kBlocks > 1 ? l / 16 : 0;
  const int pixel = Own::group() * Tile::kPixels + Tile::corner(16 * Own::strip() + l % 16);
  return {
      shared_address(expanded + pixel * kChunkPitch + 8 * (Own::block() + second)),
      (l % 4 == l / 8 ? diagonals + (Own::group() * 8 + l / 4) * kTapWords : zeros) + Own::block()};
}

// Outputs of `Strips` strips of 16 pixels, one below the other, and of `Blocks` blocks of eight positions, the first
// ones but for `skip` blocks. Lane 4 g + t gets of pixels g (sums 0 and 1) and g + 8 (2 and 3) channels 8 t + 2 j and
// one more of block j. `mask` is what counts of the expanded map where `Masked`.
template <typename T, int Stride, bool Masked, int Strips, int Blocks>
MVIT3_DEVICE
void apply_taps(float (&out)[Strips][Blocks][4], const TapsFrom& from, int skip, uint32_t mask) {
  using Tile = OutputTile<Stride>;
  static_assert(Strips == 1 || (Stride == 1 && Tile::kWidth == 16), "a strip is a row below the one before it");
  constexpr int kBytes = kChunkPitch * int(sizeof(T)), kLoads = Blocks == 1 ? 1 : Blocks / 2;
  Run<Blocks> tap[9];
#pragma unroll
  for (int i = 0; i < 9; ++i) tap[i] = *reinterpret_cast<const Run<Blocks>*>(from.diagonals + 4 * i + skip);
  const SharedAddress corner = from.expanded + 16 * skip;
#pragma unroll
  for (int row = 0; row < Strips + 2; ++row)
#pragma unroll
    for (int tx = 0; tx < 3; ++tx) {
      uint32_t part[kLoads][Blocks == 1 ? 2 : 4];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        load_matrices(part[i], corner + (row * Tile::kInWidth + Tile::shift(tx)) * kBytes + 32 * i);
        if (Masked)
          for (uint32_t& word : part[i]) word &= mask;
      }
#pragma unroll
      for (int s = 0; s < Strips; ++s) {
        const int ty = row - s;
        if (ty < 0 || ty > 2) continue;
#pragma unroll
        for (int b = 0; b < Blocks; ++b) {
          const uint32_t* const a = part[b / 2] + b % 2 * 2;
          multiply_add(out[s][b], a[0], a[1], tap[3 * ty + tx].word[b], T{});
        }
      }
    }
}

// Calls use(outputs) with what apply_taps gives, which returns its packed numbers added by `add_nothing`. Where they
// are not finite it is called again with the outputs channel by channel: in the product zeros times such a number reach
// the other seven channels of its block.
template <typename T, int Stride, int Strips, int Blocks, typename F>
MVIT3_DEVICE
void filter(const TapsFrom& from, int skip, const F& use) {
#pragma unroll 1
  for (bool apart = false;; apart = true) {
    float out[Strips][Blocks][4];
    clear(out);
    if (apart) {
#pragma unroll
      for (int b = 0; b < Blocks; ++b)
#pragma unroll 1
        for (int c = 0; c < 8; ++c) {
          const bool own = lane() % 4 == c / 2;
          float one[Strips][1][4];
          clear(one);
          apply_taps<T, Stride, true>(one, from, skip + b, own ? 0xffffu << 16 * (c % 2) : 0u);
#pragma unroll
          for (int i = 0; i < Strips * 4; ++i)
            out[i / 4][b][i % 4] = own && i % 2 == c % 2 ? one[i / 4][0][i % 4] : out[i / 4][b][i % 4];
        }
    } else {
      apply_taps<T, Stride, false>(out, from, skip, 0);
    }
    const uint32_t nothing = use(out);
    if (apart || !any((nothing & 0x7fff7fffu) != 0)) return;
  }
}

}  // namespace mvit3
