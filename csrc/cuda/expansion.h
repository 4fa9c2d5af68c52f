// The front of an inverted residual on one tile: the expanded map of the tile and of its border, 32 channels at a time,
// in shared memory.
//
// Shared memory holds the tile of x (all input channels, or a slice of them), the weights of the 32 channels and their
// expanded pixels. Weights and tile of the step to come are copied while the present one is filtered. A step has two
// barriers: one behind the expansion, one behind the filter.
#pragma once

#include "tile.h"

namespace mvit3 {

constexpr int kChunk = 32;  // expanded channels at a time
constexpr int kChunkPitch = kChunk + 8;

// Hands out shared memory, in bytes.
struct Carver {
  int bytes = 0;

  MVIT3_BOTH
  int take(int64_t count, int size) {
    const int at = bytes;
    bytes += round_up(int(count) * size, 16);
    return at;
  }
};

// A tile of the filtered map, and the rectangle of x that it is made of. 180 and 153 pixels fill most of 12 and 10
// blocks of 16 rows.
template <int Stride>
struct OutputTile {
  static constexpr int kHeight = Stride == 1 ? 8 : 4, kWidth = Stride == 1 ? 16 : 8;
  static constexpr int kInHeight = (kHeight - 1) * Stride + 3, kInWidth = (kWidth - 1) * Stride + 3;
  static constexpr int kPixels = kInHeight * kInWidth;
  // A thread filters two channels of a column of kRows outputs.
  static constexpr int kRows = kHeight * kWidth / (kThreads / (kChunk / 2));
};

template <typename T, int Stride>
struct Expansion {
  using Tile = OutputTile<Stride>;
  static constexpr int kRowBlocks = 3, kColumnBlocks = 2;  // of a warp; warps stand 4 x 2
  static_assert(Tile::kPixels <= 4 * 16 * kRowBlocks, "the warps cover all pixels");

  struct Layout {
    int x, weight, expanded, affine, taps;
    MVIT3_BOTH
    Layout(Carver& carver, int slice)
        : x(carver.take(Tile::kPixels * (slice + 8), sizeof(T))), weight(carver.take(kChunk * (slice + 8), sizeof(T))),
          expanded(carver.take(Tile::kPixels * kChunkPitch, sizeof(T))), affine(carver.take(kChunk, sizeof(Affine))),
          taps(carver.take(9 * kChunk, sizeof(float))) {}
  };

  const ExpansionArguments& arguments;
  Matrix<T> x, weight, expanded;
  Affine* affine;
  float* taps;

  MVIT3_DEVICE
  Expansion(const ExpansionArguments& a, const Layout& layout)
      : arguments(a), x{at<T>(layout.x), a.slice + 8}, weight{at<T>(layout.weight), a.slice + 8},
        expanded{at<T>(layout.expanded), kChunkPitch}, affine(at<Affine>(layout.affine)), taps(at<float>(layout.taps)) {
  }

  template <typename V>
  static MVIT3_DEVICE
  V* at(int offset) { return reinterpret_cast<V*>(shared_memory() + offset); }

  MVIT3_DEVICE
  bool whole() const { return arguments.slice >= arguments.maps.inputs; }

  static MVIT3_DEVICE
  Place of_x(Place tile) { return tile.moved_to(tile.top * Stride - 1, tile.left * Stride - 1); }

  MVIT3_DEVICE
  void load_slice(Place tile, int chunk, int first, bool with_pixels) const {
    const Maps& m = arguments.maps;
    if (with_pixels)
      load_pixels<Tile::kInHeight, Tile::kInWidth>(
          x, static_cast<const T*>(arguments.x), m.height, m.width, m.inputs, of_x(tile), first, arguments.slice);
    const Packed& p = arguments.packed;
    load_matrix(weight, p.expand, p.channels, p.inputs, chunk, kChunk, first, arguments.slice);
  }

  // Begins the copies of a step, where they fit as a whole. Nobody may read weight, affine or, at the first chunk, x
  // any more.
  MVIT3_DEVICE
  void prefetch(Place tile, int chunk) const {
    if (whole()) load_slice(tile, chunk, 0, chunk == 0);
    load_floats(&affine[0].scale, arguments.packed.affine + 2 * chunk, 2 * kChunk, 0);
  }

  // Fills `expanded` and `taps`. What was prefetched must have arrived, and nobody may read them any more; a barrier
  // must follow.
  MVIT3_DEVICE
  void expand(Place tile, int chunk) const {
    const Maps& m = arguments.maps;
    load_floats(taps, arguments.packed.taps + 9 * chunk, 9 * kChunk, 0);
    const int first_row = warp() % 4 * 16 * kRowBlocks, first_column = warp() / 4 * 8 * kColumnBlocks;
    float sum[kRowBlocks][kColumnBlocks][4];
    clear(sum);
    const int steps = arguments.slice / 16;
    if (whole()) {
      multiply<T, Rows::kOwn, Rows::kOwn>(sum, x, first_row, Tile::kPixels, weight, first_column, kChunk, steps);
    } else {
#pragma unroll 1
      for (int first = 0; first < m.inputs; first += arguments.slice) {
        if (first) synchronize();
        load_slice(tile, chunk, first, true);
        copies_arrive();
        synchronize();
        multiply<T, Rows::kOwn, Rows::kOwn>(sum, x, first_row, Tile::kPixels, weight, first_column, kChunk, steps);
      }
    }
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const int column = first_column + 8 * j + 2 * t;
      const Affine one = affine[column], two = affine[column + 1];
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const Affine& norm = k % 2 ? two : one;
          sum[i][j][k] = norm.scale * sum[i][j][k] + norm.shift;
        }
    }
    copies_arrive();
    activate<4 * kRowBlocks * kColumnBlocks>(&sum[0][0][0], arguments.act);
    const Place from = of_x(tile);
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = first_row + 16 * i + 8 * half + g;
        if (pixel >= Tile::kPixels) continue;
        // The convolution pads the expanded map, not x.
        const bool there = inside(from.y(pixel / Tile::kInWidth), from.x(pixel % Tile::kInWidth), m.height, m.width);
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j)
          *reinterpret_cast<uint32_t*>(expanded.row(pixel) + first_column + 8 * j + 2 * t) =
              there ? pack<T>(sum[i][j][2 * half], sum[i][j][2 * half + 1]) : 0u;
      }
  }

  // ---- The depth-wise taps. Half a warp has the 16 pairs of channels of one strip: its loads and stores are runs of
  // 64 bytes, and the other half's strip lies where shared memory's other banks are.

  static MVIT3_DEVICE
  int pair() { return thread() % (kChunk / 2); }
  static MVIT3_DEVICE
  int strip_column() {
    constexpr int kApart = 4 / Stride;
    return warp() % kApart + lane() / 16 * kApart + warp() / kApart % (Tile::kWidth / (2 * kApart)) * 2 * kApart;
  }
  static MVIT3_DEVICE
  int strip_row() { return warp() / (Tile::kWidth / 2) * Tile::kRows; }

  static MVIT3_DEVICE
  Place place_of(const Maps& m, int64_t tile) {
    return place<Tile::kHeight, Tile::kWidth>(tile, m.out_height, m.out_width, m.dilation);
  }
  static MVIT3_BOTH
  int64_t tiles(const Maps& m) {
    return tiles_of(m.batch, Tile::kHeight, Tile::kWidth, m.out_height, m.out_width, m.dilation);
  }

  // Outputs of this thread's strip that lie inside the map: the first ones.
  MVIT3_DEVICE
  int strip_length(Place tile) const {
    if (tile.x(strip_column()) >= arguments.maps.out_width) return 0;
    const int left = arguments.maps.out_height - tile.y(strip_row());  // in rows of the whole map
    return left <= 0 ? 0 : left > (Tile::kRows - 1) * tile.step ? Tile::kRows : int(ceil_div(left, tile.step));
  }

  MVIT3_DEVICE
  void filter(Pair (&out)[Tile::kRows]) const {
    Pair tap[9];
#pragma unroll
    for (int i = 0; i < 9; ++i) tap[i] = *reinterpret_cast<const Pair*>(taps + i * kChunk + 2 * pair());
    const T* corner = expanded.row(strip_row() * Stride * Tile::kInWidth + strip_column() * Stride) + 2 * pair();
    Pair window[3][3];
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      out[r] = {0.0f, 0.0f};
#pragma unroll
      for (int ty = 0; ty < 3; ++ty) {
        const int row = r * Stride + ty;
#pragma unroll
        for (int tx = 0; tx < 3; ++tx) {
          Pair& value = window[row % 3][tx];
          if (r == 0 || ty >= 3 - Stride)
            value = unpack<T>(*reinterpret_cast<const uint32_t*>(corner + (row * Tile::kInWidth + tx) * kChunkPitch));
          out[r].first += tap[3 * ty + tx].first * value.first;
          out[r].second += tap[3 * ty + tx].second * value.second;
        }
      }
    }
  }
};

}  // namespace mvit3
