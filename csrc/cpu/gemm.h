// Matrix products on the rows of feature maps: the core that the 1x1 convolutions and linear maps share.
//
// A weight (outputs, inputs) is packed into panels of a few vectors of outputs, each panel [inputs][outputs of the
// panel], so that a micro-kernel streams it from the first-level cache while a block of rows accumulates in registers.
// What happens to the finished sums is up to the caller: `emit(row, output, sums)` is inlined, so a norm, an activation
// or a residual costs no pass. E is the type of both operands (dot.h): float, or bfloat16 in pairs of inputs where the
// CPU multiplies it.
#pragma once

#include "dot.h"
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

// Writes a vector of one step: at(k) is the vector of neighbour k.
template <typename E, typename At>
MVIT3_INLINE void store_step(E* out, const At& at) {
  Vec values[Dot<E>::kDepth];
  for (int64_t k = 0; k < Dot<E>::kDepth; ++k) values[k] = at(k);
  Dot<E>::store(out, values);
}

// A weight in panels, padded with zeros to whole vectors of outputs and whole steps of inputs.
template <typename E>
class PackedWeightOf {
 public:
  // `at(output, input)` reads the weight.
  template <typename At>
  PackedWeightOf(int64_t outputs, int64_t inputs, const At& at) : PackedWeightOf(outputs, inputs) {
    for_each_panel([&](int64_t first, int64_t width, E* out) {
      constexpr int64_t kBlock = 16;  // of inputs: what is written stays in the first-level cache
      for (int64_t begin = 0; begin < depth_; begin += kBlock)
        for (int64_t o = 0; o < width; ++o)
          for (int64_t i = begin; i < std::min(begin + kBlock, depth_); ++i)
            out[(i / kDepth * width + o) * kDepth + i % kDepth] =
                from_float<E>(first + o < outputs_ && i < inputs_ ? at(first + o, i) : 0.0f);
    });
  }

  // The weight w (outputs, inputs), its rows `stride` apart; with `scale`, padded to whole vectors, column c times
  // scale[c].
  static PackedWeightOf rows(
      const float* w, int64_t outputs, int64_t inputs, int64_t stride, const float* scale = nullptr) {
    PackedWeightOf packed(outputs, inputs);
    packed.for_each_panel([&](int64_t first, int64_t width, E* out) {
      for (int64_t i = 0; i < inputs; i += kLanes)  // what is written stays in the first-level cache
        for (int64_t o = 0; o < width; o += kLanes) {
          alignas(64) float square[kLanes * kLanes];
          for (int64_t r = 0; r < kLanes; ++r) {
            Vec row = first + o + r < outputs ? load_some(w + (first + o + r) * stride + i, inputs - i) : Vec(0.0f);
            store(square + r * kLanes, scale ? row * load(scale + i) : row);
          }
          transpose(square);
          for (int64_t r = 0; r < std::min<int64_t>(kLanes, packed.depth_ - i); r += kDepth)
            store_step(out + (i + r) * width + o * kDepth, [&](int64_t k) { return load(square + (r + k) * kLanes); });
        }
    });
    return packed;
  }

  // The transpose of w (inputs, outputs), its rows `stride` apart; `scale` as above.
  static PackedWeightOf columns(
      const float* w, int64_t outputs, int64_t inputs, int64_t stride, const float* scale = nullptr) {
    PackedWeightOf packed(outputs, inputs);
    packed.for_each_panel([&](int64_t first, int64_t width, E* out) {
      for (int64_t i = 0; i < inputs; i += kDepth)
        for (int64_t o = 0; o < width; o += kLanes)
          store_step(out + i * width + o * kDepth, [&](int64_t k) {
            const Vec row =
                i + k < inputs ? load_some(w + (i + k) * stride + first + o, outputs - first - o) : Vec(0.0f);
            return scale ? row * load(scale + first + o) : row;
          });
    });
    return packed;
  }

  int64_t outputs() const { return outputs_; }
  int64_t inputs() const { return inputs_; }
  int64_t steps() const { return depth_ / kDepth; }
  Range panels() const { return {0, (outputs_ + kPanel - 1) / kPanel}; }
  // Outputs of some panels, padded to whole vectors.
  int64_t lanes(Range panels) const {
    return std::min(panels.end * kPanel, round_up(outputs_, kLanes)) - panels.begin * kPanel;
  }

  // The panel that begins with output `first`, a multiple of kPanel, and its number of vectors.
  const E* panel(int64_t first) const { return data_.data() + first * depth_; }
  int64_t panel_vecs(int64_t first) const {
    return std::min<int64_t>(kPanelVecs, (outputs_ - first + kLanes - 1) / kLanes);
  }

 private:
  static constexpr int64_t kDepth = Dot<E>::kDepth;

  PackedWeightOf(int64_t outputs, int64_t inputs)
      : outputs_(outputs), inputs_(inputs), depth_(round_up(inputs, kDepth)),
        data_(round_up(outputs, kLanes) * depth_) {}

  // f(first output, width, data) for every panel, over all threads.
  template <typename F>
  void for_each_panel(const F& f) {
    const int64_t panels = this->panels().size(),
                  parts = std::clamp<int64_t>(panels, 1, count_parts(outputs_ * inputs_));
    for_each_part(parts, [&](int64_t part) {
      const Range range = part_range(panels, part, parts);
      for (int64_t first = range.begin * kPanel; first < range.end * kPanel; first += kPanel)
        f(first, panel_vecs(first) * kLanes, data_.data() + first * depth_);
    });
  }

  int64_t outputs_, inputs_, depth_;  // depth: the inputs, padded
  Scratch<E> data_;
};

using PackedWeight = PackedWeightOf<float>;

// Two operands of a block, with Dot<E>::kDepth neighbours at each place: a(row, k) = a[row * row_step + k * step], b(k,
// vector) = b[k * b_step + vector * kLanes * kDepth]. One of row_step and step is kDepth: either the reduction runs
// along the rows of a feature map, or the rows of the block do. `ahead` elements behind b is what the products after
// these ones read as b: a weight that no call touches between two calls of an engine comes from far, so it is fetched
// while others are multiplied.
template <typename E>
struct OperandsOf {
  const E *a, *b;
  int64_t row_step, step, b_step, depth, ahead = 0;
};

using Operands = OperandsOf<float>;

// Whether such products run in matrix registers: those of bfloat16 whose reduction runs along the rows of a.
template <typename E>
MVIT3_INLINE bool in_registers(const OperandsOf<E>& in) {
  if constexpr (kMultipliesBFloat16 && std::is_same_v<E, BFloat16>)
    return in.step == Dot<E>::kDepth && amx::Share::open();
  return false;
}

// Writes (or, with `add`, adds) the product of a block of 1..kBlockRows rows, 1..amx::kRows in matrix registers, and
// 1..kPanelVecs vectors to out[row * out_stride + column].
template <typename E>
void multiply_block(int64_t rows, int64_t vecs, const OperandsOf<E>& in, float* out, int64_t out_stride, bool add);

// The same for a sum of any length, cut: a sum of sums errs less than a running one, and a piece of a panel stays in
// cache.
template <typename E, int64_t kLongest = 512>
void multiply_long(int64_t rows, int64_t vecs, const OperandsOf<E>& in, float* out, int64_t out_stride, bool add) {
  if (in.depth <= kLongest) return multiply_block(rows, vecs, in, out, out_stride, add);  // no division a block
  const int64_t pieces = (in.depth + kLongest - 1) / kLongest;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const Range range = part_range(in.depth, piece, pieces);
    const int64_t begin = range.begin * in.b_step,
                  ahead = piece + 1 < pieces ? range.size() * in.b_step : in.ahead - begin;
    const OperandsOf<E> part{
        in.a + range.begin * in.step, in.b + begin, in.row_step, in.step, in.b_step, range.size(), ahead};
    multiply_block(rows, vecs, part, out, out_stride, add || piece > 0);
  }
}

// All blocks of rows against one panel of `vecs` vectors: f(first row, number of rows, operands of the block).
template <typename E, typename F>
MVIT3_INLINE void for_each_block_of(int64_t rows, OperandsOf<E> in, const F& f) {
  const E* a = in.a;
  if (in_registers(in)) {
    for (int64_t first = 0; first < rows; first += amx::kRows) {
      in.a = a + first * in.row_step;
      f(first, std::min(amx::kRows, rows - first), in);
    }
    return;
  }
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const Range range = part_range(rows, block, blocks);  // blocks of almost equal size: no short last one
    in.a = a + range.begin * in.row_step;
    f(range.begin, range.size(), in);
  }
}

// out[row * out_stride + column] = (or, with `add`, +=) the product of all rows and one panel of `vecs` vectors.
template <typename E = float, int64_t kLongest = 512>
void multiply_panel_into(
    int64_t rows, int64_t vecs, const OperandsOf<E>& in, float* out, int64_t out_stride, bool add) {
  for_each_block_of(rows, in, [&](int64_t first, int64_t count, const OperandsOf<E>& block) {
    multiply_long<E, kLongest>(count, vecs, block, out + first * out_stride, out_stride, add);
  });
}

// emit(row, column, sums) for every row and vector of a panel that begins with `column`.
template <typename E = float, typename Emit>
void multiply_panel(int64_t rows, int64_t vecs, const OperandsOf<E>& in, int64_t column, const Emit& emit) {
  constexpr int64_t kMost = kMultipliesBFloat16 && std::is_same_v<E, BFloat16> ? amx::kRows : kBlockRows;
  alignas(64) float sums[kMost * kPanel];  // in the first-level cache: what becomes of the sums is compiled once,
                                           // not once a block size
  for_each_block_of(rows, in, [&](int64_t first, int64_t count, const OperandsOf<E>& block) {
    multiply_long(count, vecs, block, sums, kPanel, false);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t v = 0; v < vecs; ++v) emit(first + r, column + v * kLanes, load(sums + r * kPanel + v * kLanes));
  });
}

// Calls f(first output, number of vectors) for every panel of `panels`.
template <typename E, typename F>
MVIT3_INLINE void for_each_panel(const PackedWeightOf<E>& weight, Range panels, const F& f) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) f(panel * kPanel, weight.panel_vecs(panel * kPanel));
}

// The operands of rows x, `stride` apart, and of the panel of `vecs` vectors that begins with `output`.
template <typename E>
OperandsOf<E> operands(const E* x, int64_t stride, const PackedWeightOf<E>& weight, int64_t output, int64_t vecs) {
  constexpr int64_t kDepth = Dot<E>::kDepth;
  const int64_t b_step = vecs * kLanes * kDepth, steps = weight.steps();
  return {x, weight.panel(output), stride, kDepth, b_step, steps, steps * b_step};
}

// emit(row, output, sums) for every row 0..rows-1 and vector of outputs: sums = x[row] W^T. Row r begins at x + r *
// stride, and is readable to a whole step.
template <typename E, typename Emit>
void multiply(
    const E* x, int64_t stride, int64_t rows, const PackedWeightOf<E>& weight, Range panels, const Emit& emit) {
  for_each_panel(weight, panels, [&](int64_t output, int64_t vecs) {
    multiply_panel(rows, vecs, operands(x, stride, weight, output, vecs), output, emit);
  });
}

template <typename E, typename Emit>
void multiply(const E* x, int64_t stride, int64_t rows, const PackedWeightOf<E>& weight, const Emit& emit) {
  multiply(x, stride, rows, weight, weight.panels(), emit);
}

// out[row * out_stride + output] = (or, with `add`, +=) x[row] W^T. Rows of out are padded to whole vectors.
template <typename E>
void multiply_into(
    const E* x, int64_t stride, int64_t rows, const PackedWeightOf<E>& weight, Range panels, float* out,
    int64_t out_stride, bool add = false) {
  for_each_panel(weight, panels, [&](int64_t output, int64_t vecs) {
    multiply_panel_into(rows, vecs, operands(x, stride, weight, output, vecs), out + output, out_stride, add);
  });
}

template <typename E>
void multiply_into(
    const E* x, int64_t stride, int64_t rows, const PackedWeightOf<E>& weight, float* out, int64_t out_stride,
    bool add = false) {
  multiply_into(x, stride, rows, weight, weight.panels(), out, out_stride, add);
}

// out (columns of a, columns of b) += (or, without `add`, =) a^T b over `steps` steps of rows, each of Dot<E>::kDepth
// rows side by side, column by column (`rows_in_steps`). Strides are those of a and b from step to step. Rows of b and
// of out are padded to whole vectors.
template <typename E>
void add_outer(
    const E* a, int64_t a_stride, int64_t a_columns, const E* b, int64_t b_stride, int64_t b_columns, int64_t steps,
    float* out, int64_t out_stride, bool add = true) {
  constexpr int64_t kDepth = Dot<E>::kDepth;
  for (int64_t column = 0; column < b_columns; column += kPanel) {
    const int64_t vecs = std::min<int64_t>(kPanelVecs, (b_columns - column + kLanes - 1) / kLanes);
    multiply_panel_into<E>(
        a_columns, vecs, {a, b + column * kDepth, kDepth, a_stride, b_stride, steps}, out + column, out_stride, add);
  }
}

// How a product is cut over threads: into row_parts ranges of rows, each into `columns` ranges of panels. The longest
// part decides, and between cuts that are about as good the one with fewer ranges of panels. A map of few rows is so
// cut over panels, and every thread has work and reads only its part of the weight.
struct BlockCut {
  int64_t rows, panels, lanes, row_parts, columns = 1;  // lanes: outputs, padded to whole vectors

  template <typename E>
  BlockCut(int64_t rows, const PackedWeightOf<E>& weight)
      : rows(rows), panels(weight.panels().size()), lanes(weight.lanes(weight.panels())),
        row_parts(spread_parts(rows * weight.inputs() * weight.outputs(), 1 << 16)) {
    const int64_t threads = row_parts;
    int64_t least = threads > 1 ? longest(threads, 1) : 0;
    for (int64_t columns = 2; columns <= std::min(panels, threads); ++columns) {
      const int64_t cost = longest(threads / columns, columns);
      if (cost * 51 > least * 50) continue;
      this->columns = columns;
      row_parts = threads / columns;
      least = cost;
    }
    row_parts = std::min(row_parts, std::max<int64_t>(rows, 1));
  }

  int64_t parts() const { return row_parts * columns; }
  Range rows_of(int64_t part) const { return part_range(rows, part / columns, row_parts); }
  Range panels_of(int64_t part) const { return part_range(panels, part % columns, columns); }

  template <typename E>
  Region operations(const PackedWeightOf<E>& weight) const {
    return operations_of(
        parts(), [&](int64_t part) { return rows_of(part).size() * weight.lanes(panels_of(part)) * weight.inputs(); });
  }

 private:
  // The cost of the longest part, rows times outputs. A block of rows costs about two rows more than its own, and a
  // weight is not there before a whole block could be multiplied.
  int64_t longest(int64_t row_parts, int64_t columns) const {
    const int64_t most = (rows + row_parts - 1) / row_parts, blocks = (most + kBlockRows - 1) / kBlockRows;
    return (std::max<int64_t>(most, kBlockRows) + 2 * blocks) *
           std::min((panels + columns - 1) / columns * kPanel, lanes);
  }
};

// f(range of rows, range of panels) once a part of a product, all parts in parallel.
template <typename E, typename F>
void for_each_block(int64_t rows, const PackedWeightOf<E>& weight, const F& f) {
  const BlockCut cut(rows, weight);
  for_each_part(cut.parts(), [&](int64_t part) {
    const Range mine = cut.rows_of(part), panels = cut.panels_of(part);
    if (mine.size() > 0 && panels.size() > 0) f(mine, panels);
  });
}

}  // namespace mvit3
