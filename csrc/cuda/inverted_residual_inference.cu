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
  // A step of 64 channels is for kernels whose weights fit shared memory.
  using Front = Expansion<T, Stride, Channels, Channels == kChunk ? kMostInputs : kMostInputs / 2>;
  using Step = typename Front::Step;
  using Tile = OutputTile<Stride>;
  static constexpr int kBlocksAtOnce = 2;
  static constexpr int kPixels = Tile::kHeight * Tile::kWidth, kPitch = Step::kProjectPitch,
                       kGroups = Channels / kChunk;
  using Own = TapWarps<Stride, kGroups>;
  // The sums of a tile are this many output channels; a launch has a slice of blocks for each of them. Warps stand 4 x
  // 2 or 2 x 4, and have every second or fourth 16 of the channels. Where more expanded channels are in work, there are
  // fewer registers for sums.
  static constexpr int kRowWarps = Stride == 1 ? 4 : 2, kColumnWarps = kWarps / kRowWarps;
  static constexpr int kRowBlocks = kPixels / (16 * kRowWarps), kColumnBlocks = Channels > kChunk ? 4
                                                                                : Stride == 1     ? 8
                                                                                                  : 10;
  static constexpr int kSlice = 8 * kColumnBlocks * kColumnWarps;
  // Whether sums leave no register for what could be kept from step to step.
  static constexpr bool kTight = Stride == 1 && Channels == kChunk;

  static MVIT3_BOTH
  int columns(const Arguments& a) {
    const int outputs = round_up(a.front.maps.outputs, 16);
    return outputs < kSlice ? outputs : kSlice;
  }

  struct Layout {
    Carver carver;
    typename Front::Layout front;
    int filtered, diagonals, middle, project, last, zeros, arrivals;
    MVIT3_BOTH
    explicit Layout(const Arguments& a)
        : front(carver), filtered(carver.take(kPixels * kPitch, sizeof(T))),
          diagonals(carver.take(Step::kDiagonals, 1)), middle(carver.take(Step::kNorm, 1)),
          project(carver.take(columns(a), Step::kOutput)), last(carver.take(columns(a), sizeof(Affine))),
          zeros(carver.take(kTapWords, sizeof(uint32_t))), arrivals(carver.take(2, sizeof(Arrival))) {}
  };

  static MVIT3_BOTH
  int64_t tiles(const Arguments& a) { return TileWalk<Stride>::tiles(a.front.maps); }

  const Arguments& a;
  const Maps& m;
  const Front front;
  const Matrix<T> filtered, project;
  Added* const middle;
  Affine* const last;
  uint32_t* const diagonals;
  Arrival* const arrivals;
  const TapsFrom taps;
  // What is added to the lane's outputs of the taps, and where they go; its rows of the factors of the projection.
  const Places of_taps, of_project;

  MVIT3_DEVICE
  Inference(const Arguments& a, const Layout& layout)
      : a(a), m(a.front.maps), front(a.front, layout.front), filtered{Front::template at<T>(layout.filtered), kPitch},
        project{Front::template at<T>(layout.project), kPitch}, middle(Front::template at<Added>(layout.middle)),
        last(Front::template at<Affine>(layout.last)), diagonals(Front::template at<uint32_t>(layout.diagonals)),
        arrivals(Front::template at<Arrival>(layout.arrivals)),
        taps(taps_from<Stride>(front, diagonals, Front::template at<uint32_t>(layout.zeros))),
        of_taps(places_of_taps()), of_project(places_of_project()) {
    for (int i = thread(); i < kTapWords; i += kThreads) Front::template at<uint32_t>(layout.zeros)[i] = 0;
    const Affine* const norms = reinterpret_cast<const Affine*>(a.front.packed.last) + slice() * kSlice;
    for (int i = thread(); i < columns(a); i += kThreads)
      last[i] = slice() * kSlice + i < m.outputs ? norms[i] : Affine{0.0f, 0.0f};
  }

  // On sm_80 these do not fit either.
  static MVIT3_DEVICE
  bool keeps_places() { return !kTight || copies_runs(); }
  MVIT3_DEVICE
  Places places_of_taps() const {
    return {
        shared_address(middle + Own::channel() / 2),
        shared_address(filtered.row(16 * Own::strip() + lane() / 4) + Own::channel())};
  }
  MVIT3_DEVICE
  Places places_of_project() const {
    return {operand_a<T, Rows::kOwn>(filtered, first_row(), kPixels), operand_b<T, Rows::kOwn>(project, column(0))};
  }

  using Sums = float[kRowBlocks][kColumnBlocks][4];

  static MVIT3_DEVICE
  int first_row() { return warp() % kRowWarps * 16 * kRowBlocks; }
  // The first channel of block j of a warp's sums, and how far it is from that of block 0.
  static MVIT3_DEVICE
  int column(int j) { return 16 * (warp() / kRowWarps) + next(j); }
  static MVIT3_BOTH
  constexpr int next(int j) { return 16 * (j / 2 * kColumnWarps) + j % 2 * 8; }

  // Of the warp's pairs of blocks of outputs.
  MVIT3_DEVICE
  int pairs() const { return (columns(a) / 16 - warp() / kRowWarps + kColumnWarps - 1) / kColumnWarps; }

  // The parameters of a step of channels.
  MVIT3_DEVICE
  const char* step(int number) const { return a.front.packed.steps + int64_t(number) * a.front.packed.bytes; }

  // The parameters of a step are copied in two parts, by one thread where the device copies runs, else by all. Nobody
  // may read any more: taps and what is added behind them;
  // Spills where registers are few.
  static MVIT3_DEVICE
  bool runs() { return copies_runs() && !kTight; }
  MVIT3_DEVICE
  void load_taps(int number) const {
    if (!runs()) return mvit3::copy_run<Step::kTaps>(diagonals, step(number) + a.front.packed.expansion);
    if (thread() != 0) return;
    expect(arrivals[0], Step::kTaps);
    copy_run(diagonals, step(number) + a.front.packed.expansion, Step::kTaps, arrivals[0]);
  }
  // the weights of the projection, and the expansion's parameters of step `next`.
  MVIT3_DEVICE
  void load_weights(int number, int next) const {
    if (!runs()) {
      load_project(step(number));
      front.load_parameters(step(next));
    } else if (thread() == 0) {
      expect(arrivals[1], projection_bytes() + front.parameters());
      copy_run(project.data, step(number) + projection_from(), projection_bytes(), arrivals[1]);
      copy_run(front.norm, step(next), front.parameters(), arrivals[1]);
    }
  }
  // Behind it a part is there, of a phase of `Arrival`.
  MVIT3_DEVICE
  void arrives(int part, int phase) const {
    if (!runs() || part == 1) copies_arrive();  // with those of x
    if (runs())
      synchronize_after(arrivals[part], phase);
    else
      synchronize();
  }

  MVIT3_DEVICE
  void load_project(const char* step) const {
    const int own = 16 * thread();
    const char* from = step + projection_from() + own;
    char* to = reinterpret_cast<char*>(project.data) + own;
    const char* const end = reinterpret_cast<char*>(project.data) + projection_bytes();
#pragma unroll 1
    for (; to < end; to += 16 * kThreads, from += 16 * kThreads) copy_16(to, from);
  }
  MVIT3_DEVICE
  int projection_from() const { return a.front.packed.expansion + Step::kTaps + slice() * kSlice * Step::kOutput; }
  // Of the slice.
  MVIT3_DEVICE
  int projection_bytes() const {
    const int left = round_up(m.outputs, 16) - slice() * kSlice;
    return (left < kSlice ? left : kSlice) * Step::kOutput;
  }

  // `filtered` becomes the activated outputs of the taps.
  MVIT3_DEVICE
  void filter() const {
    constexpr int kStrips = Own::kStrips, kAtOnce = Own::kBlocks < 2 || kTight ? 1 : 2;
    const Added* const first = reinterpret_cast<const Added*>((keeps_places() ? of_taps : places_of_taps()).first());
    const auto added = [&](int block) { return first[block]; };
    mvit3::filter<T, Stride, kStrips, kAtOnce, Own::kBlocks>(
        taps, [&](int block) { return Step::kFolds ? added(block) : Added{}; },
        [&](int block, float (&out)[kStrips][kAtOnce][4], uint32_t seen) {
          if (!Step::kFolds)
#pragma unroll
            for (int i = 0; i < kStrips * kAtOnce; ++i)
              normalise(out[i / kAtOnce][i % kAtOnce], added(block + i % kAtOnce));
          activate_halved<4 * kAtOnce * kStrips>(&out[0][0][0], a.front.act);
          T* const to = reinterpret_cast<T*>((keeps_places() ? of_taps : places_of_taps()).second());
#pragma unroll
          for (int i = 0; i < 2 * kStrips; ++i) {
            Run<kAtOnce> run;
#pragma unroll
            for (int b = 0; b < kAtOnce; ++b)
              run.word[b] = pack<T>(out[i / 2][b][i % 2 * 2], out[i / 2][b][i % 2 * 2 + 1]);
            *reinterpret_cast<Run<kAtOnce>*>(to + 8 * i * kPitch + 2 * block) = run;
            seen = mark(run.word[0], run.word[kAtOnce - 1], seen, T{});
          }
          return seen;
        });
  }

  // sum += filtered project^T of a step, of `Pairs` pairs of blocks of outputs, or as many as the warp has.
  template <int Pairs>
  MVIT3_DEVICE
  void multiply_project(Sums& sum, int count) const {
    if (count < Pairs) {
      if constexpr (Pairs > 1) multiply_project<Pairs - 1>(sum, count);
      return;
    }
    const Places from = keeps_places() ? of_project : places_of_project();
    const SharedAddress from_a = shared_address(from.first()), from_b = shared_address(from.second());
    constexpr int kRow = kPitch * int(sizeof(T));
#pragma unroll
    for (int k = 0; k < 2 * Channels; k += 32) {
      uint32_t part_a[kRowBlocks][4];
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) load_matrices(part_a[i], from_a + 16 * i * kRow + k);
#pragma unroll
      for (int j = 0; j < 2 * Pairs; j += 2) {
        uint32_t part_b[4];
        load_matrices(part_b, from_b + next(j) * kRow + k);
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i) {
          multiply_add(sum[i][j], part_a[i], part_b[0], part_b[1], T{});
          multiply_add(sum[i][j + 1], part_a[i], part_b[2], part_b[3], T{});
        }
      }
    }
  }

  // The sums of a tile begin with what the last norm adds, where its scale is part of the weights.
  MVIT3_DEVICE
  void begin_sums(Sums& sum) const {
    if (!Step::kFolds) return clear(sum);
    const Affine* const own = last + column(0) + lane() % 4 * 2;
    const int count = pairs();
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      if (j / 2 >= count) break;
      const AffinePair norm = *reinterpret_cast<const AffinePair*>(own + next(j));
#pragma unroll
      for (int i = 0; i < 4 * kRowBlocks; ++i) sum[i / 4][j][i % 4] = i % 2 ? norm.second.shift : norm.first.shift;
    }
  }

  // Whether the residual is in the sums from the start: x is in shared memory, and the last norm's scale in the
  // weights.
  static constexpr bool kAddsEarly = Stride == 1 && Step::kFolds && Front::kWhole;

  // sum += x of the tile's outputs, as a product with the identity.
  MVIT3_DEVICE
  void add_residual(Sums& sum) const {
    const int l = lane(), count = pairs();
    const T* const own = front.x.row(Tile::corner(first_row() + l % 16) + Tile::kInWidth + 1) + slice() * kSlice +
                         column(0) + l / 16 * 8;
    const SharedAddress from = shared_address(own);
    const uint32_t one = l % 4 != l / 8 ? 0 : l / 4 % 2 ? pack<T>(0.0f, 1.0f) : pack<T>(1.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < kColumnBlocks; j += 2) {
      if (j / 2 >= count) break;
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        uint32_t part[4];
        load_matrices(part, from + (i * Tile::kInWidth * Front::kPitch + next(j)) * int(sizeof(T)));
        multiply_add(sum[i][j], part[0], part[1], one, T{});
        multiply_add(sum[i][j + 1], part[2], part[3], one, T{});
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
    const int top = first_row() / Tile::kWidth, left = first_row() % Tile::kWidth + lane() / 4;
    const int rows = stop.rows - top, columns_left = stop.columns - left;
    // In y, and in x, where it is added.
    const int64_t place =
        (stop.output + int64_t(top * m.out_width + left) * m.dilation) * m.outputs + (Pairs ? channel : 0);
    T* const first = static_cast<T*>(a.y) + place;
    const T* const first_x = static_cast<const T*>(a.front.x) + place;
    const int pixel = m.dilation * m.outputs;
    const bool add = Stride == 1 && !kAddsEarly && a.residual;
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
      // Eight outputs of a row of the tile: half a row, or all of one.
      const int y = 8 * i / Tile::kWidth, x = 8 * i % Tile::kWidth;
      if (y >= rows || x >= columns_left) continue;
      const int64_t next_pixel = int64_t(y * m.out_width + x) * pixel;
      T* const to = first + next_pixel;
      const T* const from = first_x + next_pixel;
      uint32_t more[kColumnBlocks];
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
        more[j] = 0;
        if (!add || next(j) >= most) continue;
        if (Pairs) {
          more[j] = *reinterpret_cast<const uint32_t*>(from + next(j));
        } else {
          const Pair pair = load_pair(from, channel + next(j), m.outputs);
          more[j] = pack<T>(pair.first, pair.second);
        }
      }
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
        if (next(j) >= most) continue;
        const float* const product = &sum[i / 2][j][i % 2 * 2];
        Pair value{product[0], product[1]};
        if (!Step::kFolds) {
          const AffinePair norm = *reinterpret_cast<const AffinePair*>(last + own + next(j));
          value = {
              norm.first.scale * value.first + norm.first.shift, norm.second.scale * value.second + norm.second.shift};
        }
        if (add) {
          const Pair pair = unpack<T>(more[j]);
          value = {value.first + pair.first, value.second + pair.second};
        }
        const uint32_t bits = pack<T>(value.first, value.second);
        if (Pairs)
          *reinterpret_cast<uint32_t*>(to + next(j)) = bits;
        else
          store_pair(to, channel + next(j), m.outputs, bits);
      }
    }
  }

  MVIT3_DEVICE
  void over_tiles() const {
    const int64_t count = tiles(a), end = count * (block() + 1) / blocks();
    const int64_t tile = count * block() / blocks();
    const int start = int(tile - end);  // stops are counted up to 0, in one register
    const int steps = (m.expanded + Channels - 1) / Channels;
    front.begin(tile, start);
    if (runs() && thread() == 0) {
      prepare(arrivals[0]);
      prepare(arrivals[1]);
      expect(arrivals[1], front.parameters());
      copy_run(front.norm, step(0), front.parameters(), arrivals[1]);
    }
    synchronize();
    if (!runs()) front.load_parameters(step(0));
    if (front.whole()) front.load_x(front.stop(start), 0);
    arrives(1, 0);
    int odd = 0;  // whether an odd number of steps is done
#pragma unroll 1
    for (int at = start; at < 0; ++at) {
      const Stop& stop = front.stop(at);
      const bool border = stop.outside != 0;
      Sums sum;
      begin_sums(sum);
      if (kAddsEarly && a.residual) add_residual(sum);
#pragma unroll 1
      for (int number = 0; number < steps; ++number) {
        load_taps(number);
        if (number == 0) front.advance(at + 1);
        front.expand(stop, step(number), kTight ? stop.outside != 0 : border);
        arrives(0, odd);
        odd ^= 1;

        const bool last = number + 1 == steps;
        load_weights(number, last ? 0 : number + 1);
        if (last && at + 1 < 0 && front.whole()) front.load_x(front.stop(at + 1), 0);
        filter();
        arrives(1, odd);
        multiply_project<kColumnBlocks / 2>(sum, pairs());
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

template <typename T, int Stride>
using Narrow = Inference<T, Stride, kChunk>;
template <typename T, int Stride>
using Wide = Inference<T, Stride, 2 * kChunk>;

// Half as many steps are faster, where their sums fit the registers and the rest fits shared memory twice.
template <typename K>
bool fits(const InferenceArguments& a) {
  constexpr int kMostShared = 99 * 1024;  // of a block, on a device that has the least
  return a.front.maps.inputs <= kMostInputs / 2 && a.front.maps.expanded > kChunk &&
         a.front.maps.outputs <= K::kSlice && typename K::Layout(a).carver.bytes <= kMostShared;
}

// Calls f with the kernel for a call.
template <typename F>
void choose_inference(const InferenceArguments& a, const F& f) {
  choose<Wide>(a.bfloat16, a.stride, [&](auto kernel) {
    if (fits<typename decltype(kernel)::type>(a)) return f(kernel);
    choose<Narrow>(a.bfloat16, a.stride, f);
  });
}

int64_t inference_workspace(const InferenceArguments& a) {
  int64_t floats = 0;
  choose_inference(a, [&](auto kernel) { floats = packed_floats<typename decltype(kernel)::type::Step>(a.front); });
  return floats;
}

void inference(const InferenceArguments& a, void* stream) {
  choose_inference(a, [&](auto kernel) {
    using K = typename decltype(kernel)::type;
    const int shared = typename K::Layout(a).carver.bytes, slices = (a.front.maps.outputs + K::kSlice - 1) / K::kSlice;
    InferenceArguments ready = a;
    PackArguments parameters{};
    parameters.project = a.project;
    parameters.middle = a.middle;
    parameters.last = a.last;
    parameters.folds = true;
    pack_into<typename K::Type, typename K::Step>(ready.front, parameters, a.workspace, stream);
    launch<K>(ready, blocks_for<K>(a, shared), slices, shared, stream);
  });
}

}  // namespace mvit3
