// inverted_residual on tiles in shared memory (identity G of the design), backward.

#include "inverted_residual_backward_filtered.h"

namespace mvit3 {

// With dp (B, H', W', outputs), the gradient of the projection, and z as Filter left it:
//   g = (dp project) * act'(middle(z)), dz = scale g + c1 + c2 z,
//   e = norm(x expand^T) again, G = (depthwise^T * dz) * act'(e), dx = (G * scale) expand;
// and per block, over its tiles, n1 = G^T x, g1 = sum of G, dtaps = sum of act(e) times the dz that meets it.
//
// A warp has 16 pixels of the tile, of which it makes e, the gradient of act(e) and G where the tensor cores leave and
// take their operands: only what other warps need goes through shared memory. The depth-wise products are products of
// matrices too (tap_of).
//
// Reads x, dp and z once for each tile of x, dp and z with a border of one pixel (x of more than 128 inputs, and dp of
// more than kMostOutputs outputs, once for each 32 expanded channels of a tile), and the packed parameters once for
// each tile. Writes dx (B, H, W, inputs) once, and adds to the workspace (blocks, expanded, kRow) for each tile.
//
// With wide inputs G (B, H, W, expanded) is written instead, and dx, n1 and g1 are left to products over the whole map:
// what a block would need for them does not fit beside x.
template <typename T, int Stride, int Steps>
struct Backward : BackwardFiltered<T, Stride, Steps> {
  using Base = BackwardFiltered<T, Stride, Steps>;
  using Base::Base, Base::a, Base::m, Base::warp, Base::whole_inputs;
  using Base::kHeight, Base::kWidth, Base::kOutWidth, Base::kInputs, Base::kPitch, Base::kGroups, Base::kWide;
  using Base::kRowBytes;
  using Base::tile, Base::corner_of;
  using Base::x, Base::z, Base::value, Base::gradient, Base::expand, Base::scaled;
  using typename Base::Arguments, typename Base::Parameters, typename Base::Tile;
  using typename Base::OfExpanded, typename Base::OfFiltered, typename Base::OfProducts;

  // What a lane keeps of a tile from step to step: sums of dx; or, of wide inputs, its part of x as the products take
  // it, of pixels lane / 4 and 8 more of the warp.
  struct Sums {
    float dx[2 * Steps][4];
  };
  struct Pixels {
    uint32_t x[Steps][4];
  };
  using Carried = std::conditional_t<kWide, Pixels, Sums>;

  // ---- The steps

  // Where pixel lane / 4 + 8 half of the warp lies in x, -1 outside.
  static MVIT3_DEVICE
  int place_of(unsigned t, int half) { return Base::own_places()[t / kWarp * 16 + t % kWarp / 4 + 8 * half]; }

  // Eight inputs from `channel` on that cannot be loaded at once.
  MVIT3_DEVICE
  Vector load_one_by_one(const T* from, int channel) const {
    Vector v{};
#pragma unroll 1
    for (int i = 0; i < 8 && channel + i < m.inputs; ++i) {
      const uint32_t bits = uint32_t(from[i].bits) << 16 * (i % 2);
#pragma unroll
      for (int part = 0; part < 4; ++part) v.part[part] |= part == i / 2 ? bits : 0u;
    }
    return v;
  }
  // Inputs first..first+kInputs-1 of the warp's pixels.
  MVIT3_DEVICE
  void load_pixels(const T* map, int first, Pixels& to) const {
    const unsigned t = thread();
    const bool vectors = m.inputs % 8 == 0 && is_aligned(map);
#pragma unroll
    for (int k = 0; k < Steps; k += 2) {
      const int channel = first + 16 * k + int(t % 4) * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = place_of(t, half);
        const bool there = place >= 0 && channel < m.inputs;
        const T* const from = map + (there ? int64_t(place) * m.inputs + channel : 0);
        const Vector v =
            vectors ? *reinterpret_cast<const Vector*>(from) : load_one_by_one(from, there ? channel : m.inputs);
        // Masked rather than chosen: what a product takes must lie in other registers than what was loaded, and is
        // else moved there by each step.
        const uint32_t mask = there ? ~0u : 0u;
#pragma unroll
        for (int i = 0; i < 4; ++i) to.x[k + i / 2][i % 2 * 2 + half] = v.part[i] & mask;
      }
    }
  }

  // sum += x expand^T of 16 pixels and 16 inputs.
  MVIT3_DEVICE
  void multiply_by_expand(SharedAddress of_weight, const uint32_t (&pixels)[4], float (&sum)[kGroups][4]) const {
#pragma unroll
    for (int j = 0; j < kGroups; j += 2) {
      uint32_t weight[4];
      load_matrices(weight, of_weight + 16 * j * kPitch);
      multiply_add(sum[j], pixels, weight[0], weight[1], T{});
      multiply_add(sum[j + 1], pixels, weight[2], weight[3], T{});
    }
  }
  // sum += x expand^T of the warp's pixels.
  MVIT3_DEVICE
  void expand_again(int, int, const OfExpanded& lane, const Sums&, float (&sum)[kGroups][4]) const {
    const SharedAddress of_x = shared_address(x().row(16 * warp)) + lane.x,
                        of_weight = shared_address(expand().data) + lane.expand;
#pragma unroll
    for (int k = 0; k < Steps; ++k) {
      uint32_t pixels[4];
      load_matrices(pixels, of_x + 32 * k);
      multiply_by_expand(of_weight + 32 * k, pixels, sum);
    }
  }
  MVIT3_DEVICE
  void expand_again(int number, int chunk, const OfExpanded& lane, Pixels& carried, float (&sum)[kGroups][4]) const {
    const SharedAddress of_weight = shared_address(expand().data) + lane.expand;
    if (whole_inputs()) {
#pragma unroll
      for (int k = 0; k < Steps; ++k) multiply_by_expand(of_weight + 32 * k, carried.x[k], sum);
      return;
    }
#pragma unroll 1
    for (int from = 0; from < a.sizes.slices; ++from) {
      if (from) synchronize();
      this->load_expand(this->packed(chunk), from);
      load_pixels(tile(number).x, from * kInputs, carried);
      copies_arrive();
      synchronize();
#pragma unroll
      for (int k = 0; k < Steps; ++k) multiply_by_expand(of_weight + 32 * k, carried.x[k], sum);
    }
  }

  static MVIT3_DEVICE
  void clear_outside(unsigned t, uint32_t (&pairs)[kGroups][2]) {
    const bool outside[2] = {place_of(t, 0) < 0, place_of(t, 1) < 0};
    if (!any(outside[0] || outside[1])) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (outside[half])
#pragma unroll
        for (int j = 0; j < kGroups; ++j) pairs[j][half] = 0u;
  }

  // Pairs of channels of the warp's pixels, to their rows, of which the lane's begins `of_lane` bytes behind the first.
  MVIT3_DEVICE
  void store(Matrix<T> to, int of_lane, const uint32_t (&pairs)[kGroups][2]) const {
    const SharedAddress row = shared_address(to.row(16 * warp)) + of_lane;
#pragma unroll
    for (int j = 0; j < kGroups; j += 2)
      store_matrices(row + 16 * j, {pairs[j][0], pairs[j][1], pairs[j + 1][0], pairs[j + 1][1]});
  }

  // dz at the warp's pixels: where a lane reads it for pair of taps `pair`, 8 channels from the first on.
  struct Corner {
    SharedAddress left, right, corner;

    MVIT3_DEVICE
    Corner(unsigned warp, const OfExpanded& lane) {
      corner = shared_address(z().row(corner_of(16 * warp))) + lane.at;
      if (Stride == 1) {
        left = corner + 2 * kRowBytes - lane.second;
        right = corner + 2 * kOutWidth * kRowBytes - kOutWidth * lane.second;
      } else {
        const unsigned parities = warp / 2;
        left = corner + lane.second * int(parities % 2 ? 1 : parities / 2 * kOutWidth);
        right = corner + lane.second;
      }
    }
    MVIT3_DEVICE
    SharedAddress of(int pair) const {
      constexpr int kDown = kOutWidth * kChunkPitch * sizeof(T);
      if (Stride == 1) return pair < 3 ? left + (2 - pair) * kDown : pair == 3 ? right : corner;
      return pair < 4 ? left : right + kDown;
    }
  };

  // The gradient of act(e), or half of it, of the warp's pixels, 8 channels from 8 group on. Two: stride 2, two pairs
  // of taps.
  template <bool Two>
  MVIT3_DEVICE
  void transposed_filter(
      const Corner& corner, const char* diagonal, unsigned parities, int group, float (&sum)[4]) const {
    const char* const from = diagonal + group * kDiagonals;
    uint32_t part[4];
    const auto add = [&](int pair, const uint32_t* two) {
      load_matrices(part, corner.of(pair) + 16 * group);
      multiply<T>(pair == 0, sum, part, two[0], two[1]);
    };
    if constexpr (Stride == 1) {
      Vector weight[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i) weight[i] = *reinterpret_cast<const Vector*>(from + i * kUnit);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) add(pair, weight[pair / 2].part + pair % 2 * 2);
    } else {
      const Run<2> weight = *reinterpret_cast<const Run<2>*>(from + parities / 2 * kUnit + parities % 2 * 8);
      add(0, weight.word);
      if constexpr (Two) {
        const Run<2> other = *reinterpret_cast<const Run<2>*>(from + 2 * kUnit);
        add(4, other.word);
      }
    }
  }

  // act(e) of the warp's pixels to shared memory, and their G.
  template <bool Silu>
  MVIT3_DEVICE
  void expanded_gradient(int number, int chunk, Carried& carried, uint32_t (&gradients)[kGroups][2]) const {
    const OfExpanded lane = this->template of_lane<OfExpanded>();
    const OfFiltered other = this->template of_lane<OfFiltered>();
    const int of_norm = this->template of_lane<OfProducts>().norm, of_row = other.weight;
    float slope[kGroups][4] = {};
    expand_again(number, chunk, lane, carried, slope);
    uint32_t values[kGroups][2];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      normalise(slope[j], Base::added(Parameters::kNorm, 8 * j, of_norm));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &first = slope[j][2 * half], &second = slope[j][2 * half + 1];
        const float value = this->template activate<Silu>(first);
        values[j][half] = pack<T>(value, this->template activate<Silu>(second));
      }
    }
    const bool whole = tile(number).whole;
    if (!whole) clear_outside(thread(), values);
    store(value(), of_row, values);
    const Corner corner(warp, lane);
    const char* const diagonal = Base::diagonals() + other.diagonal;
    const auto filter = [&](auto two) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        float sum[4];
        transposed_filter<two>(corner, diagonal, warp / 2, j, sum);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          gradients[j][half] = pack<T>(
              sum[2 * half] * slope[j][2 * half] + sum[2 * half],
              sum[2 * half + 1] * slope[j][2 * half + 1] + sum[2 * half + 1]);
      }
    };
    Stride == 2 && warp / 2 == 3 ? filter(std::true_type{}) : filter(std::false_type{});
    if constexpr (!kWide) {
      if (!whole) clear_outside(thread(), gradients);
      store(gradient(), of_row, gradients);
    }
  }

  // sum += (G * scale) expand of the warp's pixels.
  MVIT3_DEVICE
  void contract(const uint32_t (&gradients)[kGroups][2], float (&sum)[2 * Steps][4]) const {
    const SharedAddress of_weight = shared_address(scaled().data) + this->template of_lane<OfExpanded>().x;
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

  // G of the warp's pixels, to memory.
  MVIT3_DEVICE
  void store_gradient(T* map, int chunk, const uint32_t (&pairs)[kGroups][2]) const {
    const unsigned t = thread(), row = t / kWarp * 16 + t % kWarp / 4;
    store(gradient(), this->template of_lane<OfFiltered>().weight, pairs);
    synchronize_warp();
    const int unit = int(t % 4) * 8, channel = chunk + unit;
    const bool vectors = m.expanded % 8 == 0 && is_aligned(a.gradient);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = place_of(t, half);
      if (place < 0) continue;
      const T* const from = gradient().row(row + 8 * half) + unit;
      T* const to = map + int64_t(place) * m.expanded + channel;
      if (vectors) {
        if (channel < m.expanded) *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
      } else {
        for (int i = 0; i < 8; ++i)
          if (channel + i < m.expanded) to[i] = from[i];
      }
    }
  }

  // ---- The whole

  MVIT3_DEVICE
  void store_dx(T* map, const float (&sum)[2 * Steps][4]) const {
    const unsigned t = thread(), first = t % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = place_of(t, half);
      if (place < 0) continue;
      T* const to = map + int64_t(place) * m.inputs;
#pragma unroll
      for (int j = 0; j < 2 * Steps; ++j) {
        const uint32_t pair = pack<T>(sum[j][2 * half], sum[j][2 * half + 1]);
        if (m.inputs == kInputs)
          *reinterpret_cast<uint32_t*>(to + first + 8 * j) = pair;
        else
          store_pair(to, first + 8 * j, m.inputs, pair);
      }
    }
  }

  // A tile's part of what is carried.
  MVIT3_DEVICE
  void start(const Tile& here, Sums& carried) const {
    this->load_x(here);
#pragma unroll
    for (int j = 0; j < 2 * Steps; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) carried.dx[j][k] = 0.0f;
  }
  MVIT3_DEVICE
  void start(const Tile& here, Pixels& carried) const {
    if (whole_inputs()) load_pixels(here.x, 0, carried);
  }

  // What a block does in front of its first tile. Returns how many tiles it has.
  MVIT3_DEVICE
  int begin() const {
    const int64_t all = Base::tiles(a), first = all * block() / blocks();
    if (thread() == 0) this->prepare(place<kHeight, kWidth>(first, m.height, m.width, m.dilation), 0);
    this->write_of_lane();
    this->load_parameters(this->packed(0));
    synchronize();
    this->enter(0);
    synchronize();
    this->load_filtered(0, 0);
    return int(all * (block() + 1) / blocks() - first);
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const Backward self(a);
    const int count = self.begin();
    a.front.act == kSilu ? self.walk<true>(count) : self.walk<false>(count);
  }

  template <bool Silu>
  MVIT3_DEVICE
  void walk(int count) const {
    int number = 0, chunk = 0;  // of tile and channel
    Carried carried;
#pragma unroll 1
    while (true) {
      copies_arrive();
      synchronize();  // x is free
      if (chunk == 0) {
        start(tile(number), carried);
        if (thread() == 0) {
          Place there = tile(number).place;
          this->advance(there);
          this->prepare(there, number + 1);
        }
      }
      this->template filtered_gradient<Silu>(number, chunk);
      copies_arrive();
      synchronize();
      uint32_t gradients[kGroups][2];
      expanded_gradient<Silu>(number, chunk, carried, gradients);
      const bool ends = chunk + kChunk >= m.expanded;
      if constexpr (kWide) {
        store_gradient(tile(number).result, chunk, gradients);
      } else {
        contract(gradients, carried.dx);
        if (ends) store_dx(tile(number).result, carried.dx);
      }
      synchronize();
      const int next = ends ? 0 : chunk + kChunk;
      const bool more = !ends || number + 1 < count;
      if (ends) this->enter(number + 1);
      if (more) this->load_parameters(this->packed(next));
      this->multiply_by_values(chunk, number == 0);
      synchronize();  // z is free
      if (more) this->load_filtered(number + ends, next);
      if constexpr (!kWide) this->multiply_by_x(chunk, number == 0);
      if (!more) break;
      chunk = next;
      number += ends;
    }
  }
};

// Calls f with the kernel for a type of map, a stride, and as many steps of 16 inputs as there are, or that of wide
// ones.
template <typename F>
auto choose_backward(const BackwardArguments& a, const F& f) {
  const auto of_stride = [&](auto type, auto stride) {
    using T = decltype(type);
    constexpr int kStride = decltype(stride)::value;
    const int inputs = a.front.maps.inputs;
    if (inputs <= 16) return f(Chosen<Backward<T, kStride, 1>>{});
    if (inputs <= 32) return f(Chosen<Backward<T, kStride, 2>>{});
    return inputs <= kMostGradientInputs ? f(Chosen<Backward<T, kStride, 4>>{})
                                         : f(Chosen<Backward<T, kStride, kWideSteps>>{});
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
    return K::Pack::count(plan) + int64_t(blocks_for<K>(plan, K::shared(plan))) * plan.sizes.kept;
  });
}

void backward(const BackwardArguments& a, void* stream) {
  choose_backward(a, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    BackwardPlan plan = plan_of<K>(a);
    const typename K::Pack::Blocks pack(plan);
    launch<typename K::Pack>(plan, pack.steps + pack.project + pack.scaled, 1, K::Pack::kShared, stream);
    plan.workspace += K::Pack::count(plan);
    const int shared = K::shared(plan), parts = blocks_for<K>(plan, shared);
    launch<K>(plan, parts, 1, shared, stream);
    using Finish = FinishBackward<K>;
    launch<Finish>({plan, parts}, a.front.maps.expanded, 1, Finish::kShared, stream);
  });
}

}  // namespace mvit3
