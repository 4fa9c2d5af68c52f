// inverted_residual on tiles in shared memory (identity G of the design): the expanded map exists nowhere else.
//
// A call is a small kernel that packs the parameters (they are copied many times), then one whose blocks walk each over a run of tiles, and
// on each tile over the expanded channels, 32 at a time. Sums over the whole map are kept per block in a workspace and added up by a last,
// small kernel, so that results repeat from run to run.

#include <utility>

#include "expansion.h"
#include "launch.h"
#include "sums.h"

namespace mvit3 {

// ---- Parameters, packed

struct PackArguments {
  Values expand, depthwise, project;
  Norm norm, middle, last;
  bool folds;  // the middle and the last norm too
  const float *z_scale, *z_shift, *c0, *c1, *c2;  // or null
  int inputs, wide, outputs;
  Packed to;
};

template <typename T>
struct Pack {
  using Arguments = PackArguments;
  static constexpr int kBlocksAtOnce = 1;

  static MVIT3_BOTH int64_t count(const Arguments& a) {
    return int64_t(a.to.channels) * (a.to.inputs + 1 + (a.project.data ? a.outputs : 0)) + (a.folds ? a.outputs : 0);
  }

  static MVIT3_DEVICE void pack_channel(const Arguments& a, int c) {
    const bool there = c < a.wide;
    const Affine none{0.0f, 0.0f};
    const Affine norm = there ? affine_at<T>(a.norm, c) : none, middle = there && a.folds ? affine_at<T>(a.middle, c) : none;
    float* const affine = const_cast<float*>(a.to.affine) + 2 * c;
    affine[0] = norm.scale;
    affine[1] = norm.shift;
    float* const taps = const_cast<float*>(a.to.taps) + c / kChunk * 9 * kChunk + c % kChunk;
    for (int i = 0; i < 9; ++i)
      taps[i * kChunk] = there ? value_at<T>(a.depthwise, int64_t(c) * 9 + i) * (a.folds ? middle.scale : 1.0f) : 0.0f;
    const_cast<float*>(a.to.shift)[c] = middle.shift;
    if (!a.z_scale) return;
    float* const backward = const_cast<float*>(a.to.backward) + 8 * c;
    const float* const values[5] = {a.z_scale, a.z_shift, a.c0, a.c1, a.c2};
    backward[0] = norm.scale;
    backward[1] = norm.shift;
    for (int i = 0; i < 5; ++i) backward[2 + i] = there ? values[i][c] : 0.0f;
    backward[7] = 0.0f;
  }

  static MVIT3_DEVICE void run(const Arguments& a) {
    const int64_t i = int64_t(block()) * kThreads + thread(), weights = int64_t(a.to.channels) * a.to.inputs;
    if (i >= count(a)) return;
    if (i < weights) {
      const int64_t row = i / a.to.inputs, column = i % a.to.inputs;
      const bool there = row < a.wide && column < a.inputs;
      static_cast<T*>(const_cast<void*>(a.to.expand))[i] = from_float<T>(there ? value_at<T>(a.expand, row * a.inputs + column) : 0.0f);
    } else if (i < weights + a.to.channels) {
      pack_channel(a, int(i - weights));
    } else if (i < weights + a.to.channels * int64_t(1 + a.outputs)) {
      const int64_t at = i - weights - a.to.channels, row = at / a.to.channels, column = at % a.to.channels;
      static_cast<T*>(const_cast<void*>(a.to.project))[at] =
          from_float<T>(column < a.wide ? value_at<T>(a.project, row * a.wide + column) : 0.0f);
    } else {
      const int c = int(i - weights - a.to.channels * int64_t(1 + a.outputs));
      reinterpret_cast<Affine*>(const_cast<float*>(a.to.last))[c] = affine_at<T>(a.last, c);
    }
  }
};

// Where the packed parameters lie in `workspace`, and how many floats they are.
Packed packed_in(const Maps& m, float* workspace, int64_t* floats) {
  const int channels = round_up(m.wide, kChunk), inputs = round_up(m.inputs, 16);
  int64_t at = 0;
  const auto take = [&](int64_t count) { return workspace + std::exchange(at, at + count); };  // all multiples of 4
  const Packed packed{take(int64_t(channels) * inputs / 2), take(int64_t(channels) * m.outputs / 2), take(2 * channels), take(9 * channels),
                      take(channels), take(8 * channels), take(round_up(2 * m.outputs, 4)), channels, inputs};
  *floats = at;
  return packed;
}

int64_t packed_floats(const Maps& m) {
  int64_t floats;
  packed_in(m, nullptr, &floats);
  return floats;
}

// Packs the parameters of a call into its workspace, and gives back the rest of it.
template <typename T>
float* pack_into(ExpansionArguments& front, PackArguments arguments, float* workspace, void* stream) {
  const Maps& m = front.maps;
  int64_t floats;
  front.packed = packed_in(m, workspace, &floats);
  arguments.expand = front.expand;
  arguments.depthwise = front.depthwise;
  arguments.norm = front.norm;
  arguments.inputs = m.inputs;
  arguments.wide = m.wide;
  arguments.outputs = m.outputs;
  arguments.to = front.packed;
  launch<Pack<T>>(arguments, int(ceil_div(Pack<T>::count(arguments), kThreads)), 1, 0, stream);
  return workspace + floats;
}

// ---- Filter: z and its moments

template <typename T, int Stride>
struct Filter {
  using Arguments = FilterArguments;
  using Type = T;
  using Front = Expansion<T, Stride>;
  using Tile = OutputTile<Stride>;
  static constexpr int kBlocksAtOnce = 3;

  struct Layout {
    Carver carver;
    typename Front::Layout front;
    int moments, counts;
    MVIT3_BOTH explicit Layout(const Arguments& a)
        : front(carver, a.front.slice), moments(carver.take(kWarps * kChunk, sizeof(Moments))),
          counts(carver.take(kWarps, sizeof(float))) {}
  };

  static MVIT3_BOTH int64_t tiles(const Arguments& a) { return Front::tiles(a.front.maps); }

  static MVIT3_DEVICE void run(const Arguments& a) {
    const Layout layout(a);
    const Front front(a.front, layout.front);
    const Maps& m = a.front.maps;
    Moments* const moments = Front::template at<Moments>(layout.moments);
    float* const counts = Front::template at<float>(layout.counts);
    Moments* const kept = reinterpret_cast<Moments*>(a.workspace) + int64_t(block()) * m.wide;  // of this block
    const int64_t count = tiles(a), last = count * (block() + 1) / blocks();
    int64_t tile = count * block() / blocks();
    T* const z = static_cast<T*>(a.z);

    // The moments of a step are merged in the next one, behind its barrier.
    Moments before{0.0f, 0.0f};
    float seen = 0.0f;  // outputs of this block in the tiles before
    int pending = -1;
    const auto merge_pending = [&] {
      const int channel = pending + thread();
      if (pending < 0 || thread() >= kChunk || channel >= m.wide) return;
      Moments sum = before;
      float total = seen;
#pragma unroll 1
      for (int w = 0; w < kWarps; ++w) {
        sum = merge(sum, total, moments[w * kChunk + thread()], counts[w]);
        total += counts[w];
      }
      kept[channel] = sum;
    };

    Place at = Front::place_of(m, tile);
    front.prefetch(at, 0);
    for (int chunk = 0; tile < last;) {
      copies_arrive();
      synchronize();
      merge_pending();
      if (chunk == 0 && pending >= 0)
        for (int w = 0; w < kWarps; ++w) seen += counts[w];
      front.expand(at, chunk);
      synchronize();

      const Place here = at;
      const int first = chunk;
      chunk += kChunk;
      if (chunk >= m.wide) {
        chunk = 0;
        ++tile;
        at = Front::place_of(m, tile);
      }
      if (tile < last) front.prefetch(at, chunk);
      before = Moments{0.0f, 0.0f};
      if (thread() < kChunk && first + thread() < m.wide && seen > 0.0f) before = kept[first + thread()];
      pending = first;

      Pair out[Tile::kRows];
      front.filter(out);
      const int length = front.strip_length(here), channel = first + 2 * Front::pair();
      const int64_t pixel = (here.image * m.out_height + here.y(Front::strip_row())) * m.out_width + here.x(Front::strip_column());
      const int64_t down = int64_t(here.step) * m.out_width;
      Pair shift{0.0f, 0.0f}, sum{0.0f, 0.0f}, squares{0.0f, 0.0f};
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        const uint32_t bits = pack<T>(out[r].first, out[r].second);
        if (r >= length) continue;
        store_pair(z + (pixel + r * down) * m.wide, channel, m.wide, bits);
        const Pair value = unpack<T>(bits);
        if (r == 0) shift = value;  // one of the values: differences from it are small, and 0 where all are equal
        const float one = value.first - shift.first, two = value.second - shift.second;
        sum.first += one;
        sum.second += two;
        squares.first += one * one;
        squares.second += two * two;
      }
      const float n = float(length), inverse = length ? fast_divide(1.0f, n) : 0.0f;
      Moments one{shift.first + sum.first * inverse, squares.first - sum.first * sum.first * inverse};
      Moments two{shift.second + sum.second * inverse, squares.second - sum.second * sum.second * inverse};
      const float other = shuffle_xor(n, 16);
      const Moments other_one{shuffle_xor(one.mean, 16), shuffle_xor(one.squares, 16)};
      const Moments other_two{shuffle_xor(two.mean, 16), shuffle_xor(two.squares, 16)};
      if (lane() < 16) {
        moments[warp() * kChunk + 2 * lane()] = n == 0.0f ? other_one : merge(one, n, other_one, other);
        moments[warp() * kChunk + 2 * lane() + 1] = n == 0.0f ? other_two : merge(two, n, other_two, other);
        if (lane() == 0) counts[warp()] = n + other;
      }
    }
    synchronize();
    merge_pending();
    if (thread() == 0) {
      for (int w = 0; w < kWarps; ++w) seen += counts[w];
      a.workspace[int64_t(blocks()) * m.wide * 2 + block()] = seen;
    }
  }
};

// ---- Inference: the whole block

template <typename T, int Stride>
struct Inference {
  using Arguments = InferenceArguments;
  using Type = T;
  using Front = Expansion<T, Stride>;
  using Tile = OutputTile<Stride>;
  static constexpr int kBlocksAtOnce = 2;
  static constexpr int kPixels = Tile::kHeight * Tile::kWidth;
  // The sums of a tile, 32 registers of each thread, are this many output channels; a launch has a slice of blocks for each of them.
  static constexpr int kRowWarps = Stride == 1 ? 4 : 2, kColumnWarps = kWarps / kRowWarps;
  static constexpr int kRowBlocks = kPixels / (16 * kRowWarps), kColumnBlocks = 8 / kRowBlocks;
  static constexpr int kSlice = 8 * kColumnBlocks * kColumnWarps;

  static MVIT3_BOTH int columns(const Arguments& a) {
    const int outputs = round_up(a.front.maps.outputs, 16);
    return outputs < kSlice ? outputs : kSlice;
  }

  struct Layout {
    Carver carver;
    typename Front::Layout front;
    int filtered, project, shift;
    MVIT3_BOTH explicit Layout(const Arguments& a)
        : front(carver, a.front.slice), filtered(carver.take(kPixels * kChunkPitch, sizeof(T))),
          project(carver.take(columns(a) * kChunkPitch, sizeof(T))), shift(carver.take(kChunk, sizeof(float))) {}
  };

  static MVIT3_BOTH int64_t tiles(const Arguments& a) { return Front::tiles(a.front.maps); }

  static MVIT3_DEVICE void run(const Arguments& a) {
    const Layout layout(a);
    const Front front(a.front, layout.front);
    const Maps& m = a.front.maps;
    const Matrix<T> filtered{Front::template at<T>(layout.filtered), kChunkPitch};
    const Matrix<T> project{Front::template at<T>(layout.project), kChunkPitch};
    float* const shift = Front::template at<float>(layout.shift);
    const int first_output = slice() * kSlice, most = columns(a);
    const int first_row = warp() % kRowWarps * 16 * kRowBlocks, first_column = warp() / kRowWarps * 8 * kColumnBlocks;
    const int64_t count = tiles(a), last = count * (block() + 1) / blocks();
    int64_t tile = count * block() / blocks();

    Place at = Front::place_of(m, tile);
    front.prefetch(at, 0);
    copies_arrive();
    synchronize();
    while (tile < last) {
      const Place here = at;
      float sum[kRowBlocks][kColumnBlocks][4];
      clear(sum);
#pragma unroll 1
      for (int chunk = 0; chunk < m.wide; chunk += kChunk) {
        load_floats(shift, a.front.packed.shift + chunk, kChunk, 5 * kWarp);
        front.expand(here, chunk);
        synchronize();

        int next = chunk + kChunk;
        if (next >= m.wide) {
          next = 0;
          ++tile;
          at = Front::place_of(m, tile);
        }
        load_matrix(project, a.front.packed.project, m.outputs, a.front.packed.channels, first_output, most, chunk, kChunk);
        if (tile < last) front.prefetch(at, next);
        Pair out[Tile::kRows];
        front.filter(out);
        const Pair added = *reinterpret_cast<const Pair*>(shift + 2 * Front::pair());
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
          out[r].first += added.first;
          out[r].second += added.second;
        }
        activate<2 * Tile::kRows>(&out[0].first, a.front.act);
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r)
          *reinterpret_cast<uint32_t*>(
              filtered.row((Front::strip_row() + r) * Tile::kWidth + Front::strip_column()) + 2 * Front::pair()) =
              pack<T>(out[r].first, out[r].second);
        copies_arrive();
        synchronize();
        multiply<T, Rows::kOwn, Rows::kOwn>(sum, filtered, first_row, kPixels, project, first_column, most, kChunk / 16);
      }

      const int g = lane() / 4, t = lane() % 4;
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + 16 * i + 8 * half + g;
          const int y = here.y(row / Tile::kWidth), x = here.x(row % Tile::kWidth);
          if (!inside(y, x, m.out_height, m.out_width)) continue;
          const int64_t pixel = (here.image * m.out_height + y) * m.out_width + x;  // of x too, where it is added
          T* const to = static_cast<T*>(a.y) + pixel * m.outputs;
          const T* const from = static_cast<const T*>(a.front.x) + pixel * m.inputs;
#pragma unroll
          for (int j = 0; j < kColumnBlocks; ++j) {
            const int channel = first_output + first_column + 8 * j + 2 * t;
            if (channel >= m.outputs) continue;
            const Affine* const norms = reinterpret_cast<const Affine*>(a.front.packed.last);
            const Affine one = norms[channel], two = norms[channel + 1 < m.outputs ? channel + 1 : channel];
            Pair value{one.scale * sum[i][j][2 * half] + one.shift, two.scale * sum[i][j][2 * half + 1] + two.shift};
            if (a.residual) {
              const Pair add = load_pair(from, channel, m.inputs);
              value.first += add.first;
              value.second += add.second;
            }
            store_pair(to, channel, m.outputs, pack<T>(value.first, value.second));
          }
        }
    }
  }
};

// ---- Backward

template <typename T, int Stride>
struct Backward {
  using Arguments = BackwardArguments;
  using Type = T;
  static constexpr int kBlocksAtOnce = 2;
  static constexpr int kHeight = 8, kWidth = 16, kPixels = kHeight * kWidth;  // a tile of x
  // The filtered pixels that it has a part in.
  static constexpr int kOutHeight = Stride == 1 ? kHeight + 2 : kHeight / 2 + 1, kOutWidth = Stride == 1 ? kWidth + 2 : kWidth / 2 + 1;
  static constexpr int kOutPixels = kOutHeight * kOutWidth;
  static constexpr int kInputs = 64;  // input channels whose gradient the block sums; a launch has a slice of blocks for each of them
  static constexpr int kPitch = kInputs + 8;
  static constexpr int kMostOutputs = Stride == 1 ? 64 : 128;  // of the projection, in shared memory at a time
  static constexpr int kSums = 10;                             // of each channel: nine taps and G

  static MVIT3_BOTH int outputs(const Arguments& a) {
    const int all = a.front.maps.outputs, parts = (all + kMostOutputs - 1) / kMostOutputs;
    return round_up((all + parts - 1) / parts, 16);
  }
  static MVIT3_BOTH int slices(const Arguments& a) { return (a.front.maps.inputs + kInputs - 1) / kInputs; }
  static MVIT3_BOTH int64_t tiles(const Arguments& a) {
    const Maps& m = a.front.maps;
    return tiles_of(m.batch, kHeight, kWidth, m.height, m.width, m.dilation);
  }
  static MVIT3_DEVICE Place place_of(const Maps& m, int64_t tile) { return place<kHeight, kWidth>(tile, m.height, m.width, m.dilation); }
  static MVIT3_DEVICE Place of_z(Place tile) {
    return Stride == 1 ? tile.moved_to(tile.top - 1, tile.left - 1) : tile.moved_to(tile.top / 2, tile.left / 2);
  }

  // What a channel is scaled and shifted by.
  struct Channel {
    float scale, shift, z_scale, z_shift, c0, c1, c2, unused;
  };

  struct Layout {
    Carver carver;
    int x, expand, scaled, dp, project, z, wide, channels, taps, sums;
    MVIT3_BOTH explicit Layout(const Arguments& a)
        : x(carver.take(kPixels * kPitch, sizeof(T))), expand(carver.take(kChunk * kPitch, sizeof(T))),
          scaled(carver.take(kChunk * kPitch, sizeof(T))), dp(carver.take(kOutPixels * (outputs(a) + 8), sizeof(T))),
          project(carver.take(outputs(a) * kChunkPitch, sizeof(T))), z(carver.take(kOutPixels * kChunkPitch, sizeof(T))),
          wide(carver.take(kPixels * kChunkPitch, sizeof(T))), channels(carver.take(kChunk, sizeof(Channel))),
          taps(carver.take(9 * kChunk, sizeof(float))), sums(carver.take(2 * kSums * kChunk, sizeof(float))) {}
  };

  const Arguments& a;
  const Maps& m;
  Matrix<T> x, expand, scaled, dp, project, z, wide;
  Channel* channels;
  float *taps, *sums;

  template <typename V>
  static MVIT3_DEVICE V* at(int offset) { return reinterpret_cast<V*>(shared_memory() + offset); }

  MVIT3_DEVICE Backward(const Arguments& a, const Layout& layout)
      : a(a), m(a.front.maps), x{at<T>(layout.x), kPitch}, expand{at<T>(layout.expand), kPitch}, scaled{at<T>(layout.scaled), kPitch},
        dp{at<T>(layout.dp), outputs(a) + 8}, project{at<T>(layout.project), kChunkPitch}, z{at<T>(layout.z), kChunkPitch},
        wide{at<T>(layout.wide), kChunkPitch}, channels(at<Channel>(layout.channels)), taps(at<float>(layout.taps)),
        sums(at<float>(layout.sums)) {}

  MVIT3_DEVICE bool whole_inputs() const { return m.inputs <= kInputs; }
  // Columns of x and of its weights in shared memory.
  MVIT3_DEVICE int width() const { return whole_inputs() ? a.front.packed.inputs : kInputs; }
  MVIT3_DEVICE bool whole_outputs() const { return outputs(a) >= m.outputs; }

  MVIT3_DEVICE void load_x(Place tile, int first) const {
    load_pixels<kHeight, kWidth>(x, static_cast<const T*>(a.front.x), m.height, m.width, m.inputs, tile, first, width());
  }
  MVIT3_DEVICE void load_dp(Place tile, int first) const {
    load_pixels<kOutHeight, kOutWidth>(
        dp, static_cast<const T*>(a.dp), m.out_height, m.out_width, m.outputs, of_z(tile), first, outputs(a));
  }
  MVIT3_DEVICE void load_expand(int chunk, int first) const {
    load_matrix(expand, a.front.packed.expand, a.front.packed.channels, a.front.packed.inputs, chunk, kChunk, first, width());
  }
  MVIT3_DEVICE void load_project(int chunk, int first) const {
    load_matrix(project, a.front.packed.project, m.outputs, a.front.packed.channels, first, outputs(a), chunk, kChunk);
  }

  // Begins the copies of a step but for x. Nobody may read any more what they replace: all but x, scaled and wide.
  MVIT3_DEVICE void prefetch(Place tile, int chunk) const {
    load_pixels<kOutHeight, kOutWidth>(
        z, static_cast<const T*>(a.z), m.out_height, m.out_width, m.wide, of_z(tile), chunk, kChunk);
    if (whole_inputs()) load_expand(chunk, 0);
    if (whole_outputs()) {
      load_project(chunk, 0);
      if (chunk == 0) load_dp(tile, 0);
    }
    load_floats(&channels[0].scale, a.front.packed.backward + 8 * chunk, 8 * kChunk, 0);
    load_floats(taps, a.front.packed.taps + 9 * chunk, 9 * kChunk, 4 * kWarp);
  }

  // z becomes dz, zero outside the map.
  MVIT3_DEVICE void filtered_gradient(Place tile, int chunk) const {
    constexpr int kRowBlocks = (kOutPixels + 63) / 64, kColumnBlocks = 2;
    const int first_row = warp() % 4 * 16 * kRowBlocks, first_column = warp() / 4 * 8 * kColumnBlocks;
    float sum[kRowBlocks][kColumnBlocks][4];
    clear(sum);
#pragma unroll 1
    for (int first = 0; first < m.outputs; first += outputs(a)) {
      if (!whole_outputs()) {
        if (first) synchronize();
        load_project(chunk, first);
        load_dp(tile, first);
        copies_arrive();
        synchronize();
      }
      multiply<T, Rows::kOwn, Rows::kSummed>(sum, dp, first_row, kOutPixels, project, first_column, kChunk, outputs(a) / 16);
    }
    const Place from = of_z(tile);
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = first_row + 16 * i + 8 * half + g;
        if (pixel >= kOutPixels) continue;
        const bool there = inside(from.y(pixel / kOutWidth), from.x(pixel % kOutWidth), m.out_height, m.out_width);
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j) {
          const int column = first_column + 8 * j + 2 * t;
          uint32_t* const place = reinterpret_cast<uint32_t*>(z.row(pixel) + column);
          const Pair value = unpack<T>(*place);
          const Channel &one = channels[column], &two = channels[column + 1];
          float normal[2] = {one.z_scale * value.first + one.z_shift, two.z_scale * value.second + two.z_shift}, slope[2];
          activate_with_slope<2>(normal, slope, a.front.act);
          *place = there ? pack<T>(
                               one.c0 * (sum[i][j][2 * half] * slope[0]) + (one.c1 + one.c2 * value.first),
                               two.c0 * (sum[i][j][2 * half + 1] * slope[1]) + (two.c1 + two.c2 * value.second))
                         : 0u;
        }
      }
  }

  // `wide` becomes the expansion of the tile behind the norm, before the activation. The block's own slice of x and expand remains.
  MVIT3_DEVICE void expand_again(Place tile, int chunk) const {
    constexpr int kRowBlocks = 2, kColumnBlocks = 2;
    const int first_row = warp() % 4 * 16 * kRowBlocks, first_column = warp() / 4 * 8 * kColumnBlocks;
    float sum[kRowBlocks][kColumnBlocks][4];
    clear(sum);
    const int parts = slices(a);
#pragma unroll 1
    for (int i = 0; i < parts; ++i) {
      if (!whole_inputs()) {
        const int first = (slice() + 1 + i) % parts * kInputs;
        if (i) synchronize();
        load_x(tile, first);
        load_expand(chunk, first);
        copies_arrive();
        synchronize();
      }
      multiply<T, Rows::kOwn, Rows::kOwn>(sum, x, first_row, kPixels, expand, first_column, kChunk, width() / 16);
    }
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const int column = first_column + 8 * j + 2 * t;
      const Channel &one = channels[column], &two = channels[column + 1];
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(wide.row(first_row + 16 * i + 8 * half + g) + column) = pack<T>(
              one.scale * sum[i][j][2 * half] + one.shift, two.scale * sum[i][j][2 * half + 1] + two.shift);
    }
  }

  MVIT3_DEVICE void scale_weights() const {
    const int across = width() / 2;
#pragma unroll 1
    for (int i = thread(); i < kChunk * across; i += kThreads) {
      const int r = i / across, c = i % across * 2;
      const Pair weight = unpack<T>(*reinterpret_cast<const uint32_t*>(expand.row(r) + c));
      const float scale = channels[r].scale;
      *reinterpret_cast<uint32_t*>(scaled.row(r) + c) = pack<T>(weight.first * scale, weight.second * scale);
    }
  }

  // `wide` becomes G; `sums` the gradients of the taps and the sum of G, of both halves of the tile. A thread has two channels of a column;
  // the lanes of a warp are 4 pairs of channels x 8 columns, which lie in different banks.
  MVIT3_DEVICE void transposed_filter(Place tile) const {
    const int group = warp() % 4, side = warp() / 4;
    const int channel = 8 * group + 2 * (lane() % 4), column = 8 * side + lane() / 4;
    Pair tap[9];
#pragma unroll
    for (int i = 0; i < 9; ++i) tap[i] = *reinterpret_cast<const Pair*>(taps + i * kChunk + channel);
    // Stride 2: an even column has part in one column of outputs, through the middle tap; an odd one in two, right and left.
    const bool odd = column % 2 != 0;
    if (Stride == 2) {
#pragma unroll
      for (int ty = 0; ty < 3; ++ty) {
        tap[3 * ty] = odd ? tap[3 * ty] : Pair{0.0f, 0.0f};
        tap[3 * ty + 2] = odd ? tap[3 * ty + 2] : tap[3 * ty + 1];
      }
    }
    Pair dtap[9], total{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 9; ++i) dtap[i] = {0.0f, 0.0f};
    const T* const corner = z.row(Stride == 1 ? column : column / 2) + channel;
    const int right = Stride == 1 ? 1 : (column + 1) / 2 - column / 2;
    Pair window[3][3];
#pragma unroll
    for (int r = 0; r < kHeight; ++r) {
      T* const place = wide.row(r * kWidth + column) + channel;
      const Pair pre = unpack<T>(*reinterpret_cast<const uint32_t*>(place));
      float value[2] = {pre.first, pre.second}, slope[2];
      activate_with_slope<2>(value, slope, a.front.act);
      const bool there = inside(tile.y(r), tile.x(column), m.height, m.width);
      if (!there) value[0] = value[1] = 0.0f;
      Pair gradient{0.0f, 0.0f};
      const auto take = [&](int i, Pair dz) {
        gradient.first += tap[i].first * dz.first;
        gradient.second += tap[i].second * dz.second;
        dtap[i].first += value[0] * dz.first;
        dtap[i].second += value[1] * dz.second;
      };
      const auto read = [&](int row, int from) {
        return unpack<T>(*reinterpret_cast<const uint32_t*>(corner + (row * kOutWidth + from) * kChunkPitch));
      };
      if (Stride == 1) {
#pragma unroll
        for (int ty = 2; ty >= 0; --ty) {
          const int row = r + 2 - ty;
#pragma unroll
          for (int tx = 0; tx < 3; ++tx) {
            Pair& dz = window[row % 3][tx];
            if (r == 0 || ty == 0) dz = read(row, 2 - tx);
            take(3 * ty + tx, dz);
          }
        }
      } else {
        // An even row: one row of outputs, the middle taps; an odd one: two, the bottom and the top taps.
#pragma unroll
        for (int part = 0; part < 1 + r % 2; ++part) {
          const int ty = r % 2 == 0 ? 1 : part == 0 ? 2 : 0, row = r / 2 + part;
          take(3 * ty + 2, read(row, 0));
          take(3 * ty, read(row, right));
        }
      }
      const float first = there ? gradient.first * slope[0] : 0.0f, second = there ? gradient.second * slope[1] : 0.0f;
      total.first += first;
      total.second += second;
      *reinterpret_cast<uint32_t*>(place) = pack<T>(first, second);
    }
    if (Stride == 2) {
#pragma unroll
      for (int ty = 0; ty < 3; ++ty) {
        dtap[3 * ty + 1] = odd ? Pair{0.0f, 0.0f} : dtap[3 * ty + 2];
        if (!odd) dtap[3 * ty] = dtap[3 * ty + 2] = {0.0f, 0.0f};
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      Pair value = i < 9 ? dtap[i < 9 ? i : 0] : total;
#pragma unroll
      for (int mask = 4; mask < kWarp; mask *= 2) {
        value.first += shuffle_xor(value.first, mask);
        value.second += shuffle_xor(value.second, mask);
      }
      if (lane() < 4) *reinterpret_cast<Pair*>(sums + (side * kSums + i) * kChunk + channel) = value;
    }
  }

  // Adds `sums` to what the block kept of its tiles before, (wide, kSums).
  MVIT3_DEVICE void keep_sums(float* kept, int chunk, bool first_tile) const {
#pragma unroll 1
    for (int i = thread(); i < kSums * kChunk; i += kThreads) {
      const int c = chunk + i / kSums, k = i % kSums;
      if (c >= m.wide) continue;
      const float sum = sums[k * kChunk + i / kSums] + sums[(kSums + k) * kChunk + i / kSums];
      float& to = kept[int64_t(c) * kSums + k];
      to = first_tile ? sum : to + sum;
    }
  }

  // Adds G^T x of the tile to what the block kept, (wide, inputs).
  MVIT3_DEVICE void multiply_by_x(float* kept, int chunk, bool first_tile) const {
    const int first_row = warp() % 2 * 16, first_column = warp() / 2 * 16, g = lane() / 4, t = lane() % 4;
    float sum[1][2][4];
    clear(sum);
    const auto for_each = [&](const auto& f) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = chunk + first_row + k / 2 * 8 + g, column = slice() * kInputs + first_column + 8 * j + 2 * t + k % 2;
          if (row < m.wide && column < m.inputs) f(sum[0][j][k], kept[int64_t(row) * m.inputs + column]);
        }
    };
    if (!first_tile) for_each([](float& value, float& memory) { value = memory; });
    multiply<T, Rows::kSummed, Rows::kSummed>(sum, wide, first_row, kChunk, x, first_column, width(), kPixels / 16);
    for_each([](float& value, float& memory) { memory = value; });
  }

  static MVIT3_DEVICE void run(const Arguments& a) { Backward(a, Layout(a)).run(); }

  MVIT3_DEVICE void run() const {
    constexpr int kRowBlocks = 2, kColumnBlocks = 4;  // of dx
    const int first_row = warp() % 4 * 16 * kRowBlocks, first_column = warp() / 4 * 8 * kColumnBlocks;
    const int64_t count = tiles(a), begin = count * block() / blocks(), end = count * (block() + 1) / blocks();
    float* const kept_products = a.workspace + block() * kept(a);
    float* const kept_sums = kept_products + int64_t(m.wide) * m.inputs;

    Place tile = place_of(m, begin);
    prefetch(tile, 0);
    for (int64_t i = begin; i < end; ++i) {
      const Place here = tile;
      if (whole_inputs()) load_x(here, 0);
      float sum[kRowBlocks][kColumnBlocks][4];
      clear(sum);
#pragma unroll 1
      for (int chunk = 0; chunk < m.wide; chunk += kChunk) {
        copies_arrive();
        synchronize();
        filtered_gradient(here, chunk);
        expand_again(here, chunk);
        synchronize();
        scale_weights();
        transposed_filter(here);
        synchronize();
        if (slice() == 0) keep_sums(kept_sums, chunk, i == begin);
        const bool ends = chunk + kChunk >= m.wide;
        if (ends) tile = place_of(m, i + 1);
        if (!ends || i + 1 < end) prefetch(tile, ends ? 0 : chunk + kChunk);
        multiply_by_x(kept_products, chunk, i == begin);
        multiply<T, Rows::kOwn, Rows::kSummed>(sum, wide, first_row, kPixels, scaled, first_column, width(), kChunk / 16);
      }
      const int g = lane() / 4, t = lane() % 4;
#pragma unroll
      for (int r = 0; r < 2 * kRowBlocks; ++r) {
        const int pixel = first_row + 8 * r + g, y = here.y(pixel / kWidth), x = here.x(pixel % kWidth);
        if (!inside(y, x, m.height, m.width)) continue;
        T* const to = static_cast<T*>(a.dx) + ((here.image * m.height + y) * m.width + x) * m.inputs;
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j)
          store_pair(
              to, slice() * kInputs + first_column + 8 * j + 2 * t, m.inputs,
              pack<T>(sum[r / 2][j][r % 2 * 2], sum[r / 2][j][r % 2 * 2 + 1]));
      }
      synchronize();  // x is free
    }
  }

  // Floats that a block keeps of its tiles.
  static MVIT3_BOTH int64_t kept(const Arguments& a) { return int64_t(a.front.maps.wide) * (a.front.maps.inputs + kSums); }
};

// Adds up what the blocks kept, 32 sums to a block of threads.
struct FinishBackward {
  struct Arguments {
    const float* workspace;
    float *n1, *g1, *dtaps;
    int parts;
    int64_t products, count;
  };
  static constexpr int kBlocksAtOnce = 1;

  static MVIT3_DEVICE void run(const Arguments& a) {
    const int64_t i = int64_t(block()) * kWarp + lane();
    const float sum = sum_of_parts(a.workspace, a.parts, a.count, i);
    if (warp() || i >= a.count) return;
    const int64_t channel = (i - a.products) / 10, k = (i - a.products) % 10;
    (i < a.products ? a.n1[i] : k < 9 ? a.dtaps[channel * 9 + k] : a.g1[channel]) = sum;
  }
};

namespace {

template <typename K>
struct Chosen {
  using type = K;
};

// Calls f with the kernel for a type of map and a stride.
template <template <typename, int> class Kernel, typename F>
auto choose(bool bfloat16, int stride, const F& f) {
  if (bfloat16) return stride == 1 ? f(Chosen<Kernel<BFloat16, 1>>{}) : f(Chosen<Kernel<BFloat16, 2>>{});
  return stride == 1 ? f(Chosen<Kernel<Float16, 1>>{}) : f(Chosen<Kernel<Float16, 2>>{});
}

// As many blocks as the device runs at once, at most one for each tile.
template <typename K>
int blocks_for(const typename K::Arguments& a, int shared) {
  const int64_t tiles = K::tiles(a), most = resident_blocks<K>(shared);
  return int(tiles < most ? tiles : most);
}

}  // namespace

int64_t filter_workspace(const FilterArguments& a) {
  return choose<Filter>(a.bfloat16, a.stride, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    return packed_floats(a.front.maps) + int64_t(blocks_for<K>(a, typename K::Layout(a).carver.bytes)) * (2 * a.front.maps.wide + 1);
  });
}

void filter(const FilterArguments& a, void* stream) {
  choose<Filter>(a.bfloat16, a.stride, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    const int shared = typename K::Layout(a).carver.bytes, parts = blocks_for<K>(a, shared), channels = a.front.maps.wide;
    FilterArguments ready = a;
    ready.workspace = pack_into<typename K::Type>(ready.front, {}, a.workspace, stream);
    launch<K>(ready, parts, 1, shared, stream);
    launch<FinishMoments>({ready.workspace, a.mean, a.var, parts, channels}, (channels + kWarp - 1) / kWarp, 1, kThreads * 8, stream);
  });
}

int64_t inference_workspace(const InferenceArguments& a) { return packed_floats(a.front.maps); }

void inference(const InferenceArguments& a, void* stream) {
  choose<Inference>(a.bfloat16, a.stride, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    const int shared = typename K::Layout(a).carver.bytes, slices = (a.front.maps.outputs + K::kSlice - 1) / K::kSlice;
    InferenceArguments ready = a;
    PackArguments parameters{};
    parameters.project = a.project;
    parameters.middle = a.middle;
    parameters.last = a.last;
    parameters.folds = true;
    pack_into<typename K::Type>(ready.front, parameters, a.workspace, stream);
    launch<K>(ready, blocks_for<K>(a, shared), slices, shared, stream);
  });
}

int64_t backward_workspace(const BackwardArguments& a) {
  return choose<Backward>(a.bfloat16, a.stride, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    return packed_floats(a.front.maps) + blocks_for<K>(a, typename K::Layout(a).carver.bytes) * K::kept(a);
  });
}

void backward(const BackwardArguments& a, void* stream) {
  choose<Backward>(a.bfloat16, a.stride, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    const Maps& m = a.front.maps;
    const int shared = typename K::Layout(a).carver.bytes, parts = blocks_for<K>(a, shared);
    BackwardArguments ready = a;
    PackArguments parameters{};
    parameters.project = a.project;
    parameters.z_scale = a.z_scale;
    parameters.z_shift = a.z_shift;
    parameters.c0 = a.c0;
    parameters.c1 = a.c1;
    parameters.c2 = a.c2;
    ready.workspace = pack_into<typename K::Type>(ready.front, parameters, a.workspace, stream);
    launch<K>(ready, parts, K::slices(a), shared, stream);
    const int64_t count = K::kept(a);
    launch<FinishBackward>(
        {ready.workspace, a.n1, a.g1, a.dtaps, parts, int64_t(m.wide) * m.inputs, count}, int(ceil_div(count, kWarp)), 1, kThreads * 4,
        stream);
  });
}

}  // namespace mvit3
