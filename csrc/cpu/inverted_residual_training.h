// inverted_residual in training: what its forward and its backward pass share.
//
// The block with its intermediate maps, each named once and everywhere so:
//   e = x expand^T          (B, H, W, expanded)
//   z = depthwise * act(norm(e))   (B, H', W', expanded), the depth-wise map
//   p = act(norm(z)) project^T     (B, H', W', outputs)
//   y = norm(p), + x where the block has a skip connection
//
// There are two ways through, which share all passes over z:
//   stored      e is written once; its sums, and later those of its gradient, are taken from tiles in cache.
//   recomputed  e lives in a few rows of second-level cache and never reaches memory. Its statistics come from the
//               moments of x (identity A of the design); backward makes its rows again and corrects the gradient of x
//               instead of that of e (identity B).
// Recomputing costs 2 * inputs operations for each element of e and saves reading and writing e and its gradient, so
// it pays where there are few inputs. Kept for backward are x, z, p, and e or the moments of x.
//
// Rows are cut into tiles, images into ranges of rows, the same way for a fixed number of threads: results repeat from
// run to run.
#pragma once

#include "inverted_residual.h"

namespace mvit3::inverted_residual {

using Shape = InvertedResidualShape;

struct Block {
  Shape shape;
  ConvNorm expand, depthwise, project;

  template <typename E>
  PackedWeightOf<E> expand_weight() const {
    return expand.pack<E>(shape.expanded, shape.inputs);
  }
  template <typename E>
  PackedWeightOf<E> project_weight() const {
    return project.pack<E>(shape.outputs, shape.expanded);
  }
};

// What forward computes and backward reads: of e and the moments of x only one is there.
template <typename T>
struct Kept {
  T *e, *z, *p;
  float* mean;
  double* covariance;

  bool stored() const { return e != nullptr; }
};

// Into how many ranges the rows of an image are cut: as few as give all threads about the same, for rows around a
// border are made twice.
inline int64_t ranges_of(const Shape& s, int64_t height) {
  const int64_t threads = torch::stable::get_num_threads(), most = std::max<int64_t>(height / 4, 1);
  int64_t ranges = 1;
  while (ranges < std::min(threads, most) && round_up(s.batch * ranges, threads) * 9 > s.batch * ranges * 10) ++ranges;
  return ranges;
}

// Rows of a tile through a function of value and channel, in place or not.
template <typename F>
MVIT3_INLINE void for_each_vec(int64_t rows, int64_t channels, const F& f) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += kLanes) f(r, c);
}

// Brings `bytes` of memory into the second-level cache in `steps` steps, which a product takes in turns with its own
// work: the product waits for arithmetic, what follows it for memory.
class Ahead {
 public:
  template <typename T>
  Ahead(const T* first, int64_t count, int64_t steps)
      : next_(reinterpret_cast<const char*>(first)), end_(reinterpret_cast<const char*>(first + count)),
        step_(round_up((end_ - next_ + steps - 1) / steps, kLine)) {}

  MVIT3_INLINE void step() {
    for (const char* last = std::min(next_ + step_, end_); next_ < last; next_ += kLine) prefetch(next_);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *next_, *end_;
  int64_t step_;
};

// The number of elements of the tile that follows rows first..first+count-1.
inline int64_t next_tile(int64_t rows, int64_t first, int64_t count, int64_t channels) {
  return std::min(kTileRows, rows - first - count) * channels;
}

// The covariance of the channels of x as float32 can hold it: of the channels in units of their own, powers of two
// about their deviation. The unit is 1 in all but extreme cases, where a product of two values of the channel, as of
// 1e19, or the sum of many would overflow.
class Covariance {
 public:
  // The diagonal of a covariance, one value every `step`.
  Covariance(const double* variance, int64_t channels, int64_t step = 1) : units_(lanes_of(channels), 1.0f) {
    for (int64_t c = 0; c < channels; ++c)
      if (std::isfinite(variance[c * step]) && variance[c * step] > 0x1p80)
        units_[c] = float(std::exp2(std::min(std::ilogb(variance[c * step]) / 2, 126)));
  }

  float unit(int64_t c) const { return units_[c]; }
  float largest() const { return *std::max_element(units_.begin(), units_.end()); }

  // The rows of a weight in these units.
  Scratch<float> scaled(const float* weight, int64_t count, int64_t channels) const {
    Scratch<float> out(count * channels);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < channels; ++c) out[r * channels + c] = weight[r * channels + c] * units_[c];
    return out;
  }

  // The covariance itself, in float64, as the operand of a product.
  PackedWeight pack(const double* covariance, int64_t channels) const {
    return PackedWeight(channels, channels, [&](int64_t i, int64_t j) {
      return float(covariance[i * channels + j] / (double(units_[i]) * units_[j]));
    });
  }

 private:
  std::vector<float> units_;
};

// The gradients of the parameters: of the weights in tensors of their dtypes, of the three norms in float64.
struct Gradients {
  Tensor expand, depthwise, project;
  Values norm_weights[3], norm_biases[3];
};

// Maps that backward needs memory for: the gradients of the outputs of the first norm, where e is stored, and of the
// second one; of the shapes of e and z.
template <typename T>
struct NormGradients {
  T *of_e, *of_z;
};

// Both for float, BFloat16 and Float16. `forward` also sets the statistics of the block's norms.
template <typename T>
void forward(Block& b, int64_t act, const T* x, T* y, const Kept<T>& kept);
template <typename T>
void backward(
    const Block& b, int64_t act, const T* dy, const T* x, const Kept<T>& kept, const NormGradients<T>& memory, T* dx,
    Gradients& out);

}  // namespace mvit3::inverted_residual
