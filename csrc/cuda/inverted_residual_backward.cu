// inverted_residual on tiles in shared memory (identity G of the design), backward.

#include "inverted_residual_backward_sums.h"

namespace mvit3 {

// With dp (B, H', W', outputs), the gradient of the projection, and z as Filter left it:
//   g = (dp project) * act'(z_scale z + z_shift), dz = c0 g + c1 + c2 z,
//   e = norm(x expand^T) again, G = (depthwise^T * dz) * act'(e), dx = (G * scale) expand;
// and per block, over its tiles, n1 = G^T x, g1 = sum of G, dtaps = sum of act(e) times the dz that meets it.
//
// A warp has 16 pixels of the tile, of which it makes e, the gradient of act(e) and G where the tensor cores leave and
// take their operands: only what other warps need goes through shared memory. The depth-wise products are products of
// matrices too (tap_of).
//
// Reads x, dp and z once for each tile of x, dp and z with a border of one pixel (more than 64 inputs and more than 64
// or 128 outputs once for each 32 expanded channels of a tile), and the packed parameters once for each tile.
// Writes dx (B, H, W, inputs) once, and adds to the workspace (blocks, slices of inputs, expanded, kRow) for each tile.
// With more inputs than kInputs each slice of blocks does all but its part of dx and n1 again.
template <typename T, int Stride, int Steps>
struct Backward : BackwardSums<T, Stride, Steps> {
  using Base = BackwardSums<T, Stride, Steps>;
  using Base::a, Base::m, Base::lane, Base::warp, Base::rows_of, Base::columns_of, Base::whole_inputs,
      Base::whole_outputs;
  using Base::kHeight, Base::kWidth, Base::kOutWidth, Base::kOutPixels, Base::kInputs, Base::kPitch, Base::kGroups;
  using Base::tile, Base::places, Base::in_x, Base::corner_of;
  using Base::x, Base::dp, Base::z, Base::value, Base::gradient, Base::project, Base::expand, Base::scaled;
  using typename Base::Arguments, typename Base::Parameters;

  // ---- The steps

  // Half of an activation's argument becomes r, of which (1 + r) / 2 is the slope. Returns the activation.
  template <bool Silu>
  MVIT3_DEVICE
  float activate(float& half) const {
    if (Silu) {
      const float t = approximate_tanh(half), value = half * t + half;
      half = half * (1.0f - t * t) + t;
      return value;
    }
    const float value = 2.0f * half;
    const bool rises = a.front.act != kRelu || !(value <= 0.0f);  // as torch: NaN stays
    half = rises ? 1.0f : -1.0f;
    return rises ? value : 0.0f;
  }

  // sum += dp project, of 16 kRowBlocks filtered pixels x 16 channels.
  template <int RowBlocks>
  MVIT3_DEVICE
  void project_back(
      int number, const char* packed, float (&sum)[RowBlocks][2][4], unsigned first_row, unsigned first_column) const {
#pragma unroll 1
    for (int part = 0; part < a.sizes.parts; ++part) {
      if (!whole_outputs()) {
        if (part) synchronize();
        this->load_project(packed, part);
        this->load_dp(tile(number).place, part * a.sizes.width);
        copies_arrive();
        synchronize();
      }
      if (first_row >= kOutPixels) continue;
      SharedAddress of_pixels[RowBlocks], of_weight = rows_of(project(), 0, first_column);
#pragma unroll
      for (int i = 0; i < RowBlocks; ++i) {
        const unsigned row = first_row + 16 * i + lane() % 16;
        of_pixels[i] = shared_address(dp().row(row < kOutPixels ? row : kOutPixels - 1) + lane() / 16 * 8);
      }
#pragma unroll 2
      for (int k = 0; k < a.sizes.width / 16; ++k) {
        uint32_t pixels[4], weight[4];
        load_transposed(weight, of_weight);
        of_weight += 16 * kChunkPitch * sizeof(T);
#pragma unroll
        for (int i = 0; i < RowBlocks; ++i) {
          load_matrices(pixels, of_pixels[i]);
          of_pixels[i] += 16 * sizeof(T);
          multiply_add(sum[i][0], pixels, weight[0], weight[1], T{});
          multiply_add(sum[i][1], pixels, weight[2], weight[3], T{});
        }
      }
    }
  }

  // z becomes dz; outside the map it stays zero.
  template <bool Silu>
  MVIT3_DEVICE
  void filtered_gradient(int number, const char* packed) const {
    constexpr int kRowBlocks = Stride == 1 ? 3 : 1;  // of a warp; warps stand 4 x 2
    const unsigned first_row = warp() % 4 * 16 * kRowBlocks, first_column = warp() / 4 * 16;
    float sum[kRowBlocks][2][4];
    clear(sum);
    project_back(number, packed, sum, first_row, first_column);
    if (first_row >= kOutPixels) return;
    MiddleNorm by[2][2];
    float times[2][2];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const unsigned channel = first_column + 8 * j + lane() % 4 * 2 + k;
        by[j][k] = Base::middle_norm()[channel];
        times[j][k] = Parameters::kFolds ? 1.0f : Base::half_c0()[channel];
      }
    const unsigned column = first_column + lane() / 16 * 8;
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      const unsigned pixel = first_row + 16 * i + lane() % 16;
      const bool there = pixel < kOutPixels && places()[pixel < kOutPixels ? pixel : 0] >= 0;
      const SharedAddress row = shared_address(z().row(there ? pixel : kOutPixels) + column);
      uint32_t part[4];
      load_matrices(part, row);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const MiddleNorm &one = by[k / 2][0], &two = by[k / 2][1];
        const Pair old = unpack<T>(part[k]);
        const auto gradient_of = [&](float old, float g, const MiddleNorm& by, float times) {
          float half = by.scale * old + by.shift;
          activate<Silu>(half);
          if (!Parameters::kFolds) g *= times;
          return g * half + (g + (by.c2 * old + by.c1));
        };
        part[k] = pack<T>(
            gradient_of(old.first, sum[i][k / 2][k % 2 * 2], one, times[k / 2][0]),
            gradient_of(old.second, sum[i][k / 2][k % 2 * 2 + 1], two, times[k / 2][1]));
      }
      store_matrices(row, part);
    }
  }

  // sum += x expand^T of the warp's pixels. The block's own slice of x remains.
  MVIT3_DEVICE
  void expand_again(int number, const char* packed, float (&sum)[kGroups][4]) const {
#pragma unroll 1
    for (int i = 0; i < a.sizes.slices; ++i) {
      if (!whole_inputs()) {
        const int from = (slice() + 1 + i) % a.sizes.slices;
        if (i) synchronize();
        this->load_x(tile(number).place, from * kInputs);
        this->load_expand(packed, from);
        copies_arrive();
        synchronize();
      }
      const SharedAddress of_x = rows_of(x(), 16 * warp(), 0);
      const SharedAddress of_weight = columns_of(expand(), 0, 0);
#pragma unroll
      for (int k = 0; k < Steps; ++k) {
        uint32_t pixels[4];
        load_matrices(pixels, of_x + 32 * k);
#pragma unroll
        for (int j = 0; j < kGroups; j += 2) {
          uint32_t weight[4];
          load_matrices(weight, of_weight + 16 * j * kPitch + 32 * k);
          multiply_add(sum[j], pixels, weight[0], weight[1], T{});
          multiply_add(sum[j + 1], pixels, weight[2], weight[3], T{});
        }
      }
    }
  }

  // Of a whole tile nothing is outside the map.
  MVIT3_DEVICE
  void clear_outside(const Place& here, uint32_t (&pairs)[kGroups][2]) const {
    if (here.y(kHeight - 1) < m.height && here.x(kWidth - 1) < m.width) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (in_x(here, 16 * warp() + 8 * half + lane() / 4) < 0)
#pragma unroll
        for (int j = 0; j < kGroups; ++j) pairs[j][half] = 0u;
  }

  // Pairs of channels of the warp's pixels, to their rows.
  static MVIT3_DEVICE
  void store(Matrix<T> to, const uint32_t (&pairs)[kGroups][2]) {
    const SharedAddress row = rows_of(to, 16 * warp(), 0);
#pragma unroll
    for (int j = 0; j < kGroups; j += 2)
      store_matrices(row + 16 * j, {pairs[j][0], pairs[j][1], pairs[j + 1][0], pairs[j + 1][1]});
  }

  // dz at the warp's pixels: where a lane reads it for pair of taps `pair`, 8 channels from the first on.
  struct Corner {
    SharedAddress left, right, corner;

    MVIT3_DEVICE
    Corner() {
      const unsigned l = lane(), second = l / 16, at = corner_of(16 * warp() + l % 16);
      const auto pixel = [&](unsigned p) { return shared_address(z().row(p)); };
      if (Stride == 1) {
        left = pixel(at + 2 - second);
        right = pixel(at + (2 - second) * kOutWidth);
        corner = pixel(at);
      } else {
        const unsigned parities = warp() / 2;
        left = pixel(at + second * (parities % 2 ? 1 : parities / 2 * kOutWidth));
        right = pixel(at + second);
      }
    }
    MVIT3_DEVICE
    SharedAddress of(int pair) const {
      constexpr int kDown = kOutWidth * kChunkPitch * sizeof(T);
      if (Stride == 1) return pair < 3 ? left + (2 - pair) * kDown : pair == 3 ? right : corner;
      return pair < 4 ? left : right + kDown;
    }
  };

  // The gradient of act(e) / 2 of the warp's pixels, 8 channels from 8 group on.
  MVIT3_DEVICE
  void transposed_filter(const Corner& corner, const char* diagonal, int group, float (&sum)[4]) const {
    const char* const from = diagonal + group * kDiagonals;
    uint32_t part[4];
    const auto multiply = [&](int pair, const uint32_t* two) {
      load_matrices(part, corner.of(pair) + 16 * group);
      multiply_add(sum, part, two[0], two[1], T{});
    };
    if constexpr (Stride == 1) {
      Vector weight[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i) weight[i] = *reinterpret_cast<const Vector*>(from + i * kUnit);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) multiply(pair, weight[pair / 2].part + pair % 2 * 2);
    } else {
      const unsigned parities = warp() / 2;
      multiply(0, reinterpret_cast<const uint32_t*>(from + parities / 2 * kUnit + parities % 2 * 8));
      if (parities == 3) multiply(4, reinterpret_cast<const uint32_t*>(from + 2 * kUnit));
    }
  }

  // act(e) and G of the warp's pixels, to shared memory; G returned too.
  template <bool Silu>
  MVIT3_DEVICE
  void expanded_gradient(int number, const char* packed, uint32_t (&gradients)[kGroups][2]) const {
    float slope[kGroups][4] = {};
    expand_again(number, packed, slope);
    uint32_t values[kGroups][2];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const Affine* const norm = Base::first_norm() + 8 * j + lane() % 4 * 2;
      const Affine one = norm[0], two = norm[1];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &first = slope[j][2 * half], &second = slope[j][2 * half + 1];
        first = one.scale * first + one.shift;
        second = two.scale * second + two.shift;
        const float value = activate<Silu>(first);
        values[j][half] = pack<T>(value, activate<Silu>(second));
      }
    }
    clear_outside(tile(number).place, values);
    store(value(), values);
    const Corner corner;
    const bool on_diagonal = lane() % 4 == lane() / 8;
    const char* const diagonal = Base::diagonals() + (on_diagonal ? 16 * (lane() / 4) : kUnit - 16);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      float sum[4] = {};
      transposed_filter(corner, diagonal, j, sum);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        gradients[j][half] = pack<T>(
            sum[2 * half] * slope[j][2 * half] + sum[2 * half],
            sum[2 * half + 1] * slope[j][2 * half + 1] + sum[2 * half + 1]);
    }
    clear_outside(tile(number).place, gradients);
    store(gradient(), gradients);
  }

  // sum += (G * scale) expand of the warp's pixels.
  MVIT3_DEVICE
  void contract(const uint32_t (&gradients)[kGroups][2], float (&sum)[2 * Steps][4]) const {
    const SharedAddress of_weight = rows_of(scaled(), 0, 0);
#pragma unroll
    for (int j = 0; j < kGroups; j += 2) {
      const uint32_t pixels[4] = {gradients[j][0], gradients[j][1], gradients[j + 1][0], gradients[j + 1][1]};
#pragma unroll
      for (int k = 0; k < Steps; ++k) {
        uint32_t weight[4];
        load_transposed(weight, of_weight + 16 * j * kPitch + 32 * k);
        multiply_add(sum[2 * k], pixels, weight[0], weight[1], T{});
        multiply_add(sum[2 * k + 1], pixels, weight[2], weight[3], T{});
      }
    }
  }

  // ---- The whole

  MVIT3_DEVICE
  void store_dx(const Place& here, const float (&sum)[2 * Steps][4]) const {
    const unsigned g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = in_x(here, 16 * warp() + 8 * half + g);
      if (place < 0) continue;
      T* const to = static_cast<T*>(a.dx) + (here.image * m.height * m.width + place) * m.inputs;
#pragma unroll
      for (int j = 0; j < 2 * Steps; ++j)
        store_pair(to, slice() * kInputs + 8 * j + 2 * t, m.inputs, pack<T>(sum[j][2 * half], sum[j][2 * half + 1]));
    }
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const Backward self{{{a, a.front.maps}}};
    a.front.act == kSilu ? self.walk<true>() : self.walk<false>();
  }

  template <bool Silu>
  MVIT3_DEVICE
  void walk() const {
    const int64_t all = Base::tiles(a), begin = all * block() / blocks();
    const int count = int(all * (block() + 1) / blocks() - begin);
    int number = 0, chunk = 0;  // of tile and channel
    this->enter(place<kHeight, kWidth>(begin, m.height, m.width, m.dilation), 0);
    this->load_parameters(this->packed(0));
    synchronize();
    this->load_filtered(0, 0);
    float sum[2 * Steps][4];
#pragma unroll 1
    while (true) {
      copies_arrive();
      synchronize();  // x is free
      if (chunk == 0) {
        if (whole_inputs()) this->load_x(tile(number).place, 0);
#pragma unroll
        for (int j = 0; j < 2 * Steps; ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[j][k] = 0.0f;
      }
      filtered_gradient<Silu>(number, this->packed(chunk));
      copies_arrive();
      synchronize();
      uint32_t gradients[kGroups][2];
      expanded_gradient<Silu>(number, this->packed(chunk), gradients);
      contract(gradients, sum);
      const bool ends = chunk + kChunk >= m.expanded;
      if (ends) store_dx(tile(number).place, sum);
      synchronize();
      const int next = ends ? 0 : chunk + kChunk;
      const bool more = !ends || number + 1 < count;
      if (ends) {
        Place there = tile(number).place;
        this->advance(there);
        this->enter(there, number + 1);
      }
      if (more) this->load_parameters(this->packed(next));
      if (slice() == 0) this->multiply_by_values(this->kept_of(chunk), number == 0);
      synchronize();  // z is free
      if (more) this->load_filtered(number + ends, next);
      this->multiply_by_x(this->kept_of(chunk), number == 0);
      if (!more) break;
      chunk = next;
      number += ends;
    }
  }
};

// Calls f with the kernel for a type of map, a stride, and as many steps of 16 inputs as there are, at most 4.
template <typename F>
auto choose_backward(const BackwardArguments& a, const F& f) {
  const auto of_stride = [&](auto type, auto stride) {
    using T = decltype(type);
    constexpr int kStride = decltype(stride)::value;
    const int inputs = a.front.maps.inputs;
    if (inputs <= 16) return f(Chosen<Backward<T, kStride, 1>>{});
    return inputs <= 32 ? f(Chosen<Backward<T, kStride, 2>>{}) : f(Chosen<Backward<T, kStride, 4>>{});
  };
  const auto of_type = [&](auto type) {
    return a.stride == 1 ? of_stride(type, std::integral_constant<int, 1>{})
                         : of_stride(type, std::integral_constant<int, 2>{});
  };
  return a.bfloat16 ? of_type(BFloat16{}) : of_type(Float16{});
}

template <typename K>
BackwardPlan plan_of(const BackwardArguments& a) {
  const Maps& m = a.front.maps;
  const auto every = [&](int n) { return int(ceil_div(n, m.dilation)); };
  return {
      a, K::Parameters::sizes(m, K::kMostOutputs, K::kRow), every(m.height), every(m.width),
      reinterpret_cast<const char*>(a.workspace)};
}

int64_t backward_workspace(const BackwardArguments& a) {
  return choose_backward(a, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    const BackwardPlan plan = plan_of<K>(a);
    return K::Pack::count(plan) + int64_t(blocks_for<K>(plan, K::shared(plan))) * plan.sizes.slices * plan.sizes.kept;
  });
}

void backward(const BackwardArguments& a, void* stream) {
  choose_backward(a, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    BackwardPlan plan = plan_of<K>(a);
    const int64_t packed = K::Pack::count(plan);
    launch<typename K::Pack>(plan, int(ceil_div(packed, kThreads)), 1, 0, stream);
    plan.workspace += packed;
    const int shared = K::shared(plan), parts = blocks_for<K>(plan, shared);
    launch<K>(plan, parts, plan.sizes.slices, shared, stream);
    using Finish = FinishBackward<K>;
    launch<Finish>({plan, parts}, int(ceil_div(Finish::count(plan), kWarp)), 1, kThreads * 4, stream);
  });
}

}  // namespace mvit3
