// The sums over pixels of the backward kernel of inverted_residual: per block, and over all blocks.
#pragma once

#include "inverted_residual_backward_tile.h"
#include "sums.h"

namespace mvit3 {

template <typename T, int Stride, int Steps>
struct BackwardSums : BackwardTile<T, Stride, Steps> {
  using Base = BackwardTile<T, Stride, Steps>;
  using Base::Base, Base::a, Base::warp, Base::own, Base::corner_of;
  using Base::kPixels, Base::kOutWidth, Base::kInputs, Base::kPitch, Base::kShares, Base::kFirstTap, Base::kHalf,
      Base::kRow, Base::kRowBytes, Base::kPart;
  using Base::x, Base::z, Base::value, Base::gradient;
  using typename Base::OfExpanded, typename Base::OfProducts, typename Base::OfTaps;

  // Of what the block keeps, number `first` of the row of channel `row`, and so many bytes behind it.
  MVIT3_DEVICE
  float* kept_at(unsigned row, unsigned first, int bytes) const {
    float* const own = a.workspace + unsigned(block()) * uint64_t(a.sizes.kept);
    return reinterpret_cast<float*>(reinterpret_cast<char*>(own) + ((row * kRow + first) * 4u + unsigned(bytes)));
  }

  // Adds to what the block kept of its tiles before.
  template <bool First>
  static MVIT3_DEVICE
  void keep(float* to, float first, float second) {
    if (First)
      *reinterpret_cast<Pair*>(to) = {first, second};
    else
      add_in_memory(to, first, second);
  }

  // G^T x of the tile, and the sum of G.
  MVIT3_DEVICE
  void multiply_by_x(int chunk, bool first_tile) const {
    const unsigned warp = Stride == 1 ? anew(this->warp) : this->warp, first_row = warp % 2 * 16, part = warp / 2,
                   columns = part % Steps * 16, share = part / Steps;
    const unsigned first_pixel = share * (kPixels / kShares);
    const OfProducts lane = this->template of_lane<OfProducts>();
    float sum[2][4] = {}, total[4] = {};
    const SharedAddress of_gradient = shared_address(gradient().row(first_pixel) + first_row) + lane.gradient;
    const SharedAddress of_x = shared_address(x().row(first_pixel) + columns) + this->template of_lane<OfExpanded>().x;
    uint32_t pixels[4], inputs[4], ones = pack<T>(1.0f, 1.0f);
#pragma unroll
    for (int k = 0; k < 2 * Steps; ++k) {
      load_transposed(pixels, of_gradient + 32 * k * kChunkPitch);
      load_transposed(inputs, of_x + 32 * k * kPitch);
      multiply<T>(k == 0, sum[0], pixels, inputs[0], inputs[1]);
      multiply<T>(k == 0, sum[1], pixels, inputs[2], inputs[3]);
    }
    // The warps of a share divide its pixels for the sum of G, which is a product with ones.
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      load_transposed(pixels, of_gradient + 32 * (2 * (part % Steps) + k) * kChunkPitch);
      multiply<T>(k == 0, total, pixels, ones, ones);
    }
    float* const to = kept_at(chunk + first_row, part * kPart, lane.kept);
    const auto write = [&](auto first) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 2; ++j) keep<first>(to + 8 * half * kRow + 8 * j, sum[j][2 * half], sum[j][2 * half + 1]);
      if (lane.norm == 0) keep<first>(to + 16, total[0], total[2]);
    };
    first_tile ? write(std::true_type{}) : write(std::false_type{});
  }

  // The gradients of the taps: of 8 channels, over half of the tile, products of dz (two taps of 8 channels x pixels)
  // with act(e), whose diagonals count.
  MVIT3_DEVICE
  void multiply_by_values(int chunk, bool first_tile) const {
    const unsigned warp = Base::kWide && Stride == 1 ? anew(this->warp) : this->warp, group = warp % 4, half = warp / 4;
    const OfTaps lane = this->template of_lane<OfTaps>();
    const SharedAddress of_value = shared_address(value().row(64 * half) + 8 * group) + own;
    constexpr int kSums = Stride == 1 ? kPairs : 3;
    float sum[kSums][4] = {};
    uint32_t values[2][4], part[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_transposed(values[i], of_value + 64 * i * kChunkPitch);
    const auto add = [&](int r, float (&to)[4], bool first) {
      multiply<T>(first, to, part, values[r / 2][r % 2 * 2], values[r / 2][r % 2 * 2 + 1]);
    };
    if constexpr (Stride == 1) {
      add_rows(group, half, lane, part, sum, add);
    } else {
      const auto bytes = [](unsigned pixels) { return pixels * unsigned(kRowBytes); };
      const SharedAddress corner = shared_address(z().data + 8 * group) + lane.left;
      const SharedAddress even = corner + lane.right * int(half * kOutWidth), odd = corner + lane.right;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        load_transposed(part, (r < 2 ? even : odd) + bytes(corner_of(16 * (r % 2))));
        add(r, sum[r / 2], r % 2 == 0);
      }
      if (half == 1)
#pragma unroll
        for (int r = 2; r < 4; ++r) {
          load_transposed(part, odd + bytes(corner_of(16 * (r % 2)) + kOutWidth));
          add(r, sum[2], r == 2);
        }
    }
    if (lane.kept < 0) return;  // not on the diagonal
    const bool odd = lane.odd;
    float* const to = kept_at(chunk + 8 * group, half * kHalf, lane.kept);
    const auto write = [&](auto first) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int pair = Stride == 1 ? i : i < 2 ? 2 * half + i : 4;
        if (i < 2 || Stride == 1 || half == 1)
          keep<first>(to + 2 * pair, odd ? sum[i][1] : sum[i][0], odd ? sum[i][3] : sum[i][2]);
      }
    };
    first_tile ? write(std::true_type{}) : write(std::false_type{});
  }

  // Stride 1: a row of dz meets three rows of values, so it is loaded once for all of them: its pixels that meet by
  // taps 0 and 1 of a row of taps, and those of two rows that meet by the last taps.
  template <typename F>
  MVIT3_DEVICE
  void add_rows(
      unsigned group, unsigned half, const OfTaps& lane, uint32_t (&part)[4], float (&sum)[kPairs][4],
      const F& add) const {
    const SharedAddress pixels = shared_address(z().row(4 * half * kOutWidth) + 8 * group);
    const SharedAddress left = pixels + lane.left, right = pixels + lane.right;
    constexpr int kDown = kOutWidth * kRowBytes;
#pragma unroll
    for (int j = 0; j < 6; ++j) {
      load_transposed(part, left + j * kDown);
#pragma unroll
      for (int ty = 0; ty < 3; ++ty)
        if (const int r = j + ty - 2; r >= 0 && r < 4) add(r, sum[ty], r == 0);
      // Rows j and j - 1; what lies above the first one is for no tap.
      load_transposed(part, right + j * kDown);
      if (j >= 2) add(j - 2, sum[3], j == 2);
      if (j < 4) add(j, sum[4], j == 0);
    }
  }
};

// Adds up what the blocks kept, a channel to a block of threads: the nine gradients of its taps (expanded, 9) and, but
// for wide inputs, G^T x and the sum g of G, of which it makes the gradients of the expansion W and its norm (identity
// B), with the covariance S of x:
//   N = G^T x - g mean, dweight = rstd * sum(W * N), dW = scale * (N - dweight * rstd * W S), dbias = g;
//   correction = (scale * rstd * dweight, scale * g) / pixels.
// Reads the workspace and writes the gradients once, S once for each channel.
template <typename K>
struct FinishBackward {
  struct Arguments {
    BackwardPlan plan;
    int parts;
  };
  using T = typename K::Type;
  static constexpr int kBlocksAtOnce = 1, kSlots = (K::kRow + kWarp - 1) / kWarp, kRow = (kSlots + 1) * kWarp;
  static constexpr int kShared = (kWarps * kRow + 6 * kMostGradientInputs) * int(sizeof(float));

  // The parts of a sum in a row of the workspace.
  struct Parts {
    int first, count, apart;
  };
  static MVIT3_DEVICE
  Parts parts_of_tap(int tap) {
    int slot = 0;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i)
      if (tap_of<K::kStride>(i / 2, i % 2) == tap) slot = i;
    return {K::kFirstTap + slot, K::kHalf ? 2 : 1, K::kHalf};
  }
  static MVIT3_DEVICE
  float sum_of(const float* row, const Parts& parts) {
    float sum = 0.0f;
    for (int i = 0; i < parts.count; ++i) sum += row[parts.first + i * parts.apart];
    return sum;
  }

  // The row of the channel, added up over blocks; behind it four parts of g, which channels with an 8 in their number
  // have in the row of the one 8 before.
  static MVIT3_DEVICE
  const float* add_up(const Arguments& arguments) {
    const BackwardPlan& a = arguments.plan;
    float* const rows = reinterpret_cast<float*>(shared_memory());  // (kWarps, kRow)
    const int other = block() / 8 % 2;
    const float* const from = a.workspace + int64_t(block()) * K::kRow;
    float sum[kSlots + 1] = {};
#pragma unroll 4
    for (int p = warp(); p < arguments.parts; p += kWarps) {
      const float* const row = from + int64_t(p) * a.sizes.kept;
#pragma unroll
      for (int i = 0; i < kSlots; ++i)
        if (i * kWarp + lane() < K::kRow) sum[i] += row[i * kWarp + lane()];
      if (!K::kWide && lane() < 4) sum[kSlots] += row[16 + other - 8 * other * K::kRow + lane() * K::kPart];
    }
#pragma unroll
    for (int i = 0; i <= kSlots; ++i) rows[warp() * kRow + i * kWarp + lane()] = sum[i];
    synchronize();
    if (thread() < kRow)
      for (int w = 1; w < kWarps; ++w) rows[thread()] += rows[w * kRow + thread()];
    synchronize();
    return rows;
  }

  static MVIT3_DEVICE
  void run(const Arguments& arguments) {
    const BackwardPlan& a = arguments.plan;
    const float* const row = add_up(arguments);
    const int t = thread(), channel = block();
    if (t < 9) a.dtaps[channel * 9 + t] = sum_of(row, parts_of_tap(t));
    if constexpr (!K::kWide) expand(a, row, t, channel);
  }

  static MVIT3_DEVICE
  void expand(const BackwardPlan& a, const float* row, int t, int channel) {
    constexpr int kMost = kMostGradientInputs;
    const int inputs = a.front.maps.inputs;
    float* const products = reinterpret_cast<float*>(shared_memory()) + kWarps * kRow;  // N
    float *const weights = products + kMost, *const sums = weights + kMost;             // W; (4, kMost), of W S
    const float g = sum_of(row, {kSlots * kWarp, 4, 1});
    const float scale = affine_at<T>(a.front.norm, channel).scale, rstd = inverse_std<T>(a.front.norm, channel);
    if (t < inputs) {
      const Parts parts{t / 16 * K::kPart + t % 16, K::kShares, K::kPart * K::kInputs / 16};
      products[t] = sum_of(row, parts) - g * a.mean[t];
      weights[t] = to_float(from_float<T>(value_at<T>(a.front.expand, int64_t(channel) * inputs + t)));
    }
    synchronize();
    const int column = t % kMost, group = t / kMost;
    float sum = 0.0f, dweight = 0.0f;
    if (column < inputs)
      for (int i = group; i < inputs; i += kThreads / kMost) sum += weights[i] * a.covariance[i * inputs + column];
    sums[t] = sum;
    for (int i = 0; i < inputs; ++i) dweight += weights[i] * products[i];
    dweight *= rstd;
    synchronize();
    if (t < inputs) {
      const float weight_covariance = sums[t] + sums[kMost + t] + sums[2 * kMost + t] + sums[3 * kMost + t];
      a.dexpand[int64_t(channel) * inputs + t] = scale * (products[t] - dweight * rstd * weight_covariance);
    }
    if (t > 0) return;
    const float share = 1.0f / float(a.front.maps.batch * a.front.maps.height * a.front.maps.width);
    a.dfirst_weight[channel] = dweight;
    a.dfirst_bias[channel] = g;
    a.correction[channel] = scale * rstd * dweight * share;
    a.correction[a.front.maps.expanded + channel] = scale * g * share;
  }
};

}  // namespace mvit3
