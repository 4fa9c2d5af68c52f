// The depth-wise 3x3 convolution by itself, with the moments of what it stores, and its backward pass in one pass over dz and x.
//
// A thread has a few neighbouring channels of a few neighbouring columns. Their taps (and backward, the sums of their gradients) stay in
// its registers while it walks down the map: a row is loaded once, rows ahead of its use, and added to the unfinished sums of the three
// rows that it belongs to. Two columns share what they load, and channels are 8 bytes of each: with 16 bytes of one column a thread would
// need the registers of twice as many taps, and load and unpack three pixels for each that it makes instead of two.
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
    const int64_t most = resident < slices ? 1 : resident / slices, useful = ceil_div(units, kLeastRows);
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

// Of a map: how far rows and columns of a thread are apart, in bytes. Launches bring it along, where instructions read it in place.
struct Steps {
  int64_t down, across;
  int rows, height, width;

  Steps(const Maps& m, bool out, int number)
      : down(int64_t(m.dilation) * (out ? m.out_width : m.width) * m.inputs * number), across(int64_t(m.dilation) * m.inputs * number),
        rows(m.dilation), height(out ? m.out_height : m.height), width(out ? m.out_width : m.width) {}
};

// The columns of a thread in a map, row by row.
template <typename T, int Count>
struct Strip {
  const Steps& steps;
  T* next;        // first column of the row to come
  int row, end;   // that row; the one that the thread does not need any more
  uint32_t there; // which of the columns are in the map

  MVIT3_DEVICE Strip(const Steps& s, T* map, int channels, int channel, const Place& at, int first_row, int end_row, int first_column)
      : steps(s), row(first_row), end(end_row < s.height ? end_row : s.height), there(0) {
    next = map + ((at.image * s.height + first_row) * s.width + first_column) * channels + channel;
#pragma unroll
    for (int i = 0; i < Count; ++i) there |= uint32_t(unsigned(first_column + i * at.step) < unsigned(s.width)) << i;
  }

  MVIT3_DEVICE bool has(int i) const { return there & 1u << i; }
  static MVIT3_DEVICE T* moved(T* from, int64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(from) + bytes);
  }
  MVIT3_DEVICE void advance() {
    next = moved(next, steps.down);
    row += steps.rows;
  }

  // The row to come, zeros where there are no pixels or nobody needs them.
  template <typename N>
  MVIT3_DEVICE void load(N (&pixels)[Count]) {
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
  MVIT3_DEVICE void store(int i, const N& pixel) const { pixel.store(moved(next, i * steps.across)); }
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
  static constexpr int kChannels = Vectors ? 8 / sizeof(T) : 1, kColumns = 2, kSeen = (kColumns - 1) * Stride + 3;
  using Plan = Walk<kColumns, kChannels>;
  using Arguments = Planned<T, Plan>;
  using Pixel = Numbers<T, kChannels>;

  static int shared(const Plan& walk) {
    return walk.positions * (walk.groups * kChannels * int(sizeof(Moments)) + int(sizeof(float)));
  }
  static int64_t kept(const Plan& walk) { return 2 * int64_t(walk.channels) + 1; }

  // to = sum + a row of x times row Row of the taps
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

  // Moments of what a thread stored. In a strip differences from the mean before it are summed (in the first one from its first value):
  // three operations a number, where a running mean takes four and a division.
  struct Seen {
    float before = 0.0f, count = 0.0f;  // values before the strip, and in it
    float mean[kChannels] = {}, squares[kChannels] = {}, sum[kChannels] = {};

    MVIT3_DEVICE void start(const Pixel& pixel) {
      if (before + count == 0.0f) pixel.to(mean);
    }
    MVIT3_DEVICE void add(const Pixel& pixel) {
      float value[kChannels];
      pixel.to(value);
      count += 1.0f;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float apart = value[c] - mean[c];
        sum[c] += apart;
        squares[c] += apart * apart;
      }
    }
    MVIT3_DEVICE void end_strip() {
      before += count;
      count = 0.0f;
      const float share = before > 0.0f ? fast_divide(1.0f, before) : 0.0f;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float moved = sum[c] * share, left = squares[c] - sum[c] * moved;
        squares[c] = left < 0.0f ? 0.0f : left;  // NaN stays
        mean[c] += moved;
        sum[c] = 0.0f;
      }
    }
  };

  static MVIT3_DEVICE void store(Strip<T, kColumns>& z, const float (&value)[kColumns][kChannels], Seen& seen) {
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      if (x && !z.has(x)) continue;
      const Pixel pixel = Pixel::of(value[x]);
      z.store(x, pixel);
      if (x == 0) seen.start(pixel);
      seen.add(pixel);
    }
    z.advance();
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
        const int first_in = Stride == 1 ? at.y(first - 1) : 2 * first - 1, end_in = Stride == 1 ? at.y(last) + 1 : 2 * last;
        Strip<const T, kSeen> x(
            a.in, static_cast<const T*>(a.x), m.inputs, channel, at, first_in, end_in, Stride * at.x(0) - at.step);
        Strip<T, kColumns> z(a.out, static_cast<T*>(a.z), m.inputs, channel, at, at.y(first), at.y(last), at.x(0));
        const float none[kColumns][kChannels] = {};
        float row[kSeen][kChannels], value[kColumns][kChannels], above[kColumns][kChannels] = {}, here[kColumns][kChannels] = {};
        Pixel ahead[2][kSeen];
        x.load(ahead[0]);
        x.load(ahead[1]);
        if constexpr (Stride == 1) {
#pragma unroll 1
          for (int from = first - 1; from <= last; from += 2) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int r = from + i;
              if (r > last) break;
              unpack_row(row, ahead[i]);
              x.load(ahead[i]);
              weigh<2>(value, above, row, taps);
              weigh<1>(above, here, row, taps);
              weigh<0>(here, none, row, taps);
              if (r > first) store(z, value, seen);
            }
          }
        } else {
          unpack_row(row, ahead[0]);
          x.load(ahead[0]);
          weigh<0>(above, none, row, taps);
#pragma unroll 1
          for (int y = first; y < last; ++y) {
            unpack_row(row, ahead[1]);
            x.load(ahead[1]);
            weigh<1>(value, above, row, taps);
            unpack_row(row, ahead[0]);
            x.load(ahead[0]);
            weigh<2>(value, value, row, taps);
            weigh<0>(above, none, row, taps);
            store(z, value, seen);
          }
        }
        seen.end_strip();
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
      if (own == 0) counts[walk.position()] = seen.before;
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
  // Stride 1: one block with twice the channels a thread, because what is around the products is the same for any number of channels.
  static constexpr int kBlocksAtOnce = Stride == 1 ? 1 : 2;
  static constexpr int kChannels = Vectors ? (Stride == 1 ? 8 : 4) / sizeof(T) : 1, kColumns = Stride == 1 ? 2 : 1;
  using Plan = Walk<kColumns, kChannels>;
  using Arguments = Planned<T, Plan>;
  using Pixel = Numbers<T, kChannels>;

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
      Taps& taps, Place at, int first, int last, Strip<const T, 4>& dz, Strip<const T, 2>& x, Strip<T, 2>& dx) {
    constexpr int kRing = 3;
    Pixel dz_ahead[kRing][4], x_ahead[kRing][2];  // row r of dz and row r + 1 of x are at (r - (first - 1)) % 3
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
      dz.load(dz_ahead[i]);
      x.load(x_ahead[i]);
    }
    const bool all = dz.there == 15;
    float value[kRing][2][kChannels] = {}, grad[kRing][2][kChannels] = {};  // row r is at (r - (first - 2)) % 3
    int y = at.y(first - 1);
#pragma unroll 1
    for (int from = first - 1; from <= last; from += kRing) {
#pragma unroll
      for (int i = 0; i < kRing; ++i, y += at.step) {
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
        dz.load(dz_ahead[i]);
        x.load(x_ahead[i]);
        const auto add_row = [&](auto whole) {
          constexpr bool kWhole = decltype(whole)::value;
#pragma unroll
          for (int ty = 0; ty < 3; ++ty) {
            if (!kWhole && (r - 1 + ty < first || r - 1 + ty >= last)) continue;
            const auto meet = [&](int column, int from_column) {
              taps.meet(
                  3 * ty + column + 2 - from_column, value[(i + ty) % kRing][column], row[from_column], grad[(i + ty) % kRing][column]);
            };
            meet(0, 1);
            if (kWhole || dz.has(0)) meet(0, 0);
            if (kWhole || dz.has(2)) {
              meet(0, 2);
              meet(1, 1);
              meet(1, 2);
            }
            if (kWhole || dz.has(3)) meet(1, 3);
          }
        };
        if (all && r > first && r + 1 < last)
          add_row(std::true_type{});
        else if (unsigned(y) < unsigned(dz.steps.height))
          add_row(std::false_type{});
        if (r > first) {
          dx.store(0, Pixel::of(grad[i][0]));
          if (dx.has(1)) dx.store(1, Pixel::of(grad[i][1]));
          dx.advance();
        }
      }
    }
  }

  // Stride 2: for a pixel of dz four of x, by parity of row and column. An even one meets the middle tap, an odd one the two around it.
  static MVIT3_DEVICE void walk_down_quarters(
      Taps& taps, int first, int last, Strip<const T, 2>& dz, Strip<const T, 2>& x, Strip<T, 2>& dx) {
    Pixel dz_ahead[2], even_ahead[2], odd_ahead[2];
    float here[2][kChannels], below[2][kChannels];
    const auto load = [&] {
      dz.load(dz_ahead);
      x.load(even_ahead);
      x.load(odd_ahead);
    };
    dz.load(dz_ahead);
#pragma unroll
    for (int j = 0; j < 2; ++j) dz_ahead[j].to(below[j]);
    load();
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
      load();
      // One row of x and one of dz, by row `row` of the taps.
      const auto meet = [&](int row, const float (&values)[2][kChannels], const float (&gradients)[2][kChannels]) {
        taps.meet(3 * row + 1, values[0], gradients[0], grad[0]);
        if (x.has(1)) taps.meet(3 * row + 2, values[1], gradients[0], grad[1]);
        if (dz.has(1)) taps.meet(3 * row, values[1], gradients[1], grad[1]);
      };
      const auto store = [&] {
        dx.store(0, Pixel::of(grad[0]));
        if (dx.has(1)) dx.store(1, Pixel::of(grad[1]));
        dx.advance();
      };
      meet(1, even, here);
      store();
      if (2 * y + 1 >= x.steps.height) break;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) grad[0][c] = grad[1][c] = 0.0f;
      meet(2, odd, here);
      if (y + 1 < dz.steps.height) meet(0, odd, below);
      store();
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
        const auto *const from_dz = static_cast<const T*>(a.dz), *const from_x = static_cast<const T*>(a.x);
        const int top = Stride * at.y(first), bottom = Stride * at.y(last), left = Stride * at.x(0);
        constexpr bool around = Stride == 1;
        Strip<const T, around ? 4 : 2> dz(
            a.out, from_dz, m.inputs, channel, at, at.y(around ? first - 1 : first), at.y(last) + 1, at.x(around ? -1 : 0));
        Strip<const T, 2> x(a.in, from_x, m.inputs, channel, at, top, bottom, left);
        Strip<T, 2> dx(a.in, static_cast<T*>(a.dx), m.inputs, channel, at, top, bottom, left);
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
