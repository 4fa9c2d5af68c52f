// inverted_residual on tiles in shared memory (identity G of the design), forward: the expanded map exists nowhere
// else.

#include "inverted_residual.h"
#include "sums.h"

namespace mvit3 {

// ---- Filter: z and its moments

// a = act(scale * (x expand^T) + shift), z = depthwise * a, and the moments of the z that is stored:
// mean = sum(z) / n, squares = sum((z - mean)^2), for each channel, over the pixels of a block.
//
// A slice of blocks has 64 expanded channels, whose weights stay in shared memory and whose sums stay in registers
// while a block walks over its tiles. Reads x (B, H, W, inputs) once for each slice and tile of z, with a border of one
// pixel; the parameters once for each block, which packs them for itself (with more than 128 inputs they are packed
// before, and the weights read once for each tile). Writes z
// (B, H', W', expanded) once, and the moments (2, blocks, expanded) and the number of pixels (blocks).
template <typename T, int Stride, int Inputs>
struct Filter {
  using Arguments = FilterArguments;
  using Type = T;
  using Tile = OutputTile<Stride>;
  static constexpr int kBlocksAtOnce = 2;
  static constexpr int kSlice = 2 * kChunk;
  using Front = Expansion<T, Stride, kSlice, Inputs>;
  using Step = typename Front::Step;
  using Own = TapWarps<Stride, 2>;
  static constexpr int kStrips = Own::kStrips, kBlocks = Own::kBlocks, kChannels = 2 * kBlocks;

  struct Layout {
    Carver carver;
    typename Front::Layout front;
    int diagonals;
    MVIT3_BOTH
    explicit Layout(const Arguments&)
        : front(carver), diagonals(carver.take((2 * 8 + 1) * kTapWords, sizeof(uint32_t))) {}
  };
  static_assert(
      kWarps * (kChunk * sizeof(Moments) + sizeof(float)) <= 2 * Front::kGroupRows * kChunkPitch * sizeof(T), "");

  static MVIT3_BOTH
  int slices(const Maps& m) { return (m.expanded + kSlice - 1) / kSlice; }

  // What a lane has seen of its channels: differences from one of the values, which are small, and 0 where all are
  // equal.
  struct Sums {
    uint32_t shift[kBlocks];
    float sum[kChannels], squares[kChannels];
    int count;
  };

  // The outputs of a lane, packed: half 0 and 1 of each strip.
  using Outputs = uint32_t[kStrips][2][kBlocks];

  static MVIT3_DEVICE
  void outputs(Outputs& bits, const TapsFrom& from) {
    // Two blocks at a time: four would take too many registers.
    mvit3::filter<T, Stride, kStrips, 2, kBlocks>(
        from, [](int) { return Added{}; },
        [&](int first, const float (&out)[kStrips][2][4], uint32_t seen) {
#pragma unroll
          for (int i = 0; i < 2 * kStrips; ++i) {
            const int s = i / 2, half = i % 2;
            uint32_t* const to = &bits[s][half][first];
#pragma unroll
            for (int b = 0; b < 2; ++b) to[b] = pack<T>(out[s][b][2 * half], out[s][b][2 * half + 1]);
            seen = mark(to[0], to[1], seen, T{});
          }
          return seen;
        });
  }

  // Of half a strip: where it lies, from the lane's first output on.
  static MVIT3_DEVICE
  int y_of(int strip, int half) { return Stride == 1 ? strip : half; }
  static MVIT3_DEVICE
  int x_of(int half) { return Stride == 1 ? 8 * half : 0; }

  template <typename F>
  static MVIT3_DEVICE
  void keep(Sums& sums, const Outputs& bits, const F& inside) {
    if (sums.count == 0)
#pragma unroll
      for (int i = 2 * kStrips - 1; i >= 0; --i)
        if (inside(y_of(i / 2, i % 2), x_of(i % 2)))
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) sums.shift[b] = bits[i / 2][i % 2][b];
    Pair from[kBlocks];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) from[b] = unpack<T>(sums.shift[b]);
#pragma unroll
    for (int i = 0; i < 2 * kStrips; ++i) {
      if (!inside(y_of(i / 2, i % 2), x_of(i % 2))) continue;
      ++sums.count;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const Pair value = unpack<T>(bits[i / 2][i % 2][b]);
        const float one = value.first - from[b].first, two = value.second - from[b].second;
        sums.sum[2 * b] += one;
        sums.sum[2 * b + 1] += two;
        sums.squares[2 * b] += one * one;
        sums.squares[2 * b + 1] += two * two;
      }
    }
  }

  template <typename F>
  static MVIT3_DEVICE
  void store(T* first, const Outputs& bits, int channel, const Maps& m, const F& inside) {
    const int64_t pixel = int64_t(m.dilation) * m.expanded;
#pragma unroll
    for (int i = 0; i < 2 * kStrips; ++i) {
      const int y = y_of(i / 2, i % 2), x = x_of(i % 2);
      if (!inside(y, x)) continue;
      T* const to = first + (y * m.out_width + x) * pixel;
      const uint32_t (&words)[kBlocks] = bits[i / 2][i % 2];
      if (m.expanded % kChannels == 0) {  // z is aligned
        if (channel >= m.expanded) continue;
        Run<kBlocks> run;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) run.word[b] = words[b];
        *reinterpret_cast<Run<kBlocks>*>(to + channel) = run;
      } else {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) store_pair(to, channel + 2 * b, m.expanded, words[b]);
      }
    }
  }

  // What the slice's expansion is made with, and the diagonals of its taps.
  static MVIT3_DEVICE
  void load_parameters(const ExpansionArguments& a, const Front& front, uint32_t* table, const char* step) {
    if (!front.whole()) {
      copy_run<Step::kDiagonals>(table, step + a.packed.expansion);
      front.load_parameters(step);
      return;
    }
    const PackArguments arguments = front_to_pack(a);
    const Pack<T, Step> packed{arguments};
    const int first = slice() * kSlice;
    uint32_t* const norms = reinterpret_cast<uint32_t*>(front.norm);
    for (int i = thread(); i < Step::kNorm / 4; i += kThreads) norms[i] = packed.norm(first, i);
#pragma unroll 4
    for (int row = warp(); row < kSlice; row += kWarps) {
      uint32_t* const words = reinterpret_cast<uint32_t*>(front.weight.row(row));
      const float scale = Step::kFolds ? packed.first(first + row).scale : 1.0f;
      for (int word = lane(); 2 * word < a.slice; word += kWarp)
        words[word] = packed.weights(a.expand, first + row, a.maps.expanded, 2 * word, a.maps.inputs, scale);
    }
    for (int i = thread(); i < Step::kDiagonals / 4; i += kThreads) table[i] = packed.tap(first, i);
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const Layout layout(a);
    const Front front(a.front, layout.front);
    const Maps& m = a.front.maps;
    const int first = slice() * kSlice;
    const char* const step = a.front.packed.steps + int64_t(slice()) * a.front.packed.bytes;
    const int64_t count = TileWalk<Stride>::tiles(m), last = count * (block() + 1) / blocks();
    const int64_t tile = count * block() / blocks();
    const int start = int(tile - last);  // stops are counted up to 0, in one register

    uint32_t* const table = Front::template at<uint32_t>(layout.diagonals);
    uint32_t* const zeros = table + 2 * 8 * kTapWords;
    load_parameters(a.front, front, table, step);
    for (int i = thread(); i < kTapWords; i += kThreads) zeros[i] = 0;
    front.begin(tile, start);
    synchronize();

    const bool idle = first + Own::group() * kChunk >= m.expanded;  // the same for all lanes
    const TapsFrom taps = taps_from<Stride>(front, table, zeros);
    // The first output of the lane in a tile, and how far it is from the tile's first one (a sample of z has less than
    // 2^31 numbers).
    const int top = 16 * Own::strip() / Tile::kWidth, left = lane() / 4;
    const uint32_t offset = uint32_t(top * m.out_width + left) * uint32_t(m.dilation * m.expanded);
    Sums sums{};
    if (front.whole() && start < 0) front.load_x(front.stop(start), 0);
#pragma unroll 1
    for (int at = start; at < 0; ++at) {
      copies_arrive();
      synchronize();
      const Stop& stop = front.stop(at);
      front.advance(at + 1);
      front.expand(stop, step, stop.outside != 0);
      synchronize();
      if (front.whole() && at + 1 < 0) front.load_x(front.stop(at + 1), 0);
      if (idle) continue;
      Outputs bits;
      outputs(bits, taps);
      T* const to = static_cast<T*>(a.z) + (stop.output * m.expanded + offset);
      const int rows = stop.rows - top, columns = stop.columns - left;
      if (stop.rows >= Tile::kHeight && stop.columns >= Tile::kWidth) {  // no lane has a branch then
        keep(sums, bits, [](int, int) { return true; });
        store(to, bits, first + Own::channel(), m, [](int, int) { return true; });
      } else {
        const auto inside = [&](int y, int x) { return y < rows && x < columns; };
        keep(sums, bits, inside);
        store(to, bits, first + Own::channel(), m, inside);
      }
    }
    finish(a, sums, front.expanded);
  }

  // The moments of the block: those of a warp's lanes, then those of its warps, which have the same channels in fours
  // (or every second one of them).
  static MVIT3_DEVICE
  void finish(const Arguments& a, const Sums& sums, T* memory) {
    const Maps& m = a.front.maps;
    Moments* const moments = reinterpret_cast<Moments*>(memory);  // (kWarps, 32)
    float* const counts = reinterpret_cast<float*>(moments + kWarps * kChunk);
    synchronize();
    float count = float(sums.count);
    Moments own[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float mean = sums.count ? fast_divide(sums.sum[c], count) : 0.0f;
      const Pair shift = unpack<T>(sums.shift[c / 2]);
      own[c] = {(c % 2 ? shift.second : shift.first) + mean, sums.squares[c] - sums.sum[c] * mean};
    }
#pragma unroll
    for (int apart = 4; apart < kWarp; apart *= 2) {
      const float other = shuffle_xor(count, apart);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const Moments one{shuffle_xor(own[c].mean, apart), shuffle_xor(own[c].squares, apart)};
        own[c] = count == 0.0f ? one : merge(own[c], count, one, other);
      }
      count += other;
    }
    if (lane() < 4) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) moments[warp() * kChunk + Own::channel() % kChunk + c] = own[c];
      if (lane() == 0) counts[warp()] = count;
    }
    synchronize();
    const int c = thread(), to = slice() * kSlice + c;
    if (c >= kSlice || to >= m.expanded) return;
    constexpr int kApart = 4 / kBlocks;
    Moments sum{0.0f, 0.0f};
    float total = 0.0f;
#pragma unroll 1
    for (int w = c / kChunk * 4 + c % 8 / kChannels; w < c / kChunk * 4 + 4; w += kApart) {
      sum = merge(sum, total, moments[w * kChunk + c % kChunk], counts[w]);
      total += counts[w];
    }
    store_moments(a, m.expanded, to, sum, total);
  }
};

template <typename T, int Stride>
using NarrowFilter = Filter<T, Stride, kMostInputs / 2>;
template <typename T, int Stride>
using WideFilter = Filter<T, Stride, kMostInputs>;

// Calls f with the kernel for a call.
template <typename F>
auto choose_filter(const FilterArguments& a, const F& f) {
  return a.front.maps.inputs > kMostInputs / 2 ? choose<WideFilter>(a.bfloat16, a.stride, f)
                                               : choose<NarrowFilter>(a.bfloat16, a.stride, f);
}

// Whether inputs come in several slices, whose weights each tile copies anew.
bool packs_before(const FilterArguments& a) { return a.front.slice < a.front.maps.inputs; }

int64_t filter_workspace(const FilterArguments& a) {
  if (!packs_before(a)) return 0;
  return choose_filter(a, [&](auto kernel) { return packed_floats<typename decltype(kernel)::type::Step>(a.front); });
}

void filter(const FilterArguments& a, void* stream) {
  choose_filter(a, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    const int shared = typename K::Layout(a).carver.bytes;
    FilterArguments ready = a;
    if (packs_before(a)) pack_into<typename K::Type, typename K::Step>(ready.front, {}, a.workspace, stream);
    resident_blocks<K>(shared);
    launch<K>(ready, a.parts, K::slices(a.front.maps), shared, stream);
  });
}

}  // namespace mvit3
