// The depth-wise 3x3 convolution by itself, backward: the gradients of x and of the taps in one pass over dz and x.

#include "depthwise_walk.h"
#include "sums.h"

namespace mvit3 {

// dx = depthwise^T * dz, and per block the sums over its pixels of x times the dz that it meets by each tap, the
// gradient of the taps.
//
// Reads x (B, H, W, C) and dz (B, H', W', C) once, and again the rows of dz around those of a block and its columns
// around those of a thread; the taps (C, 9) once a thread. Writes dx (B, H, W, C) once, and to the workspace
// (blocks, C, 9).
template <typename T, int Stride, bool Vectors>
struct DepthwiseBackward {
  // Stride 1: one block with twice the channels a thread, because what is around the products is the same for any
  // number of channels.
  static constexpr int kBlocksAtOnce = Stride == 1 ? 1 : 2;
  static constexpr int kChannels = Vectors ? (Stride == 1 ? 8 : 4) / sizeof(T) : 1, kColumns = Stride == 1 ? 2 : 1;
  using Plan = Walk<kColumns, kChannels>;
  using Arguments = Planned<T, Plan>;
  using Pixel = Numbers<T, kChannels>;

  static int shared(const Plan& walk) { return walk.positions * walk.groups * kChannels * 9 * int(sizeof(float)); }
  static MVIT3_BOTH
  int64_t kept(const Plan& walk) { return 9 * int64_t(walk.channels); }

  struct Taps {
    float tap[9][kChannels], sum[9][kChannels];

    // A value of x and the gradient that it meets by a tap.
    MVIT3_DEVICE
    void meet(int i, const float (&x)[kChannels], const float (&dz)[kChannels], float (&dx)[kChannels]) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        dx[c] += tap[i][c] * dz[c];
        sum[i][c] += x[c] * dz[c];
      }
    }
  };

  // Two columns of x, four of dz around them. A row of dz is added to the three rows of x that it belongs to. What is
  // not there takes no part, so that NaN spoils no more than it meets.
  static MVIT3_DEVICE
  void walk_down(
      Taps& taps, Place at, int first, int last, Strip<const T, 4>& dz, Strip<const T, 2>& x, Strip<T, 2>& dx) {
    constexpr int kRing = 3;
    Pixel dz_ahead[kRing][4], x_ahead[kRing][2];  // row r of dz and row r + 1 of x are at (r - (first - 1)) % 3
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
      dz.load(dz_ahead[i]);
      x.load(x_ahead[i]);
    }
    const bool all = dz.there == 15;
    float value[kRing][2][kChannels] = {}, grad[kRing][2][kChannels] = {};  // row r is at (r - (first - 2)) % 3
    int y = at.y(first - 1);
#pragma unroll 1
    for (int from = first - 1; from <= last; from += kRing) {
#pragma unroll
      for (int i = 0; i < kRing; ++i, y += at.step) {
        const int r = from + i;
        if (r > last) break;
        float row[4][kChannels];
#pragma unroll
        for (int j = 0; j < 4; ++j) dz_ahead[i][j].to(row[j]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          x_ahead[i][j].to(value[(i + 2) % kRing][j]);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) grad[(i + 2) % kRing][j][c] = 0.0f;
        }
        dz.load(dz_ahead[i]);
        x.load(x_ahead[i]);
        const auto add_row = [&](auto whole) {
          constexpr bool kWhole = decltype(whole)::value;
#pragma unroll
          for (int ty = 0; ty < 3; ++ty) {
            if (!kWhole && (r - 1 + ty < first || r - 1 + ty >= last)) continue;
            const auto meet = [&](int column, int from_column) {
              taps.meet(
                  3 * ty + column + 2 - from_column, value[(i + ty) % kRing][column], row[from_column],
                  grad[(i + ty) % kRing][column]);
            };
            meet(0, 1);
            if (kWhole || dz.has(0)) meet(0, 0);
            if (kWhole || dz.has(2)) {
              meet(0, 2);
              meet(1, 1);
              meet(1, 2);
            }
            if (kWhole || dz.has(3)) meet(1, 3);
          }
        };
        if (all && r > first && r + 1 < last)
          add_row(std::true_type{});
        else if (unsigned(y) < unsigned(dz.steps.height))
          add_row(std::false_type{});
        if (r > first) {
          dx.store(0, Pixel::of(grad[i][0]));
          if (dx.has(1)) dx.store(1, Pixel::of(grad[i][1]));
          dx.advance();
        }
      }
    }
  }

  // Stride 2: for a pixel of dz four of x, by parity of row and column. An even one meets the middle tap, an odd one
  // the two around it.
  static MVIT3_DEVICE
  void walk_down_quarters(
      Taps& taps, int first, int last, Strip<const T, 2>& dz, Strip<const T, 2>& x, Strip<T, 2>& dx) {
    Pixel dz_ahead[2], even_ahead[2], odd_ahead[2];
    float here[2][kChannels], below[2][kChannels];
    const auto load = [&] {
      dz.load(dz_ahead);
      x.load(even_ahead);
      x.load(odd_ahead);
    };
    dz.load(dz_ahead);
#pragma unroll
    for (int j = 0; j < 2; ++j) dz_ahead[j].to(below[j]);
    load();
#pragma unroll 1
    for (int y = first; y < last; ++y) {
      float even[2][kChannels], odd[2][kChannels], grad[2][kChannels] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) here[j][c] = below[j][c];
        dz_ahead[j].to(below[j]);
        even_ahead[j].to(even[j]);
        odd_ahead[j].to(odd[j]);
      }
      load();
      // One row of x and one of dz, by row `row` of the taps.
      const auto meet = [&](int row, const float (&values)[2][kChannels], const float (&gradients)[2][kChannels]) {
        taps.meet(3 * row + 1, values[0], gradients[0], grad[0]);
        if (x.has(1)) taps.meet(3 * row + 2, values[1], gradients[0], grad[1]);
        if (dz.has(1)) taps.meet(3 * row, values[1], gradients[1], grad[1]);
      };
      const auto store = [&] {
        dx.store(0, Pixel::of(grad[0]));
        if (dx.has(1)) dx.store(1, Pixel::of(grad[1]));
        dx.advance();
      };
      meet(1, even, here);
      store();
      if (2 * y + 1 >= x.steps.height) break;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) grad[0][c] = grad[1][c] = 0.0f;
      meet(2, odd, here);
      if (y + 1 < dz.steps.height) meet(0, odd, below);
      store();
    }
  }

  // The sums of the threads of a block, added up in their order, to the workspace.
  static MVIT3_DEVICE
  void keep(const Arguments& a, const Taps& taps) {
    const Plan& walk = a.walk;
    const int width = walk.groups * kChannels * 9;
    float* const sums = reinterpret_cast<float*>(shared_memory());  // (positions, width), channel by channel
    if (walk.position() < walk.positions) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
#pragma unroll
        for (int i = 0; i < 9; ++i)
          sums[walk.position() * width + (thread() % walk.groups * kChannels + c) * 9 + i] = taps.sum[i][c];
    }
    synchronize();
#pragma unroll 1
    for (int i = thread(); i < width; i += kThreads) {
      const int64_t of_slice = int64_t(slice()) * width + i;
      if (of_slice >= kept(walk)) break;
      float sum = 0.0f;
      for (int p = 0; p < walk.positions; ++p) sum += sums[p * width + i];
      a.workspace[block() * kept(walk) + of_slice] = sum;
    }
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const Plan& walk = a.walk;
    const Maps& m = a.maps;
    const int channel = walk.channel();
    Taps taps;
    load_taps<T>(taps.tap, a.weight, channel, m.inputs);
#pragma unroll
    for (int i = 0; i < 9; ++i)
#pragma unroll
      for (int c = 0; c < kChannels; ++c) taps.sum[i][c] = 0.0f;
    if (walk.works())
      walk.for_each_strip([&](Place at, int first, int last) {
        const auto *const from_dz = static_cast<const T*>(a.dz), *const from_x = static_cast<const T*>(a.x);
        const int top = Stride * at.y(first), bottom = Stride * at.y(last), left = Stride * at.x(0);
        constexpr bool around = Stride == 1;
        Strip<const T, around ? 4 : 2> dz(
            a.out, from_dz, m.inputs, channel, at, at.y(around ? first - 1 : first), at.y(last) + 1,
            at.x(around ? -1 : 0));
        Strip<const T, 2> x(a.in, from_x, m.inputs, channel, at, top, bottom, left);
        Strip<T, 2> dx(a.in, static_cast<T*>(a.dx), m.inputs, channel, at, top, bottom, left);
        if constexpr (Stride == 1)
          walk_down(taps, at, first, last, dz, x, dx);
        else
          walk_down_quarters(taps, first, last, dz, x, dx);
      });
    keep(a, taps);
  }
};

// Adds up what the blocks kept of the gradient of the taps, 32 to a block of threads.
template <typename T>
struct FinishTaps {
  struct Arguments {
    const float* workspace;
    T* dweight;
    int parts;
    int64_t count;
  };
  static constexpr int kBlocksAtOnce = 1;

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const int64_t i = int64_t(block()) * kWarp + lane();
    const float sum = sum_of_parts(a.workspace, a.parts, a.count, i, i < a.count);
    if (warp() == 0 && i < a.count) a.dweight[i] = from_float<T>(sum);
  }
};

int64_t depthwise_backward_workspace(const DepthwiseArguments& a) { return depthwise_workspace<DepthwiseBackward>(a); }

void depthwise_backward(const DepthwiseArguments& a, void* stream) {
  choose_depthwise<DepthwiseBackward>(a, [&](auto kernel) {
    using T = typename decltype(kernel)::Number;
    const DepthwiseLaunch<typename decltype(kernel)::type> call(a);
    call(stream);
    const auto finish = [&](auto* dweight) {
      const int64_t count = 9 * int64_t(a.maps.inputs);
      using W = std::remove_pointer_t<decltype(dweight)>;
      launch<FinishTaps<W>>(
          {a.workspace, dweight, call.blocks, count}, int(ceil_div(count, kWarp)), 1, kThreads * 4, stream);
    };
    a.weight.single ? finish(static_cast<float*>(a.dweight)) : finish(static_cast<T*>(a.dweight));
  });
}

}  // namespace mvit3
