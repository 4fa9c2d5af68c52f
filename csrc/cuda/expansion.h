// The front of an inverted residual on one tile: the expanded map of the tile and of its border, some channels at a
// time, in shared memory.
//
// Shared memory holds the tile of x (all input channels, or a slice of them), the weights of the expanded channels,
// their expanded pixels (in the order of taps.h) and, for each pixel of a tile, where it lies and what it takes to be
// inside the map.
#pragma once

#include <type_traits>

#include "tile.h"

namespace mvit3 {

constexpr int kChunk = 32;  // channels of a group
constexpr int kChunkPitch = kChunk + 8;
// Words of the taps of a block of eight positions in a row of diagonals (taps.h): those of the first two columns, row
// by row, then those of the third, then nothing, so that they are read in fours; and of the four blocks of a row.
constexpr int kBlockTaps = 12, kTapWords = 4 * kBlockTaps;

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
  static constexpr int kPixels = kInHeight * kInWidth, kRows = (kPixels + 15) / 16 * 16;
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

// Where a thread finds two things in shared memory, in bytes from its start (less than 2^17, the second a multiple of
// 4): in one register, for as long as the kernel runs.
class Places {
 public:
  MVIT3_DEVICE
  Places(SharedAddress first, SharedAddress second) : bits_(offset(first) | offset(second) / 4 << 17) {}
  MVIT3_DEVICE
  char* first() const { return shared_memory() + (anew(bits_) & 0x1ffff); }
  MVIT3_DEVICE
  char* second() const { return shared_memory() + (anew(bits_) >> 17) * 4; }

 private:
  static MVIT3_DEVICE
  uint32_t offset(SharedAddress a) { return uint32_t(a - shared_address(shared_memory())); }

  uint32_t bits_;
};

struct alignas(16) AffinePair {
  Affine first, second;
};

// What is added to products of two neighbouring channels: where the scale of their norm is folded into the factors,
// the shifts, as sums of two pixels want them; else scale and shift of each channel, for `normalise`.
struct alignas(16) Added {
  float part[4];
};

// Numbers of the two channels, one after the other.
MVIT3_DEVICE
void normalise(float (&sum)[4], const Added& by) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = by.part[i % 2 * 2] * sum[i] + by.part[i % 2 * 2 + 1];
}

// The parameters of a step of `Channels` expanded channels, in bytes from its start: what is added to the expansion,
// its weights for each slice of inputs; diagonals, what is added to their products; the weights of the projection, an
// output to a row. Rows are as long as in shared memory, so that parts are copied as they are.
template <typename T, int Channels, int Inputs, bool Folds>
struct ForwardStep {
  static constexpr bool kFolds = Folds;
  static constexpr int kChannels = Channels, kPitch = Inputs + 8, kProjectPitch = Channels + 8;
  static constexpr int kNorm = Channels * int(sizeof(Affine)), kWeights = Channels * kPitch * int(sizeof(T)),
                       kDiagonals = Channels / 4 * kTapWords * 4, kTaps = kDiagonals + kNorm,
                       kOutput = kProjectPitch * int(sizeof(T));

  static MVIT3_BOTH
  int expansion(int slices) { return kNorm + slices * kWeights; }
  static MVIT3_BOTH
  int bytes(int slices, int outputs) { return expansion(slices) + kTaps + round_up(outputs, 16) * kOutput; }
};

// Copies a run of bytes, a multiple of 16.
template <int Bytes>
MVIT3_DEVICE
void copy_run(void* to, const char* from) {
  constexpr int kAtOnce = 16 * kThreads;
  const int own = 16 * thread();
  char* const mine = static_cast<char*>(to) + own;
#pragma unroll
  for (int i = 0; i < Bytes; i += kAtOnce)
    if (i + kAtOnce <= Bytes || own < Bytes - i) copy_16(mine + i, from + own + i);
}

// `Channels` expanded channels at a time (32, or two groups of 32) of at most `Inputs` inputs at a time.
template <typename T, int Stride, int Channels, int Inputs>
struct Expansion {
  using Tile = OutputTile<Stride>;
  // Whether norms scale the weights in front of them. In float16 the product might be too small a number; with stride 1
  // and 32 channels sums of 128 outputs leave too few registers for what is added.
  static constexpr bool kFolds = std::is_same<T, BFloat16>::value && (Stride == 2 || Channels > kChunk);
  using Step = ForwardStep<T, Channels, Inputs, kFolds>;
  static constexpr int kGroups = Channels / kChunk, kPitch = Step::kPitch;
  // Warps stand 4 x 2, or 2 x 4 where that shares the tile evenly: each has every fourth or second block of 16 pixels,
  // and half or a quarter of the channels.
  static constexpr int kRowWarps = Stride == 2 && Channels > kChunk ? 2 : 4, kColumnWarps = kWarps / kRowWarps;
  static constexpr int kBlocks = Tile::kRows / 16, kRowBlocks = (kBlocks + kRowWarps - 1) / kRowWarps,
                       kColumnBlocks = Channels / (8 * kColumnWarps);
  static constexpr bool kWhole = Inputs < kMostInputs;  // a launch with more has another kernel
  // Pixels of a group in shared memory: whole blocks of 16, where there is room for them.
  static constexpr int kGroupRows = kWhole ? Tile::kRows : Tile::kPixels;
  static constexpr int kStops = 4;

  struct Layout {
    int x, norm, weight, expanded, spots, stops, walk;
    MVIT3_BOTH
    explicit Layout(Carver& carver)
        : x(carver.take(Tile::kPixels * kPitch, sizeof(T))), norm(carver.take(Step::kNorm, 1)),
          weight(carver.take(Step::kWeights, 1)), expanded(carver.take(kGroups * kGroupRows * kChunkPitch, sizeof(T))),
          spots(carver.take(Tile::kRows, sizeof(Spot))), stops(carver.take(kStops, sizeof(Stop))),
          walk(carver.take(1, sizeof(TileWalk<Stride>))) {}
  };

  const ExpansionArguments& arguments;
  Matrix<T> x, weight;
  T* expanded;
  Spot* spots;
  Added* norm;
  Stop* stops;
  TileWalk<Stride>* walk;
  const SharedAddress from_x, from_weight;  // the lane's rows of both factors
  const Places own;                         // what is added to its first channels, and where its first outputs go
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
      : arguments(a), x{at<T>(layout.x), kPitch}, weight{at<T>(layout.weight), kPitch},
        expanded(at<T>(layout.expanded)), spots(at<Spot>(layout.spots)), norm(at<Added>(layout.norm)),
        stops(at<Stop>(layout.stops)), walk(at<TileWalk<Stride>>(layout.walk)),
        from_x(operand_a<T, Rows::kOwn>(x, 16 * (warp() % kRowWarps), Tile::kPixels)),
        from_weight(operand_b<T, Rows::kOwn>(weight, first_column())),
        own(shared_address(norm + first_column() / 2 + lane() % 4),
            shared_address(
                group(first_column() / kChunk) + 8 * (lane() % 4) + first_column() % kChunk / 4 +
                first_pixel() * kChunkPitch)) {
    const int across = a.slice / 8;
    const int row = thread() / across, step = kThreads / across;
    copies = uint32_t(row < step ? row : 1 << 12) << 16 | step << 8 | thread() % across;  // one too many has no row
    for (int i = thread(); i < Tile::kRows; i += kThreads) {
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
  bool whole() const { return kWhole || arguments.slice >= arguments.maps.inputs; }
  MVIT3_DEVICE
  T* group(int i) const { return expanded + i * kGroupRows * kChunkPitch; }

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
      const int step = row_step() * kPitch;
      const uint32_t outside = stop.outside;
      const uintptr_t from = reinterpret_cast<uintptr_t>(map) + (stop.x * m.inputs + first + unit()) * sizeof(T);
      T* to = x.row(first_row()) + unit();
      const int next = row_step();
      const auto copy = [&](const Spot& spot, T* here) {
        copy_16_or_zeros(
            !(spot.bits & outside), here, reinterpret_cast<const char*>(from + uint64_t(spot.offset) * bytes));
      };
      int pixel = first_row();
      // Three at a time, if there are registers: between a read of shared memory and a copy into it sm_90 waits, for
      // three instructions.
#pragma unroll 1
      for (; (Stride == 2 || kGroups > 1) && pixel + 2 * next < Tile::kPixels; pixel += 3 * next, to += 3 * step) {
        const Spot one = spots[pixel], two = spots[pixel + next], three = spots[pixel + 2 * next];
        copy(one, to);
        copy(two, to + step);
        copy(three, to + 2 * step);
      }
#pragma unroll 1
      for (; pixel < Tile::kPixels; pixel += next, to += step) copy(spots[pixel], to);
    } else {
#pragma unroll 1
      for (int pixel = first_row(); pixel < Tile::kPixels; pixel += row_step())
        *reinterpret_cast<Vector*>(x.row(pixel) + unit()) = Vector{};
    }
  }

  // The same of the parameters of a step: what is added, and the weights where they stay for all inputs.
  MVIT3_DEVICE
  int parameters() const { return Step::kNorm + (whole() ? Step::kWeights : 0); }
  MVIT3_DEVICE
  void load_parameters(const char* step) const {
    if (whole())
      copy_run<Step::kNorm + Step::kWeights>(norm, step);
    else
      copy_run<Step::kNorm>(norm, step);
  }

  // Fills `expanded`. What was copied must have arrived, and nobody may read `expanded` any more; a barrier must
  // follow. With more than one slice of inputs their copies are made here. border: whether some of the tile's rectangle
  // is outside the map.
  MVIT3_DEVICE
  void expand(const Stop& stop, const char* step, bool border) const {
    Sums sum;
    if (kWhole) {
      multiply_slice<true>(sum);
    } else {
      begin_sums(sum);
      int first = 0;
      step += Step::kNorm;
      do {
        if (!whole()) {
          if (first) synchronize();
          load_x(stop, first);
          copy_run<Step::kWeights>(weight.data, step);
          step += Step::kWeights;
          copies_arrive();
          synchronize();
        }
        multiply_slice<false>(sum);
        first += arguments.slice;
      } while (first < arguments.maps.inputs);
    }
    store(sum, stop, border);
  }

  using Sums = float[kRowBlocks][kColumnBlocks][4];

  static MVIT3_DEVICE
  int first_pixel() { return 16 * (warp() % kRowWarps) + lane() / 4; }
  static MVIT3_DEVICE
  int first_column() { return warp() / kRowWarps * 8 * kColumnBlocks; }
  // Whether a pixel of block i of a warp has a place in a group.
  static MVIT3_DEVICE
  bool has(int i, int pixel) { return 16 * kRowWarps * (i + 1) <= kGroupRows || pixel < kGroupRows; }

  // What is added to block 0 of channels; to block j 4 j later.
  MVIT3_DEVICE
  const Added* added() const { return reinterpret_cast<const Added*>(own.first()); }
  // What the sums of a block start with.
  static MVIT3_DEVICE
  Added start(const Added* added) { return Step::kFolds ? *added : Added{}; }
  MVIT3_DEVICE
  void begin_sums(Sums& sum) const {
    const Added* const first = added();
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const Added from = start(first + 4 * j);
#pragma unroll
      for (int i = 0; i < 4 * kRowBlocks; ++i) sum[i / 4][j][i % 4] = from.part[i % 4];
    }
  }

  // sum += x weight^T of the slice; where `Begins` they begin here. Behind the tile's last pixel lies other memory, of
  // which sums are made that nobody uses.
  template <bool Begins>
  MVIT3_DEVICE
  void multiply_slice(Sums& sum) const {
    constexpr int kDown = 16 * kPitch * int(sizeof(T)), kMost = Inputs / 16;
    if (Begins) {
      const Added* const first = added();
#pragma unroll
      for (int j = 0; j < kColumnBlocks; j += 2) {
        const Added from[2] = {start(first + 4 * j), start(first + 4 * j + 4)};
        uint32_t b[4];
        load_matrices(b, from_weight + j / 2 * kDown);
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i) {
          uint32_t a[4];
          load_matrices(a, from_x + i * kRowWarps * kDown);
          multiply_and_add(sum[i][j], a, b[0], b[1], from[0].part, T{});
          multiply_and_add(sum[i][j + 1], a, b[2], b[3], from[1].part, T{});
        }
      }
    }
#pragma unroll
    for (int k = Begins ? 1 : 0; k < kMost; ++k) {
      if (16 * k >= arguments.slice) break;
      uint32_t b[kColumnBlocks / 2][4];
#pragma unroll
      for (int j = 0; j < kColumnBlocks / 2; ++j) load_matrices(b[j], from_weight + j * kDown + 32 * k);
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        uint32_t a[4];
        load_matrices(a, from_x + i * kRowWarps * kDown + 32 * k);
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j)
          multiply_add(sum[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], T{});
      }
    }
  }

  // Norm, activation, and the pixels to their place: the convolution pads the expanded map, so those outside are 0.
  MVIT3_DEVICE
  void store(Sums& sum, const Stop& stop, bool border) const {
    using Words = Run<kColumnBlocks>;
    T* const to = reinterpret_cast<T*>(own.second());
    if (!Step::kFolds)
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
        const Added by = added()[4 * j];
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i) normalise(sum[i][j], by);
      }
    activate_halved<4 * kColumnBlocks * kRowBlocks>(&sum[0][0][0], arguments.act);
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
      const int next = i / 2 * kRowWarps * 16 + i % 2 * 8;
      if (!has(i / 2, first_pixel() + next)) continue;
      Words words;
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j)
        words.word[j] = pack<T>(sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
      *reinterpret_cast<Words*>(to + next * kChunkPitch) = words;
    }
    if (!border) return;
    const uint32_t outside = stop.outside;
    const int pixel = first_pixel();
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
      const int next = i / 2 * kRowWarps * 16 + i % 2 * 8;
      if (has(i / 2, pixel + next) && spots[pixel + next].bits & outside)
        *reinterpret_cast<Words*>(to + next * kChunkPitch) = Words{};
    }
  }
};

}  // namespace mvit3
