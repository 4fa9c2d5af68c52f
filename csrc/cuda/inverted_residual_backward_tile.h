// A tile of the backward kernel of inverted_residual: its places in the maps, its shared memory, and the copies.
#pragma once

#include "inverted_residual_backward.h"

namespace mvit3 {

template <typename T, int Stride, int Steps>
struct BackwardTile {
  using Arguments = BackwardPlan;
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
  // Of n1 a warp has 16 x 16 numbers, over a share of the pixels.
  static constexpr int kShares = kWide ? 0 : 4 / Steps;
  // What a block keeps of a channel: but for wide inputs n1 of each share and eight parts of g1; and the pairs of taps,
  // of two halves of the tile.
  static constexpr int kFirstTap = kWide ? 0 : kShares * kInputs + 8, kHalf = Stride == 1 ? 2 * kPairs : 0,
                       kRow = kFirstTap + (Stride == 1 ? 4 : 2) * kPairs;

  static constexpr int kMostOutputs = (Stride == 1 ? 64 : 128) * (kWide ? 2 : 1);  // in shared memory at a time
  static MVIT3_BOTH
  int64_t tiles(const Arguments& a) {
    const Maps& m = a.front.maps;
    return tiles_of(m.batch, kHeight, kWidth, m.height, m.width, m.dilation);
  }
  // A tile, and z of its image. There are two in turns: one may be written while the other is read.
  struct Tile {
    Place place;
    const T* z;
    bool whole;  // nothing of it is outside the map
  };

  // Shared memory, in bytes from its start. What has a fixed size comes first.
  static MVIT3_BOTH
  constexpr int size(int pixels, int pitch) { return pixels * pitch * int(sizeof(T)); }
  static constexpr int kOfPixels = kPixels * kChunkPitch * int(sizeof(T));
  static constexpr int kX = 0, kZ = kX + (kWide ? 0 : kPixels * kPitch * int(sizeof(T))),
                       kValue = kZ + (kOutPixels + 1) * kChunkPitch * int(sizeof(T)), kGradient = kValue + kOfPixels,
                       kPlaces = kGradient + (kWide ? 0 : kOfPixels), kRows = kPlaces + kOutRows * 4,
                       kTile = kRows + kOutRows * 4, kOnes = kTile + 96, kStep = kOnes + 16,
                       kDp = kStep + Parameters::kProject;
  // Behind dp, whose last rows are read beyond its end. G of wide inputs only passes through here.
  static MVIT3_BOTH
  int first_project(const Arguments& a) { return kDp + size(kOutPixels, a.sizes.width + 8); }
  static MVIT3_BOTH
  int shared(const Arguments& a) {
    const int project = Parameters::project(a.sizes.width);
    return first_project(a) + (kWide && project < kOfPixels ? kOfPixels : project);
  }

  template <typename V>
  static MVIT3_DEVICE
  V* at(int offset) { return reinterpret_cast<V*>(shared_memory() + offset); }
  static MVIT3_DEVICE
  Matrix<T> x() { return {at<T>(kX), kPitch}; }
  static MVIT3_DEVICE
  Matrix<T> z() { return {at<T>(kZ), kChunkPitch}; }
  static MVIT3_DEVICE
  Matrix<T> value() { return {at<T>(kValue), kChunkPitch}; }
  MVIT3_DEVICE
  Matrix<T> gradient() const { return {at<T>(kWide ? first_project(a) : kGradient), kChunkPitch}; }
  static MVIT3_DEVICE
  int* places() { return at<int>(kPlaces); }  // of the filtered pixels in their map, -1 outside
  static MVIT3_DEVICE
  int* rows() { return at<int>(kRows); }  // where their rows of z begin in shared memory, in numbers
  static MVIT3_DEVICE
  uint32_t* ones() { return at<uint32_t>(kOnes); }
  static MVIT3_DEVICE
  Tile& tile(int number) { return *at<Tile>(kTile + number % 2 * 48); }
  static MVIT3_DEVICE
  Matrix<T> expand() { return {at<T>(kStep), kPitch}; }
  static MVIT3_DEVICE
  Matrix<T> scaled() { return {at<T>(kStep + Parameters::kExpand), kPitch}; }
  static MVIT3_DEVICE
  const char* diagonals() { return at<char>(kStep + Parameters::kDiagonal); }
  static MVIT3_DEVICE
  const MiddleNorm* middle_norm() { return at<MiddleNorm>(kStep + Parameters::kMiddle); }
  static MVIT3_DEVICE
  const Affine* first_norm() { return at<Affine>(kStep + Parameters::kNorm); }
  MVIT3_DEVICE
  Matrix<T> project() const { return {at<T>(first_project(a)), kChunkPitch}; }
  MVIT3_DEVICE
  Matrix<T> dp() const { return {at<T>(kDp), a.sizes.width + 8}; }

  const Arguments& a;
  const Maps& m;

  // Places in the block that are known not to be negative: to divide them takes no instructions for their sign.
  static MVIT3_DEVICE
  unsigned lane() { return unsigned(thread()) % kWarp; }
  static MVIT3_DEVICE
  unsigned warp() { return unsigned(thread()) / kWarp; }
  // Where a lane reads 16 x 16 numbers of a matrix: pixels of A or, transposed, of B; or the other way round. Each stage
  // of a step asks once which lane it is (see `thread`).
  static MVIT3_DEVICE
  SharedAddress rows_of(Matrix<T> matrix, unsigned lane, int row, int column) {
    return shared_address(matrix.row(row + lane % 16) + column + lane / 16 * 8);
  }
  static MVIT3_DEVICE
  SharedAddress columns_of(Matrix<T> matrix, unsigned lane, int row, int column) {
    return shared_address(matrix.row(row + lane % 8 + lane / 16 * 8) + column + lane / 8 % 2 * 8);
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
  // Writes down what belongs to a tile; a barrier must follow.
  MVIT3_DEVICE
  void enter(Place there, int number) const {
    const Place from = of_z(there);
    if (thread() == 0)
      tile(number) = {
          there, image(a.z, there, m.out_height, m.out_width, m.expanded),
          there.y(kHeight - 1) < m.height && there.x(kWidth - 1) < m.width};
    const unsigned pixel = thread();
    if (pixel >= kOutRows) return;
    const int y = from.y(pixel / kOutWidth), column = from.x(pixel % kOutWidth);
    const bool is_there = pixel < kOutPixels && inside(y, column, m.out_height, m.out_width);
    places()[pixel] = is_there ? y * m.out_width + column : -1;
    rows()[pixel] = int(is_there ? pixel : kOutPixels) * kChunkPitch;
  }

  // ---- Copies

  // Channels first..first+count-1, a multiple of 16, of the pixels of an image; where(i) is the place of pixel i, below
  // 0 for zeros. 2^shift threads share a pixel, at least one for each 8 channels.
  template <int Pixels, typename F>
  MVIT3_DEVICE
  void load(Matrix<T> to, const T* from, int channels, int first, int count, int shift, const F& where) const {
    if (channels % 8 == 0 && is_aligned(from)) {
      const unsigned c = unsigned(thread()) % (1u << shift) * 8, pixel = unsigned(thread()) >> shift;
      if (c >= unsigned(count)) return;
      const bool there = first + int(c) < channels;
      from += first + c;
      T* row = to.row(pixel) + c;
#pragma unroll
      for (int i = 0; i < (Pixels << shift) / kThreads; ++i) {
        const int place = where(pixel + (i * kThreads >> shift));
        copy_16_or_zeros(
            there && place >= 0, row + (i * kThreads >> shift) * to.pitch, from + int64_t(place) * channels);
      }
      const int last = (Pixels << shift) / kThreads * kThreads >> shift;
      if (last < Pixels && last + pixel < Pixels) {
        const int place = where(pixel + last);
        copy_16_or_zeros(there && place >= 0, row + last * to.pitch, from + int64_t(place) * channels);
      }
    } else {
#pragma unroll 1
      for (int i = thread(); i < Pixels * count; i += kThreads) {
        const int pixel = i / count, c = i % count, place = where(pixel);
        to.row(pixel)[c] = place >= 0 && first + c < channels ? from[int64_t(place) * channels + first + c] : T{0};
      }
    }
  }

  // The image of a tile in a map.
  MVIT3_DEVICE
  const T* image(const void* map, Place tile, int height, int width, int channels) const {
    return static_cast<const T*>(map) + tile.image * height * width * channels;
  }
  MVIT3_DEVICE
  void load_x(Place tile) const {
    constexpr int kShift = Steps == 1 ? 1 : Steps == 2 ? 2 : 3;
    load<kPixels>(
        x(), image(a.front.x, tile, m.height, m.width, m.inputs), m.inputs, 0, kInputs, kShift,
        [&](int p) { return in_x(tile, p); });
  }
  MVIT3_DEVICE
  void load_dp(Place tile, int first) const {
    load<kOutPixels>(
        dp(), image(a.dp, tile, m.out_height, m.out_width, m.outputs), m.outputs, first, a.sizes.width, a.sizes.shift,
        [&](int p) { return places()[p]; });
  }
  // z of a step, and dp of a tile, where it fits.
  MVIT3_DEVICE
  void load_filtered(int number, int chunk) const {
    load<kOutPixels>(z(), tile(number).z, m.expanded, chunk, kChunk, 2, [&](int p) { return places()[p]; });
    if (chunk == 0 && whole_outputs()) load_dp(tile(number).place, 0);
  }

  template <int Bytes>
  static MVIT3_DEVICE
  void copy(void* to, const char* from) {
    const int at = 16 * thread();
#pragma unroll
    for (int i = 0; i < Bytes; i += 16 * kThreads)
      if (i + 16 * kThreads <= Bytes || at < Bytes - i) copy_16(static_cast<char*>(to) + i + at, from + i + at);
  }
  static MVIT3_DEVICE
  void copy(void* to, const char* from, int bytes) {
#pragma unroll 1
    for (int i = 16 * thread(); i < bytes; i += 16 * kThreads) copy_16(static_cast<char*>(to) + i, from + i);
  }
  // The parameters of a step in global memory.
  MVIT3_DEVICE
  const char* packed(int chunk) const { return a.packed + uint64_t(unsigned(chunk) / kChunk) * a.sizes.bytes; }

  MVIT3_DEVICE
  void load_expand(const char* from, int slice) const {
    copy<Parameters::kExpand>(expand().data, from + slice * Parameters::kExpand);
  }
  MVIT3_DEVICE
  void load_project(const char* from, int part) const {
    const int bytes = Parameters::project(a.sizes.width);
    copy(project().data, from + a.sizes.slices * Parameters::kExpand + Parameters::kRest + part * bytes, bytes);
  }
  // Those of them that stay for the whole step.
  MVIT3_DEVICE
  void load_parameters(const char* from) const {
    if (whole_inputs()) load_expand(from, 0);
    copy<Parameters::kRest>(at<char>(kStep + Parameters::kExpand), from + a.sizes.slices * Parameters::kExpand);
    if (whole_outputs()) load_project(from, 0);
  }
};

}  // namespace mvit3
