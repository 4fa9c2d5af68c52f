// inverted_residual on tiles in shared memory (identity G of the design), backward.

#include "inverted_residual.h"
#include "sums.h"

namespace mvit3 {

// With dp (B, H', W', outputs), the gradient of the projection, and z as Filter left it:
//   g = (dp project) * act'(z_scale z + z_shift), dz = c0 g + c1 + c2 z,
//   e = norm(x expand^T) again, G = (depthwise^T * dz) * act'(e), dx = (G * scale) expand;
// and per block, over its tiles, n1 = G^T x, g1 = sum of G, dtaps = sum of act(e) times the dz that meets it.
//
// Reads x, dp and z once for each tile of x, dp and z with a border of one pixel (more than 64 inputs and more than 64
// or 128 outputs once for each 32 expanded channels of a tile), and the packed parameters once for each tile.
// Writes dx (B, H, W, inputs) once, and to the workspace (blocks, expanded, inputs) and (blocks, expanded, 10), which
// are read and written again for each tile. With more inputs than kInputs each slice of blocks does all but its part
// of dx and n1 again.
template <typename T, int Stride>
struct Backward {
  using Arguments = BackwardArguments;
  using Type = T;
  static constexpr int kBlocksAtOnce = 2;
  static constexpr int kHeight = 8, kWidth = 16, kPixels = kHeight * kWidth;  // a tile of x
  // The filtered pixels that it has a part in.
  static constexpr int kOutHeight = Stride == 1 ? kHeight + 2 : kHeight / 2 + 1,
                       kOutWidth = Stride == 1 ? kWidth + 2 : kWidth / 2 + 1;
  static constexpr int kOutPixels = kOutHeight * kOutWidth;
  static constexpr int kInputs =
      64;  // input channels whose gradient the block sums; a launch has a slice of blocks for each of them
  static constexpr int kPitch = kInputs + 8;
  static constexpr int kMostOutputs = Stride == 1 ? 64 : 128;  // of the projection, in shared memory at a time
  static constexpr int kSums = 10;                             // of each channel: nine taps and G

  static MVIT3_BOTH
  int outputs(const Arguments& a) {
    const int all = a.front.maps.outputs, parts = (all + kMostOutputs - 1) / kMostOutputs;
    return round_up((all + parts - 1) / parts, 16);
  }
  static MVIT3_BOTH
  int slices(const Arguments& a) { return (a.front.maps.inputs + kInputs - 1) / kInputs; }
  static MVIT3_BOTH
  int64_t tiles(const Arguments& a) {
    const Maps& m = a.front.maps;
    return tiles_of(m.batch, kHeight, kWidth, m.height, m.width, m.dilation);
  }
  static MVIT3_DEVICE
  Place place_of(const Maps& m, int64_t tile) { return place<kHeight, kWidth>(tile, m.height, m.width, m.dilation); }
  static MVIT3_DEVICE
  Place of_z(Place tile) {
    return Stride == 1 ? tile.moved_to(tile.top - 1, tile.left - 1) : tile.moved_to(tile.top / 2, tile.left / 2);
  }

  // What a channel is scaled and shifted by.
  struct Channel {
    float scale, shift, z_scale, z_shift, c0, c1, c2, unused;
  };

  struct Layout {
    Carver carver;
    int x, expand, scaled, dp, project, z, expanded, channels, taps, sums;
    MVIT3_BOTH
    explicit Layout(const Arguments& a)
        : x(carver.take(kPixels * kPitch, sizeof(T))), expand(carver.take(kChunk * kPitch, sizeof(T))),
          scaled(carver.take(kChunk * kPitch, sizeof(T))), dp(carver.take(kOutPixels * (outputs(a) + 8), sizeof(T))),
          project(carver.take(outputs(a) * kChunkPitch, sizeof(T))),
          z(carver.take(kOutPixels * kChunkPitch, sizeof(T))), expanded(carver.take(kPixels * kChunkPitch, sizeof(T))),
          channels(carver.take(kChunk, sizeof(Channel))), taps(carver.take(9 * kChunk, sizeof(float))),
          sums(carver.take(2 * kSums * kChunk, sizeof(float))) {}
  };

  const Arguments& a;
  const Maps& m;
  Matrix<T> x, expand, scaled, dp, project, z, expanded;
  Channel* channels;
  float *taps, *sums;

  template <typename V>
  static MVIT3_DEVICE
  V* at(int offset) { return reinterpret_cast<V*>(shared_memory() + offset); }

  MVIT3_DEVICE
  Backward(const Arguments& a, const Layout& layout)
      : a(a), m(a.front.maps), x{at<T>(layout.x), kPitch}, expand{at<T>(layout.expand), kPitch},
        scaled{at<T>(layout.scaled), kPitch}, dp{at<T>(layout.dp), outputs(a) + 8},
        project{at<T>(layout.project), kChunkPitch}, z{at<T>(layout.z), kChunkPitch},
        expanded{at<T>(layout.expanded), kChunkPitch}, channels(at<Channel>(layout.channels)),
        taps(at<float>(layout.taps)), sums(at<float>(layout.sums)) {}

  MVIT3_DEVICE
  bool whole_inputs() const { return m.inputs <= kInputs; }
  // Columns of x and of its weights in shared memory.
  MVIT3_DEVICE
  int width() const { return whole_inputs() ? a.front.packed.inputs : kInputs; }
  MVIT3_DEVICE
  bool whole_outputs() const { return outputs(a) >= m.outputs; }

  MVIT3_DEVICE
  void load_x(Place tile, int first) const {
    load_pixels<kHeight, kWidth>(
        x, static_cast<const T*>(a.front.x), m.height, m.width, m.inputs, tile, first, width());
  }
  MVIT3_DEVICE
  void load_dp(Place tile, int first) const {
    load_pixels<kOutHeight, kOutWidth>(
        dp, static_cast<const T*>(a.dp), m.out_height, m.out_width, m.outputs, of_z(tile), first, outputs(a));
  }
  MVIT3_DEVICE
  void load_expand(int chunk, int first) const {
    load_matrix(
        expand, a.front.packed.expand, a.front.packed.channels, a.front.packed.inputs, chunk, kChunk, first, width());
  }
  MVIT3_DEVICE
  void load_project(int chunk, int first) const {
    load_matrix(project, a.front.packed.project, m.outputs, a.front.packed.channels, first, outputs(a), chunk, kChunk);
  }

  // Begins the copies of a step but for x. Nobody may read any more what they replace: all but x, scaled and expanded.
  MVIT3_DEVICE
  void prefetch(Place tile, int chunk) const {
    load_pixels<kOutHeight, kOutWidth>(
        z, static_cast<const T*>(a.z), m.out_height, m.out_width, m.expanded, of_z(tile), chunk, kChunk);
    if (whole_inputs()) load_expand(chunk, 0);
    if (whole_outputs()) {
      load_project(chunk, 0);
      if (chunk == 0) load_dp(tile, 0);
    }
    load_floats(&channels[0].scale, a.front.packed.backward + 8 * chunk, 8 * kChunk, 0);
    load_floats(taps, a.front.packed.taps + 9 * chunk, 9 * kChunk, 4 * kWarp);
  }

  // z becomes dz, zero outside the map.
  MVIT3_DEVICE
  void filtered_gradient(Place tile, int chunk) const {
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
      multiply<T, Rows::kOwn, Rows::kSummed>(
          sum, dp, first_row, kOutPixels, project, first_column, kChunk, outputs(a) / 16);
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
          float normal[2] = {one.z_scale * value.first + one.z_shift, two.z_scale * value.second + two.z_shift},
                slope[2];
          activate_with_slope<2>(normal, slope, a.front.act);
          *place = there ? pack<T>(
                               one.c0 * (sum[i][j][2 * half] * slope[0]) + (one.c1 + one.c2 * value.first),
                               two.c0 * (sum[i][j][2 * half + 1] * slope[1]) + (two.c1 + two.c2 * value.second))
                         : 0u;
        }
      }
  }

  // `expanded` becomes the expansion of the tile behind the norm, before the activation. The block's own slice of x and
  // expand remains.
  MVIT3_DEVICE
  void expand_again(Place tile, int chunk) const {
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
          *reinterpret_cast<uint32_t*>(expanded.row(first_row + 16 * i + 8 * half + g) + column) =
              pack<T>(one.scale * sum[i][j][2 * half] + one.shift, two.scale * sum[i][j][2 * half + 1] + two.shift);
    }
  }

  MVIT3_DEVICE
  void scale_weights() const {
    const int across = width() / 2;
#pragma unroll 1
    for (int i = thread(); i < kChunk * across; i += kThreads) {
      const int r = i / across, c = i % across * 2;
      const Pair weight = unpack<T>(*reinterpret_cast<const uint32_t*>(expand.row(r) + c));
      const float scale = channels[r].scale;
      *reinterpret_cast<uint32_t*>(scaled.row(r) + c) = pack<T>(weight.first * scale, weight.second * scale);
    }
  }

  // Stride 2: an even column has part in one column of outputs, through the middle tap; an odd one in two, right and
  // left. The taps of a thread are sorted so that both do the same.
  MVIT3_DEVICE
  void read_taps(Pair (&tap)[9], int channel, bool odd) const {
#pragma unroll
    for (int i = 0; i < 9; ++i) tap[i] = *reinterpret_cast<const Pair*>(taps + i * kChunk + channel);
    if constexpr (Stride == 2) {
#pragma unroll
      for (int ty = 0; ty < 3; ++ty) {
        tap[3 * ty] = odd ? tap[3 * ty] : Pair{0.0f, 0.0f};
        tap[3 * ty + 2] = odd ? tap[3 * ty + 2] : tap[3 * ty + 1];
      }
    }
  }

  // The sums of the eight columns of a warp, to `sums`.
  MVIT3_DEVICE
  void add_over_columns(const Pair (&dtap)[9], const Pair& total, int channel, int side) const {
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

  // `expanded` becomes G; `sums` the gradients of the taps and the sum of G, of both halves of the tile. A thread has
  // two channels of a column; the lanes of a warp are 4 pairs of channels x 8 columns, which lie in different banks.
  MVIT3_DEVICE
  void transposed_filter(Place tile) const {
    const int group = warp() % 4, side = warp() / 4;
    const int channel = 8 * group + 2 * (lane() % 4), column = 8 * side + lane() / 4;
    const bool odd = column % 2 != 0;
    Pair tap[9];
    read_taps(tap, channel, odd);
    Pair dtap[9], total{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 9; ++i) dtap[i] = {0.0f, 0.0f};
    const T* const corner = z.row(Stride == 1 ? column : column / 2) + channel;
    const int right = Stride == 1 ? 1 : (column + 1) / 2 - column / 2;
    Pair window[3][3];
#pragma unroll
    for (int r = 0; r < kHeight; ++r) {
      T* const place = expanded.row(r * kWidth + column) + channel;
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
    add_over_columns(dtap, total, channel, side);
  }

  // Adds `sums` to what the block kept of its tiles before, (expanded, kSums).
  MVIT3_DEVICE
  void keep_sums(float* kept, int chunk, bool first_tile) const {
#pragma unroll 1
    for (int i = thread(); i < kSums * kChunk; i += kThreads) {
      const int c = chunk + i / kSums, k = i % kSums;
      if (c >= m.expanded) continue;
      const float sum = sums[k * kChunk + i / kSums] + sums[(kSums + k) * kChunk + i / kSums];
      float& to = kept[int64_t(c) * kSums + k];
      to = first_tile ? sum : to + sum;
    }
  }

  // Adds G^T x of the tile to what the block kept, (expanded, inputs).
  MVIT3_DEVICE
  void multiply_by_x(float* kept, int chunk, bool first_tile) const {
    const int first_row = warp() % 2 * 16, first_column = warp() / 2 * 16, g = lane() / 4, t = lane() % 4;
    float sum[1][2][4];
    clear(sum);
    const auto for_each = [&](const auto& f) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = chunk + first_row + k / 2 * 8 + g,
                    column = slice() * kInputs + first_column + 8 * j + 2 * t + k % 2;
          if (row < m.expanded && column < m.inputs) f(sum[0][j][k], kept[int64_t(row) * m.inputs + column]);
        }
    };
    if (!first_tile) for_each([](float& value, float& memory) { value = memory; });
    multiply<T, Rows::kSummed, Rows::kSummed>(sum, expanded, first_row, kChunk, x, first_column, width(), kPixels / 16);
    for_each([](float& value, float& memory) { memory = value; });
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) { Backward(a, Layout(a)).run(); }

  MVIT3_DEVICE
  void run() const {
    constexpr int kRowBlocks = 2, kColumnBlocks = 4;  // of dx
    const int first_row = warp() % 4 * 16 * kRowBlocks, first_column = warp() / 4 * 8 * kColumnBlocks;
    const int64_t count = tiles(a), begin = count * block() / blocks(), end = count * (block() + 1) / blocks();
    float* const kept_products = a.workspace + block() * kept(a);
    float* const kept_sums = kept_products + int64_t(m.expanded) * m.inputs;

    Place tile = place_of(m, begin);
    prefetch(tile, 0);
    for (int64_t i = begin; i < end; ++i) {
      const Place here = tile;
      if (whole_inputs()) load_x(here, 0);
      float sum[kRowBlocks][kColumnBlocks][4];
      clear(sum);
#pragma unroll 1
      for (int chunk = 0; chunk < m.expanded; chunk += kChunk) {
        copies_arrive();
        synchronize();
        filtered_gradient(here, chunk);
        expand_again(here, chunk);
        synchronize();
        scale_weights();
        transposed_filter(here);
        synchronize();
        if (slice() == 0) keep_sums(kept_sums, chunk, i == begin);
        const bool ends = chunk + kChunk >= m.expanded;
        if (ends) tile = place_of(m, i + 1);
        if (!ends || i + 1 < end) prefetch(tile, ends ? 0 : chunk + kChunk);
        multiply_by_x(kept_products, chunk, i == begin);
        multiply<T, Rows::kOwn, Rows::kSummed>(
            sum, expanded, first_row, kPixels, scaled, first_column, width(), kChunk / 16);
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
  static MVIT3_BOTH
  int64_t kept(const Arguments& a) { return int64_t(a.front.maps.expanded) * (a.front.maps.inputs + kSums); }
};

// Adds up what the blocks kept, 32 sums to a block of threads: n1 (expanded, inputs), then of each channel the nine
// gradients of its taps (expanded, 9) and g1 (expanded). Reads the workspace and writes the sums once.
struct FinishBackward {
  struct Arguments {
    const float* workspace;
    float *n1, *g1, *dtaps;
    int parts;
    int64_t products, count;
  };
  static constexpr int kBlocksAtOnce = 1;

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const int64_t i = int64_t(block()) * kWarp + lane();
    const float sum = sum_of_parts(a.workspace, a.parts, a.count, i);
    if (warp() || i >= a.count) return;
    const int64_t channel = (i - a.products) / 10, k = (i - a.products) % 10;
    (i < a.products ? a.n1[i] : k < 9 ? a.dtaps[channel * 9 + k] : a.g1[channel]) = sum;
  }
};

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
        {ready.workspace, a.n1, a.g1, a.dtaps, parts, int64_t(m.expanded) * m.inputs, count},
        int(ceil_div(count, kWarp)), 1, kThreads * 4, stream);
  });
}

}  // namespace mvit3
