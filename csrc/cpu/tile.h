// Tiles: a few rows of a feature map in float32, in a thread's second-level cache. Kernels read a tile, work on it, and
// write a tile.
#pragma once

#include <vector>

#include "gemm.h"

namespace mvit3 {

using Values = std::vector<double>;

constexpr int64_t kTileRows = 96;            // pixels of a tile of the passes that need no neighbours
constexpr int64_t kTileFloats = 128 * 1024;  // of a thread's tiles together: half of a second-level cache of 1 MiB

inline int64_t lanes_of(int64_t channels) { return round_up(channels, kLanes); }

// Floats from one row of a tile of many channels to the next: an odd number of cache lines, so that walking down a
// column meets every set of the cache.
inline int64_t tile_stride(int64_t channels) {
  return lanes_of(channels) + (lanes_of(channels) / kLanes % 2 ? 0 : kLanes);
}

// Memory of a thread that outlives the call, so that a call does not pay for fresh pages. A second request of the same
// thread hands out the same memory: ask once in a task, for all of its tiles. Slot 1 is for what the calling thread
// lends to the parts of a call.
template <int Slot = 0>
float* workspace(int64_t floats) {
  thread_local Scratch<float> memory(1);
  thread_local int64_t size = 1;
  if (size < floats) {
    memory = Scratch<float>(floats);
    size = floats;
  }
  return memory.data();
}

inline int64_t parts_for(int64_t tasks) { return std::clamp<int64_t>(tasks, 1, thread_count()); }

// The number of rows, whole blocks of them, whose tiles of `floats` floats a row fit a cache.
inline int64_t tile_rows(int64_t floats) {
  return std::clamp<int64_t>(
      kTileFloats / std::max<int64_t>(floats, 1) / kBlockRows * kBlockRows, kBlockRows, kTileRows);
}

// Calls f(part, first row, number of rows) for tiles of at most `tile` of `rows` rows.
template <typename F>
void for_each_tile(int64_t rows, int64_t parts, const F& f, int64_t tile = kTileRows) {
  for_each_part(parts, [&](int64_t part) {
    const Range range = part_range(rows, part, parts);
    for (int64_t first = range.begin; first < range.end; first += tile)
      f(part, first, std::min(tile, range.end - first));
  });
}

// The parts of a product (`for_each_block`) in tiles: f(first row, number of rows, range of panels).
template <typename E, typename F>
void for_each_block_tile(int64_t rows, const PackedWeightOf<E>& weight, const F& f) {
  for_each_block(rows, weight, [&](Range mine, Range panels) {
    for (int64_t first = mine.begin; first < mine.end; first += kTileRows)
      f(first, std::min(kTileRows, mine.end - first), panels);
  });
}

// `rows` rows of `channels` elements to rows of another type, `stride` apart, zero from the last channel to the next
// whole vector.
template <typename T, typename E>
void load_rows(const T* x, int64_t x_stride, int64_t rows, int64_t channels, E* tile, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += kLanes)
      store(tile + r * stride + c, load_some(x + r * x_stride + c, channels - c));
}

// The reverse. `past_cache` streams whole vectors; then `stream_fence` must follow.
template <typename T>
void store_rows(
    const float* tile, int64_t stride, int64_t rows, int64_t channels, T* out, int64_t out_stride,
    bool past_cache = false) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += kLanes) {
      const Vec value = load(tile + r * stride + c);
      if (past_cache)
        stream(out + r * out_stride + c, value);
      else
        store_some(out + r * out_stride + c, value, channels - c);
    }
}

// Whether `store_rows` should and can write a map of `rows` contiguous rows past the cache.
template <typename T>
bool streams(const T* out, int64_t rows, int64_t channels) {
  return channels % kLanes == 0 && is_aligned(out) && exceeds_cache(rows * channels * int64_t(sizeof(T)));
}

template <typename E>
struct RowsOf {
  const E* data;
  int64_t stride;
};

using FloatRows = RowsOf<float>;

// Rows of another type, for a product: where they lie if they are of that type (and of whole steps of it), or converted
// to `tile`.
template <typename E, typename T>
RowsOf<E> as_rows(const T* x, int64_t stride, int64_t rows, int64_t channels, E* tile) {
  if constexpr (std::is_same_v<E, T>)
    if (channels % Dot<E>::kDepth == 0) return {x, stride};
  load_rows(x, stride, rows, channels, tile, lanes_of(channels));
  return {tile, lanes_of(channels)};
}

template <typename T>
FloatRows as_floats(const T* x, int64_t stride, int64_t rows, int64_t channels, float* tile) {
  return as_rows<float>(x, stride, rows, channels, tile);
}

// Memory of a thread for rows of another type than float.
template <typename E>
E* tile_of(float* floats) {
  return reinterpret_cast<E*>(floats);
}

// One accumulator a part.
template <typename T>
std::vector<Scratch<T>> accumulators(int64_t parts, int64_t size) {
  std::vector<Scratch<T>> all;
  all.reserve(parts);
  for (int64_t i = 0; i < parts; ++i) all.emplace_back(size, T(0));
  return all;
}

template <typename T>
Values add_up(const std::vector<Scratch<T>>& parts, int64_t size) {
  Values out(size, 0.0);
  for (const auto& part : parts)
    for (int64_t i = 0; i < size; ++i) out[i] += double(part[i]);
  return out;
}

// The sums of all parts, `rows` rows of `columns` at `stride`, as a contiguous tensor's data. One pass, by rows over
// all threads.
template <typename T>
void add_up_rows(const std::vector<Scratch<float>>& parts, int64_t rows, int64_t columns, int64_t stride, T* out) {
  const int64_t ranges = count_parts(rows * columns);
  for_each_part(ranges, [&](int64_t range) {
    const Range mine = part_range(rows, range, ranges);
    for (int64_t r = mine.begin; r < mine.end; ++r)
      for (int64_t c = 0; c < columns; c += kLanes) {
        Vec sum = load_some(parts[0].data() + r * stride + c, columns - c);
        for (size_t i = 1; i < parts.size(); ++i) sum += load_some(parts[i].data() + r * stride + c, columns - c);
        store_some(out + r * columns + c, sum, columns - c);
      }
  });
}

// The same as a new tensor like the weight of this name, whose gradient the sums are; rows padded to whole vectors.
inline Tensor write_weight(
    const char* name, const std::vector<Scratch<float>>& parts, int64_t rows, int64_t columns, const Tensor& weight) {
  const Tensor out = torch::stable::new_empty(weight, weight.sizes());
  dispatch_dtype(name, out, [&](auto type) {
    add_up_rows(parts, rows, columns, lanes_of(columns), mutable_data_of<decltype(type)>(out));
  });
  return out;
}

// Rows as `add_outer` reads them: Dot<E>::kDepth rows side by side, column by column, padded with zeros to whole
// vectors of columns and whole steps of rows; value(row, column) is a vector of them. `stride` elements lie from one
// row to the next.
template <typename E, typename Value>
MVIT3_INLINE void for_each_step(int64_t rows, int64_t columns, E* out, int64_t stride, const Value& value) {
  constexpr int64_t kDepth = Dot<E>::kDepth;
  for (int64_t r = 0; r < rows; r += kDepth)
    for (int64_t c = 0; c < columns; c += kLanes)
      store_step(out + r * stride + c * kDepth, [&](int64_t k) { return r + k < rows ? value(r + k, c) : Vec(0.0f); });
}

template <typename E, typename T>
void rows_in_steps(const T* x, int64_t stride, int64_t rows, int64_t columns, E* out, int64_t out_stride) {
  for_each_step(
      rows, columns, out, out_stride, [&](int64_t r, int64_t c) { return load_some(x + r * stride + c, columns - c); });
}

// Rows in steps, `stride` elements from one step to the next.
template <typename E>
struct StepsOf {
  const E* data;
  int64_t stride;
};

// Floats of memory for steps that are an odd number of cache lines apart: a product reads few columns of all of them,
// which would else meet few sets of the cache.
inline int64_t steps_floats(int64_t rows, int64_t columns) { return (rows + 1) * tile_stride(columns); }

// Where they lie if a row is a step, else in a thread's memory.
template <int Slot, typename E>
StepsOf<E> as_steps(const RowsOf<E>& x, int64_t rows, int64_t columns) {
  if constexpr (Dot<E>::kDepth == 1) return {x.data, x.stride};
  E* tile = tile_of<E>(workspace<Slot>(steps_floats(rows, columns)));
  rows_in_steps(x.data, x.stride, rows, columns, tile, tile_stride(columns));
  return {tile, tile_stride(columns) * Dot<E>::kDepth};
}
template <int Slot, typename E>
StepsOf<E> as_steps(const StepsOf<E>& x, int64_t, int64_t) {
  return x;
}

// out (columns of a, columns of b) += (or, without `add`, =) a^T b over `count` rows, each as RowsOf or StepsOf.
// `b_columns` are whole vectors.
template <typename E, typename A = RowsOf<E>, typename B = RowsOf<E>>
void add_outer_rows(
    const A& a, int64_t a_columns, const B& b, int64_t b_columns, int64_t count, float* out, int64_t out_stride,
    bool add) {
  constexpr int64_t kDepth = Dot<E>::kDepth;
  const StepsOf<E> a_steps = as_steps<2>(a, count, a_columns), b_steps = as_steps<3>(b, count, b_columns);
  add_outer(
      a_steps.data, a_steps.stride, a_columns, b_steps.data, b_steps.stride, b_columns, (count + kDepth - 1) / kDepth,
      out, out_stride, add);
}

// Sums of products a^T b over the rows of tiles, one a part: the gradient of a weight. The first product of a part is
// written, not added, so that nothing is cleared.
template <typename E>
class OuterSumsOf {
 public:
  // `columns` of a, rows of `stride` floats for the columns of b, padded to whole vectors.
  OuterSumsOf(int64_t parts, int64_t columns, int64_t stride)
      : columns_(columns), stride_(stride), begun_(parts, false) {
    for (int64_t i = 0; i < parts; ++i) sums_.emplace_back(columns * stride);
  }

  template <typename A = RowsOf<E>, typename B = RowsOf<E>>
  void add(int64_t part, const A& a, const B& b, int64_t count) {
    add_outer_rows<E, A, B>(a, columns_, b, stride_, count, sums_[part].data(), stride_, begun_[part]);
    begun_[part] = true;
  }

  // Of all parts, after the last product.
  const std::vector<Scratch<float>>& parts() {
    for (size_t i = 0; i < sums_.size(); ++i)
      if (!begun_[i]) std::fill_n(sums_[i].data(), columns_ * stride_, 0.0f);
    return sums_;
  }

 private:
  int64_t columns_, stride_;
  std::vector<Scratch<float>> sums_;
  std::vector<char> begun_;
};

using OuterSums = OuterSumsOf<float>;

// Whether the map is cut into whole patches.
inline void check_patches(const std::string& name, const Tensor& map, int64_t patch_height, int64_t patch_width) {
  MVIT3_CHECK(
      patch_height >= 1 && patch_width >= 1, "patch_height and patch_width must be positive, got ", patch_height,
      " and ", patch_width);
  MVIT3_CHECK(
      map.size(1) % patch_height == 0 && map.size(2) % patch_width == 0, name, " of height ", map.size(1),
      " and width ", map.size(2), " must be a multiple of (patch_height, patch_width), got (", patch_height, ", ",
      patch_width, ")");
  const int64_t most = int64_t(1) << 20;  // of a map without pixels, which has patches of any size
  MVIT3_CHECK(patch_height <= most && patch_width <= most, "patch_height and patch_width must be at most ", most);
}

// Taps further from the centre than the map is large meet zeros alone, however far they are.
inline int64_t nearest_dilation(int64_t dilation, int64_t height, int64_t width) {
  return std::min(dilation, std::max({height, width, int64_t(1)}));
}

// The number of outputs of a weight (outputs, inputs), with or without the sizes of a convolution's taps behind it.
inline int64_t outputs_of(const std::string& name, const Tensor& weight) {
  MVIT3_CHECK(
      (weight.dim() == 2 || weight.dim() == 4) && weight.size(0) >= 1, name,
      " must have shape (outputs, inputs), with or without the sizes of taps behind it, got ", text(weight.sizes()));
  return weight.size(0);
}

// A weight of any storage type as float32 (outputs, inputs): where it lies, or a copy.
class FloatMatrix {
 public:
  FloatMatrix(const std::string& name, const Tensor& weight, int64_t outputs, int64_t inputs)
      : dense_(torch::stable::contiguous(weight)),
        copy_(weight.scalar_type() == ScalarType::Float ? 0 : outputs * inputs) {
    MVIT3_CHECK(weight.is_cpu(), name, " must be on the CPU");
    MVIT3_CHECK(
        outputs_of(name, weight) == outputs && weight.numel() == outputs * inputs, name, " must have ", outputs,
        " outputs of ", inputs, " values, got shape ", text(weight.sizes()));
    dispatch_dtype(name, dense_, [&](auto type) {
      using T = decltype(type);
      if constexpr (std::is_same_v<T, float>)
        data_ = data_of<float>(dense_);
      else {
        const int64_t count = outputs * inputs;
        const T* source = data_of<T>(dense_);
        for (int64_t i = 0; i < count; i += kLanes)
          store_some(copy_.data() + i, load_some(source + i, count - i), count - i);
        data_ = copy_.data();
      }
    });
  }

  const float* data() const { return data_; }

 private:
  Tensor dense_;
  Scratch<float> copy_;
  const float* data_ = nullptr;
};

// A vector parameter of any storage type as float32, padded with zeros to whole vectors; all zeros where there is none.
inline Scratch<float> read_vector(const std::string& name, const std::optional<Tensor>& t, int64_t channels) {
  Scratch<float> out(std::max<int64_t>(lanes_of(channels), 1), 0.0f);
  if (!t) return out;
  const Values values = read_channels(name, *t, channels);
  std::transform(values.begin(), values.end(), out.data(), [](double v) { return float(v); });
  return out;
}

}  // namespace mvit3
