// The depth-wise 3x3 convolution by itself, with the moments of what it stores, and its backward pass in one pass over dz and x.
//
// A thread has a few neighbouring channels of a few neighbouring columns. Their taps (and backward, the sums of their gradients) stay in its
// registers while it walks down the map: a row is loaded once, rows ahead of its use, and added to the unfinished sums of the three rows
// that it belongs to. Two columns share what they load. Channels are 8 bytes, backward 4: as many as leave two blocks room for their
// registers; 16 bytes would halve the threads that wait for memory, and there is nothing else to hide its latency behind.
//
// Blocks share the (strip of columns, row) units evenly. Columns are counted over all samples, so that narrow maps fill a block, and with
// dilation d over the d x d maps of every d-th pixel, which know nothing of each other.

#include <type_traits>

#include "launch.h"
#include "sums.h"

namespace mvit3 {

// Neighbouring numbers, loaded and stored together.
template <typename T, int Count>
struct alignas(sizeof(T) * Count) Numbers {
  static constexpr bool kPairs = sizeof(T) == 2 && Count % 2 == 0;
  std::conditional_t<kPairs, uint32_t, T> part[kPairs ? Count / 2 : Count];

  static MVIT3_DEVICE Numbers load(const T* from) { return *reinterpret_cast<const Numbers*>(from); }
  MVIT3_DEVICE void store(T* to) const { *reinterpret_cast<Numbers*>(to) = *this; }

  MVIT3_DEVICE void to(float (&value)[Count]) const {
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
  static MVIT3_DEVICE Numbers of(const float (&value)[Count]) {
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
  static constexpr int kMostGroups = 64, kLeastRows = 4;  // a part of fewer rows would read more rows around its own than rows of its own
  int channels, height, width, step;
  int slices, groups;       // a block has `groups` groups of channels
  int positions;            // groups of columns side by side in a block
  int down, side, across;   // maps of every step-th row; groups of columns of one map of every step-th column, and of all of them
  int depth;                // rows of one map
  int64_t lanes, units;     // groups of columns, in all samples; rows of all strips

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
    const int64_t most = ceil_div(resident, slices), useful = ceil_div(units, kLeastRows);
    return most < useful ? most : useful;
  }

  MVIT3_DEVICE int position() const { return thread() / groups; }
  MVIT3_DEVICE int channel() const { return (slice() * groups + thread() % groups) * Channels; }
  MVIT3_DEVICE bool works() const { return position() < positions && channel() < channels; }

  // Calls f(place, first, last) for each strip of the thread, and those rows of its map that are the block's: row r is place.y(r), and
  // column c of the thread is place.x(c), of which the first one exists.
  template <typename F>
  MVIT3_DEVICE void for_each_strip(const F& f) const {
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

// Where the columns of a thread lie in a map, and which of them do.
template <typename T, int Count>
struct Strip {
  T* at;
  int64_t row;  // elements
  int column, height;
  bool there[Count];

  MVIT3_DEVICE Strip(T* map, int64_t image, int map_height, int map_width, int channels, int channel, int first, int step)
      : row(int64_t(map_width) * channels), column(step * channels), height(map_height) {
    at = map + image * map_height * row + int64_t(first) * channels + channel;
#pragma unroll
    for (int i = 0; i < Count; ++i) there[i] = unsigned(first + i * step) < unsigned(map_width);
  }

  // Pixels of row y, zeros where there are none.
  template <typename N>
  MVIT3_DEVICE void load(N (&pixels)[Count], int y, bool wanted = true) const {
    const T* const from = at + y * row;
    wanted = wanted && unsigned(y) < unsigned(height);
#pragma unroll
    for (int i = 0; i < Count; ++i) pixels[i] = wanted && there[i] ? N::load(from + i * column) : N{};
  }
};

template <typename T, int Channels>
MVIT3_DEVICE void load_taps(float (&taps)[9][Channels], const Values& weight, int channel, int channels) {
#pragma unroll
  for (int i = 0; i < 9; ++i)
#pragma unroll
    for (int c = 0; c < Channels; ++c) taps[i][c] = channel < channels ? value_at<T>(weight, int64_t(channel + c) * 9 + i) : 0.0f;
}

// ---- Filter: z and its moments

template <typename T, int Stride, bool Vectors>
struct DepthwiseFilter {
  static constexpr int kBlocksAtOnce = 2;
  static constexpr int kChannels = Vectors ? 8 / sizeof(T) : 1, kColumns = 2, kSeen = (kColumns - 1) * Stride + 3, kAhead = Stride == 1 ? 2 : 1;
  using Plan = Walk<kColumns, kChannels>;
  using Pixel = Numbers<T, kChannels>;

  struct Arguments : DepthwiseArguments {
    Plan walk;
  };
  static int shared(const Plan& walk) {
    return walk.positions * (walk.groups * kChannels * int(sizeof(Moments)) + int(sizeof(float)));
  }
  static int64_t kept(const Plan& walk) { return 2 * int64_t(walk.channels) + 1; }

  // sum + a row times row Row of the taps; from nothing where `fresh`.
  template <int Row>
  static MVIT3_DEVICE void weigh(
      float (&to)[kColumns][kChannels], const float (&sum)[kColumns][kChannels], const float (&row)[kSeen][kChannels],
      const float (&taps)[9][kChannels]) {
#pragma unroll
    for (int x = 0; x < kColumns; ++x)
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float value = sum[x][c];
#pragma unroll
        for (int t = 0; t < 3; ++t) value += row[x * Stride + t][c] * taps[3 * Row + t][c];
        to[x][c] = value;
      }
  }

  static MVIT3_DEVICE void unpack_row(float (&row)[kSeen][kChannels], const Pixel (&pixels)[kSeen]) {
#pragma unroll
    for (int i = 0; i < kSeen; ++i) pixels[i].to(row[i]);
  }

  // Moments of what a thread stored (Welford).
  struct Seen {
    float count = 0.0f, mean[kChannels] = {}, squares[kChannels] = {};

    MVIT3_DEVICE void add(const Pixel& pixel) {
      float value[kChannels];
      pixel.to(value);
      count += 1.0f;
      const float share = fast_divide(1.0f, count);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float apart = value[c] - mean[c];
        mean[c] += apart * share;
        squares[c] += apart * (value[c] - mean[c]);
      }
    }
  };

  static MVIT3_DEVICE void store(
      const Strip<T, kColumns>& z, int y, const float (&value)[kColumns][kChannels], Seen& seen) {
    T* const to = z.at + y * z.row;
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      if (x && !z.there[x]) continue;
      const Pixel pixel = Pixel::of(value[x]);
      pixel.store(to + x * z.column);
      seen.add(pixel);
    }
  }

  static MVIT3_DEVICE void run(const Arguments& a) {
    const Plan& walk = a.walk;
    const Maps& m = a.maps;
    const int channel = walk.channel();
    float taps[9][kChannels];
    load_taps<T>(taps, a.weight, channel, m.inputs);
    Seen seen;
    if (walk.works())
      walk.for_each_strip([&](Place at, int first, int last) {
        const Strip<const T, kSeen> x(
            static_cast<const T*>(a.x), at.image, m.height, m.width, m.inputs, channel, Stride * at.x(0) - at.step, at.step);
        const Strip<T, kColumns> z(static_cast<T*>(a.z), at.image, m.out_height, m.out_width, m.inputs, channel, at.x(0), at.step);
        float row[kSeen][kChannels], value[kColumns][kChannels];
        if constexpr (Stride == 1) {
          Pixel ahead[kAhead][kSeen];
#pragma unroll
          for (int i = 0; i < kAhead; ++i) x.load(ahead[i], at.y(first - 1 + i), i < 2 || first - 1 + i <= last);
          float above[kColumns][kChannels] = {}, here[kColumns][kChannels] = {};
          const float none[kColumns][kChannels] = {};
#pragma unroll 1
          for (int from = first - 1; from <= last; from += kAhead) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
              const int r = from + i;
              if (r > last) break;
              unpack_row(row, ahead[i]);
              x.load(ahead[i], at.y(r + kAhead), r + kAhead <= last);
              weigh<2>(value, above, row, taps);
              weigh<1>(above, here, row, taps);
              weigh<0>(here, none, row, taps);
              if (r > first) store(z, at.y(r - 1), value, seen);
            }
          }
        } else {
          Pixel middle[kSeen], below[kSeen];
          x.load(below, 2 * first - 1);
          x.load(middle, 2 * first);
          unpack_row(row, below);
          x.load(below, 2 * first + 1);
          const float none[kColumns][kChannels] = {};
          float above[kColumns][kChannels];
          weigh<0>(above, none, row, taps);
#pragma unroll 1
          for (int y = first; y < last; ++y) {
            unpack_row(row, middle);
            x.load(middle, 2 * y + 2, y + 1 < last);
            weigh<1>(value, above, row, taps);
            unpack_row(row, below);
            x.load(below, 2 * y + 3, y + 1 < last);
            weigh<2>(value, value, row, taps);
            weigh<0>(above, none, row, taps);
            store(z, y, value, seen);
          }
        }
      });

    // Of the threads of a block, in their order.
    const int width = walk.groups * kChannels;
    Moments* const moments = reinterpret_cast<Moments*>(shared_memory());  // (positions, width)
    float* const counts = reinterpret_cast<float*>(moments + walk.positions * width);
    const int own = thread() % walk.groups;
    if (walk.works()) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        moments[walk.position() * width + own * kChannels + c] = {seen.mean[c], seen.squares[c]};
      if (own == 0) counts[walk.position()] = seen.count;
    }
    synchronize();
    const int of_slice = slice() * width + thread();
    float total = 0.0f;
    Moments sum{0.0f, 0.0f};
    const bool mine = thread() < width && of_slice < m.inputs;
    if (!mine) return;
#pragma unroll 1
    for (int p = 0; p < walk.positions; ++p) {
      const Moments part = moments[p * width + thread()];
      sum = total == 0.0f ? part : merge(sum, total, part, counts[p]);
      total += counts[p];
    }
    reinterpret_cast<Moments*>(a.workspace)[int64_t(block()) * m.inputs + of_slice] = sum;
    if (of_slice == 0) a.workspace[2 * int64_t(blocks()) * m.inputs + block()] = total;
  }
};

// ---- Backward: the gradients of x and of the taps

template <typename T, int Stride, bool Vectors>
struct DepthwiseBackward {
  static constexpr int kBlocksAtOnce = 2;
  static constexpr int kChannels = Vectors ? 4 / sizeof(T) : 1, kColumns = Stride == 1 ? 2 : 1;
  using Plan = Walk<kColumns, kChannels>;
  using Pixel = Numbers<T, kChannels>;

  struct Arguments : DepthwiseArguments {
    Plan walk;
  };
  static int shared(const Plan& walk) { return walk.positions * walk.groups * kChannels * 9 * int(sizeof(float)); }
  static MVIT3_BOTH int64_t kept(const Plan& walk) { return 9 * int64_t(walk.channels); }

  struct Taps {
    float tap[9][kChannels], sum[9][kChannels];

    // A value of x and the gradient that it meets by a tap.
    MVIT3_DEVICE void meet(int i, const float (&x)[kChannels], const float (&dz)[kChannels], float (&dx)[kChannels]) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        dx[c] += tap[i][c] * dz[c];
        sum[i][c] += x[c] * dz[c];
      }
    }
  };

  // Two columns of x, four of dz around them. A row of dz is added to the three rows of x that it belongs to. What is not there takes no
  // part, so that NaN spoils no more than it meets.
  static MVIT3_DEVICE void walk_down(
      Taps& taps, Place at, int first, int last, const Strip<const T, 4>& dz, const Strip<const T, 2>& x, const Strip<T, 2>& dx) {
    constexpr int kRing = 3;
    Pixel dz_ahead[kRing][4], x_ahead[kRing][2];  // row r of dz and row r + 1 of x are at (r - (first - 1)) % 3
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
      dz.load(dz_ahead[i], at.y(first - 1 + i), first - 1 + i <= last);
      x.load(x_ahead[i], at.y(first + i), first + i < last);
    }
    float value[kRing][2][kChannels] = {}, grad[kRing][2][kChannels] = {};  // row r is at (r - (first - 2)) % 3
#pragma unroll 1
    for (int from = first - 1; from <= last; from += kRing) {
#pragma unroll
      for (int i = 0; i < kRing; ++i) {
        const int r = from + i;
        if (r > last) break;
        float row[4][kChannels];
#pragma unroll
        for (int j = 0; j < 4; ++j) dz_ahead[i][j].to(row[j]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          x_ahead[i][j].to(value[(i + 2) % kRing][j]);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) grad[(i + 2) % kRing][j][c] = 0.0f;
        }
        dz.load(dz_ahead[i], at.y(r + kRing), r + kRing <= last);
        x.load(x_ahead[i], at.y(r + 1 + kRing), r + 1 + kRing < last);
        if (unsigned(at.y(r)) < unsigned(dz.height)) {
#pragma unroll
          for (int ty = 0; ty < 3; ++ty) {
            if (r - 1 + ty < first || r - 1 + ty >= last) continue;
            const auto meet = [&](int column, int from_column) {
              taps.meet(
                  3 * ty + column + 2 - from_column, value[(i + ty) % kRing][column], row[from_column], grad[(i + ty) % kRing][column]);
            };
            meet(0, 1);
            if (dz.there[0]) meet(0, 0);
            if (dz.there[2]) {
              meet(0, 2);
              meet(1, 1);
              meet(1, 2);
            }
            if (dz.there[3]) meet(1, 3);
          }
        }
        if (r > first) {
          T* const to = dx.at + at.y(r - 1) * dx.row;
          Pixel::of(grad[i][0]).store(to);
          if (dx.there[1]) Pixel::of(grad[i][1]).store(to + dx.column);
        }
      }
    }
  }

  // Stride 2: for a pixel of dz four of x, by parity of row and column. An even one meets the middle tap, an odd one the two around it.
  static MVIT3_DEVICE void walk_down_quarters(
      Taps& taps, int first, int last, const Strip<const T, 2>& dz, const Strip<const T, 2>& x, const Strip<T, 2>& dx) {
    Pixel dz_ahead[2], even_ahead[2], odd_ahead[2];
    float here[2][kChannels], below[2][kChannels];
    const auto load = [&](int y) {
      dz.load(dz_ahead, y + 1, y < last);
      x.load(even_ahead, 2 * y, y < last);
      x.load(odd_ahead, 2 * y + 1, y < last);
    };
    dz.load(dz_ahead, first);
#pragma unroll
    for (int j = 0; j < 2; ++j) dz_ahead[j].to(below[j]);
    load(first);
#pragma unroll 1
    for (int y = first; y < last; ++y) {
      float even[2][kChannels], odd[2][kChannels], grad[2][kChannels] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) here[j][c] = below[j][c];
        dz_ahead[j].to(below[j]);
        even_ahead[j].to(even[j]);
        odd_ahead[j].to(odd[j]);
      }
      load(y + 1);
      // One row of x and one of dz, by row `row` of the taps.
      const auto meet = [&](int row, const float (&values)[2][kChannels], const float (&gradients)[2][kChannels]) {
        taps.meet(3 * row + 1, values[0], gradients[0], grad[0]);
        if (x.there[1]) taps.meet(3 * row + 2, values[1], gradients[0], grad[1]);
        if (dz.there[1]) taps.meet(3 * row, values[1], gradients[1], grad[1]);
      };
      const auto store = [&](int row) {
        T* const to = dx.at + row * dx.row;
        Pixel::of(grad[0]).store(to);
        if (x.there[1]) Pixel::of(grad[1]).store(to + dx.column);
      };
      meet(1, even, here);
      store(2 * y);
      if (2 * y + 1 >= x.height) continue;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) grad[0][c] = grad[1][c] = 0.0f;
      meet(2, odd, here);
      if (y + 1 < dz.height) meet(0, odd, below);
      store(2 * y + 1);
    }
  }

  static MVIT3_DEVICE void run(const Arguments& a) {
    const Plan& walk = a.walk;
    const Maps& m = a.maps;
    const int channel = walk.channel();
    Taps taps;
    load_taps<T>(taps.tap, a.weight, channel, m.inputs);
#pragma unroll
    for (int i = 0; i < 9; ++i)
#pragma unroll
      for (int c = 0; c < kChannels; ++c) taps.sum[i][c] = 0.0f;
    if (walk.works())
      walk.for_each_strip([&](Place at, int first, int last) {
        const T *const from_dz = static_cast<const T*>(a.dz), *const from_x = static_cast<const T*>(a.x);
        const int before = Stride == 1 ? at.x(-1) : at.x(0);
        const Strip<const T, Stride == 1 ? 4 : 2> dz(from_dz, at.image, m.out_height, m.out_width, m.inputs, channel, before, at.step);
        const Strip<const T, 2> x(from_x, at.image, m.height, m.width, m.inputs, channel, Stride * at.x(0), at.step);
        const Strip<T, 2> dx(static_cast<T*>(a.dx), at.image, m.height, m.width, m.inputs, channel, Stride * at.x(0), at.step);
        if constexpr (Stride == 1)
          walk_down(taps, at, first, last, dz, x, dx);
        else
          walk_down_quarters(taps, first, last, dz, x, dx);
      });

    // Of the threads of a block, in their order.
    const int width = walk.groups * kChannels * 9;
    float* const sums = reinterpret_cast<float*>(shared_memory());  // (positions, width), channel by channel
    if (walk.position() < walk.positions) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
#pragma unroll
        for (int i = 0; i < 9; ++i)
          sums[walk.position() * width + (thread() % walk.groups * kChannels + c) * 9 + i] = taps.sum[i][c];
    }
    synchronize();
#pragma unroll 1
    for (int i = thread(); i < width; i += kThreads) {
      const int64_t of_slice = int64_t(slice()) * width + i;
      if (of_slice >= kept(walk)) break;
      float sum = 0.0f;
      for (int p = 0; p < walk.positions; ++p) sum += sums[p * width + i];
      a.workspace[block() * kept(walk) + of_slice] = sum;
    }
  }
};

// Adds up what the blocks kept of the gradient of the taps, 32 to a block of threads.
template <typename T>
struct FinishTaps {
  struct Arguments {
    const float* workspace;
    T* dweight;
    int parts;
    int64_t count;
  };
  static constexpr int kBlocksAtOnce = 1;

  static MVIT3_DEVICE void run(const Arguments& a) {
    const int64_t i = int64_t(block()) * kWarp + lane();
    const float sum = sum_of_parts(a.workspace, a.parts, a.count, i);
    if (warp() == 0 && i < a.count) a.dweight[i] = from_float<T>(sum);
  }
};

namespace {

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
  return a.type == Type::kFloat ? of_type(float{}) : a.type == Type::kBFloat16 ? of_type(BFloat16{}) : of_type(Float16{});
}

// What a launch needs beside its arguments.
template <typename K>
struct DepthwiseLaunch {
  typename K::Arguments arguments;
  int blocks, slices, shared;

  explicit DepthwiseLaunch(const DepthwiseArguments& a) : arguments{a, typename K::Plan(a.maps)} {
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

}  // namespace

int64_t depthwise_filter_workspace(const DepthwiseArguments& a) { return depthwise_workspace<DepthwiseFilter>(a); }

void depthwise_filter(const DepthwiseArguments& a, void* stream) {
  choose_depthwise<DepthwiseFilter>(a, [&](auto kernel) {
    const DepthwiseLaunch<typename decltype(kernel)::type> call(a);
    call(stream);
    const int channels = a.maps.inputs;
    launch<FinishMoments>({a.workspace, a.mean, a.var, call.blocks, channels}, int(ceil_div(channels, kWarp)), 1, kThreads * 8, stream);
  });
}

int64_t depthwise_backward_workspace(const DepthwiseArguments& a) { return depthwise_workspace<DepthwiseBackward>(a); }

void depthwise_backward(const DepthwiseArguments& a, void* stream) {
  choose_depthwise<DepthwiseBackward>(a, [&](auto kernel) {
    using T = typename decltype(kernel)::Number;
    const DepthwiseLaunch<typename decltype(kernel)::type> call(a);
    call(stream);
    const auto finish = [&](auto* dweight) {
      const int64_t count = 9 * int64_t(a.maps.inputs);
      using W = std::remove_pointer_t<decltype(dweight)>;
      launch<FinishTaps<W>>({a.workspace, dweight, call.blocks, count}, int(ceil_div(count, kWarp)), 1, kThreads * 4, stream);
    };
    a.weight.single ? finish(static_cast<float*>(a.dweight)) : finish(static_cast<T*>(a.dweight));
  });
}

}  // namespace mvit3
