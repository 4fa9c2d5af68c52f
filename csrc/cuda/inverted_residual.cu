// inverted_residual on tiles in shared memory (identity G of the design): the expanded map exists nowhere else.
//
// A block walks over a run of tiles, and on each over the expanded channels, 32 at a time; sums over the whole map are kept per block in a
// workspace and added up by a second, small kernel, so that results repeat from run to run.

#include "inverted_residual.h"

#include "launch.h"

namespace mvit3 {

// Mean and sum of squared differences from it, of values whose number is kept elsewhere.
struct Moments {
  float mean, squares;
};

MVIT3_DEVICE Moments merge(Moments a, float count_a, Moments b, float count_b) {
  if (count_b == 0.0f) return a;
  const float share = count_b / (count_a + count_b), apart = b.mean - a.mean;
  return {a.mean + apart * share, a.squares + b.squares + apart * apart * count_a * share};
}

MVIT3_BOTH int64_t tiles_of(const Maps& m, int tile_height, int tile_width, int height, int width) {
  return m.batch * ((height + tile_height - 1) / tile_height) * ((width + tile_width - 1) / tile_width);
}

// ---- Filter: z and its moments

template <typename T, int Stride>
struct Filter {
  using Arguments = FilterArguments;
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

  static MVIT3_BOTH int64_t tiles(const Arguments& a) {
    return tiles_of(a.front.maps, Tile::kHeight, Tile::kWidth, a.front.maps.out_height, a.front.maps.out_width);
  }

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
      for (int w = 0; w < kWarps; ++w) {
        sum = merge(sum, total, moments[w * kChunk + thread()], counts[w]);
        total += counts[w];
      }
      kept[channel] = sum;
    };

    Place at = place<Tile::kHeight, Tile::kWidth>(tile, m.out_height, m.out_width);
    front.prefetch(at, 0);
    for (int chunk = 0; tile < last;) {
      copies_arrive();
      synchronize();
      merge_pending();
      if (chunk == 0 && pending >= 0)
        for (int w = 0; w < kWarps; ++w) seen += counts[w];
      front.expand(at, chunk, [](int) { return 1.0f; });
      synchronize();

      const Place here = at;
      const int first = chunk;
      chunk += kChunk;
      if (chunk >= m.wide) {
        chunk = 0;
        ++tile;
        at = place<Tile::kHeight, Tile::kWidth>(tile, m.out_height, m.out_width);
      }
      if (tile < last) front.prefetch(at, chunk);
      before = Moments{0.0f, 0.0f};
      if (thread() < kChunk && first + thread() < m.wide && seen > 0.0f) before = kept[first + thread()];
      pending = first;

      Pair out[Tile::kRows];
      front.filter(out);
      const int length = front.strip_length(here), channel = first + 2 * Front::pair();
      const int64_t pixel = (here.image * m.out_height + here.top + Front::strip_row()) * m.out_width + here.left + Front::strip_column();
      Pair shift{0.0f, 0.0f}, sum{0.0f, 0.0f}, squares{0.0f, 0.0f};
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        const uint32_t bits = pack<T>(out[r].first, out[r].second);
        if (r >= length) continue;
        store_pair(z + (pixel + int64_t(r) * m.out_width) * m.wide, channel, m.wide, bits);
        const Pair value = unpack<T>(bits);
        if (r == 0) shift = value;  // one of the values: differences from it are small, and 0 where all are equal
        const float one = value.first - shift.first, two = value.second - shift.second;
        sum.first += one;
        sum.second += two;
        squares.first += one * one;
        squares.second += two * two;
      }
      const float n = float(length), inverse = length ? 1.0f / n : 0.0f;
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

// Mean and variance from the moments of `parts` blocks, 32 channels to a block of threads.
struct FinishFilter {
  struct Arguments {
    const float* workspace;
    float *mean, *var;
    int parts, channels;
  };
  static constexpr int kBlocksAtOnce = 1;

  static MVIT3_DEVICE void run(const Arguments& a) {
    double* const sums = reinterpret_cast<double*>(shared_memory());  // (kWarps, 32)
    const Moments* const moments = reinterpret_cast<const Moments*>(a.workspace);
    const float* const counts = a.workspace + int64_t(a.parts) * a.channels * 2;
    const int channel = block() * kWarp + lane();
    const bool there = channel < a.channels;
    const auto add_up = [&](auto value) {
      double sum = 0.0;
      if (there)
        for (int p = warp(); p < a.parts; p += kWarps) sum += value(p);
      synchronize();
      sums[thread()] = sum;
      synchronize();
      sum = 0.0;
      for (int w = 0; w < kWarps; ++w) sum += sums[w * kWarp + lane()];
      return sum;
    };
    const double count = add_up([&](int p) { return double(counts[p]); });
    const double mean = add_up([&](int p) { return counts[p] * double(moments[int64_t(p) * a.channels + channel].mean); }) / count;
    const double squares = add_up([&](int p) {
      const Moments part = moments[int64_t(p) * a.channels + channel];
      const double apart = part.mean - mean;
      return part.squares + counts[p] * apart * apart;
    });
    if (there && warp() == 0) {
      a.mean[channel] = float(mean);
      a.var[channel] = float(squares / count);
    }
  }
};

namespace {

// Calls f with the kernel for the type and stride of `a`.
template <template <typename, int> class Kernel, typename F>
auto choose(bool bfloat16, int stride, const F& f) {
  if (bfloat16) return stride == 1 ? f(Kernel<BFloat16, 1>{}) : f(Kernel<BFloat16, 2>{});
  return stride == 1 ? f(Kernel<Float16, 1>{}) : f(Kernel<Float16, 2>{});
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
    using K = decltype(kernel);
    return int64_t(blocks_for<K>(a, typename K::Layout(a).carver.bytes)) * (2 * a.front.maps.wide + 1);
  });
}

void filter(const FilterArguments& a, void* stream) {
  choose<Filter>(a.bfloat16, a.stride, [&](auto kernel) {
    using K = decltype(kernel);
    const int shared = typename K::Layout(a).carver.bytes, parts = blocks_for<K>(a, shared), channels = a.front.maps.wide;
    launch<K>(a, parts, 1, shared, stream);
    launch<FinishFilter>({a.workspace, a.mean, a.var, parts, channels}, (channels + kWarp - 1) / kWarp, 1, kThreads * 8, stream);
  });
}

}  // namespace mvit3
