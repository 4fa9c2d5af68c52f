// What the forward kernels of inverted_residual share: the packed parameters, and the choice of a kernel.
//
// A call is a small kernel that packs the parameters, where they are copied many times, then one whose blocks walk each
// over a run of tiles. Sums over the whole map are kept per block and added up by whoever needs them, so that results
// repeat from run to run.
#pragma once

#include "expansion.h"
#include "launch.h"
#include "taps.h"

namespace mvit3 {

struct PackArguments {
  Values expand, depthwise, project;
  Norm norm, middle, last;
  bool folds;  // all three norms; else the first one alone
  int act, inputs, expanded, outputs, slice;
  Packed to;
};

// Packs the parameters as kernels of `Steps` copy them, a word to a thread. Reads each parameter a few times and writes
// each packed number once.
template <typename T, typename Steps>
struct Pack {
  using Arguments = PackArguments;
  static constexpr int kBlocksAtOnce = 1, kChannels = Steps::kChannels;

  const Arguments& a;

  static MVIT3_BOTH
  int64_t count(const Arguments& a) {
    return ceil_div(a.expanded, kChannels) * (a.to.bytes / 4) + (a.folds ? a.outputs : 0);
  }

  MVIT3_DEVICE
  Affine norm_of(const Norm& norm, int c, int count) const {
    return c < count ? affine_at<T>(norm, c) : Affine{0.0f, 0.0f};
  }
  MVIT3_DEVICE
  Affine first(int c) const { return halved(norm_of(a.norm, c, a.expanded), a.act); }
  MVIT3_DEVICE
  Affine middle(int c) const { return a.folds ? halved(norm_of(a.middle, c, a.expanded), a.act) : Affine{1.0f, 0.0f}; }

  // Two neighbouring weights of a row, times the scale that is folded into them.
  MVIT3_DEVICE
  uint32_t weights(const Values& values, int row, int rows, int column, int columns, float scale) const {
    const auto one = [&](int c) {
      return row < rows && c < columns ? scale * value_at<T>(values, int64_t(row) * columns + c) : 0.0f;
    };
    return pack<T>(one(column), one(column + 1));
  }

  // A word of what is added to channels of a product, `Added`.
  MVIT3_DEVICE
  static uint32_t added(const Affine& even, const Affine& odd, int part) {
    const float folded = part % 2 ? odd.shift : even.shift, of_pair = part < 2 ? even.scale : odd.scale,
                shift = part < 2 ? even.shift : odd.shift;
    return bits_of(Steps::kFolds ? folded : part % 2 ? shift : of_pair);
  }

  // A word of the diagonals of the step from `channel` on.
  MVIT3_DEVICE
  uint32_t tap(int channel, int at) const {
    const int row = at / kTapWords, j = at % kTapWords / kBlockTaps, word = at % kBlockTaps;
    const int c = channel + row / 8 * kChunk + 8 * (row % 8 / 2) + 2 * j + row % 2;
    const int number = word < 6 ? word / 2 * 3 + word % 2 : 3 * (word - 6) + 2;
    if (c >= a.expanded || number > 8) return 0;
    const float tap = value_at<T>(a.depthwise, int64_t(c) * 9 + number) * (Steps::kFolds ? middle(c).scale : 1.0f);
    return row % 2 ? pack<T>(0.0f, tap) : pack<T>(tap, 0.0f);
  }

  // A word of what is added to its expansion, and of the expansion's weights.
  MVIT3_DEVICE
  uint32_t norm(int channel, int at) const {
    return added(first(channel + at / 4 * 2), first(channel + at / 4 * 2 + 1), at % 4);
  }
  MVIT3_DEVICE
  uint32_t expansion(int channel, int at) const {
    constexpr int kWide = Steps::kPitch / 2;
    const int row = at / kWide, word = at % kWide;
    const int c = channel + row % kChannels, input = row / kChannels * a.slice + 2 * word;
    if (2 * word >= a.slice) return 0;
    return weights(a.expand, c, a.expanded, input, a.inputs, Steps::kFolds ? first(c).scale : 1.0f);
  }

  // Word `at` of the step from `channel` on.
  MVIT3_DEVICE
  uint32_t word(int channel, int at) const {
    constexpr int kDeep = Steps::kProjectPitch / 2;
    const int expansion = a.to.expansion / 4;
    if (at < Steps::kNorm / 4) return norm(channel, at);
    if (at < expansion) return this->expansion(channel, at - Steps::kNorm / 4);
    at -= expansion;
    if (at < Steps::kDiagonals / 4) return tap(channel, at);
    at -= Steps::kDiagonals / 4;
    if (at < Steps::kNorm / 4) return added(middle(channel + at / 4 * 2), middle(channel + at / 4 * 2 + 1), at % 4);
    at -= Steps::kNorm / 4;
    const int row = at / kDeep, column = at % kDeep * 2;
    if (column >= kChannels || row >= a.outputs) return 0;
    const float scale = Steps::kFolds ? affine_at<T>(a.last, row).scale : 1.0f;
    return weights(a.project, row, a.outputs, channel + column, a.expanded, scale);
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const int64_t i = int64_t(block()) * kThreads + thread(), words = a.to.bytes / 4;
    const int64_t last = ceil_div(a.expanded, kChannels) * words;
    if (i >= count(a)) return;
    if (i < last) {
      reinterpret_cast<uint32_t*>(const_cast<char*>(a.to.steps))[i] =
          Pack{a}.word(int(i / words) * kChannels, int(i % words));
    } else {
      reinterpret_cast<Affine*>(const_cast<float*>(a.to.last))[i - last] = affine_at<T>(a.last, int(i - last));
    }
  }
};

// Where the packed parameters of a kernel lie in `workspace`, and how many floats they are.
template <typename Steps>
Packed packed_in(const ExpansionArguments& front, float* workspace, int64_t* floats) {
  const Maps& m = front.maps;
  const int slices = (m.inputs + front.slice - 1) / front.slice, bytes = Steps::bytes(slices, m.outputs);
  const int64_t steps = ceil_div(m.expanded, Steps::kChannels) * (bytes / 4);
  *floats = steps + round_up(2 * m.outputs, 4);
  return {reinterpret_cast<const char*>(workspace), workspace + steps, bytes, Steps::expansion(slices)};
}

template <typename Steps>
int64_t packed_floats(const ExpansionArguments& front) {
  int64_t floats;
  packed_in<Steps>(front, nullptr, &floats);
  return floats;
}

// The part of the arguments that a call without a projection has.
MVIT3_BOTH
PackArguments front_to_pack(const ExpansionArguments& front) {
  PackArguments arguments{};
  arguments.expand = front.expand;
  arguments.depthwise = front.depthwise;
  arguments.norm = front.norm;
  arguments.inputs = front.maps.inputs;
  arguments.expanded = front.maps.expanded;
  arguments.slice = front.slice;
  arguments.act = front.act;
  arguments.to = front.packed;
  return arguments;
}

// Packs the parameters of a call into its workspace; `last`: where norms are folded, those behind the expansion and the
// projection.
template <typename T, typename Steps>
void pack_into(ExpansionArguments& front, const PackArguments& last, float* workspace, void* stream) {
  int64_t floats;
  front.packed = packed_in<Steps>(front, workspace, &floats);
  PackArguments arguments = front_to_pack(front);
  if (last.folds) {
    arguments.project = last.project;
    arguments.middle = last.middle;
    arguments.last = last.last;
    arguments.folds = true;
    arguments.outputs = front.maps.outputs;
  }
  using Kernel = Pack<T, Steps>;
  launch<Kernel>(arguments, int(ceil_div(Kernel::count(arguments), kThreads)), 1, 0, stream);
}

// ---- The kernel of a call

template <typename K>
struct Chosen {
  using type = K;
};

// Calls f with the kernel for a type of map and a stride.
template <template <typename, int> class Kernel, typename F>
auto choose(bool bfloat16, int stride, const F& f) {
  if (bfloat16) return stride == 1 ? f(Chosen<Kernel<BFloat16, 1>>{}) : f(Chosen<Kernel<BFloat16, 2>>{});
  return stride == 1 ? f(Chosen<Kernel<Float16, 1>>{}) : f(Chosen<Kernel<Float16, 2>>{});
}

// As many blocks as the device runs at once, at most one for each tile.
template <typename K>
int blocks_for(const typename K::Arguments& a, int shared) {
  const int64_t tiles = K::tiles(a), most = resident_blocks<K>(shared);
  return int(tiles < most ? tiles : most);
}

}  // namespace mvit3
