// Batch normalisation, activation and residual on NHWC maps. Meaning: mvit3_kernels/ops/batch_norm_act/reference.py.
//
// Memory is the limit, so a pass is one sequential walk. A map is M rows of C channels; rows are grouped into
// "periods", the shortest run of rows that is a whole number of cache lines, so that any C is handled by full vectors
// and only the last, partial period is copied out. Per-channel values are repeated along one period. Within a tile of
// periods the loops run down the columns, which keeps parameters and accumulators in registers. The second pass walks
// against the first: what was read last is still in the cache.

#include <numeric>

#include "../op_arguments.h"
#include "norm.h"

namespace mvit3 {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kTileBytes = 32768;

// A map as periods: `full` of them and `tail` elements of one more.
struct Periods {
  int64_t rows, channels, length, full, tail, tile, parts;

  Periods(const Tensor& x, int64_t element_size) {
    channels = x.size(x.dim() - 1);
    rows = channels ? x.numel() / channels : 0;
    length = std::lcm(std::max<int64_t>(channels, 1), kLine / element_size);
    full = x.numel() / length;
    tail = x.numel() % length;
    tile = std::clamp<int64_t>(kTileBytes / (length * element_size), 8, 256);
    parts = count_parts(x.numel(), 1 << 16);
  }

  Range part(int64_t index) const { return part_range(full, index, parts); }

  // f(first period, number of periods, elements from here to the tile that comes next) for each tile of a part.
  template <typename F>
  void for_each_tile(int64_t index, bool descending, const F& f) const {
    const Range range = part(index);
    const int64_t tiles = (range.size() + tile - 1) / tile;
    const int64_t ahead = (descending ? -tile : tile) * length;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = range.begin + (descending ? tiles - 1 - i : i) * tile;
      f(first, std::min(tile, range.end - first), ahead);
    }
  }
};

// `values`, one per channel, repeated along a period.
void repeat(const std::vector<double>& values, const Periods& p, float* out) {
  if (p.channels == 0) return;
  for (int64_t i = 0; i < p.length; i += p.channels) std::copy(values.begin(), values.end(), out + i);
}

// One period that holds the tail of `x`, zeros behind it.
template <typename T>
Scratch<T> padded_tail(const T* x, const Periods& p) {
  Scratch<T> out(p.length, T{});
  std::copy_n(x + p.full * p.length, p.tail, out.data());
  return out;
}

// Sums over the periods of one part, in float64, of each lane's distance to its pivot (its first value) and of the
// distance squared. The pivot keeps the sums small, so that a mean of many deviations cancels without harm and a
// constant channel has variance 0.
struct LaneSums {
  Scratch<double> pivot, sum, square;

  explicit LaneSums(int64_t length) : pivot(length), sum(length, 0.0), square(length, 0.0) {}
};

template <typename T>
void moments_tile(const T* x, int64_t count, int64_t length, int64_t ahead, LaneSums& sums) {
  for (int64_t col = 0; col < length; col += kLanes) {
    const RunMoments run = RunMoments::in_float64(count, load(sums.pivot.data() + col), [&](int64_t i) {
      prefetch(x + col + i * length + ahead);
      return load(x + col + i * length);
    });
    accumulate(sums.sum.data() + col, run.sum);
    accumulate(sums.square.data() + col, run.square);
  }
}

template <typename T>
void moments_part(const T* x, const Periods& p, int64_t part, LaneSums& sums) {
  const Range range = p.part(part);
  if (range.size() == 0) return;
  for (int64_t i = 0; i < p.length; ++i) {
    const float first = to_float(x[range.begin * p.length + i]);
    sums.pivot[i] = std::isfinite(first) ? first : 0.0f;
  }
  p.for_each_tile(part, true, [&](int64_t first, int64_t count, int64_t ahead) {
    moments_tile(x + first * p.length, count, p.length, ahead, sums);
  });
}

// Mean and biased variance of each channel: of all parts and lanes and the elements of the tail.
template <typename T>
void combine_moments(
    const T* x, const Periods& p, const std::vector<LaneSums>& parts, std::vector<double>& mean,
    std::vector<double>& var) {
  for (int64_t c = 0; c < p.channels; ++c) {
    Moments all;
    for (int64_t part = 0; part < p.parts; ++part) {
      const double count = double(p.part(part).size());
      const LaneSums& sums = parts[part];
      for (int64_t lane = c; lane < p.length; lane += p.channels)
        all.join(Moments::about(sums.pivot[lane], count, sums.sum[lane], sums.square[lane]));
    }
    for (int64_t lane = c; lane < p.tail; lane += p.channels) all.join({1, to_float(x[p.full * p.length + lane]), 0});
    mean[c] = all.mean;
    var[c] = all.variance();
  }
}

template <typename T>
void batch_moments(const T* x, const Periods& p, std::vector<double>& mean, std::vector<double>& var) {
  std::vector<LaneSums> parts;
  parts.reserve(p.parts);
  for (int64_t i = 0; i < p.parts; ++i) parts.emplace_back(p.length);
  for_each_part(p.parts, [&](int64_t part) { moments_part(x, p, part, parts[part]); });
  combine_moments(x, p, parts, mean, var);
}

// Per-channel values along a period: pre-activation = (x - mean) * scale + shift.
struct Affine {
  Scratch<float> mean, scale, shift;

  // The mean is rounded to float32 for the subtraction, which is then exact where it matters; the shift carries the
  // rest of it.
  Affine(const Periods& p, const Norm& norm) : mean(p.length), scale(p.length), shift(p.length) {
    Values scale64(p.channels), shift64 = norm.bias;
    for (int64_t c = 0; c < p.channels; ++c) {
      scale64[c] = norm.folded(c).scale;
      const double rest = double(float(norm.mean[c])) - norm.mean[c];
      if (std::isfinite(rest)) shift64[c] += rest * scale64[c];
    }
    repeat(norm.mean, p, mean.data());
    repeat(scale64, p, scale.data());
    repeat(shift64, p, shift.data());
  }
};

template <bool Stream, typename T>
MVIT3_INLINE void put(T* p, Vec v) {
  if constexpr (Stream)
    stream(p, v);
  else
    store(p, v);
}

// A line of a column at a time (one vector of float32, two of 16-bit types), so that streaming stores fill whole cache
// lines.
template <typename T, int Act, bool Residual, bool Stream>
void forward_tile(const T* x, const T* residual, T* y, int64_t count, int64_t length, int64_t ahead, Affine& affine) {
  constexpr int kVecs = kLine / sizeof(T) / kLanes;
  for (int64_t col = 0; col < length; col += kVecs * kLanes) {
    Vec mean[kVecs], scale[kVecs], shift[kVecs];
    for (int u = 0; u < kVecs; ++u) {
      mean[u] = load(affine.mean.data() + col + u * kLanes);
      scale[u] = load(affine.scale.data() + col + u * kLanes);
      shift[u] = load(affine.shift.data() + col + u * kLanes);
    }
    for (int64_t at = col; at < count * length; at += length) {
      prefetch(x + at + ahead);
      if constexpr (Residual) prefetch(residual + at + ahead);
      for (int u = 0; u < kVecs; ++u) {
        Vec v = activate<Act>(fma(load(x + at + u * kLanes) - mean[u], scale[u], shift[u]));
        if constexpr (Residual) v += load(residual + at + u * kLanes);
        put<Stream>(y + at + u * kLanes, v);
      }
    }
  }
}

template <typename T, int Act, bool Residual, bool Stream>
void forward_map(const T* x, const T* residual, T* y, const Periods& p, Affine& affine) {
  for_each_part(p.parts, [&](int64_t part) {
    p.for_each_tile(part, false, [&](int64_t first, int64_t count, int64_t ahead) {
      const int64_t at = first * p.length;
      forward_tile<T, Act, Residual, Stream>(
          x + at, Residual ? residual + at : nullptr, y + at, count, p.length, ahead, affine);
    });
    if constexpr (Stream) stream_fence();
  });
  if (p.tail == 0) return;
  Scratch<T> x_tail = padded_tail(x, p), y_tail(p.length);
  Scratch<T> residual_tail = padded_tail(Residual ? residual : x, p);
  forward_tile<T, Act, Residual, false>(x_tail.data(), residual_tail.data(), y_tail.data(), 1, p.length, 0, affine);
  std::copy_n(y_tail.data(), p.tail, y + p.full * p.length);
}

std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b, double factor = 1) {
  std::vector<double> out(a.size());
  for (size_t c = 0; c < a.size(); ++c) out[c] = a[c] * b[c] * factor;
  return out;
}

struct ForwardArguments {
  Tensor x;
  BatchNormArguments norm;
  int64_t act;
  OptionalTensor residual;
};

// y; mean and variance of the batch, empty unless in training.
std::array<Tensor, 3> batch_norm_act_forward(const ForwardArguments& a) {
  check_map("x", a.x);
  return dispatch_dtype("x", a.x, [&](auto type) {
    using T = decltype(type);
    const Tensor dense = torch::stable::contiguous(a.x);
    const Periods p(dense, sizeof(T));
    Norm norm("", a.norm.weight, a.norm.bias, p.channels, a.norm.eps);
    const auto* input = data_of<T>(dense);
    if (a.norm.training)
      batch_moments(input, p, norm.mean, norm.var);
    else
      norm.read_running("", a.norm.running_mean, a.norm.running_var);
    Affine affine(p, norm);

    Tensor y = new_output(dense);
    const Tensor dense_residual = a.residual ? contiguous_like("residual", *a.residual, a.x) : dense;
    const auto* added = data_of<T>(dense_residual);
    auto* output = mutable_data_of<T>(y);
    const bool past_cache = exceeds_cache(dense.numel() * int64_t(sizeof(T))) && is_aligned(output);
    dispatch_activation(a.act, [&](auto code) {
      dispatch_bool(a.residual.has_value(), [&](auto has_residual) {
        dispatch_bool(past_cache, [&](auto streams) {
          forward_map<T, code, has_residual, streams>(input, added, output, p, affine);
        });
      });
    });
    const auto [mean, var] = norm.of_batch(a.norm.training, a.x);
    return std::array<Tensor, 3>{y, mean, var};
  });
}

// What a walk of the backward pass does: sum the parameter gradients, write dx from the finished sums, or, where the
// statistics are constants and dx needs no sums, both at once; or sum and leave the gradient before the activation in
// dx, which the next walk reads.
enum Walk { kSum, kWrite, kSumAndWrite, kSumAndKeep };

// Elements of a float32 map up to which keeping that gradient costs less than computing it twice.
constexpr int64_t kMostKept = 1 << 20;

struct BackwardTerms {
  Affine affine;
  Scratch<float> slope, offset;  // training: dx = (grad - (x - mean) * slope - offset) * scale
};

template <typename T, int Act, Walk Mode, bool Stream>
void backward_tile(
    const T* dy, const T* x, T* dx, int64_t count, int64_t length, int64_t ahead, BackwardTerms& terms, double* sum,
    double* dot) {
  constexpr int kVecs = kLine / sizeof(T) / kLanes;
  constexpr int64_t kRun =
      8;  // so many rows are added in float32 before float64 takes over: exact enough, and hardly slower
  for (int64_t col = 0; col < length; col += kVecs * kLanes) {
    Vec mean[kVecs], scale[kVecs], shift[kVecs], slope[kVecs], offset[kVecs];
    for (int u = 0; u < kVecs; ++u) {
      const int64_t lane = col + u * kLanes;
      mean[u] = load(terms.affine.mean.data() + lane);
      scale[u] = load(terms.affine.scale.data() + lane);
      shift[u] = load(terms.affine.shift.data() + lane);
      if constexpr (Mode == kWrite) {
        slope[u] = load(terms.slope.data() + lane);
        offset[u] = load(terms.offset.data() + lane);
      }
    }
    for (int64_t row = 0; row < count; row += kRun) {
      Vec s[kVecs], d[kVecs];
      for (int u = 0; u < kVecs; ++u) s[u] = d[u] = 0.0f;
      const int64_t end = std::min(row + kRun, count) * length;
      for (int64_t at = row * length + col; at < end; at += length) {
        prefetch(x + at + ahead);
        prefetch(dy + at + ahead);
        for (int u = 0; u < kVecs; ++u) {
          const int64_t here = at + u * kLanes;
          const Vec centred = load(x + here) - mean[u];
          const Vec grad = activate_backward<Act>(fma(centred, scale[u], shift[u]), load(dy + here));
          if constexpr (Mode != kWrite) {
            s[u] += grad;
            d[u] = fma(grad, centred, d[u]);
          }
          if constexpr (Mode == kWrite) put<Stream>(dx + here, fnma(centred, slope[u], grad - offset[u]) * scale[u]);
          if constexpr (Mode == kSumAndWrite) put<Stream>(dx + here, grad * scale[u]);
          if constexpr (Mode == kSumAndKeep) store(dx + here, grad);
        }
      }
      for (int u = 0; Mode != kWrite && u < kVecs; ++u) {
        accumulate(sum + col + u * kLanes, s[u]);
        accumulate(dot + col + u * kLanes, d[u]);
      }
    }
  }
}

// One walk over the map; `sums` holds 2 * parts rows of a period each (the sum of grad, and of grad * (x - mean)).
template <typename T, int Act, Walk Mode, bool Stream>
void backward_map(const T* dy, const T* x, T* dx, const Periods& p, BackwardTerms& terms, double* sums) {
  for_each_part(p.parts, [&](int64_t part) {
    double* sum = sums + 2 * part * p.length;
    p.for_each_tile(part, Mode == kSum, [&](int64_t first, int64_t count, int64_t ahead) {
      const int64_t at = first * p.length;
      backward_tile<T, Act, Mode, Stream>(dy + at, x + at, dx + at, count, p.length, ahead, terms, sum, sum + p.length);
    });
    if constexpr (Stream) stream_fence();
  });
  if (p.tail == 0) return;
  Scratch<T> dy_tail = padded_tail(dy, p), x_tail = padded_tail(x, p),
             dx_tail(p.length);  // a zero dy adds nothing to the sums
  backward_tile<T, Act, Mode, false>(
      dy_tail.data(), x_tail.data(), dx_tail.data(), 1, p.length, 0, terms, sums, sums + p.length);
  if constexpr (Mode != kSum) std::copy_n(dx_tail.data(), p.tail, dx + p.full * p.length);
}

std::vector<double> add_up(const double* sums, const Periods& p) {
  std::vector<double> out(p.channels, 0.0);
  for (int64_t part = 0; part < p.parts; ++part)
    for (int64_t lane = 0; p.channels && lane < p.length; ++lane)
      out[lane % p.channels] += sums[2 * part * p.length + lane];
  return out;
}

struct BackwardArguments {
  Tensor dy, x;
  BatchNormBackwardArguments norm;
  int64_t act;
};

// Gradients of x, weight and bias.
std::array<Tensor, 3> batch_norm_act_backward(const BackwardArguments& a) {
  check_map("x", a.x);
  return dispatch_dtype("x", a.x, [&](auto type) {
    using T = decltype(type);
    const Tensor dense = torch::stable::contiguous(a.x), dense_dy = contiguous_like("dy", a.dy, a.x);
    const Periods p(dense, sizeof(T));
    Norm norm("", a.norm.weight, a.norm.bias, p.channels, a.norm.eps);
    norm.read_statistics("", a.norm.mean, a.norm.var);
    BackwardTerms terms{Affine(p, norm), Scratch<float>(p.length), Scratch<float>(p.length)};

    Tensor dx = new_output(dense);
    const auto* grad = data_of<T>(dense_dy);
    const auto* input = data_of<T>(dense);
    auto* output = mutable_data_of<T>(dx);
    const bool past_cache = exceeds_cache(dense.numel() * int64_t(sizeof(T))) && is_aligned(output);
    Scratch<double> sums(2 * p.parts * p.length, 0.0);
    Values rstd(p.channels), dbias, dweight;
    for (int64_t c = 0; c < p.channels; ++c) rstd[c] = norm.rstd(c);
    const auto finish_sums = [&] {
      dbias = add_up(sums.data(), p);
      dweight = product(add_up(sums.data() + p.length, p), rstd);
    };
    dispatch_activation(a.act, [&](auto code) {
      dispatch_bool(past_cache, [&](auto streams) {
        if (a.norm.training) {
          const auto finish_terms = [&] {
            finish_sums();
            const double share = 1.0 / std::max<int64_t>(p.rows, 1);
            repeat(product(rstd, dweight, share), p, terms.slope.data());
            repeat(product(dbias, Values(dbias.size(), share)), p, terms.offset.data());
          };
          if constexpr (std::is_same_v<T, float> && !streams)
            if (dense.numel() <= kMostKept) {
              backward_map<T, code, kSumAndKeep, false>(grad, input, output, p, terms, sums.data());
              finish_terms();
              return backward_map<T, kIdentity, kWrite, false>(output, input, output, p, terms, sums.data());
            }
          backward_map<T, code, kSum, false>(grad, input, output, p, terms, sums.data());
          finish_terms();
          backward_map<T, code, kWrite, streams>(grad, input, output, p, terms, sums.data());
        } else {
          backward_map<T, code, kSumAndWrite, streams>(grad, input, output, p, terms, sums.data());
          finish_sums();
        }
      });
    });
    return std::array<Tensor, 3>{dx, write_channels(dweight, a.norm.weight), write_channels(dbias, a.norm.bias)};
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("batch_norm_act_forward", mvit3::boxed<mvit3::batch_norm_act_forward>);
  m.impl("batch_norm_act_backward", mvit3::boxed<mvit3::batch_norm_act_backward>);
}
