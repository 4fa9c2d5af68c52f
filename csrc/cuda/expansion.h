// The front of an inverted residual on one tile: the expanded map of the tile and of its border, some channels at a
// time, in shared memory.
//
// Shared memory holds the tile of x (all input channels, or a slice of them), the weights of the expanded channels,
// their expanded pixels (in the order of taps.h) and, for each pixel of a tile, where it lies and what it takes to be
// inside the map.
#pragma once

#include "tile.h"

namespace mvit3 {

constexpr int kChunk = 32;  // channels of a group
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
  static constexpr int kStrips = kHeight * kWidth / 16;  // runs of 16 outputs

  // Pixels of an image row in shared memory: what a tap meets of neighbouring outputs lies side by side, so with stride
  // 2 the even columns come first.
  static constexpr int kEven = (kInWidth + 1) / 2;
  static MVIT3_BOTH
  int column(int place) { return Stride == 1 ? place : place < kEven ? 2 * place : 2 * (place - kEven) + 1; }
  // From an output's corner to what its taps of column tx meet.
  static MVIT3_BOTH
  constexpr int shift(int tx) { return Stride == 1 ? tx : tx % 2 * kEven + tx / 2; }
  // The pixel under the first tap of an output.
  static MVIT3_BOTH
  int corner(int output) { return output / kWidth * Stride * kInWidth + output % kWidth; }
};

// Bits first..first+count-1 of a run at `first` of a dimension that lie outside 0..size-1.
MVIT3_DEVICE
uint32_t bits_outside(int first, int count, int size) {
  const int low = first < 0 ? -first : 0, left = size - first, high = left < low ? low : left < count ? left : count;
  return ((1u << count) - 1) ^ ((1u << high) - (1u << low));
}

// What a block must know of a tile: the first pixel of its rectangle of x, if that is inside, and what lies outside, in
// the bits of `Spot`; its first pixel in the filtered map, and rows and columns that are inside.
struct alignas(16) Stop {
  int64_t x, output;
  uint32_t outside;
  int rows, columns;
};

// The walk over the tiles of a map, in their order. One thread does it for its block.
template <int Stride>
struct TileWalk {
  using Tile = OutputTile<Stride>;

  Place at;
  int height, width;  // of the tiles' grid: of every `step`-th pixel of the filtered map, at most

  MVIT3_DEVICE
  TileWalk(const Maps& m, int64_t tile)
      : at(place<Tile::kHeight, Tile::kWidth>(tile, m.out_height, m.out_width, m.dilation)),
        height(int(ceil_div(m.out_height, m.dilation))), width(int(ceil_div(m.out_width, m.dilation))) {}

  static MVIT3_BOTH
  int64_t tiles(const Maps& m) {
    return tiles_of(m.batch, Tile::kHeight, Tile::kWidth, m.out_height, m.out_width, m.dilation);
  }

  MVIT3_DEVICE
  void next() {
    at.left += Tile::kWidth;
    if (at.left < width) return;
    at.left = 0;
    at.top += Tile::kHeight;
    if (at.top < height) return;
    at.top = 0;
    if (++at.first_column < at.step) return;
    at.first_column = 0;
    if (++at.first_row < at.step) return;
    at.first_row = 0;
    ++at.image;
  }

  MVIT3_DEVICE
  Stop stop(const Maps& m) const {
    const auto size = [&](int all, int first) { return at.step == 1 ? all : (all - first + at.step - 1) / at.step; };
    const int top = at.top * Stride - 1, left = at.left * Stride - 1;
    const uint32_t rows = bits_outside(top, Tile::kInHeight, size(m.height, at.first_row)),
                   columns = bits_outside(left, Tile::kInWidth, size(m.width, at.first_column));
    const Place of_x = at.moved_to(top, left);
    return {
        (at.image * m.height + of_x.y(0)) * m.width + of_x.x(0),
        (at.image * m.out_height + at.y(0)) * m.out_width + at.x(0), rows | columns << Tile::kInHeight,
        size(m.out_height, at.first_row) - at.top, size(m.out_width, at.first_column) - at.left};
  }
};

// Where a pixel of a tile lies, in pixels of x behind the first one, and the bits of its row and its column.
struct alignas(8) Spot {
  uint32_t offset;
  uint32_t bits;
};

struct alignas(16) AffinePair {
  Affine first, second;
};

// `Channels` expanded channels at a time: 32, or two groups of 32.
template <typename T, int Stride, int Channels>
struct Expansion {
  using Tile = OutputTile<Stride>;
  static constexpr int kGroups = Channels / kChunk;
  // Warps stand 4 x 2: each has every fourth block of 16 pixels, and half of the channels.
  static constexpr int kBlocks = (Tile::kPixels + 15) / 16, kRowBlocks = (kBlocks + 3) / 4,
                       kColumnBlocks = Channels / 16;
  static constexpr int kStops = 4;

  struct Layout {
    int x, weight, expanded, spots, affine, stops, walk;
    MVIT3_BOTH
    Layout(Carver& carver, int slice)
        : x(carver.take(Tile::kPixels * (slice + 8), sizeof(T))),
          weight(carver.take(Channels * (slice + 8), sizeof(T))),
          expanded(carver.take(kGroups * Tile::kPixels * kChunkPitch, sizeof(T))),
          spots(carver.take(16 * kBlocks, sizeof(Spot))), affine(carver.take(Channels, sizeof(Affine))),
          stops(carver.take(kStops, sizeof(Stop))), walk(carver.take(1, sizeof(TileWalk<Stride>))) {}
  };

  const ExpansionArguments& arguments;
  Matrix<T> x, weight;
  T* expanded;
  Spot* spots;
  Affine* affine;
  Stop* stops;
  TileWalk<Stride>* walk;
  // How a thread copies rows of a slice: 16 bytes of every row_step-th row; all in one register.
  uint32_t copies;

  MVIT3_DEVICE
  int first_row() const { return int(copies >> 16); }
  MVIT3_DEVICE
  int row_step() const { return int(copies >> 8 & 0xff); }
  MVIT3_DEVICE
  int unit() const { return int(copies & 0xff) * 8; }

  MVIT3_DEVICE
  Expansion(const ExpansionArguments& a, const Layout& layout)
      : arguments(a), x{at<T>(layout.x), a.slice + 8}, weight{at<T>(layout.weight), a.slice + 8},
        expanded(at<T>(layout.expanded)), spots(at<Spot>(layout.spots)), affine(at<Affine>(layout.affine)),
        stops(at<Stop>(layout.stops)), walk(at<TileWalk<Stride>>(layout.walk)) {
    const int across = a.slice / 8;
    const int row = thread() / across, step = kThreads / across;
    copies = uint32_t(row < step ? row : 1 << 12) << 16 | step << 8 | thread() % across;  // one too many has no row
    for (int i = thread(); i < 16 * kBlocks; i += kThreads) {
      const int row = i / Tile::kInWidth, column = Tile::column(i % Tile::kInWidth);
      const uint32_t bits = i < Tile::kPixels ? 1u << row | 1u << (Tile::kInHeight + column) : 0u;
      spots[i] = {uint32_t((row * a.maps.width + column) * a.maps.dilation), bits};
    }
  }

  // Tile number `tile` is the first one of the block, its stop the one of that number; each call of `advance` makes the
  // next one. The one before the last is still read then.
  MVIT3_DEVICE
  void begin(int64_t tile, int stop) const {
    if (thread() != 0) return;
    const TileWalk<Stride> first(arguments.maps, tile);
    *walk = first;
    stops[uint32_t(stop) % kStops] = first.stop(arguments.maps);
  }
  MVIT3_DEVICE
  const Stop& stop(int i) const { return stops[uint32_t(i) % kStops]; }
  MVIT3_DEVICE
  void advance(int stop) const {
    if (thread() != 0) return;
    TileWalk<Stride> now = *walk;
    now.next();
    *walk = now;
    stops[uint32_t(stop) % kStops] = now.stop(arguments.maps);
  }

  template <typename V>
  static MVIT3_DEVICE
  V* at(int offset) { return reinterpret_cast<V*>(shared_memory() + offset); }

  MVIT3_DEVICE
  bool whole() const { return arguments.slice >= arguments.maps.inputs; }
  MVIT3_DEVICE
  T* group(int i) const { return expanded + i * Tile::kPixels * kChunkPitch; }

  // Begins the copies of input channels first..first+slice-1 of a tile, zeros behind the last channel. What is outside
  // the map stays as it is.
  MVIT3_DEVICE
  void load_x(const Stop& stop, int first) const {
    const Maps& m = arguments.maps;
    const T* const map = static_cast<const T*>(arguments.x);
    if (m.inputs % 8 || !is_aligned(map)) {
#pragma unroll 1
      for (int i = thread(); i < Tile::kPixels * arguments.slice; i += kThreads) {
        const int pixel = i / arguments.slice, c = i % arguments.slice;
        const Spot spot = spots[pixel];
        if (!(spot.bits & stop.outside))
          x.row(pixel)[c] = first + c < m.inputs ? map[(stop.x + spot.offset) * m.inputs + first + c] : T{0};
      }
    } else if (first + unit() < m.inputs) {
      const uint32_t bytes = uint32_t(m.inputs) * sizeof(T);
      const int step = row_step() * x.pitch;
      const uint32_t outside = stop.outside;
      const uintptr_t from = reinterpret_cast<uintptr_t>(map) + (stop.x * m.inputs + first + unit()) * sizeof(T);
      T* to = x.row(first_row()) + unit();
#pragma unroll 1
      for (int pixel = first_row(); pixel < Tile::kPixels; pixel += row_step(), to += step) {
        const Spot spot = spots[pixel];
        copy_16_or_zeros(
            !(spot.bits & outside), to, reinterpret_cast<const char*>(from + uint64_t(spot.offset) * bytes));
      }
    } else {
#pragma unroll 1
      for (int pixel = first_row(); pixel < Tile::kPixels; pixel += row_step())
        *reinterpret_cast<Vector*>(x.row(pixel) + unit()) = Vector{};
    }
  }

  // The same of the weights of channels channel..channel+Channels-1.
  MVIT3_DEVICE
  void load_weight(int channel, int first) const {
    const Packed& p = arguments.packed;
    const T* const from = static_cast<const T*>(p.expand) + int64_t(channel) * p.inputs + first + unit();
    for (int r = first_row(); r < Channels; r += row_step()) {
      if (channel + r < p.channels && first + unit() < p.inputs) {
        copy_16(weight.row(r) + unit(), from + r * p.inputs);
      } else {
        *reinterpret_cast<Vector*>(weight.row(r) + unit()) = Vector{};
      }
    }
  }

  // Fills `expanded`. What was copied must have arrived, and nobody may read `expanded` any more; a barrier must
  // follow. With more than one slice of inputs their copies are made here.
  MVIT3_DEVICE
  void expand(const Stop& stop, int channel) const {
    float sum[kRowBlocks][kColumnBlocks][4];
    clear(sum);
    int first = 0;
    do {
      if (!whole()) {
        if (first) synchronize();
        load_x(stop, first);
        load_weight(channel, first);
        copies_arrive();
        synchronize();
      }
      multiply_slice(sum);
      first += arguments.slice;
    } while (first < arguments.maps.inputs);
    store(sum, stop.outside);
  }

  static MVIT3_DEVICE
  int first_column() { return warp() / 4 * 8 * kColumnBlocks; }

  MVIT3_DEVICE
  void multiply_slice(float (&sum)[kRowBlocks][kColumnBlocks][4]) const {
    SharedAddress from_x[kRowBlocks], from_weight = operand_b<T, Rows::kOwn>(weight, first_column());
    const int next = 16 * weight.pitch * int(sizeof(T));
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i)
      from_x[i] = full(i) ? operand_a<T, Rows::kOwn>(x, 16 * (warp() % 4), 1 << 20) + 4 * i * next
                          : operand_a<T, Rows::kOwn>(x, 16 * (warp() % 4 + 4 * i), Tile::kPixels);
#pragma unroll 1
    for (int k = arguments.slice; k > 0; k -= 16) {
      uint32_t b[kColumnBlocks / 2][4];
#pragma unroll
      for (int j = 0; j < kColumnBlocks / 2; ++j) load_matrices(b[j], from_weight + j * next);
      from_weight += 32;
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        if (4 * i + 3 >= kBlocks && warp() % 4 + 4 * i >= kBlocks) continue;  // the same for all lanes
        uint32_t a[4];
        load_matrices(a, from_x[i]);
        from_x[i] += 32;
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j)
          multiply_add(sum[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], T{});
      }
    }
  }

  // Whether block i of every warp has 16 pixels.
  static MVIT3_BOTH
  constexpr bool full(int i) { return 16 * (4 * i + 4) <= Tile::kPixels; }

  // Norm, activation, and the pixels to their place: the convolution pads the expanded map, so those outside are 0.
  MVIT3_DEVICE
  void store(float (&sum)[kRowBlocks][kColumnBlocks][4], uint32_t outside) const {
    using Words = Run<kColumnBlocks>;
    const int g = lane() / 4, t = lane() % 4, column = first_column();
    T* const to = group(column / kChunk) + 8 * t + column % kChunk / 4;
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      const int block = warp() % 4 + 4 * i;
      if (4 * i + 3 >= kBlocks && block >= kBlocks) continue;
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
        const AffinePair norm = *reinterpret_cast<const AffinePair*>(affine + column + 8 * j + 2 * t);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const Affine& n = k % 2 ? norm.second : norm.first;
          sum[i][j][k] = n.scale * sum[i][j][k] + n.shift;
        }
      }
      activate_halved<4 * kColumnBlocks>(&sum[i][0][0], arguments.act);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = 16 * block + 8 * half + g;
        if (!full(i) && pixel >= Tile::kPixels) continue;
        Words words;
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j) words.word[j] = pack<T>(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
        *reinterpret_cast<Words*>(to + pixel * kChunkPitch) = words;
      }
    }
    if (!outside) return;
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
      const int pixel = 16 * (warp() % 4 + i / 2 * 4) + i % 2 * 8 + g;
      if (4 * (i / 2) + 3 < kBlocks || pixel < 16 * kBlocks)
        if (spots[pixel].bits & outside) *reinterpret_cast<Words*>(to + pixel * kChunkPitch) = Words{};
    }
  }
};

}  // namespace mvit3
