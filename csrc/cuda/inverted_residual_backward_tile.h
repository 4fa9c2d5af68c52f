// A tile of the backward kernel of inverted_residual: its places in the maps, its shared memory, and the copies.
#pragma once

#include "inverted_residual_backward.h"

namespace mvit3 {

template <typename T, int Stride, int Steps>
struct BackwardTile {
  using Arguments = BackwardPlan;
  using Type = T;
  using Pack = PackBackward<T, Stride, Steps>;
  using Parameters = StepParameters<T, Steps>;
  static constexpr bool kWide = Parameters::kWide;
  static constexpr int kBlocksAtOnce = 2, kStride = Stride;
  static constexpr int kHeight = 8, kWidth = 16, kPixels = kHeight * kWidth;  // a tile of x
  // The filtered pixels that it has a part in. Behind them in shared memory is a row for what is outside the map.
  static constexpr int kOutHeight = Stride == 1 ? kHeight + 2 : kHeight / 2 + 1,
                       kOutWidth = Stride == 1 ? kWidth + 2 : kWidth / 2 + 1;
  static constexpr int kOutPixels = kOutHeight * kOutWidth, kOutRows = (kOutPixels + 15) / 16 * 16;
  static constexpr int kInputs = 16 * Steps;  // at a time; but for wide ones these are all
  static constexpr int kPitch = kInputs + 8;
  static constexpr int kGroups = kChunk / 8;  // of 8 channels
  // Of n1 a warp has 16 x 16 numbers, over a share of the pixels, and a part of g1.
  static constexpr int kShares = kWide ? 0 : 4 / Steps;
  // What a block keeps of a channel: but for wide inputs four parts of 16 numbers of n1 and two of g1, of which the
  // first 8 of 16 channels have those of the other 8 too; and the pairs of taps, of two halves of the tile.
  static constexpr int kPart = 18, kFirstTap = kWide ? 0 : 4 * kPart, kHalf = Stride == 1 ? 2 * kPairs : 0,
                       kRow = kFirstTap + (Stride == 1 ? 4 : 2) * kPairs;

  static constexpr int kMostOutputs = (Stride == 1 ? 64 : 128) * (kWide ? 2 : 1);  // in shared memory at a time
  static MVIT3_BOTH
  int64_t tiles(const Arguments& a) {
    const Maps& m = a.front.maps;
    return tiles_of(m.batch, kHeight, kWidth, m.height, m.width, m.dilation);
  }
  // A tile, and its image in all maps: `result` is dx, or G of wide inputs. There are two in turns: one may be written
  // while the other is read.
  struct Tile {
    Place place;
    const T *x, *z, *dp;
    T* result;
    bool whole;  // nothing of it is outside the map
  };

  // Shared memory, in bytes from its start. What has a fixed size comes first.
  static MVIT3_BOTH
  constexpr int size(int pixels, int pitch) { return pixels * pitch * int(sizeof(T)); }
  static constexpr int kOfPixels = kPixels * kChunkPitch * int(sizeof(T));
  // z is not the first: its sums over pixels read a row above it, for a tap that is none.
  static constexpr int kX = 0, kValue = kX + (kWide ? 0 : kPixels * kPitch * int(sizeof(T))), kZ = kValue + kOfPixels,
                       kGradient = kZ + (kOutPixels + 1) * kChunkPitch * int(sizeof(T)),
                       kPlaces = kGradient + (kWide ? 0 : kOfPixels), kRows = kPlaces + kOutRows * 4,
                       kOwnPlaces = kRows + kOutRows * 2, kTile = kOwnPlaces + kPixels * 4, kStep = kTile + 160,
                       kProject = kStep + Parameters::kProject;
  // Behind the projection, where G of wide inputs passes through. Its last rows are read and not filled.
  static MVIT3_BOTH
  int first_dp(const Arguments& a) {
    const int project = Parameters::project(a.sizes.width);
    return kProject + (kWide && project < kOfPixels ? kOfPixels : project);
  }
  static MVIT3_BOTH
  int shared(const Arguments& a) { return first_dp(a) + size(kOutRows, a.sizes.width + 8); }

  template <typename V>
  static MVIT3_DEVICE
  V* at(int offset) { return reinterpret_cast<V*>(shared_memory() + offset); }
  static MVIT3_DEVICE
  Matrix<T> x() { return {at<T>(kX), kPitch}; }
  static MVIT3_DEVICE
  Matrix<T> z() { return {at<T>(kZ), kChunkPitch}; }
  static MVIT3_DEVICE
  Matrix<T> value() { return {at<T>(kValue), kChunkPitch}; }
  static MVIT3_DEVICE
  Matrix<T> gradient() { return {at<T>(kWide ? kProject : kGradient), kChunkPitch}; }
  static MVIT3_DEVICE
  int* places() { return at<int>(kPlaces); }  // of the filtered pixels in their map, -1 outside
  static MVIT3_DEVICE
  uint16_t* rows() { return at<uint16_t>(kRows); }  // where their rows of z begin, in bytes from the first one's
  static MVIT3_DEVICE
  int* own_places() { return at<int>(kOwnPlaces); }  // of the tile's pixels in x, in the order of the warps, -1 outside
  static MVIT3_DEVICE
  Tile& tile(int number) { return *at<Tile>(kTile + number % 2 * 80); }
  static MVIT3_DEVICE
  Matrix<T> expand() { return {at<T>(kStep), kPitch}; }
  static MVIT3_DEVICE
  Matrix<T> scaled() { return {at<T>(kStep + Parameters::kDiagonal - Parameters::kExpand), kPitch}; }
  static MVIT3_DEVICE
  const char* diagonals() { return at<char>(kStep + Parameters::kDiagonal); }
  static MVIT3_DEVICE
  const MiddleNorm* middle_norm() { return at<MiddleNorm>(kStep + Parameters::kMiddle); }
  // Of channels from `first` on, where the lane's part of a group of 8 begins `of_lane` bytes behind the first one's.
  static MVIT3_DEVICE
  const Added& added(int norm, unsigned first, int of_lane) {
    return *at<Added>(kStep + norm + int(first) / 2 * int(sizeof(Added)) + of_lane);
  }
  static MVIT3_DEVICE
  Matrix<T> project() { return {at<T>(kProject), kChunkPitch}; }
  MVIT3_DEVICE
  Matrix<T> dp() const { return {at<T>(first_dp(a)), a.sizes.width + 8}; }

  const Arguments& a;
  const Maps& m;
  const unsigned warp;  // of the thread
  const int own;        // where the lane's row of value() begins, in bytes from the first one's

  MVIT3_DEVICE
  explicit BackwardTile(const Arguments& arguments)
      : a(arguments), m(a.front.maps), warp(unsigned(thread()) / kWarp),
        own(int(unsigned(thread()) % kWarp * kRowBytes)) {}

  // ---- What follows from the number of a lane

  // Bytes from where its warp reads or writes, for each stage of a step. They lie behind the 32 channels of the rows of
  // value(), where no product reads: to load four takes an instruction, to compute them about twelve.
  static constexpr int kRowBytes = kChunkPitch * int(sizeof(T));
  struct alignas(16) OfFiltered {
    static constexpr int kPlace = 0;
    int dp, row, weight, diagonal;  // row: in rows(); weight: also of 16 x 16 numbers of rows of 32 channels
  };
  struct alignas(16) OfExpanded {
    static constexpr int kPlace = 1;
    int x, expand, at, second;  // at: its pixel of z; second: a pixel where it reads the second tap of a pair, else 0
  };
  struct alignas(16) OfTaps {
    static constexpr int kPlace = 2;
    int left, right, kept, odd;  // stride 2: right is as `second`; kept: below 0 where it has no diagonal
  };
  struct alignas(16) OfProducts {
    static constexpr int kPlace = 3;
    int gradient, kept, norm, column;  // column: of 16 x 16 numbers
  };
  template <typename Of>
  MVIT3_DEVICE
  Of& of_lane() const { return *at<Of>(kValue + kChunk * int(sizeof(T)) + Of::kPlace * kWarp * kRowBytes + own); }

  // By the first warp.
  MVIT3_DEVICE
  void write_of_lane() const {
    const int lane = thread(), second = lane / 8 % 2, pixel = lane / 16 * 8 + lane % 8;
    if (lane >= kWarp) return;
    // 16 x 16 numbers of a matrix: pixels of A or, transposed, of B; or the other way round.
    const auto rows = [&](int pitch) { return lane % 16 * pitch * int(sizeof(T)) + lane / 16 * 16; };
    const auto columns = [&](int pitch) { return pixel * pitch * int(sizeof(T)) + lane / 8 % 2 * 16; };
    const bool on_diagonal = lane % 4 == lane / 8;
    of_lane<OfFiltered>() =
        OfFiltered{rows(dp().pitch), lane % 16 * 2, rows(kChunkPitch), on_diagonal ? 16 * (lane / 4) : kUnit - 16};
    of_lane<OfExpanded>() =
        OfExpanded{rows(kPitch), columns(kPitch), int(corner_of(lane % 16)) * kRowBytes, lane / 16 * kRowBytes};
    const int first = Stride == 1 ? (pixel + 2 - second) * kRowBytes : int(corner_of(pixel)) * kRowBytes;
    const int other = Stride == 1 ? (pixel - second * kOutWidth) * kRowBytes : second * kRowBytes;
    of_lane<OfTaps>() = OfTaps{first, other, on_diagonal ? (lane / 4 * kRow + kFirstTap) * 4 : -1, lane / 4 % 2};
    of_lane<OfProducts>() =
        OfProducts{columns(kChunkPitch), (lane / 4 * kRow + lane % 4 * 2) * 4, lane % 4 * 16, lane / 16 * 16};
  }

  MVIT3_DEVICE
  bool whole_inputs() const { return a.sizes.slices == 1; }
  MVIT3_DEVICE
  bool whole_outputs() const { return a.sizes.parts == 1; }

  // ---- Places

  // From a tile to the next one.
  MVIT3_DEVICE
  void advance(Place& tile) const {
    if ((tile.left += kWidth) < a.columns) return;
    tile.left = 0;
    if ((tile.top += kHeight) < a.rows) return;
    tile.top = 0;
    if (++tile.first_column < tile.step) return;
    tile.first_column = 0;
    if (++tile.first_row < tile.step) return;
    tile.first_row = 0;
    ++tile.image;
  }
  static MVIT3_DEVICE
  Place of_z(Place tile) {
    return Stride == 1 ? tile.moved_to(tile.top - 1, tile.left - 1) : tile.moved_to(tile.top / 2, tile.left / 2);
  }
  // Pixel p of a tile, in the order of the warps. Stride 2: two warps have those of the same parities.
  static MVIT3_DEVICE
  unsigned row_of(unsigned p) { return Stride == 1 ? p / 16 : p / 16 % 2 * 4 + p % 16 / 8 * 2 + p / 64; }
  static MVIT3_DEVICE
  unsigned column_of(unsigned p) { return Stride == 1 ? p % 16 : p % 8 * 2 + p / 32 % 2; }
  // Number of pixel p of the tile in a map of x, -1 outside.
  MVIT3_DEVICE
  int in_x(Place tile, unsigned p) const {
    const int y = tile.y(row_of(p)), column = tile.x(column_of(p));
    return inside(y, column, m.height, m.width) ? y * m.width + column : -1;
  }
  // The first filtered pixel that meets pixel p of the tile. Stride 1: by the last tap, and the others by taps before
  // it. Stride 2: by the middle tap in an even row or column, else by the last one, and the next pixel by the first
  // tap.
  static MVIT3_DEVICE
  unsigned corner_of(unsigned p) {
    return Stride == 1 ? row_of(p) * kOutWidth + column_of(p) : (p / 16 % 2 * 2 + p % 16 / 8) * kOutWidth + p % 8;
  }
  // Writes down a tile; one thread does.
  MVIT3_DEVICE
  void prepare(const Place& there, int number) const {
    const int64_t pixels = there.image * m.height * m.width, filtered = there.image * m.out_height * m.out_width;
    tile(number) = {
        there,
        static_cast<const T*>(a.front.x) + pixels * m.inputs,
        static_cast<const T*>(a.z) + filtered * m.expanded,
        static_cast<const T*>(a.dp) + filtered * m.outputs,
        static_cast<T*>(kWide ? a.gradient : a.dx) + pixels * (kWide ? m.expanded : m.inputs),
        there.y(kHeight - 1) < m.height && there.x(kWidth - 1) < m.width};
  }
  // And the places of its pixels; a barrier must follow.
  MVIT3_DEVICE
  void enter(int number) const {
    const Place there = tile(number).place, from = of_z(there);
    const unsigned pixel = thread();
    if (pixel < kPixels) own_places()[pixel] = in_x(there, pixel);
    if (pixel >= kOutRows) return;
    const int y = from.y(pixel / kOutWidth), column = from.x(pixel % kOutWidth);
    const bool is_there = pixel < kOutPixels && inside(y, column, m.out_height, m.out_width);
    places()[pixel] = is_there ? y * m.out_width + column : -1;
    rows()[pixel] = uint16_t((is_there ? pixel : kOutPixels) * kRowBytes);
  }

  // ---- Copies

  // Number place * channels from `from` on, where it is one: an address in one or two instructions, not six.
  static MVIT3_DEVICE
  const T* number_at(const T* from, unsigned place, unsigned channels) {
    const auto bytes = reinterpret_cast<uintptr_t>(from) + uint64_t(place) * (channels * unsigned(sizeof(T)));
    return reinterpret_cast<const T*>(bytes);
  }

  // Channels first..first+count-1, a multiple of 16, of the pixels of an image; where[i] is the place of pixel i, below
  // 0 for zeros. 2^shift threads share a pixel, at least one for each 8 channels; it is Shift, or that is 0.
  // map: where images begin, of which `from` is one.
  template <int Pixels, int Shift>
  MVIT3_DEVICE
  void load(
      Matrix<T> to, const void* map, const T* from, int channels, int first, int count, int shift,
      const int* where) const {
    if (channels % 8 == 0 && is_aligned(map)) {
      const unsigned t = thread(), c = t % (1u << shift) * 8, apart = kThreads >> shift;
      if (c >= unsigned(count)) return;
      const bool there = first + int(c) < channels;
      from += first + c;
      T* row = to.row(t >> shift) + c;
      const auto copy = [&](unsigned pixel) {
        const int place = where[pixel];
        copy_16_or_zeros(there && place >= 0, row, number_at(from, unsigned(place), unsigned(channels)));
        row += apart * to.pitch;
      };
      if constexpr (Shift > 0) {
#pragma unroll
        for (unsigned i = 0; i < Pixels; i += kThreads >> Shift)
          if (i + (kThreads >> Shift) <= Pixels || (t >> Shift) < Pixels - i) copy((t >> Shift) + i);
      } else {
#pragma unroll 1
        for (unsigned pixel = t >> shift; pixel < Pixels; pixel += apart) copy(pixel);
      }
    } else {
#pragma unroll 1
      for (int i = thread(); i < Pixels * count; i += kThreads) {
        const int pixel = i / count, c = i % count, place = where[pixel];
        to.row(pixel)[c] = place >= 0 && first + c < channels ? from[int64_t(place) * channels + first + c] : T{0};
      }
    }
  }

  MVIT3_DEVICE
  void load_x(const Tile& tile) const {
    constexpr int kShift = Steps == 1 ? 1 : Steps == 2 ? 2 : 3;
    load<kPixels, kShift>(x(), a.front.x, tile.x, m.inputs, 0, kInputs, kShift, own_places());
  }
  MVIT3_DEVICE
  void load_dp(const Tile& tile, int first) const {
    load<kOutPixels, 0>(dp(), a.dp, tile.dp, m.outputs, first, a.sizes.width, a.sizes.shift, places());
  }
  // z of a step, and dp of a tile, where it fits.
  MVIT3_DEVICE
  void load_filtered(int number, int chunk) const {
    load<kOutPixels, 2>(z(), a.z, tile(number).z, m.expanded, chunk, kChunk, 2, places());
    if (chunk == 0 && whole_outputs()) load_dp(tile(number), 0);
  }

  // At most MostBytes of them, from At bytes on.
  template <int MostBytes, int At = 0>
  static MVIT3_DEVICE
  void copy_all(char* to, const char* from, int bytes) {
    if constexpr (At < MostBytes) {
      copy_16_behind<At>(At < bytes, to, from);
      copy_all<MostBytes, At + 16 * kThreads>(to, from, bytes);
    }
  }
  template <int MostBytes>
  static MVIT3_DEVICE
  void copy(void* to, const char* from, int bytes) {
    const int at = 16 * thread();
    copy_all<MostBytes>(static_cast<char*>(to) + at, from + at, bytes - at);
  }
  // The parameters of a step in global memory.
  MVIT3_DEVICE
  const char* packed(int chunk) const { return a.packed + uint64_t(unsigned(chunk) / kChunk) * a.sizes.bytes; }

  MVIT3_DEVICE
  void load_expand(const char* from, int slice) const {
    copy<Parameters::kExpand>(expand().data, from + slice * Parameters::kExpand, Parameters::kExpand);
  }
  MVIT3_DEVICE
  void load_project(const char* from, int part) const {
    const int bytes = Parameters::project(a.sizes.width);
    copy<Parameters::project(kMostOutputs)>(
        project().data, from + a.sizes.slices * Parameters::kExpand + Parameters::kRest + part * bytes, bytes);
  }
  // Those of them that stay for the whole step: all that it has in shared memory, or what does not come in parts.
  MVIT3_DEVICE
  void load_parameters(const char* from) const {
    if (whole_inputs() && whole_outputs()) {
      copy<Parameters::kProject + Parameters::project(kMostOutputs)>(at<char>(kStep), from, a.sizes.bytes);
    } else {
      if (whole_inputs()) load_expand(from, 0);
      copy<Parameters::kRest>(
          at<char>(kStep + Parameters::kExpand), from + a.sizes.slices * Parameters::kExpand, Parameters::kRest);
      if (whole_outputs()) load_project(from, 0);
    }
  }
};

}  // namespace mvit3
