// inverted_residual on tiles in shared memory (identity G of the design), inference: only x is read and y written.

#include "inverted_residual.h"

namespace mvit3 {

// y = last(act(middle(depthwise * act(norm(x expand^T)))) project^T), + x where `residual`; the norms folded.
//
// On each tile a block walks over the expanded channels, `Channels` at a time; weights and tile of the step to come are
// copied while the taps are applied. A step has two barriers: one behind the expansion, one behind the taps.
//
// Reads x (B, H, W, inputs) once for each tile of y, with a border of one pixel (more than 128 inputs once for each
// step of a tile) and, where it is added, once more; the packed parameters once for each tile. Writes y (B, H', W',
// outputs) once. With more outputs than kSlice each slice of blocks does all but the projection again.
template <typename T, int Stride, int Channels>
struct Inference {
  using Arguments = InferenceArguments;
  using Type = T;
  using Front = Expansion<T, Stride, Channels>;
  using Tile = OutputTile<Stride>;
  static constexpr int kBlocksAtOnce = 2;
  static constexpr int kPixels = Tile::kHeight * Tile::kWidth, kPitch = Channels + 8, kGroups = Channels / kChunk;
  using Own = TapWarps<Stride, kGroups>;
  // The sums of a tile are this many output channels; a launch has a slice of blocks for each of them. Warps stand 4 x
  // 2 or 2 x 4, and have every second or fourth 16 of the channels. Where more expanded channels are in work, there are
  // fewer registers for sums.
  static constexpr int kRowWarps = Stride == 1 ? 4 : 2, kColumnWarps = kWarps / kRowWarps;
  static constexpr int kRowBlocks = kPixels / (16 * kRowWarps), kColumnBlocks = Channels > kChunk ? 4
                                                                                : Stride == 1     ? 8
                                                                                                  : 12;
  static constexpr int kSlice = 8 * kColumnBlocks * kColumnWarps;

  static MVIT3_BOTH
  int columns(const Arguments& a) {
    const int outputs = round_up(a.front.maps.outputs, 16);
    return outputs < kSlice ? outputs : kSlice;
  }

  struct Layout {
    Carver carver;
    typename Front::Layout front;
    int filtered, project, middle, last, diagonals;
    MVIT3_BOTH
    explicit Layout(const Arguments& a)
        : front(carver, a.front.slice), filtered(carver.take(kPixels * kPitch, sizeof(T))),
          project(carver.take(columns(a) * kPitch, sizeof(T))), middle(carver.take(Channels, sizeof(Affine))),
          last(carver.take(columns(a), sizeof(Affine))),
          diagonals(carver.take((kGroups * 8 + 1) * kTapWords, sizeof(uint32_t))) {}
  };

  static MVIT3_BOTH
  int64_t tiles(const Arguments& a) { return TileWalk<Stride>::tiles(a.front.maps); }

  const Arguments& a;
  const Maps& m;
  const Front front;
  const Matrix<T> filtered, project;
  Affine *const middle, *const last;
  uint32_t* const diagonals;

  MVIT3_DEVICE
  Inference(const Arguments& a, const Layout& layout)
      : a(a), m(a.front.maps), front(a.front, layout.front), filtered{Front::template at<T>(layout.filtered), kPitch},
        project{Front::template at<T>(layout.project), kPitch}, middle(Front::template at<Affine>(layout.middle)),
        last(Front::template at<Affine>(layout.last)), diagonals(Front::template at<uint32_t>(layout.diagonals)) {
    for (int i = thread(); i < kTapWords; i += kThreads) diagonals[kGroups * 8 * kTapWords + i] = 0;
    const Affine* const norms = reinterpret_cast<const Affine*>(a.front.packed.last) + slice() * kSlice;
    for (int i = thread(); i < columns(a); i += kThreads)
      last[i] = slice() * kSlice + i < m.outputs ? norms[i] : Affine{0.0f, 0.0f};
  }

  using Sums = float[kRowBlocks][kColumnBlocks][4];

  static MVIT3_DEVICE
  int first_row() { return warp() % kRowWarps * 16 * kRowBlocks; }
  // The first channel of block j of a warp's sums.
  static MVIT3_DEVICE
  int column(int j) { return 16 * (warp() / kRowWarps + j / 2 * kColumnWarps) + j % 2 * 8; }

  // How many of the channels of a step there are: 32 less in the last one, maybe.
  MVIT3_DEVICE
  int channels(int chunk) const {
    const int left = a.front.packed.channels - chunk;
    return left < Channels ? left : Channels;
  }

  // The copies of a step. Nobody may read any more: weights and norm of the expansion;
  MVIT3_DEVICE
  void load_expansion(int chunk) const {
    if (front.whole()) front.load_weight(chunk, 0);
    load_floats(&front.affine[0].scale, a.front.packed.affine + 2 * chunk, 2 * channels(chunk), 0);
  }
  // taps and norm behind them;
  MVIT3_DEVICE
  void load_taps(int chunk) const {
    const Packed& p = a.front.packed;
    const int words = channels(chunk) * 9;
    const float* const from = static_cast<const float*>(p.diagonals) + int64_t(chunk) * 9;
    load_floats(reinterpret_cast<float*>(diagonals), from, words, 0);
    load_floats(&middle[0].scale, p.middle + 2 * chunk, 2 * channels(chunk), 5 * kWarp);
  }
  // the weights of the projection.
  MVIT3_DEVICE
  void load_project(int chunk, int first_output) const {
    constexpr int kAcross = Channels / 8;
    const Packed& p = a.front.packed;
    const int column = thread() % kAcross * 8;
    const T* const from = static_cast<const T*>(p.project) + chunk + column;
    const bool there = column < channels(chunk);
#pragma unroll 1
    for (int r = thread() / kAcross; r < columns(a); r += kThreads / kAcross)
      copy_16_or_zeros(
          there && first_output + r < m.outputs, project.row(r) + column,
          from + int64_t(first_output + r) * p.channels);
  }

  // `filtered` becomes the activated outputs of the taps.
  MVIT3_DEVICE
  void filter() const {
    constexpr int kStrips = Own::kStrips, kAtOnce = Own::kBlocks < 2 ? 1 : 2;  // four take too many registers
    const TapsFrom from = taps_from<Stride, kGroups>(front.expanded, diagonals, diagonals + kGroups * 8 * kTapWords);
    T* const to = filtered.row(16 * Own::strip() + lane() / 4) + Own::channel();
    const Affine* const norms = middle + Own::channel();
#pragma unroll
    for (int block = 0; block < Own::kBlocks; block += kAtOnce)
      mvit3::filter<T, Stride, kStrips, kAtOnce>(from, block, [&](float (&out)[kStrips][kAtOnce][4]) {
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b) {
          const AffinePair norm = *reinterpret_cast<const AffinePair*>(norms + 2 * (block + b));
#pragma unroll
          for (int i = 0; i < 4 * kStrips; ++i) {
            const Affine& n = i % 2 ? norm.second : norm.first;
            out[i / 4][b][i % 4] = n.scale * out[i / 4][b][i % 4] + n.shift;
          }
        }
        activate_halved<4 * kAtOnce * kStrips>(&out[0][0][0], a.front.act);
        uint32_t nothing = 0;
#pragma unroll
        for (int i = 0; i < 2 * kStrips; ++i) {
          Run<kAtOnce> run;
#pragma unroll
          for (int b = 0; b < kAtOnce; ++b) {
            run.word[b] = pack<T>(out[i / 2][b][i % 2 * 2], out[i / 2][b][i % 2 * 2 + 1]);
            nothing = add_nothing(run.word[b], nothing, T{});
          }
          *reinterpret_cast<Run<kAtOnce>*>(to + 8 * i * kPitch + 2 * block) = run;
        }
        return nothing;
      });
  }

  MVIT3_DEVICE
  void multiply_project(Sums& sum) const {
    const int most = columns(a);
    const SharedAddress from_a = operand_a<T, Rows::kOwn>(filtered, first_row(), kPixels),
                        from_b = operand_b<T, Rows::kOwn>(project, column(0));
#pragma unroll
    for (int k = 0; k < 2 * Channels; k += 32) {
      uint32_t part_a[kRowBlocks][4];
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) load_matrices(part_a[i], from_a + 16 * i * kPitch * int(sizeof(T)) + k);
#pragma unroll
      for (int j = 0; j < kColumnBlocks; j += 2) {
        if (column(j) >= most) break;  // the same for all lanes
        uint32_t part_b[4];
        load_matrices(part_b, from_b + 8 * j * kColumnWarps * kPitch * int(sizeof(T)) + k);
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i) {
          multiply_add(sum[i][j], part_a[i], part_b[0], part_b[1], T{});
          multiply_add(sum[i][j + 1], part_a[i], part_b[2], part_b[3], T{});
        }
      }
    }
  }

  // The sums of a warp's block of the tile through the last norm, and the residual, to y; `Pairs`: two channels at
  // once.
  template <bool Pairs>
  MVIT3_DEVICE
  void store(const Stop& stop, const Sums& sum) const {
    const int own = column(0) + lane() % 4 * 2, channel = slice() * kSlice + own;
    const int most = Pairs ? m.outputs - channel : columns(a) - own;
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
      const int output = first_row() + 8 * i + lane() / 4, y = output / Tile::kWidth, x = output % Tile::kWidth;
      if (y >= stop.rows || x >= stop.columns) continue;
      // In y, and in x, where it is added.
      const int64_t place = (stop.output + int64_t(y * m.out_width + x) * m.dilation) * m.outputs;
      T* const to = static_cast<T*>(a.y) + place + (Pairs ? channel : 0);
      const T* const from = static_cast<const T*>(a.front.x) + place + (Pairs ? channel : 0);
      const auto each = [&](auto add) {
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j) {
          const int next = column(j) - column(0);
          if (next >= most) break;
          const AffinePair norm = *reinterpret_cast<const AffinePair*>(last + own + next);
          const float* const product = &sum[i / 2][j][i % 2 * 2];
          const Pair more = add(next);
          const uint32_t bits = pack<T>(
              norm.first.scale * product[0] + norm.first.shift + more.first,
              norm.second.scale * product[1] + norm.second.shift + more.second);
          if (Pairs)
            *reinterpret_cast<uint32_t*>(to + next) = bits;
          else
            store_pair(to, channel + next, m.outputs, bits);
        }
      };
      if (!a.residual)
        each([](int) { return Pair{0.0f, 0.0f}; });
      else if (Pairs)
        each([&](int next) { return unpack<T>(*reinterpret_cast<const uint32_t*>(from + next)); });
      else
        each([&](int next) { return load_pair(from, channel + next, m.outputs); });
    }
  }

  MVIT3_DEVICE
  void over_tiles() const {
    const int64_t count = tiles(a), end = count * (block() + 1) / blocks();
    const int64_t tile = count * block() / blocks();
    const int start = int(tile - end);  // stops are counted up to 0, in one register
    front.begin(tile, start);
    synchronize();
    load_expansion(0);
    if (front.whole()) front.load_x(front.stop(start), 0);
    copies_arrive();
    synchronize();
#pragma unroll 1
    for (int at = start; at < 0; ++at) {
      const Stop& stop = front.stop(at);
      Sums sum;
      clear(sum);
#pragma unroll 1
      for (int chunk = 0; chunk < m.expanded; chunk += Channels) {
        load_taps(chunk);
        if (chunk == 0) front.advance(at + 1);
        front.expand(stop, chunk);
        copies_arrive();
        synchronize();

        load_project(chunk, slice() * kSlice);
        if (chunk + Channels < m.expanded) {
          load_expansion(chunk + Channels);
        } else if (at + 1 < 0) {
          load_expansion(0);
          if (front.whole()) front.load_x(front.stop(at + 1), 0);
        }
        filter();
        copies_arrive();
        synchronize();
        multiply_project(sum);
      }
      if (m.outputs % 2 == 0 && reinterpret_cast<uintptr_t>(a.front.x) % 4 == 0)  // y is aligned
        store<true>(stop, sum);
      else
        store<false>(stop, sum);
    }
  }

  static MVIT3_DEVICE
  void run(const Arguments& a) {
    const Inference inference(a, Layout(a));
    inference.over_tiles();
  }
};

int64_t inference_workspace(const InferenceArguments& a) { return packed_floats(a.front.maps); }

template <typename T, int Stride>
using Narrow = Inference<T, Stride, kChunk>;
template <typename T, int Stride>
using Wide = Inference<T, Stride, 2 * kChunk>;

// Half as many steps are faster, where their sums fit the registers and the rest fits shared memory twice.
template <typename K>
bool fits(const InferenceArguments& a) {
  constexpr int kMostShared = 99 * 1024;  // of a block, on a device that has the least
  return a.front.maps.expanded > kChunk && a.front.maps.outputs <= K::kSlice &&
         typename K::Layout(a).carver.bytes <= kMostShared;
}

template <typename K>
void infer(const InferenceArguments& a, void* stream) {
  const int shared = typename K::Layout(a).carver.bytes, slices = (a.front.maps.outputs + K::kSlice - 1) / K::kSlice;
  InferenceArguments ready = a;
  PackArguments parameters{};
  parameters.project = a.project;
  parameters.middle = a.middle;
  parameters.last = a.last;
  parameters.folds = true;
  pack_into<typename K::Type>(ready.front, parameters, a.workspace, stream);
  launch<K>(ready, blocks_for<K>(a, shared), slices, shared, stream);
}

void inference(const InferenceArguments& a, void* stream) {
  choose<Wide>(a.bfloat16, a.stride, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    if (fits<K>(a)) return infer<K>(a, stream);
    choose<Narrow>(a.bfloat16, a.stride, [&](auto other) { infer<typename decltype(other)::type>(a, stream); });
  });
}

}  // namespace mvit3
