// Matrix products on the rows of feature maps: the core that the 1x1 convolutions and linear maps share.
//
// A weight (outputs, inputs) is packed into panels of a few vectors of outputs, each panel [inputs][outputs of the panel], so that a
// micro-kernel streams it from the first-level cache while a block of rows accumulates in registers. What happens to the finished
// sums is up to the caller: `emit(row, output, sums)` is inlined, so a norm, an activation or a residual costs no pass.
#pragma once

#include <utility>

#include "parallel.h"
#include "tensor.h"

namespace mvit3 {

// Accumulators in registers: kBlockRows x kPanelVecs vectors, with room for a panel's vectors and one broadcast.
#if defined(__AVX512F__)
constexpr int kPanelVecs = 2, kBlockRows = 12;  // 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kPanelVecs = 1, kBlockRows = 6;  // 12 of 16, two to a vector
#else
constexpr int kPanelVecs = 1, kBlockRows = 3;  // 12 of 16 (SSE) or 32 (NEON), four to a vector
#endif
constexpr int64_t kPanel = kPanelVecs * kLanes;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A weight in panels, padded with zero outputs to whole vectors.
class PackedWeight {
 public:
  // `at(output, input)` reads the weight.
  template <typename At>
  PackedWeight(int64_t outputs, int64_t inputs, const At& at) : PackedWeight(outputs, inputs) {
    for_each_panel([&](int64_t first, int64_t width, float* out) {
      constexpr int64_t kBlock = 16;  // of inputs: what is written stays in the first-level cache
      for (int64_t begin = 0; begin < inputs_; begin += kBlock)
        for (int64_t o = 0; o < width; ++o)
          for (int64_t i = begin; i < std::min(begin + kBlock, inputs_); ++i) out[i * width + o] = first + o < outputs_ ? at(first + o, i) : 0.0f;
    });
  }

  // The weight w (outputs, inputs), its rows `stride` apart.
  static PackedWeight rows(const float* w, int64_t outputs, int64_t inputs, int64_t stride) {
    return PackedWeight(outputs, inputs, [=](int64_t o, int64_t i) { return w[o * stride + i]; });
  }

  // The transpose of w (inputs, outputs), its rows `stride` apart.
  static PackedWeight columns(const float* w, int64_t outputs, int64_t inputs, int64_t stride) {
    PackedWeight packed(outputs, inputs);
    packed.for_each_panel([&](int64_t first, int64_t width, float* out) {
      for (int64_t i = 0; i < inputs; ++i)
        for (int64_t o = 0; o < width; o += kLanes) store(out + i * width + o, load_some(w + i * stride + first + o, outputs - first - o));
    });
    return packed;
  }

  int64_t outputs() const { return outputs_; }
  int64_t inputs() const { return inputs_; }

  // The panel that begins with output `first`, a multiple of kPanel, and its number of vectors.
  const float* panel(int64_t first) const { return data_.data() + first * inputs_; }
  int64_t panel_vecs(int64_t first) const { return std::min<int64_t>(kPanelVecs, (outputs_ - first + kLanes - 1) / kLanes); }

 private:
  PackedWeight(int64_t outputs, int64_t inputs) : outputs_(outputs), inputs_(inputs), data_(round_up(outputs, kLanes) * inputs) {}

  // f(first output, width, data) for every panel, over all threads.
  template <typename F>
  void for_each_panel(const F& f) {
    const int64_t panels = (outputs_ + kPanel - 1) / kPanel, parts = std::min(panels, count_parts(outputs_ * inputs_));
    for_each_part(std::max<int64_t>(parts, 1), [&](int64_t part) {
      const Range range = part_range(panels, part, parts);
      for (int64_t first = range.begin * kPanel; first < range.end * kPanel; first += kPanel)
        f(first, panel_vecs(first) * kLanes, data_.data() + first * inputs_);
    });
  }

  int64_t outputs_, inputs_;
  Scratch<float> data_;
};

// Two operands of a block: a(row, k) = a[row * row_step + k * step], b(k, vector) = b[k * b_step + vector * kLanes].
struct Operands {
  const float *a, *b;
  int64_t row_step, step, b_step, depth;
};

template <int Rows, int Vecs, typename Emit>
MVIT3_INLINE void multiply_block(const Operands& in, int64_t row, int64_t column, const Emit& emit) {
  Vec sums[Rows][Vecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) sums[r][v] = 0.0f;
  const float *a = in.a, *b = in.b;
  for (int64_t k = 0; k < in.depth; ++k, a += in.step, b += in.b_step) {
    Vec w[Vecs];
    for (int v = 0; v < Vecs; ++v) w[v] = load(b + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Vec value = a[r * in.row_step];
      for (int v = 0; v < Vecs; ++v) sums[r][v] = fma(value, w[v], sums[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) emit(row + r, column + v * kLanes, sums[r][v]);
}

template <int Vecs, typename Emit, int... Less>
void multiply_sized(int64_t rows, const Operands& in, int64_t row, int64_t column, const Emit& emit, std::integer_sequence<int, Less...>) {
  ((rows == Less + 1 ? multiply_block<Less + 1, Vecs>(in, row, column, emit) : void()), ...);  // one instance for each number of rows
}

// All blocks of rows against one panel of `vecs` vectors.
template <typename Emit>
void multiply_panel(int64_t rows, int64_t vecs, Operands in, int64_t column, const Emit& emit) {
  constexpr std::make_integer_sequence<int, kBlockRows> sizes;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const float* a = in.a;
  for (int64_t block = 0; block < blocks; ++block) {
    const Range range = part_range(rows, block, blocks);  // blocks of almost equal size: no short last one
    in.a = a + range.begin * in.row_step;
    if (vecs == kPanelVecs)
      multiply_sized<kPanelVecs>(range.size(), in, range.begin, column, emit, sizes);
    else
      multiply_sized<1>(range.size(), in, range.begin, column, emit, sizes);
  }
}

// emit(row, output, sums) for every row 0..rows-1 and vector of outputs: sums = x[row] W^T. Row r begins at x + r * stride.
template <typename Emit>
void multiply(const float* x, int64_t stride, int64_t rows, const PackedWeight& weight, const Emit& emit) {
  for (int64_t output = 0; output < weight.outputs(); output += kPanel) {
    const int64_t vecs = weight.panel_vecs(output);
    multiply_panel(rows, vecs, {x, weight.panel(output), stride, 1, vecs * kLanes, weight.inputs()}, output, emit);
  }
}

// out (columns of a, columns of b) += a^T b over `rows` rows. Rows of b and of out are padded to whole vectors.
inline void add_outer(
    const float* a, int64_t a_stride, int64_t a_columns, const float* b, int64_t b_stride, int64_t b_columns, int64_t rows, float* out, int64_t out_stride) {
  for (int64_t column = 0; column < b_columns; column += kPanel) {
    const int64_t vecs = std::min<int64_t>(kPanelVecs, (b_columns - column + kLanes - 1) / kLanes);
    multiply_panel(a_columns, vecs, {a, b + column, 1, a_stride, b_stride, rows}, column, [&](int64_t row, int64_t at, Vec sums) {
      float* p = out + row * out_stride + at;
      store(p, load(p) + sums);
    });
  }
}

}  // namespace mvit3
