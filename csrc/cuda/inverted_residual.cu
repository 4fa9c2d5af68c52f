// inverted_residual on tiles in shared memory (identity G of the design), forward: the expanded map exists nowhere
// else.

#include "inverted_residual.h"
#include "sums.h"

namespace mvit3 {

// ---- Filter: z and its moments

// a = act(scale * (x expand^T) + shift), z = depthwise * a, and the moments of the z that is stored:
// mean = sum(z) / n, squares = sum((z - mean)^2), for each channel, over the pixels of a block.
//
// Reads x (B, H, W, inputs) once for each tile of z, with a border of one pixel (more than 128 inputs once for each 32
// expanded channels of a tile); the packed parameters once for each tile. Writes z (B, H', W', expanded) once, and to
// the workspace the moments (blocks, expanded) and the number of pixels (blocks). Those of a block are read and written
// again for each of its tiles.
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
    MVIT3_BOTH
    explicit Layout(const Arguments& a)
        : front(carver, a.front.slice), moments(carver.take(kWarps * kChunk, sizeof(Moments))),
          counts(carver.take(kWarps, sizeof(float))) {}
  };

  static MVIT3_BOTH
  int64_t tiles(const Arguments& a) { return Front::tiles(a.front.maps); }

  // Two neighbouring channels of a strip of z: their moments, of `count` pixels each.
  struct StripMoments {
    Moments first, second;
    float count;
  };

  // Stores the thread's strip, whose first `length` outputs are in the map, `down` pixels from one to the next.
  static MVIT3_DEVICE
  StripMoments store(
      T* z, const Pair (&out)[Tile::kRows], int length, int64_t pixel, int64_t down, int channel, int channels) {
    Pair shift{0.0f, 0.0f}, sum{0.0f, 0.0f}, squares{0.0f, 0.0f};
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const uint32_t bits = pack<T>(out[r].first, out[r].second);
      if (r >= length) continue;
      store_pair(z + (pixel + r * down) * channels, channel, channels, bits);
      const Pair value = unpack<T>(bits);
      if (r == 0) shift = value;  // one of the values: differences from it are small, and 0 where all are equal
      const float one = value.first - shift.first, two = value.second - shift.second;
      sum.first += one;
      sum.second += two;
      squares.first += one * one;
      squares.second += two * two;
    }
    const float n = float(length), inverse = length ? fast_divide(1.0f, n) : 0.0f;
    return {
        {shift.first + sum.first * inverse, squares.first - sum.first * sum.first * inverse},
        {shift.second + sum.second * inverse, squares.second - sum.second * sum.second * inverse},
        n};
  }

  // The moments of the two strips of a warp, whose halves have the same channels, to shared memory.
  static MVIT3_DEVICE
  void keep(const StripMoments& own, Moments* moments, float* counts) {
    const auto& [one, two, n] = own;
    const float other = shuffle_xor(n, 16);
    const Moments other_one{shuffle_xor(one.mean, 16), shuffle_xor(one.squares, 16)};
    const Moments other_two{shuffle_xor(two.mean, 16), shuffle_xor(two.squares, 16)};
    if (lane() >= 16) return;
    moments[warp() * kChunk + 2 * lane()] = n == 0.0f ? other_one : merge(one, n, other_one, other);
    moments[warp() * kChunk + 2 * lane() + 1] = n == 0.0f ? other_two : merge(two, n, other_two, other);
    if (lane() == 0) counts[warp()] = n + other;
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const Layout layout(a);
    const Front front(a.front, layout.front);
    const Maps& m = a.front.maps;
    Moments* const moments = Front::template at<Moments>(layout.moments);
    float* const counts = Front::template at<float>(layout.counts);
    Moments* const kept = reinterpret_cast<Moments*>(a.workspace) + int64_t(block()) * m.expanded;  // of this block
    const int64_t count = tiles(a), last = count * (block() + 1) / blocks();
    int64_t tile = count * block() / blocks();
    T* const z = static_cast<T*>(a.z);

    // The moments of a step are merged in the next one, behind its barrier.
    Moments before{0.0f, 0.0f};
    float seen = 0.0f;  // outputs of this block in the tiles before
    int pending = -1;
    const auto merge_pending = [&] {
      const int channel = pending + thread();
      if (pending < 0 || thread() >= kChunk || channel >= m.expanded) return;
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
      if (chunk >= m.expanded) {
        chunk = 0;
        ++tile;
        at = Front::place_of(m, tile);
      }
      if (tile < last) front.prefetch(at, chunk);
      before = Moments{0.0f, 0.0f};
      if (thread() < kChunk && first + thread() < m.expanded && seen > 0.0f) before = kept[first + thread()];
      pending = first;

      Pair out[Tile::kRows];
      front.filter(out);
      const int length = front.strip_length(here), channel = first + 2 * Front::pair();
      const int64_t pixel =
          (here.image * m.out_height + here.y(Front::strip_row())) * m.out_width + here.x(Front::strip_column());
      const int64_t down = int64_t(here.step) * m.out_width;
      keep(store(z, out, length, pixel, down, channel, m.expanded), moments, counts);
    }
    synchronize();
    merge_pending();
    if (thread() == 0) {
      for (int w = 0; w < kWarps; ++w) seen += counts[w];
      a.workspace[int64_t(blocks()) * m.expanded * 2 + block()] = seen;
    }
  }
};

// ---- Inference: the whole block

// y = last(act(middle(depthwise * act(norm(x expand^T)))) project^T), + x where `residual`; the norms folded.
//
// Reads x (B, H, W, inputs) as Filter does and, where it is added, once more; the packed parameters once for each tile.
// Writes y (B, H', W', outputs) once. With more outputs than kSlice each slice of blocks
// does all but the projection again.
template <typename T, int Stride>
struct Inference {
  using Arguments = InferenceArguments;
  using Type = T;
  using Front = Expansion<T, Stride>;
  using Tile = OutputTile<Stride>;
  static constexpr int kBlocksAtOnce = 2;
  static constexpr int kPixels = Tile::kHeight * Tile::kWidth;
  // The sums of a tile, 32 registers of each thread, are this many output channels; a launch has a slice of blocks for
  // each of them.
  static constexpr int kRowWarps = Stride == 1 ? 4 : 2, kColumnWarps = kWarps / kRowWarps;
  static constexpr int kRowBlocks = kPixels / (16 * kRowWarps), kColumnBlocks = 8 / kRowBlocks;
  static constexpr int kSlice = 8 * kColumnBlocks * kColumnWarps;

  static MVIT3_BOTH
  int columns(const Arguments& a) {
    const int outputs = round_up(a.front.maps.outputs, 16);
    return outputs < kSlice ? outputs : kSlice;
  }

  struct Layout {
    Carver carver;
    typename Front::Layout front;
    int filtered, project, shift;
    MVIT3_BOTH
    explicit Layout(const Arguments& a)
        : front(carver, a.front.slice), filtered(carver.take(kPixels * kChunkPitch, sizeof(T))),
          project(carver.take(columns(a) * kChunkPitch, sizeof(T))), shift(carver.take(kChunk, sizeof(float))) {}
  };

  static MVIT3_BOTH
  int64_t tiles(const Arguments& a) { return Front::tiles(a.front.maps); }

  // The sums of a warp's block of the tile through the last norm, and the residual, to y.
  static MVIT3_DEVICE
  void store(
      const Arguments& a, const Place& here, const float (&sum)[kRowBlocks][kColumnBlocks][4], int first_row,
      int first_channel) {
    const Maps& m = a.front.maps;
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
          const int channel = first_channel + 8 * j + 2 * t;
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

  static MVIT3_DEVICE
  void run(const Arguments& a) {
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
      for (int chunk = 0; chunk < m.expanded; chunk += kChunk) {
        load_floats(shift, a.front.packed.shift + chunk, kChunk, 5 * kWarp);
        front.expand(here, chunk);
        synchronize();

        int next = chunk + kChunk;
        if (next >= m.expanded) {
          next = 0;
          ++tile;
          at = Front::place_of(m, tile);
        }
        load_matrix(
            project, a.front.packed.project, m.outputs, a.front.packed.channels, first_output, most, chunk, kChunk);
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
        multiply<T, Rows::kOwn, Rows::kOwn>(
            sum, filtered, first_row, kPixels, project, first_column, most, kChunk / 16);
      }

      store(a, here, sum, first_row, first_output + first_column);
    }
  }
};

int64_t filter_workspace(const FilterArguments& a) {
  return choose<Filter>(a.bfloat16, a.stride, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    return packed_floats(a.front.maps) +
           int64_t(blocks_for<K>(a, typename K::Layout(a).carver.bytes)) * (2 * a.front.maps.expanded + 1);
  });
}

void filter(const FilterArguments& a, void* stream) {
  choose<Filter>(a.bfloat16, a.stride, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    const int shared = typename K::Layout(a).carver.bytes, parts = blocks_for<K>(a, shared),
              channels = a.front.maps.expanded;
    FilterArguments ready = a;
    ready.workspace = pack_into<typename K::Type>(ready.front, {}, a.workspace, stream);
    launch<K>(ready, parts, 1, shared, stream);
    launch<FinishMoments>(
        {ready.workspace, a.mean, a.var, parts, channels}, (channels + kWarp - 1) / kWarp, 1, kThreads * 8, stream);
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

}  // namespace mvit3
