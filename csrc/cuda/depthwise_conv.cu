// The depth-wise 3x3 convolution by itself, with the moments of what it stores.

#include "depthwise_walk.h"
#include "sums.h"

namespace mvit3 {

// z = depthwise * x, and the moments of the z that is stored: mean = sum(z) / n, squares = sum((z - mean)^2), for each
// channel, over the pixels of a block.
//
// Reads x (B, H, W, C) once, and again the rows around those of a block and the columns around those of a thread; the
// taps (C, 9) once a thread. Writes z (B, H', W', C) once, and the moments (2, blocks, C) and the number of pixels
// (blocks).
template <typename T, int Stride, bool Vectors>
struct DepthwiseFilter {
  static constexpr int kBlocksAtOnce = 2;
  static constexpr int kChannels = Vectors ? 8 / sizeof(T) : 1, kColumns = 2, kSeen = (kColumns - 1) * Stride + 3;
  using Plan = Walk<kColumns, kChannels>;
  using Arguments = Planned<T, Plan>;
  using Pixel = Numbers<T, kChannels>;

  static int shared(const Plan& walk) {
    return walk.positions * (walk.groups * kChannels * int(sizeof(Moments)) + int(sizeof(float)));
  }

  // to = sum + a row of x times row Row of the taps
  template <int Row>
  static MVIT3_DEVICE
  void weigh(
      float (&to)[kColumns][kChannels], const float (&sum)[kColumns][kChannels], const float (&row)[kSeen][kChannels],
      const float (&taps)[9][kChannels]) {
#pragma unroll
    for (int x = 0; x < kColumns; ++x)
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float value = sum[x][c];
#pragma unroll
        for (int t = 0; t < 3; ++t) value += row[x * Stride + t][c] * taps[3 * Row + t][c];
        to[x][c] = value;
      }
  }

  static MVIT3_DEVICE
  void unpack_row(float (&row)[kSeen][kChannels], const Pixel (&pixels)[kSeen]) {
#pragma unroll
    for (int i = 0; i < kSeen; ++i) pixels[i].to(row[i]);
  }

  // Moments of what a thread stored. In a strip differences from the mean before it are summed (in the first one from
  // its first value): three operations a number, where a running mean takes four and a division.
  struct Seen {
    float before = 0.0f, count = 0.0f;  // values before the strip, and in it
    float mean[kChannels] = {}, squares[kChannels] = {}, sum[kChannels] = {};

    MVIT3_DEVICE
    void start(const Pixel& pixel) {
      if (before + count == 0.0f) pixel.to(mean);
    }
    MVIT3_DEVICE
    void add(const Pixel& pixel) {
      float value[kChannels];
      pixel.to(value);
      count += 1.0f;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float apart = value[c] - mean[c];
        sum[c] += apart;
        squares[c] += apart * apart;
      }
    }
    MVIT3_DEVICE
    void end_strip() {
      before += count;
      count = 0.0f;
      const float share = before > 0.0f ? fast_divide(1.0f, before) : 0.0f;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float moved = sum[c] * share, left = squares[c] - sum[c] * moved;
        squares[c] = left < 0.0f ? 0.0f : left;  // NaN stays
        mean[c] += moved;
        sum[c] = 0.0f;
      }
    }
  };

  static MVIT3_DEVICE
  void store(Strip<T, kColumns>& z, const float (&value)[kColumns][kChannels], Seen& seen) {
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      if (x && !z.has(x)) continue;
      const Pixel pixel = Pixel::of(value[x]);
      z.store(x, pixel);
      if (x == 0) seen.start(pixel);
      seen.add(pixel);
    }
    z.advance();
  }

  // The moments of the threads of a block, joined in their order.
  static MVIT3_DEVICE
  void keep(const Arguments& a, const Seen& seen) {
    const Plan& walk = a.walk;
    const Maps& m = a.maps;
    const int width = walk.groups * kChannels;
    Moments* const moments = reinterpret_cast<Moments*>(shared_memory());  // (positions, width)
    float* const counts = reinterpret_cast<float*>(moments + walk.positions * width);
    const int own = thread() % walk.groups;
    if (walk.works()) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        moments[walk.position() * width + own * kChannels + c] = {seen.mean[c], seen.squares[c]};
      if (own == 0) counts[walk.position()] = seen.before;
    }
    synchronize();
    const int of_slice = slice() * width + thread();
    float total = 0.0f;
    Moments sum{0.0f, 0.0f};
    const bool mine = thread() < width && of_slice < m.inputs;
    if (!mine) return;
#pragma unroll 1
    for (int p = 0; p < walk.positions; ++p) {
      const Moments part = moments[p * width + thread()];
      sum = total == 0.0f ? part : merge(sum, total, part, counts[p]);
      total += counts[p];
    }
    store_moments(a, m.inputs, of_slice, sum, total);
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const Plan& walk = a.walk;
    const Maps& m = a.maps;
    const int channel = walk.channel();
    float taps[9][kChannels];
    load_taps<T>(taps, a.weight, channel, m.inputs);
    Seen seen;
    if (walk.works())
      walk.for_each_strip([&](Place at, int first, int last) {
        const int first_in = Stride == 1 ? at.y(first - 1) : 2 * first - 1,
                  end_in = Stride == 1 ? at.y(last) + 1 : 2 * last;
        Strip<const T, kSeen> x(
            a.in, static_cast<const T*>(a.x), m.inputs, channel, at, first_in, end_in, Stride * at.x(0) - at.step);
        Strip<T, kColumns> z(a.out, static_cast<T*>(a.z), m.inputs, channel, at, at.y(first), at.y(last), at.x(0));
        const float none[kColumns][kChannels] = {};
        float row[kSeen][kChannels], value[kColumns][kChannels], above[kColumns][kChannels] = {},
                                                                 here[kColumns][kChannels] = {};
        Pixel ahead[2][kSeen];
        x.load(ahead[0]);
        x.load(ahead[1]);
        if constexpr (Stride == 1) {
#pragma unroll 1
          for (int from = first - 1; from <= last; from += 2) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int r = from + i;
              if (r > last) break;
              unpack_row(row, ahead[i]);
              x.load(ahead[i]);
              weigh<2>(value, above, row, taps);
              weigh<1>(above, here, row, taps);
              weigh<0>(here, none, row, taps);
              if (r > first) store(z, value, seen);
            }
          }
        } else {
          unpack_row(row, ahead[0]);
          x.load(ahead[0]);
          weigh<0>(above, none, row, taps);
#pragma unroll 1
          for (int y = first; y < last; ++y) {
            unpack_row(row, ahead[1]);
            x.load(ahead[1]);
            weigh<1>(value, above, row, taps);
            unpack_row(row, ahead[0]);
            x.load(ahead[0]);
            weigh<2>(value, value, row, taps);
            weigh<0>(above, none, row, taps);
            store(z, value, seen);
          }
        }
        seen.end_strip();
      });
    keep(a, seen);
  }
};

void depthwise_filter(const DepthwiseArguments& a, void* stream) {
  choose_depthwise<DepthwiseFilter>(a, [&](auto kernel) {
    DepthwiseLaunch<typename decltype(kernel)::type> call(a);
    call.blocks = a.parts;
    call(stream);
  });
}

}  // namespace mvit3
