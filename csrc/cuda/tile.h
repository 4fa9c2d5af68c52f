// Tiles of maps and of weights in shared memory, parameters, activations.
#pragma once

#include "../activations.h"
#include "../batch_norm.h"
#include "arguments.h"
#include "mma.h"

namespace mvit3 {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct alignas(16) Vector {
  uint32_t part[4];
};

// So many neighbouring words, read or written at once.
template <int Words>
struct alignas(4 * Words) Run {
  uint32_t word[Words];
};

// Number i of a parameter.
template <typename T>
MVIT3_DEVICE
float value_at(const Values& values, int64_t i) {
  return values.single ? static_cast<const float*>(values.data)[i] : to_float(static_cast<const T*>(values.data)[i]);
}

// What batch normalisation does to a channel.
struct alignas(8) Affine {
  float scale, shift;
};

template <typename T>
MVIT3_DEVICE
Affine affine_at(const Norm& norm, int channel) {
  if (norm.scale) return {norm.scale[channel], norm.shift[channel]};
  const FoldedNorm<float> folded = fold_norm(
      value_at<T>(norm.weight, channel), value_at<T>(norm.bias, channel), value_at<T>(norm.mean, channel),
      value_at<T>(norm.var, channel), norm.eps);
  return {folded.scale, folded.shift};
}

// Where a tile lies. With dilation d its pixels are d apart: a map is then d x d maps of pixels that know nothing of
// each other, each of them convolved without dilation.
struct Place {
  int64_t image;
  int top, left;  // in the map of every `step`-th pixel, from (first_row, first_column) on
  int first_row, first_column, step;

  MVIT3_DEVICE
  int y(int row) const { return first_row + (top + row) * step; }
  MVIT3_DEVICE
  int x(int column) const { return first_column + (left + column) * step; }
  MVIT3_DEVICE
  Place moved_to(int new_top, int new_left) const { return {image, new_top, new_left, first_row, first_column, step}; }
};

MVIT3_BOTH
int round_up(int n, int to) { return (n + to - 1) / to * to; }
MVIT3_BOTH
int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

MVIT3_BOTH
int64_t tiles_of(int64_t batch, int tile_height, int tile_width, int height, int width, int step) {
  return batch * step * step * ceil_div(ceil_div(height, step), tile_height) *
         ceil_div(ceil_div(width, step), tile_width);
}

template <int Height, int Width>
MVIT3_DEVICE
Place place(int64_t tile, int height, int width, int step) {
  const int down = int(ceil_div(ceil_div(height, step), Height)), across = int(ceil_div(ceil_div(width, step), Width));
  const int64_t row = tile / across, phase = row / down;
  const int which = int(phase % (step * step));
  return {
      phase / (step * step), int(row % down) * Height, int(tile % across) * Width, which / step, which % step, step};
}

MVIT3_DEVICE
bool inside(int y, int x, int height, int width) {
  return unsigned(y) < unsigned(height) && unsigned(x) < unsigned(width);
}

MVIT3_DEVICE
bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A rectangle of a map (B, H, W, channels), its channels first..first+count-1, count a multiple of 16, with zeros
// outside the map.
template <int Height, int Width, typename T>
MVIT3_DEVICE
void load_pixels(Matrix<T> tile, const T* map, int height, int width, int channels, Place at, int first, int count) {
  const T* image = map + at.image * height * width * channels;
  const bool vectors = channels % 8 == 0 && is_aligned(map);
  const int unit = vectors ? 8 : 1, across = count / unit;
#pragma unroll 1
  for (int i = thread(); i < Height * Width * across; i += kThreads) {
    const int pixel = i / across, c = i % across * unit;
    const int y = at.y(pixel / Width), x = at.x(pixel % Width);
    const bool there = inside(y, x, height, width) && first + c < channels;
    T* to = tile.row(pixel) + c;
    const T* from = image + (int64_t(y) * width + x) * channels + first + c;
    if (!vectors) {
      *to = there ? *from : T{0};
    } else if (there) {
      copy_16(to, from);
    } else {
      *reinterpret_cast<Vector*>(to) = Vector{};
    }
  }
}

// Rows first_row..+rows-1 and columns first_column..+columns-1, a multiple of 16, of a packed matrix (height, width),
// zeros outside it.
template <typename T>
MVIT3_DEVICE
void load_matrix(
    Matrix<T> tile, const void* matrix, int height, int width, int first_row, int rows, int first_column, int columns) {
  const int across = columns / 8;
#pragma unroll 1
  for (int i = thread(); i < rows * across; i += kThreads) {
    const int r = i / across, c = i % across * 8;
    T* to = tile.row(r) + c;
    if (first_row + r < height && first_column + c < width) {
      copy_16(to, static_cast<const T*>(matrix) + int64_t(first_row + r) * width + first_column + c);
    } else {
      *reinterpret_cast<Vector*>(to) = Vector{};
    }
  }
}

// `count` floats, a multiple of 4, by the threads from `first` on.
MVIT3_DEVICE
void load_floats(float* to, const float* from, int count, int first) {
  const int i = 4 * (thread() - first);
  if (i >= 0 && i < count) copy_16(to + i, from + i);
}

// Two neighbouring channels of a row of `channels` numbers; what lies behind the last one is left alone.
template <typename T>
MVIT3_DEVICE
void store_pair(T* row, int channel, int channels, uint32_t bits) {
  if (channels % 2 == 0) {
    if (channel < channels) *reinterpret_cast<uint32_t*>(row + channel) = bits;
  } else {
    if (channel < channels) row[channel] = T{uint16_t(bits & 0xffff)};
    if (channel + 1 < channels) row[channel + 1] = T{uint16_t(bits >> 16)};
  }
}

template <typename T>
MVIT3_DEVICE
Pair load_pair(const T* row, int channel, int channels) {
  const bool together = channels % 2 == 0 && reinterpret_cast<uintptr_t>(row) % 4 == 0;
  if (together && channel < channels) return unpack<T>(*reinterpret_cast<const uint32_t*>(row + channel));
  return {
      channel < channels ? to_float(row[channel]) : 0.0f, channel + 1 < channels ? to_float(row[channel + 1]) : 0.0f};
}

// ---- Activations

MVIT3_DEVICE
float sigmoid(float x) { return fast_divide(1.0f, 1.0f + fast_exp(-x)); }

template <int Count>
MVIT3_DEVICE
void activate(float* values, int act) {
  if (act == kSilu) {
#pragma unroll
    for (int i = 0; i < Count; ++i) values[i] *= sigmoid(values[i]);
  } else if (act == kRelu) {
#pragma unroll
    for (int i = 0; i < Count; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];  // NaN stays
  }
}

// Of values that are halved where the activation is SiLU (`halved`): x sigmoid(x) = h + h tanh(h) with h = x / 2.
template <int Count>
MVIT3_DEVICE
void activate_halved(float* values, int act) {
  if (act == kSilu) {
#pragma unroll
    for (int i = 0; i < Count; ++i) values[i] += values[i] * fast_tanh(values[i]);
  } else {
    activate<Count>(values, act);
  }
}
MVIT3_DEVICE
Affine halved(Affine norm, int act) {
  const float factor = act == kSilu ? 0.5f : 1.0f;
  return {norm.scale * factor, norm.shift * factor};
}

// The values and the slopes there.
template <int Count>
MVIT3_DEVICE
void activate_with_slope(float* values, float* slopes, int act) {
#pragma unroll
  for (int i = 0; i < Count; ++i) slopes[i] = 1.0f;
  if (act == kSilu) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const float s = sigmoid(values[i]);
      slopes[i] = s * (1.0f + values[i] * (1.0f - s));
      values[i] *= s;
    }
  } else if (act == kRelu) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      slopes[i] = values[i] <= 0.0f ? 0.0f : 1.0f;  // as torch: the gradient where the output is not 0
      values[i] = values[i] < 0.0f ? 0.0f : values[i];
    }
  }
}

}  // namespace mvit3
