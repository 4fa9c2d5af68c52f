// The gradient of the filtered map, which the backward kernel of inverted_residual makes of a tile in place of z.
#pragma once

#include "inverted_residual_backward_sums.h"

namespace mvit3 {

template <typename T, int Stride, int Steps>
struct BackwardFiltered : BackwardSums<T, Stride, Steps> {
  using Base = BackwardSums<T, Stride, Steps>;
  using Base::Base, Base::a, Base::warp, Base::whole_outputs, Base::kOutPixels, Base::kWide;
  using Base::tile, Base::dp, Base::z, Base::project;
  using typename Base::Parameters, typename Base::OfFiltered, typename Base::OfProducts;

  static constexpr int kAtOnce = kWide && Stride == 1 ? 1 : 3;  // steps over outputs, as registers allow

  // Half of an activation's argument becomes r, of which (1 + r) / 2 is the slope. Returns the activation.
  template <bool Silu>
  MVIT3_DEVICE
  float activate(float& half) const {
    if (Silu) {
      const float t = fast_tanh(half), value = half * t + half;
      half = half * (1.0f - t * t) + t;
      return value;
    }
    const float value = 2.0f * half;
    const bool rises = a.front.act != kRelu || !(value <= 0.0f);  // as torch: NaN stays
    half = rises ? 1.0f : -1.0f;
    return rises ? value : 0.0f;
  }

  // sum = dp project or, but for the first part of the outputs, sum += dp project: of 16 kRowBlocks filtered pixels x
  // 16 channels, over the outputs in shared memory.
  template <bool First, int RowBlocks>
  MVIT3_DEVICE
  void multiply_by_project(
      float (&sum)[RowBlocks][2][4], const OfFiltered& lane, unsigned first_row, unsigned first_column) const {
    SharedAddress of_pixels[RowBlocks], of_weight = shared_address(project().data + first_column) + lane.weight;
    of_pixels[0] = shared_address(dp().row(first_row)) + lane.dp;
#pragma unroll
    for (int i = 1; i < RowBlocks; ++i) of_pixels[i] = of_pixels[i - 1] + 16 * dp().pitch * int(sizeof(T));
    const auto step = [&](bool first) {
      uint32_t pixels[4], weight[4];
      load_transposed(weight, of_weight);
      of_weight += 16 * kChunkPitch * sizeof(T);
#pragma unroll
      for (int i = 0; i < RowBlocks; ++i) {
        load_matrices(pixels, of_pixels[i]);
        of_pixels[i] += 16 * sizeof(T);
        multiply<T>(first, sum[i][0], pixels, weight[0], weight[1]);
        multiply<T>(first, sum[i][1], pixels, weight[2], weight[3]);
      }
    };
    step(First);
#pragma unroll kAtOnce
    for (int k = 1; k < a.sizes.width / 16; ++k) step(false);
  }

  // z becomes dz; outside the map it stays zero.
  template <bool Silu>
  MVIT3_DEVICE
  void filtered_gradient(int number, int chunk) const {
    constexpr int kRowBlocks = Stride == 1 ? 3 : 1;  // of a warp; warps stand 4 x 2
    const unsigned first_row = warp % 4 * 16 * kRowBlocks, first_column = warp / 4 * 16;
    const bool some = first_row < kOutPixels;
    const OfFiltered lane = this->template of_lane<OfFiltered>();
    float sum[kRowBlocks][2][4];
    if (whole_outputs()) {
      if (some) multiply_by_project<true>(sum, lane, first_row, first_column);
    } else {
      clear(sum);
#pragma unroll 1
      for (int part = 0; part < a.sizes.parts; ++part) {
        if (part) synchronize();
        this->load_project(this->packed(chunk), part);
        this->load_dp(tile(number), part * a.sizes.width);
        copies_arrive();
        synchronize();
        if (some) multiply_by_project<false>(sum, lane, first_row, first_column);
      }
    }
    if (!some) return;
    const OfProducts& other = this->template of_lane<OfProducts>();
    const int of_norm = other.norm, of_column = other.column;
    Vector slope[2];
    uint32_t c1[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const char* const from = Base::diagonals() + (first_column / 8 + j) * kDiagonals;
      slope[j] = *reinterpret_cast<const Vector*>(from + kUnits * kUnit + lane.diagonal);
      c1[j] = *reinterpret_cast<const uint32_t*>(from + kConstant + unsigned(lane.diagonal) / 4);
    }
    const SharedAddress column = shared_address(z().data + first_column);
    const uint32_t ones = pack<T>(1.0f, 1.0f);
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      const SharedAddress row =
          column + *Base::template at<uint16_t>(Base::kRows + int(first_row + 16 * i) * 2 + lane.row);
      uint32_t part[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t pixels[4];  // 8 channels of z, twice
        load_matrices(pixels, row + 16 * j);
        float (&g)[4] = sum[i][j];
        float dz[4];
        // Loaded anew for each 16 pixels: a product takes it in place, where kept ones would cost 8 registers.
        Added half = Base::added(Parameters::kShift, first_column + 8 * j, of_norm);
        multiply_add(half.part, pixels, slope[j].part[0], slope[j].part[1], T{});
        if (!Parameters::kFolds) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const MiddleNorm& by = Base::middle_norm()[first_column + 8 * j + of_norm / 8 + k % 2];
            const Pair old = unpack<T>(pixels[k / 2]);
            g[k] *= by.half_c0;
            dz[k] = g[k] + (by.c2 * (k % 2 ? old.second : old.first) + by.c1);
          }
        } else {
          multiply_and_add(dz, pixels, slope[j].part[2], slope[j].part[3], g, T{});
          multiply_add(dz, ones, ones, c1[j], T{});
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          activate<Silu>(half.part[k]);
          dz[k] += g[k] * half.part[k];
        }
        part[2 * j] = pack<T>(dz[0], dz[1]);
        part[2 * j + 1] = pack<T>(dz[2], dz[3]);
      }
      store_matrices(row + of_column, part);
    }
  }
};

}  // namespace mvit3
