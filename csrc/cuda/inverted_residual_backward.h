// What the backward kernel of inverted_residual has for itself: instructions of the device, and its parameters as a
// step of 32 expanded channels copies them into shared memory.
#pragma once

#include "inverted_residual.h"
#include "sums.h"

#if defined(__CUDACC__)

namespace mvit3 {

// multiply_add to zeros, which need no registers then.
MVIT3_DEVICE
void multiply_first(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, "
      "%10, %10};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}
MVIT3_DEVICE
void multiply_first(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, "
      "%10, %10};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// copy_16 of what lies `At` bytes behind, where `wanted`, without a branch and without an address of its own.
template <int At>
MVIT3_DEVICE
void copy_16_behind(bool wanted, void* shared, const void* global) {
  asm volatile(
      "{ .reg .pred wanted; setp.ne.u32 wanted, %2, 0; @wanted cp.async.cg.shared.global [%0 + %3], [%1 + %3], 16; }" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(uint32_t(wanted)), "n"(At)
      : "memory");
}

// A barrier of a warp.
MVIT3_DEVICE
void synchronize_warp() { __syncwarp(); }

// Adds to two neighbouring numbers in global memory, 8 bytes aligned, without waiting for what they were.
MVIT3_DEVICE
void add_in_memory(float* to, float first, float second) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(first), "f"(second) : "memory");
#else
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(first) : "memory");
  asm volatile("red.global.add.f32 [%0 + 4], %1;" ::"l"(to), "f"(second) : "memory");
#endif
}

// The opposite of load_matrices.
MVIT3_DEVICE
void store_matrices(SharedAddress row, const uint32_t (&in)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(in[0]), "r"(in[1]),
               "r"(in[2]), "r"(in[3])
               : "memory");
#else
  const int at = thread() % kWarp / 4, part = thread() % 4;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const SharedAddress to = __shfl_sync(0xffffffffu, row, 8 * m + at) + 4 * part;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(in[m]) : "memory");
  }
#endif
}

}  // namespace mvit3

#else

#include "emulation_backward.h"

#endif

namespace mvit3 {

// sum = A B or, but for the first one, sum += A B.
template <typename T>
MVIT3_DEVICE
void multiply(bool first, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  first ? multiply_first(sum, a, b0, b1, T{}) : multiply_add(sum, a, b0, b1, T{});
}

// ---- The depth-wise convolution on tensor cores. A product of 16 pixels x 16 with 16 x 8 channels is two taps of 8
// channels: the second operand is two diagonals of 8, under each other.

// Pairs of taps, four bits each, 15 for none: its diagonal is zero. Stride 2: of pixels of x in an even row and column,
// in an odd column, in an odd row, in both (two pairs).
constexpr int kPairs = 5;
template <int Stride>
MVIT3_BOTH
constexpr int tap_of(int pair, int i) {
  return int((Stride == 1 ? 0xf852764310 : 0x02681735f4) >> 4 * (2 * pair + i) & 15);
}
constexpr int kNoTap = 15;

// The kernel of so many steps of 16 inputs is that of wide ones, which stores the gradient of the expanded map.
constexpr int kWideSteps = 8;

// The diagonals of 8 channels: 4 registers of a lane in a unit, of which 8 lanes have one channel each and the others
// read the zeros behind. Behind the taps come those of the slopes of two functions of z, a unit, and one register of
// the constant of the second one.
constexpr int kUnits = (2 * kPairs + 3) / 4, kUnit = 9 * 16, kConstant = (kUnits + 1) * kUnit,
              kDiagonals = kConstant + 48;

// ---- The parameters of a step

// A function slope z + constant of 8 filtered channels is a product of (z, z) with two diagonals of the slope, the
// second of what the first one's rounding to 16 bits leaves. One is half of the activation's argument, the other
// c1 + c2 z. The first constant is what the product is added to; the second comes as a product of ones, in two parts
// too.
//
// In float16 c1 + c2 z might be too small a number, and so might the projection times c0: both are computed.
struct alignas(16) MiddleNorm {
  float half_c0, c1, c2, none;
};

// Numbers that a launch brings along: of outputs in shared memory at a time and of such parts, of slices of 16 Steps
// inputs; 2^shift threads have 8 outputs each of a pixel; bytes of the parameters of a step; floats that a block keeps
// of its tiles.
struct StepSizes {
  int width, parts, slices, shift;
  unsigned bytes, kept;
};

// The parameters of a step, in bytes from its start in shared memory: the expansion, 32 x 16 Steps inputs; diagonals;
// norms; the projection, `width` outputs x 32 channels. In global memory there is an expansion for each slice of
// inputs, and a projection for each part of the outputs.
//
// The expansion is as it is and, but for wide inputs, times its norm's scale, of which both numbers are there. (Forward
// has half of the scale in bfloat16 weights alone; but rounding once more moves e, by whose sign ReLU decides, and by
// as much more as x is far from zero in standard deviations.) The projection of bfloat16 has the scale of the middle
// norm, whose shifts are all that is left of it; float16, where that might be too small a number, has a MiddleNorm.
template <typename T, int Steps>
struct StepParameters {
  static constexpr bool kWide = Steps == kWideSteps;
  static constexpr int kInputs = 16 * Steps, kPitch = kInputs + 8;
  // Whether scales of the middle norm are multiplied into the factors of products, and c1 + c2 z is a product.
  static constexpr bool kFolds = std::is_same_v<T, BFloat16>;
  static constexpr int kExpand = kChunk * kPitch * int(sizeof(T)), kAllDiagonals = kChunk / 8 * kDiagonals;
  static constexpr int kScaled = kWide ? 0 : kExpand;
  static constexpr int kNorms = kChunk / 2 * int(sizeof(Added));
  static constexpr int kDiagonal = kExpand + kScaled, kNorm = kDiagonal + kAllDiagonals, kShift = kNorm + kNorms,
                       kMiddle = kShift + kNorms, kProject = kMiddle + (kFolds ? 0 : kChunk * int(sizeof(MiddleNorm))),
                       kRest = kProject - kExpand;

  static MVIT3_BOTH
  constexpr int project(int width) { return width * kChunkPitch * int(sizeof(T)); }
  static StepSizes sizes(const Maps& m, int most_outputs, int row) {
    const int parts = (m.outputs + most_outputs - 1) / most_outputs, slices = (m.inputs + kInputs - 1) / kInputs;
    const int width = round_up((m.outputs + parts - 1) / parts, 16);
    int shift = 1;
    while (8 << shift < width) ++shift;
    return {
        width,
        parts,
        slices,
        shift,
        unsigned(slices * kExpand + kRest + parts * project(width)),
        unsigned(round_up(m.expanded, kChunk) * row)};
  }
};

// The input in place of column `column` of wide weights, whose products take x as a lane loads it: eight inputs at a
// time, for two steps of 16.
MVIT3_BOTH
int wide_input(int column) {
  const int step = column / 16 % 2, high = column / 8 % 2, lane = column % 8 / 2;
  return column / 32 * 32 + 8 * lane + 4 * step + 2 * high + column % 2;
}

struct BackwardPlan : BackwardArguments {
  StepSizes sizes;
  int rows, columns;   // of the map of every dilation-th pixel
  const char* packed;  // the parameters of all steps
};

// 1 / sqrt(var + eps) of a channel.
template <typename T>
MVIT3_DEVICE
float inverse_std(const Norm& norm, int channel) {
  return fold_norm(1.0f, 0.0f, 0.0f, value_at<T>(norm.var, channel), norm.eps).scale;
}

// Writes the parameters of all steps, four bytes to a thread, and what else follows from the sums over z: the gradients
// of the projection, 32 numbers to a block, and of the middle norm; of wide inputs the scaled expansion. Reads the sums
// of the middle norm once for each block of a step, all others once.
template <typename T, int Stride, int Steps>
struct PackBackward {
  using Arguments = BackwardPlan;
  using Parameters = StepParameters<T, Steps>;
  static constexpr int kBlocksAtOnce = 1;

  // The middle norm of a channel: g + c1 + c2 z, times its scale, is the gradient of z.
  struct alignas(16) Coefficients {
    float scale, shift, c1, c2;
  };
  static constexpr int kShared = kThreads * int(sizeof(float)) + kChunk * int(sizeof(Coefficients));

  static MVIT3_BOTH
  int64_t count(const Arguments& a) { return ceil_div(a.front.maps.expanded, kChunk) * (a.sizes.bytes / 4); }
  // Blocks for a step, for all steps, for the projection, and for the scaled expansion.
  struct Blocks {
    int step, steps, project, scaled;
    MVIT3_BOTH
    explicit Blocks(const Arguments& a)
        : step(int(ceil_div(a.sizes.bytes / 4, kThreads))), steps(step * int(ceil_div(a.front.maps.expanded, kChunk))),
          project(int(ceil_div(int64_t(a.front.maps.outputs) * a.front.maps.expanded, kWarp))),
          scaled(
              Parameters::kWide ? int(ceil_div(int64_t(a.front.maps.inputs) * a.front.maps.expanded, kThreads)) : 0) {}
  };

  const Arguments& a;
  const Maps& m;
  int chunk;

  static MVIT3_DEVICE
  Coefficients* coefficients() { return reinterpret_cast<Coefficients*>(shared_memory()) + kThreads / 4; }
  MVIT3_DEVICE
  const Coefficients& middle(int channel) const { return coefficients()[channel - chunk]; }

  // Adds up the sums of the middle norm over parts of the pixels.
  MVIT3_DEVICE
  void find_coefficients(bool writes) const {
    const int channel = chunk + lane();
    const bool there = channel < m.expanded;
    const int64_t of_sums = int64_t(m.outputs) * m.expanded + channel, step = int64_t(m.outputs + 2) * m.expanded;
    const float sum = sum_of_parts(a.part, a.parts, step, of_sums, there);
    synchronize();
    const float weighted = sum_of_parts(a.part, a.parts, step, of_sums + m.expanded, there);
    if (there && warp() == 0) {
      const Affine folded = affine_at<T>(a.middle, channel);
      const float rstd = inverse_std<T>(a.middle, channel), mean = value_at<T>(a.middle.mean, channel),
                  share = 1.0f / float(m.batch * m.out_height * m.out_width);
      const float dweight = rstd * (weighted - mean * sum), c2 = -folded.scale * rstd * dweight * share;
      coefficients()[lane()] = {folded.scale, folded.shift, -folded.scale * sum * share - c2 * mean, c2};
      if (writes) {
        a.dmiddle_weight[channel] = dweight;
        a.dmiddle_bias[channel] = sum;
      }
    }
    synchronize();
  }

  MVIT3_DEVICE
  Affine first_norm(int channel) const { return affine_at<T>(a.front.norm, channel); }

  MVIT3_DEVICE
  float projection(int output, int c) const {
    if (output >= m.outputs || c >= kChunk || chunk + c >= m.expanded) return 0.0f;
    const float weight = value_at<T>(a.project, int64_t(output) * m.expanded + chunk + c);
    return Parameters::kFolds ? weight * (0.5f * middle(chunk + c).scale) : weight;
  }
  MVIT3_DEVICE
  float expansion(int c, int slice, int column, bool scaled) const {
    const int input = slice * Parameters::kInputs + (Parameters::kWide ? wide_input(column) : column);
    if (column >= Parameters::kInputs || input >= m.inputs || chunk + c >= m.expanded) return 0.0f;
    const float weight = value_at<T>(a.front.expand, int64_t(chunk + c) * m.inputs + input);
    return scaled ? to_float(from_float<T>(weight)) * first_norm(chunk + c).scale : weight;
  }
  // What the rounding of a number to 16 bits leaves of it.
  static MVIT3_DEVICE
  float left_of(float value) { return value - to_float(from_float<T>(value)); }
  // A tap, or half of it, or a part of a slope of z.
  MVIT3_DEVICE
  float on_diagonal(int channel, int unit, int i) const {
    if (unit < kUnits) {
      const int pair = 2 * unit + i / 2, tap = pair < kPairs ? tap_of<Stride>(pair, i % 2) : kNoTap;
      return tap == kNoTap ? 0.0f : 0.5f * value_at<T>(a.front.depthwise, int64_t(channel) * 9 + tap);
    }
    if (i > 1 && !Parameters::kFolds) return 0.0f;
    const float value = i < 2 ? 0.5f * middle(channel).scale : middle(channel).c2;
    return i % 2 ? left_of(value) : value;
  }
  // Register `word` of the diagonals of 8 channels, of which one half is on the diagonal; both parts of c1.
  MVIT3_DEVICE
  uint32_t diagonal(int word) const {
    const int group = word / (kDiagonals / 4), in_group = word % (kDiagonals / 4), of_c1 = in_group - kConstant / 4;
    const int unit = in_group / (kUnit / 4), lane = of_c1 < 0 ? in_group % (kUnit / 4) / 4 : of_c1;
    const int channel = chunk + 8 * group + lane;
    if (lane >= 8 || channel >= m.expanded) return 0;
    if (of_c1 >= 0) return Parameters::kFolds ? pack<T>(middle(channel).c1, left_of(middle(channel).c1)) : 0;
    const float value = on_diagonal(channel, unit, in_group % 4);
    return lane % 2 ? pack<T>(0.0f, value) : pack<T>(value, 0.0f);
  }
  // Number i of the norms of a step: of the first one, of shifts of the middle one, of MiddleNorm. The slope of the
  // activation is (1 + r) / 2, and tanh takes half of what the exponential would.
  MVIT3_DEVICE
  float norms(int i) const {
    constexpr int kOfOne = Parameters::kNorms / 4;
    const int kind = i < 2 * kOfOne ? i / kOfOne : 2, in_kind = i - kind * kOfOne;
    const int channel = chunk + (kind == 1 ? in_kind / 4 * 2 + in_kind % 2 : kind == 0 ? in_kind / 2 : in_kind / 4);
    if (channel >= m.expanded) return 0.0f;
    if (kind == 1) return 0.5f * middle(channel).shift;
    if (kind == 0) return 0.5f * (i % 2 ? first_norm(channel).shift : first_norm(channel).scale);
    const Coefficients of = middle(channel);
    return i % 4 == 0 ? 0.5f * of.scale : i % 4 == 3 ? 0.0f : i % 4 == 1 ? of.c1 : of.c2;
  }

  MVIT3_DEVICE
  uint32_t word_at(int at) const {
    const auto matrix = [](int word, int pitch, const auto& value) {
      const int row = word / (pitch / 2), column = word % (pitch / 2) * 2;
      return pack<T>(value(row, column), value(row, column + 1));
    };
    constexpr int kSlice = Parameters::kExpand / 4, kScaled = Parameters::kScaled / 4,
                  kAllDiagonals = Parameters::kAllDiagonals / 4;
    const int slices = a.sizes.slices * kSlice;
    if (at < slices + kScaled)
      return matrix(at % kSlice, Parameters::kPitch, [&](int c, int column) {
        return at < slices ? expansion(c, at / kSlice, column, false) : expansion(c, 0, column, true);
      });
    const int rest = at - slices - kScaled, in_project = at - slices - Parameters::kRest / 4;
    if (in_project >= 0) return matrix(in_project, kChunkPitch, [&](int row, int c) { return projection(row, c); });
    return rest < kAllDiagonals ? diagonal(rest) : float_bits(norms(rest - kAllDiagonals));
  }

  static MVIT3_DEVICE
  uint32_t float_bits(float value) {
    union {
      float number;
      uint32_t bits;
    } both{value};
    return both.bits;
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const Maps& m = a.front.maps;
    const Blocks all(a);
    const int number = block(), of_project = number - all.steps;
    if (of_project < 0) {
      const int step = number / all.step, words = int(a.sizes.bytes / 4), at = number % all.step * kThreads + thread();
      const PackBackward self{a, m, step * kChunk};
      self.find_coefficients(number % all.step == 0);
      if (at < words)
        reinterpret_cast<uint32_t*>(const_cast<char*>(a.packed))[int64_t(step) * words + at] = self.word_at(at);
    } else if (of_project < all.project) {
      const int64_t i = int64_t(of_project) * kWarp + lane(), numbers = int64_t(m.outputs) * m.expanded;
      const float sum = sum_of_parts(a.part, a.parts, numbers + 2 * m.expanded, i, i < numbers);
      if (warp() == 0 && i < numbers) a.dproject[i] = sum;
    } else {
      const int64_t i = int64_t(of_project - all.project) * kThreads + thread();
      if (i >= int64_t(m.inputs) * m.expanded) return;
      const float weight = to_float(from_float<T>(value_at<T>(a.front.expand, i)));
      static_cast<T*>(a.scaled)[i] = from_float<T>(weight * affine_at<T>(a.front.norm, int(i / m.inputs)).scale);
    }
  }
};

}  // namespace mvit3
