// The depth-wise taps by tensor cores: sums over eight channels, of two taps at a time, of a product whose other side
// is a diagonal matrix for each tap. An output of nine taps takes 1.5 instructions of a thread so, and float32 sums;
// nine packed multiply-adds of two channels would take 4.5 and round each sum to 16 bits.
//
// The expanded map of a tile lies in groups of 32 channels, of which position 8 t + 2 j + i holds channel 8 j + 2 t + i
// (t, j < 4, i < 2). So both what a lane gets from the expansion's product and what it gets from this one is a run of
// channels, which it stores at once.
#pragma once

#include "expansion.h"

namespace mvit3 {

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
  SharedAddress two, third;   // the rows under the first two taps of a pixel, and under the third one
  const uint32_t* diagonals;  // its words of the matrices
};

// Of its warp's outputs. Eight lanes have a word of each diagonal, the others `zeros`.
template <int Stride, typename Front>
MVIT3_DEVICE
TapsFrom taps_from(const Front& front, const uint32_t* diagonals, const uint32_t* zeros) {
  using Tile = OutputTile<Stride>;
  using Own = TapWarps<Stride, Front::kGroups>;
  const int l = lane(), second = l / 16;
  const int pixel = Own::group() * Front::kGroupRows + Tile::corner(16 * Own::strip() + l % 16);
  const auto* const from = front.expanded + pixel * kChunkPitch + 8 * Own::block();
  return {
      shared_address(from + second * Tile::shift(1) * kChunkPitch),
      shared_address(from + Tile::shift(2) * kChunkPitch + (Own::kBlocks > 1 ? 8 * second : 0)),
      (l % 4 == l / 8 ? diagonals + (Own::group() * 8 + l / 4) * kTapWords : zeros) + kBlockTaps * Own::block()};
}

// Outputs of `Strips` strips of 16 pixels, one below the other, and of `Blocks` blocks of eight positions (one or two),
// the first ones but for `skip` blocks. Lane 4 g + t gets of pixels g (sums 0 and 1) and g + 8 (2 and 3) channels 8 t +
// 2 j and one more of block j. Sums begin with `start`. `mask` is what counts of the expanded map where `Masked`.
template <typename T, int Stride, bool Masked, int Strips, int Blocks>
MVIT3_DEVICE
void apply_taps(
    float (&out)[Strips][Blocks][4], const Added (&start)[Blocks], const TapsFrom& from, int skip, uint32_t mask) {
  using Tile = OutputTile<Stride>;
  static_assert(Strips == 1 || (Stride == 1 && Tile::kWidth == 16), "a strip is a row below the one before it");
  constexpr int kDown = Tile::kInWidth * kChunkPitch * int(sizeof(T));
  Run<4> first[Blocks], next[Blocks];
  uint32_t last[Blocks];
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    const uint32_t* const tap = from.diagonals + kBlockTaps * (skip + b);
    first[b] = *reinterpret_cast<const Run<4>*>(tap);
    next[b] = *reinterpret_cast<const Run<4>*>(tap + 4);
    last[b] = tap[8];
  }
#pragma unroll
  for (int row = 0; row < Strips + 2; ++row) {
    uint32_t two[Blocks][4], third[2 * Blocks];
#pragma unroll
    for (int b = 0; b < Blocks; ++b) load_matrices(two[b], from.two + 16 * (skip + b) + row * kDown);
    load_matrices(third, from.third + 16 * skip + row * kDown);
    if (Masked) {
      for (auto& part : two)
        for (uint32_t& word : part) word &= mask;
      for (uint32_t& word : third) word &= mask;
    }
#pragma unroll
    for (int s = 0; s < Strips; ++s) {
      const int ty = row - s;
      if (ty < 0 || ty > 2) continue;
#pragma unroll
      for (int b = 0; b < Blocks; ++b) {
        float (&sum)[4] = out[s][b];
        if (ty == 0)
          multiply_and_add(sum, two[b], first[b].word[0], first[b].word[1], start[b].part, T{});
        else if (ty == 1)
          multiply_add(sum, two[b], first[b].word[2], first[b].word[3], T{});
        else
          multiply_add(sum, two[b], next[b].word[0], next[b].word[1], T{});
        multiply_add(
            sum, third[2 * b], third[2 * b + 1],
            ty == 0   ? next[b].word[2]
            : ty == 1 ? next[b].word[3]
                      : last[b],
            T{});
      }
    }
  }
}

// Calls use(block, outputs) with what apply_taps gives, for `Count` blocks of positions, `Blocks` at a time, whose sums
// begin with begin(block); it returns what it is given, marked by its packed numbers. Where one is not finite all are
// made again, channel by channel: in the product zeros times such a number reach the other seven
// channels of its block.
template <typename T, int Stride, int Strips, int Blocks, int Count, typename Begin, typename F>
MVIT3_DEVICE
void filter(const TapsFrom& from, const Begin& begin, const F& use) {
  uint32_t seen = 0;
#pragma unroll
  for (int block = 0; block < Count; block += Blocks) {
    Added start[Blocks];
#pragma unroll
    for (int b = 0; b < Blocks; ++b) start[b] = begin(block + b);
    float out[Strips][Blocks][4];
    apply_taps<T, Stride, false>(out, start, from, block, 0);
    seen = use(block, out, seen);
  }
  if (!any(!finite(seen, T{}))) return;
#pragma unroll
  for (int block = 0; block < Count; block += Blocks) {
    float out[Strips][Blocks][4];
    clear(out);
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      const Added start[1] = {begin(block + b)};
#pragma unroll 1
      for (int c = 0; c < 8; ++c) {
        const bool own = lane() % 4 == c / 2;
        float one[Strips][1][4];
        apply_taps<T, Stride, true>(one, start, from, block + b, own ? 0xffffu << 16 * (c % 2) : 0u);
#pragma unroll
        for (int i = 0; i < Strips * 4; ++i)
          if (own && i % 2 == c % 2) out[i / 4][b][i % 4] = one[i / 4][0][i % 4];
      }
    }
    use(block, out, 0);
  }
}

}  // namespace mvit3
