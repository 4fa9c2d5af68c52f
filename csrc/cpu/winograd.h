// Dense 3x3 convolution of stride 1 with zero padding, norm and activation, for inference, by Winograd's F(2x2, 3x3)
// (docs/algebra.md, M): a tile of 2 x 2 outputs is made of 16 products of channels, where its taps are 36.
//
// Some tiles at a time are turned into 16 matrices (tile, input) in second-level cache; each is multiplied by a matrix
// of its own, a panel of outputs at a time, and the 16 results are turned into outputs while they are there. A value
// that is not finite reaches what its taps reach, but an infinity may come out as NaN.
#pragma once

#include "conv3x3.h"

namespace mvit3 {

// What the products read instead of the taps g: position 4 * i + j is the (i, j) of G g G^T.
template <typename E>
struct WinogradWeightsOf {
  static constexpr int64_t kPositions = 16;
  std::vector<PackedWeightOf<E>> positions;  // (outputs, inputs) each

  // w is (outputs, 3, 3, inputs), contiguous.
  WinogradWeightsOf(const float* w, int64_t outputs, int64_t inputs) {
    const int64_t size = outputs * inputs;
    Scratch<float> turned(kPositions * size);
    const int64_t parts = count_parts(size);
    for_each_part(parts, [&](int64_t part) {
      const Range mine = part_range(outputs, part, parts);
      for (int64_t i = mine.begin * inputs; i < mine.end * inputs; ++i) {
        const float* taps = w + i / inputs * 9 * inputs + i % inputs;
        double rows[4][3];
        for (int64_t k = 0; k < 3; ++k) {
          const double a = taps[k * inputs], b = taps[(3 + k) * inputs], c = taps[(6 + k) * inputs];
          rows[0][k] = a, rows[1][k] = (a + b + c) / 2, rows[2][k] = (a - b + c) / 2, rows[3][k] = c;
        }
        for (int64_t r = 0; r < 4; ++r) {
          const auto [a, b, c] = rows[r];
          const double row[4] = {a, (a + b + c) / 2, (a - b + c) / 2, c};
          for (int64_t k = 0; k < 4; ++k) turned[(4 * r + k) * size + i] = float(row[k]);
        }
      }
    });
    for (int64_t p = 0; p < kPositions; ++p)
      positions.push_back(PackedWeightOf<E>::rows(turned.data() + p * size, outputs, inputs, inputs));
  }

  // Whether it pays, by channels: with few, turning tiles costs more than products are saved.
  static bool pays(int64_t outputs, int64_t inputs) { return std::min(outputs, inputs) >= 3 * kLanes; }
  // Whether it is exact enough, by size: outputs at a border are what is left of terms that cancel, and of a tiny map
  // they are most.
  static bool suits(int64_t height, int64_t width) { return std::min(height, width) >= 6; }

  int64_t outputs() const { return positions[0].outputs(); }
  int64_t inputs() const { return positions[0].inputs(); }
};

// The tiles of a call, over all images.
struct WinogradTiles {
  int64_t batch, height, width;

  int64_t down() const { return (height + 1) / 2; }
  int64_t across() const { return (width + 1) / 2; }
  int64_t count() const { return batch * down() * across(); }

  // Of the first output of a tile.
  struct Place {
    int64_t image, row, column;
  };
  Place place(int64_t tile) const {
    return {tile / across() / down(), tile / across() % down() * 2, tile % across() * 2};
  }

  template <typename E>
  BlockCut cut(const WinogradWeightsOf<E>& w) const {
    return BlockCut(count(), w.positions[0]);
  }
  template <typename E>
  Region operations(const WinogradWeightsOf<E>& w) const {
    Region region = cut(w).operations(w.positions[0]);
    for (double& part : region) part *= double(w.kPositions);
    return region;
  }
};

// B^T d B of a tile's 4 x 4 pixels, a channel of all 16 at a time: position p of a tile's row goes to out + p *
// distance. `zeros` stand for pixels outside of the image. Up to a vector is written beyond the channels.
template <typename E>
void turn_pixels(
    const WinogradTiles& tiles, const WinogradTiles::Place& at, const float* map, int64_t channels, const float* zeros,
    E* out, int64_t distance) {
  const float* pixels[16];
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t r = at.row + i - 1, c = at.column + j - 1;
      const bool inside = 0 <= r && r < tiles.height && 0 <= c && c < tiles.width;
      pixels[4 * i + j] = inside ? map + ((at.image * tiles.height + r) * tiles.width + c) * channels : zeros;
    }
  for_each_lanes(channels, [&](int64_t c, auto whole) {
    const int64_t left = channels - c;
    Vec d[16];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec x0 = load_lanes<whole>(pixels[j] + c, left), x1 = load_lanes<whole>(pixels[4 + j] + c, left),
                x2 = load_lanes<whole>(pixels[8 + j] + c, left), x3 = load_lanes<whole>(pixels[12 + j] + c, left);
      d[j] = x0 - x2, d[4 + j] = x1 + x2, d[8 + j] = x2 - x1, d[12 + j] = x1 - x3;
    }
    E* to = out + c;
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4, to += 4 * distance) {
      store(to, d[i] - d[i + 2]);
      store(to + distance, d[i + 1] + d[i + 2]);
      store(to + 2 * distance, d[i + 2] - d[i + 1]);
      store(to + 3 * distance, d[i + 1] - d[i + 3]);
    }
  });
}

// y = act(affine(A^T m A)) of some outputs of a tile: position p of m is p * distance further.
template <int Act, bool Roughly>
void turn_back(
    const WinogradTiles& tiles, const WinogradTiles::Place& at, const float* m, int64_t distance,
    const ScaleShift& affine, Range columns, int64_t outputs, float* y) {
  float* pixel = y + ((at.image * tiles.height + at.row) * tiles.width + at.column) * outputs;
  const bool right = at.column + 1 < tiles.width, below = at.row + 1 < tiles.height;
  for (int64_t c = columns.begin; c < columns.end; c += kLanes, m += kLanes) {
    Vec top[4], bottom[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* from = m + j * distance;
      const Vec x0 = load(from), x1 = load(from + 4 * distance), x2 = load(from + 8 * distance),
                x3 = load(from + 12 * distance);
      top[j] = x0 + x1 + x2, bottom[j] = x1 - x2 - x3;
    }
    const auto write = [&](const Vec* row, float* to) {
      const auto finish = [&](Vec value) { return activate<Act, Roughly>(affine(value, c)); };
      store_some(to + c, finish(row[0] + row[1] + row[2]), outputs - c);
      if (right) store_some(to + outputs + c, finish(row[1] - row[2] - row[3]), outputs - c);
    };
    write(top, pixel);
    if (below) write(bottom, pixel + tiles.width * outputs);
  }
}

// y = act(norm(conv(x))), NHWC and contiguous.
template <int Act, typename E>
void conv3x3_winograd(const WinogradWeightsOf<E>& weights, const ScaleShift& affine, const Conv3x3Inputs& x, float* y) {
  constexpr int64_t kPositions = WinogradWeightsOf<E>::kPositions;
  constexpr int64_t kLongest = 96;  // steps of a sum: it is one of 16 that are added up, and may err little
  const WinogradTiles tiles{x.batch, x.height, x.width};
  const int64_t channels = x.channels(), outputs = weights.outputs(), stride = lanes_of(channels),
                zeros_floats = lanes_of(std::max(x.a_channels, x.b_channels));
  const int64_t tile_floats = kPositions * (stride * int64_t(sizeof(E)) / int64_t(sizeof(float)) + kPanel);
  const int64_t most = std::max(kTileFloats * 3 / 2 / tile_floats / kBlockRows, int64_t(1)) * kBlockRows;
  const int64_t distance = most * stride + 2 * kLanes, product_distance = most * kPanel + kLanes;
  const BlockCut cut = tiles.cut(weights);
  for_each_part(cut.parts(), [&](int64_t part) {
    const Range mine = cut.rows_of(part), panels = cut.panels_of(part);
    float* zeros = workspace(zeros_floats + kPositions * (distance + product_distance) + kLanes);
    float* product = zeros + zeros_floats;
    E* turned = tile_of<E>(product + kPositions * product_distance);
    std::fill_n(zeros, zeros_floats, 0.0f);
    const int64_t chunks = (mine.size() + most - 1) / most;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Range range = part_range(mine.size(), chunk, chunks);
      const int64_t first = mine.begin + range.begin, count = range.size();
      for (int64_t t = 0; t < count; ++t) {
        const WinogradTiles::Place at = tiles.place(first + t);
        E* out = turned + t * stride;
        if (channels % kLanes)  // what a step reads beyond them; before anything is written there
          for (int64_t p = 0; p < kPositions; ++p) store(out + p * distance + channels, Vec(0.0f));
        turn_pixels(tiles, at, x.a, x.a_channels, zeros, out, distance);
        if (x.b) turn_pixels(tiles, at, x.b, x.b_channels, zeros, out + x.a_channels, distance);
      }
      for_each_panel(weights.positions[0], panels, [&](int64_t output, int64_t vecs) {
        for (int64_t p = 0; p < kPositions; ++p) {
          OperandsOf<E> in = operands(turned + p * distance, stride, weights.positions[p], output, vecs);
          const int64_t next = p + 1 < kPositions ? output : output + kPanel;
          in.ahead = weights.positions[(p + 1) % kPositions].panel(next) - in.b;
          multiply_panel_into<E, kLongest>(count, vecs, in, product + p * product_distance, kPanel, false);
        }
        for (int64_t t = 0; t < count; ++t)
          turn_back<Act, kRoughly<E>>(
              tiles, tiles.place(first + t), product + t * kPanel, product_distance, affine,
              {output, output + vecs * kLanes}, outputs, y);
      });
    }
  });
}

}  // namespace mvit3
