// What the kernels of inverted_residual share: the packed parameters, and the choice of a kernel.
//
// A call is a small kernel that packs the parameters (they are copied many times), then one whose blocks walk each over
// a run of tiles. Sums over the whole map are kept per block in a workspace and added up by a last, small kernel, so
// that results repeat from run to run.
#pragma once

#include <utility>

#include "expansion.h"
#include "launch.h"
#include "taps.h"

namespace mvit3 {

struct PackArguments {
  Values expand, depthwise, project;
  Norm norm, middle, last;
  bool folds;  // the middle and the last norm too
  int act;
  int inputs, expanded, outputs;
  Packed to;
};

// The parameters as `Packed` says: rounded to T, padded with zeros; with `folds` the
// middle and the last norm's scale and shift are written too. Reads each parameter once and writes each
// packed number once, a number or a channel to a thread.
template <typename T>
struct Pack {
  using Arguments = PackArguments;
  static constexpr int kBlocksAtOnce = 1;

  static MVIT3_BOTH
  int64_t count(const Arguments& a) {
    return int64_t(a.to.channels) * (a.to.inputs + 1 + (a.project.data ? a.outputs : 0)) + (a.folds ? a.outputs : 0);
  }

  static MVIT3_DEVICE
  void pack_channel(const Arguments& a, int c) {
    const bool there = c < a.expanded;
    const Affine none{0.0f, 0.0f};
    const Affine norm = there ? affine_at<T>(a.norm, c) : none,
                 middle = there && a.folds ? affine_at<T>(a.middle, c) : none;
    reinterpret_cast<Affine*>(const_cast<float*>(a.to.affine))[c] = halved(norm, a.act);
    reinterpret_cast<Affine*>(const_cast<float*>(a.to.middle))[c] = halved(middle, a.act);
    float* const taps = const_cast<float*>(a.to.taps) + c / kChunk * 9 * kChunk + c % kChunk;
    uint32_t* const diagonals = static_cast<uint32_t*>(const_cast<void*>(a.to.diagonals)) + diagonal_of(c);
    for (int i = 0; i < 9; ++i) {
      const float tap = there ? value_at<T>(a.depthwise, int64_t(c) * 9 + i) : 0.0f;
      taps[i * kChunk] = tap;
      diagonals[i * 4] = c % 2 ? pack<T>(0.0f, tap) : pack<T>(tap, 0.0f);
    }
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const int64_t i = int64_t(block()) * kThreads + thread(), weights = int64_t(a.to.channels) * a.to.inputs;
    if (i >= count(a)) return;
    if (i < weights) {
      const int64_t row = i / a.to.inputs, column = i % a.to.inputs;
      const bool there = row < a.expanded && column < a.inputs;
      static_cast<T*>(const_cast<void*>(a.to.expand))[i] =
          from_float<T>(there ? value_at<T>(a.expand, row * a.inputs + column) : 0.0f);
    } else if (i < weights + a.to.channels) {
      pack_channel(a, int(i - weights));
    } else if (i < weights + a.to.channels * int64_t(1 + a.outputs)) {
      const int64_t at = i - weights - a.to.channels, row = at / a.to.channels, column = at % a.to.channels;
      static_cast<T*>(const_cast<void*>(a.to.project))[at] =
          from_float<T>(column < a.expanded ? value_at<T>(a.project, row * a.expanded + column) : 0.0f);
    } else {
      const int c = int(i - weights - a.to.channels * int64_t(1 + a.outputs));
      reinterpret_cast<Affine*>(const_cast<float*>(a.to.last))[c] = affine_at<T>(a.last, c);
    }
  }
};

// Where the packed parameters lie in `workspace`, and how many floats they are.
inline Packed packed_in(const Maps& m, float* workspace, int64_t* floats) {
  const int channels = round_up(m.expanded, kChunk), inputs = round_up(m.inputs, 16);
  int64_t at = 0;
  const auto take = [&](int64_t count) { return workspace + std::exchange(at, at + count); };  // all multiples of 4
  const Packed packed{
      take(int64_t(channels) * inputs / 2),
      take(int64_t(channels) * m.outputs / 2),
      take(2 * channels),
      take(9 * channels),
      take(9 * channels),
      take(2 * channels),
      take(round_up(2 * m.outputs, 4)),
      channels,
      inputs};
  *floats = at;
  return packed;
}

inline int64_t packed_floats(const Maps& m) {
  int64_t floats;
  packed_in(m, nullptr, &floats);
  return floats;
}

// Packs the parameters of a call into its workspace, and gives back the rest of it.
template <typename T>
float* pack_into(ExpansionArguments& front, PackArguments arguments, float* workspace, void* stream) {
  const Maps& m = front.maps;
  int64_t floats;
  front.packed = packed_in(m, workspace, &floats);
  arguments.expand = front.expand;
  arguments.depthwise = front.depthwise;
  arguments.norm = front.norm;
  arguments.inputs = m.inputs;
  arguments.expanded = m.expanded;
  arguments.outputs = m.outputs;
  arguments.act = front.act;
  arguments.to = front.packed;
  launch<Pack<T>>(arguments, int(ceil_div(Pack<T>::count(arguments), kThreads)), 1, 0, stream);
  return workspace + floats;
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
