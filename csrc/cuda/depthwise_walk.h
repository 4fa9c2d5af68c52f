// What the two kernels of the depth-wise 3x3 convolution share: how blocks and threads walk over a map, and the choice
// of a kernel.
//
// A thread has a few neighbouring channels of a few neighbouring columns. Their taps (and backward, the sums of their
// gradients) stay in its registers while it walks down the map: a row is loaded once, rows ahead of its use, and added
// to the unfinished sums of the three rows that it belongs to. Two columns share what they load, and channels are 8
// bytes of each: with 16 bytes of one column a thread would need the registers of twice as many taps, and load and
// unpack three pixels for each that it makes instead of two.
//
// Blocks share the (strip of columns, row) units evenly. Columns are counted over all samples, so that maps of few
// columns fill a block too, and with dilation d over the d x d maps of every d-th pixel, which know nothing of each
// other.
#pragma once

#include <type_traits>

#include "launch.h"

namespace mvit3 {

// Neighbouring numbers, loaded and stored together.
template <typename T, int Count>
struct alignas(sizeof(T) * Count) Numbers {
  static constexpr bool kPairs = sizeof(T) == 2 && Count % 2 == 0;
  std::conditional_t<kPairs, uint32_t, T> part[kPairs ? Count / 2 : Count];

  static MVIT3_DEVICE
  Numbers load(const T* from) { return *reinterpret_cast<const Numbers*>(from); }
  MVIT3_DEVICE
  void store(T* to) const { *reinterpret_cast<Numbers*>(to) = *this; }

  MVIT3_DEVICE
  void to(float (&value)[Count]) const {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if constexpr (kPairs) {
        const Pair pair = unpack<T>(part[i / 2]);
        value[i] = i % 2 == 0 ? pair.first : pair.second;
      } else {
        value[i] = to_float(part[i]);
      }
    }
  }
  static MVIT3_DEVICE
  Numbers of(const float (&value)[Count]) {
    Numbers result;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if constexpr (!kPairs)
        result.part[i] = from_float<T>(value[i]);
      else if (i % 2 == 0)
        result.part[i / 2] = pack<T>(value[i], value[i + 1]);
    }
    return result;
  }
};

// How blocks and threads share the filtered map.
template <int Columns, int Channels>
struct Walk {
  static constexpr int kMostGroups = 64,
                       kLeastRows = 4;  // a part of fewer rows would read more rows around its own than rows of its own
  int channels, height, width, step;
  int slices, groups;  // a block has `groups` groups of channels
  int positions;       // groups of columns side by side in a block
  int down, side,
      across;  // maps of every step-th row; groups of columns of one map of every step-th column, and of all of them
  int depth;   // rows of one map
  int64_t lanes, units;  // groups of columns, in all samples; rows of all strips

  explicit Walk(const Maps& m) : channels(m.inputs), height(m.out_height), width(m.out_width), step(m.dilation) {
    const int all = (channels + Channels - 1) / Channels;
    slices = (all + kMostGroups - 1) / kMostGroups;
    groups = (all + slices - 1) / slices;
    positions = kThreads / groups;
    down = step < height ? step : height;
    depth = (height + step - 1) / step;
    side = ((width + step - 1) / step + Columns - 1) / Columns;
    across = (step < width ? step : width) * side;
    lanes = m.batch * down * across;
    units = ceil_div(lanes, positions) * depth;
  }

  // As many blocks of a slice as the device runs at once together with those of the other slices, each with some work.
  int64_t blocks_of(int resident) const {
    const int64_t most = resident < slices ? 1 : resident / slices, useful = ceil_div(units, kLeastRows);
    return most < useful ? most : useful;
  }

  MVIT3_DEVICE
  int position() const { return thread() / groups; }
  MVIT3_DEVICE
  int channel() const { return (slice() * groups + thread() % groups) * Channels; }
  MVIT3_DEVICE
  bool works() const { return position() < positions && channel() < channels; }

  // Calls f(place, first, last) for each strip of the thread, and those rows of its map that are the block's: row r is
  // place.y(r), and column c of the thread is place.x(c), of which the first one exists.
  template <typename F>
  MVIT3_DEVICE
  void for_each_strip(const F& f) const {
    const int64_t end = units * (block() + 1) / blocks();
    for (int64_t unit = units * block() / blocks(); unit < end;) {
      const int64_t strip = unit / depth, lane = strip * positions + position();
      const int first = int(unit - strip * depth);
      const int last = depth - first < end - unit ? depth : first + int(end - unit);
      unit += last - first;
      if (lane >= lanes) continue;
      const int64_t map = lane / across;
      const int column = int(lane - map * across), row = int(map % down), rows = (height - row + step - 1) / step;
      const Place at{map / down, 0, column % side * Columns, row, column / side, step};
      if (at.x(0) < width) f(at, first, last < rows ? last : rows);
    }
  }
};

// Of a map: how far rows and columns of a thread are apart, in bytes. Launches bring it along, where instructions read
// it in place.
struct Steps {
  int64_t down, across;
  int rows, height, width;

  Steps(const Maps& m, bool out, int number)
      : down(int64_t(m.dilation) * (out ? m.out_width : m.width) * m.inputs * number),
        across(int64_t(m.dilation) * m.inputs * number), rows(m.dilation), height(out ? m.out_height : m.height),
        width(out ? m.out_width : m.width) {}
};

// The columns of a thread in a map, row by row.
template <typename T, int Count>
struct Strip {
  const Steps& steps;
  T* next;         // first column of the row to come
  int row, end;    // that row; the one that the thread does not need any more
  uint32_t there;  // which of the columns are in the map

  MVIT3_DEVICE
  Strip(
      const Steps& s, T* map, int channels, int channel, const Place& at, int first_row, int end_row, int first_column)
      : steps(s), row(first_row), end(end_row < s.height ? end_row : s.height), there(0) {
    next = map + ((at.image * s.height + first_row) * s.width + first_column) * channels + channel;
#pragma unroll
    for (int i = 0; i < Count; ++i) there |= uint32_t(unsigned(first_column + i * at.step) < unsigned(s.width)) << i;
  }

  MVIT3_DEVICE
  bool has(int i) const { return there & 1u << i; }
  static MVIT3_DEVICE
  T* moved(T* from, int64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(from) + bytes);
  }
  MVIT3_DEVICE
  void advance() {
    next = moved(next, steps.down);
    row += steps.rows;
  }

  // The row to come, zeros where there are no pixels or nobody needs them.
  template <typename N>
  MVIT3_DEVICE
  void load(N (&pixels)[Count]) {
    const uint32_t wanted = unsigned(row) < unsigned(end) ? there : 0u;
    T* from = next;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      pixels[i] = wanted & 1u << i ? N::load(from) : N{};
      if (i + 1 < Count) from = moved(from, steps.across);
    }
    advance();
  }

  // Stores pixel i of the row to come.
  template <typename N>
  MVIT3_DEVICE
  void store(int i, const N& pixel) const { pixel.store(moved(next, i * steps.across)); }
};

// What a launch takes: a call, and all that the host can tell the threads about it.
template <typename T, typename Plan>
struct Planned : DepthwiseArguments {
  Plan walk;
  Steps in, out;

  explicit Planned(const DepthwiseArguments& a)
      : DepthwiseArguments(a), walk(a.maps), in(a.maps, false, sizeof(T)), out(a.maps, true, sizeof(T)) {}
};

template <typename T, int Channels>
MVIT3_DEVICE
void load_taps(float (&taps)[9][Channels], const Values& weight, int channel, int channels) {
#pragma unroll
  for (int i = 0; i < 9; ++i)
#pragma unroll
    for (int c = 0; c < Channels; ++c)
      taps[i][c] = channel < channels ? value_at<T>(weight, int64_t(channel + c) * 9 + i) : 0.0f;
}

// ---- The kernel of a call

template <typename K, typename T>
struct DepthwiseKernel {
  using type = K;
  using Number = T;
};

// Calls f with the kernel for a type, a stride, and channels that lie together on aligned memory or do not.
template <template <typename, int, bool> class Kernel, typename F>
auto choose_depthwise(const DepthwiseArguments& a, const F& f) {
  const auto of_type = [&](auto number) {
    using T = decltype(number);
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0; };
    const bool vectors = a.maps.inputs % 4 == 0 && aligned(a.x) && aligned(a.dz) && aligned(a.z) && aligned(a.dx);
    if (a.stride == 1)
      return vectors ? f(DepthwiseKernel<Kernel<T, 1, true>, T>{}) : f(DepthwiseKernel<Kernel<T, 1, false>, T>{});
    return vectors ? f(DepthwiseKernel<Kernel<T, 2, true>, T>{}) : f(DepthwiseKernel<Kernel<T, 2, false>, T>{});
  };
  return a.type == Type::kFloat      ? of_type(float{})
         : a.type == Type::kBFloat16 ? of_type(BFloat16{})
                                     : of_type(Float16{});
}

// What a launch needs beside its arguments.
template <typename K>
struct DepthwiseLaunch {
  typename K::Arguments arguments;
  int blocks, slices, shared;

  explicit DepthwiseLaunch(const DepthwiseArguments& a) : arguments(a) {
    const auto& walk = arguments.walk;
    shared = K::shared(walk);
    slices = walk.slices;
    blocks = int(walk.blocks_of(resident_blocks<K>(shared)));
  }

  void operator()(void* stream) const { launch<K>(arguments, blocks, slices, shared, stream); }
};

template <template <typename, int, bool> class Kernel>
int64_t depthwise_workspace(const DepthwiseArguments& a) {
  return choose_depthwise<Kernel>(a, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    const DepthwiseLaunch<K> call(a);
    return call.blocks * K::kept(call.arguments.walk);
  });
}

}  // namespace mvit3
