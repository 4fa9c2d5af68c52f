// inverted_residual: what training and evaluation share, and evaluation itself on packed weights, where everything
// between x and y stays in cache.
#pragma once

#include "depthwise_conv.h"

namespace mvit3 {

struct InvertedResidualShape {
  int64_t batch, height, width, inputs, expanded, outputs, stride, dilation;

  int64_t out_height() const { return (height + stride - 1) / stride; }
  int64_t out_width() const { return (width + stride - 1) / stride; }
  int64_t pixels() const { return height * width; }
  int64_t out_pixels() const { return out_height() * out_width(); }
  int64_t rows() const { return batch * pixels(); }
  int64_t out_rows() const { return batch * out_pixels(); }
  bool skip() const { return stride == 1 && inputs == outputs; }
};

// One of the three convolutions and its norm, as the op receives them.
struct ConvNorm : Norm {
  FloatMatrix matrix;  // (outputs, inputs), or (outputs, 9) where it is depth-wise

  ConvNorm(
      const std::string& name, const Tensor& w, int64_t outputs, int64_t inputs, const Tensor& norm_weight,
      const Tensor& norm_bias, double eps)
      : Norm(name + "_", norm_weight, norm_bias, outputs, eps), matrix(name, w, outputs, inputs) {}

  template <typename E = float>
  PackedWeightOf<E> pack(int64_t outputs, int64_t inputs) const {
    return PackedWeightOf<E>::rows(matrix.data(), outputs, inputs, inputs);
  }
};

// `Columns` neighbours of a filtered row, each the sum of nine taps: a pixel that several of them read is loaded once.
template <int Stride, int Columns, typename Emit>
MVIT3_INLINE void filter_columns(
    const float* const* rows, int64_t at, int64_t pixel, const Vec* w, int64_t column, int64_t channel,
    const Emit& emit) {
  Vec sums[Columns];
  for (int j = 0; j < Columns; ++j) sums[j] = 0.0f;
  for (int t = 0; t < 3; ++t) {
    constexpr int kLoaded = (Columns - 1) * Stride + 3;
    Vec values[kLoaded];
    for (int i = 0; i < kLoaded; ++i) values[i] = load(rows[t] + at + i * pixel);
    for (int k = 0; k < 3; ++k)
      for (int j = 0; j < Columns; ++j) sums[j] = fma(values[j * Stride + k], w[3 * t + k], sums[j]);
  }
  for (int j = 0; j < Columns; ++j) emit(column + j, channel, sums[j]);
}

// emit(column, channel, sums of nine taps) for `columns` pixels of a filtered row, channel by channel; rows[t] is the
// border before the row that tap row t reads, `pixel` floats from pixel to pixel.
template <typename Emit>
void filter_row(
    const float* const* rows, int64_t pixel, int64_t channels, int64_t columns, int64_t stride, int64_t dilation,
    const float* taps, const Emit& emit) {
  constexpr int kColumns = kParts == 1 ? 4 : 2;
  const int64_t together = dilation == 1 && stride <= 2 ? columns / kColumns * kColumns : 0;
  for (int64_t channel = 0; channel < channels; channel += kLanes) {
    Vec w[9];
    for (int t = 0; t < 9; ++t) w[t] = load(taps + channel * 9 + t * kLanes);
    for (int64_t column = 0; column < together; column += kColumns) {
      const int64_t at = column * stride * pixel + channel;
      if (stride == 1)
        filter_columns<1, kColumns>(rows, at, pixel, w, column, channel, emit);
      else
        filter_columns<2, kColumns>(rows, at, pixel, w, column, channel, emit);
    }
    for (int64_t column = together; column < columns; ++column) {
      const int64_t at = column * stride * pixel + channel;
      Vec sum = load(rows[0] + at) * w[0];
      for (int t = 1; t < 9; ++t) sum = fma(load(rows[t / 3] + at + t % 3 * dilation * pixel), w[t], sum);
      emit(column, channel, sum);
    }
  }
}

// Calls f(part, image, range of rows) for every task: `height` rows of each image in `ranges` ranges, all tasks in
// `parts` parts.
template <typename F>
void for_each_range(int64_t batch, int64_t height, int64_t ranges, int64_t parts, const F& f) {
  const int64_t tasks = batch * ranges;
  for_each_part(parts, [&](int64_t part) {
    const Range mine = part_range(tasks, part, parts);
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const Range range = part_range(height, task % ranges, ranges);
      if (range.size() > 0) f(part, task / ranges, range);
    }
  });
}

// The block in evaluation: the three norms are folded into the weights, what is left of them is a shift.
template <typename E>
struct InvertedResidualWeightsOf {
  int64_t inputs, expanded, outputs, stride, dilation, act;
  PackedWeightOf<E> expand, project;
  Scratch<float> taps, expand_shift, filter_shift, project_shift;

  InvertedResidualWeightsOf(
      const InvertedResidualShape& s, const ConvNorm& first, const ConvNorm& second, const ConvNorm& third, int64_t act)
      : InvertedResidualWeightsOf(s, first, second, third, act, first.affine(), second.affine(), third.affine()) {}

  InvertedResidualShape shape(int64_t batch, int64_t height, int64_t width) const {
    return {batch, height, width, inputs, expanded, outputs, stride, nearest_dilation(dilation, height, width)};
  }

 private:
  InvertedResidualWeightsOf(
      const InvertedResidualShape& s, const ConvNorm& first, const ConvNorm& second, const ConvNorm& third, int64_t act,
      ScaleShift a, ScaleShift b, ScaleShift c)
      : inputs(s.inputs), expanded(s.expanded), outputs(s.outputs), stride(s.stride), dilation(s.dilation), act(act),
        expand(scaled(first, a, expanded, inputs)), project(scaled(third, c, outputs, expanded)),
        taps(pack_taps(second.matrix.data(), expanded, b.scale.data())), expand_shift(std::move(a.shift)),
        filter_shift(std::move(b.shift)), project_shift(std::move(c.shift)) {}

  static PackedWeightOf<E> scaled(const ConvNorm& conv, const ScaleShift& norm, int64_t outputs, int64_t inputs) {
    const float *w = conv.matrix.data(), *scale = norm.scale.data();
    return PackedWeightOf<E>(outputs, inputs, [=](int64_t o, int64_t i) { return w[o * inputs + i] * scale[o]; });
  }
};

// The rows of the expansion that some rows of the output read.
inline Range read_rows(const InvertedResidualShape& s, Range rows) {
  return {
      std::max<int64_t>(rows.begin * s.stride - s.dilation, 0),
      std::min((rows.end - 1) * s.stride + s.dilation + 1, s.height)};
}

// Operations of expanding `read` rows to `channels` channels and of filtering them to `rows` rows.
inline int64_t operations(const InvertedResidualShape& s, int64_t read, int64_t rows, int64_t channels) {
  return channels * (read * s.width * s.inputs + rows * s.out_width() * 9);
}

// Whether evaluation cuts channels over threads. With a handful of rows a thread, the rows that two ranges both expand
// cost more than passing the filtered map from thread to thread.
inline bool cuts_channels(const InvertedResidualShape& s) {
  return s.batch * s.out_height() < 6 * torch::stable::get_num_threads() && s.pixels() <= 4096;
}

// Else it cuts the rows of the output over all images. Like every cut it is made by the calling thread: what PyTorch
// says of threads holds there.
struct RowsCut {
  int64_t height, rows, parts;

  explicit RowsCut(const InvertedResidualShape& s)
      : height(s.out_height()), rows(s.batch * height), parts(parts_for(rows)) {}

  // f(image, range of its rows) for all rows of a part.
  template <typename F>
  void for_each_range_of(int64_t part, const F& f) const {
    Range left = part_range(rows, part, parts);
    while (left.size() > 0) {
      const int64_t first = left.begin % height, count = std::min(left.size(), height - first);
      f(left.begin / height, Range{first, first + count});
      left.begin += count;
    }
  }
};

// How evaluation cuts a small map: each image into `ranges` ranges of its output's rows, each of them into `chunks`
// chunks of expanded channels. Of the cuts that give every thread something to do it is the one whose longest part is
// shortest, with the rows that two ranges both expand.
class ChannelsCut {
 public:
  explicit ChannelsCut(const InvertedResidualShape& s) : ChannelsCut(s, (s.expanded + kPanel - 1) / kPanel, 1, 1) {
    const int64_t threads = torch::stable::get_num_threads();
    int64_t least = 0;
    for (int64_t chunks = 1; chunks <= panels_; ++chunks) {
      const int64_t fewest = std::clamp<int64_t>(threads / (s.batch * chunks), 1, s.out_height());
      for (int64_t ranges = fewest; ranges <= std::min(fewest + 1, s.out_height()); ++ranges) {
        const ChannelsCut cut(s, panels_, ranges, chunks);
        if (cut.ring_floats() > kTileFloats && chunks < panels_) continue;
        const int64_t cost = (cut.tasks() + threads - 1) / threads * cut.longest();
        if (least > 0 && cost >= least) continue;
        least = cost;
        ranges_ = ranges;
        chunks_ = chunks;
      }
    }
    parts_ = parts_for(tasks());
  }

  int64_t tasks() const { return s_.batch * ranges_ * chunks_; }
  int64_t parts() const { return parts_; }
  int64_t most_read() const {  // rows of the expansion, of a task
    return std::min((most_rows() - 1) * s_.stride + 2 * s_.dilation + 1, s_.height);
  }
  int64_t ring_floats() const { return Ring::floats(most_read(), s_.width, s_.dilation, tile_stride(widest())); }

  // f(image, range of rows of the output, range of expanded channels) for every task, all parts in parallel.
  template <typename F>
  void for_each_task(const F& f) const {
    for_each_part(parts_, [&](int64_t part) { for_each_task_of(part, f); });
  }
  template <typename F>
  void for_each_task_of(int64_t part, const F& f) const {
    const Range mine = part_range(tasks(), part, parts_);
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const Range panels = part_range(panels_, task % chunks_, chunks_);
      f(task / chunks_ / ranges_, part_range(s_.out_height(), task / chunks_ % ranges_, ranges_),
        Range{panels.begin * kPanel, std::min(panels.end * kPanel, lanes_of(s_.expanded))});
    }
  }

 private:
  ChannelsCut(const InvertedResidualShape& s, int64_t panels, int64_t ranges, int64_t chunks)
      : s_(s), panels_(panels), ranges_(ranges), chunks_(chunks) {}

  int64_t most_rows() const { return (s_.out_height() + ranges_ - 1) / ranges_; }
  int64_t widest() const { return std::min((panels_ + chunks_ - 1) / chunks_ * kPanel, lanes_of(s_.expanded)); }
  int64_t longest() const { return operations(s_, most_read(), most_rows(), widest()); }

  const InvertedResidualShape& s_;
  int64_t panels_, ranges_, chunks_, parts_ = 1;
};

template <typename T, typename E, int Act>
class InvertedResidualForward {
  using Weights = InvertedResidualWeightsOf<E>;

 public:
  InvertedResidualForward(const Weights& w, const T* x, int64_t batch, int64_t height, int64_t width, T* y)
      : w_(w), s_(w.shape(batch, height, width)), x_(x), y_(y) {}

  void run() const {
    if (cuts_channels(s_))
      by_channels();
    else
      by_rows();
  }

 private:
  // Large maps: a part has some rows of all images, and a ring holds the expanded rows that the taps need. A panel of
  // channels of some rows at a time is expanded and filtered, row by row, so that the taps find it in first-level
  // cache.
  void by_rows() const {
    const int64_t pixel = tile_stride(s_.expanded), row_floats = s_.width * pixel, out_width = s_.out_width(),
                  d = s_.dilation;
    const RowsCut cut(s_);
    for_each_part(cut.parts, [&](int64_t part) {
      cut.for_each_range_of(part, [&](int64_t image, Range range) {
        const int64_t tile = std::clamp<int64_t>((kTileFloats / row_floats - 2 * d) / s_.stride, 1, range.size());
        const int64_t slots = (tile - 1) * s_.stride + 2 * d + 1, ring_floats = Ring::floats(slots, s_.width, d, pixel);
        float* memory = workspace(ring_floats + tile * out_width * pixel + slots * s_.width * lanes_of(s_.inputs));
        E *filtered = tile_of<E>(memory + ring_floats), *converted = filtered + tile * out_width * pixel;
        const Ring ring(memory, slots, s_.height, s_.width, d, pixel);
        int64_t next = 0;  // the first row that is not expanded yet
        for (int64_t first = range.begin; first < range.end; first += tile) {
          const Range rows{first, std::min(first + tile, range.end)},
              read = read_rows(s_, rows), fresh{std::min(std::max(next, read.begin), read.end), read.end};
          next = fresh.end;
          const RowsOf<E> in = as_rows(
              x_ + (image * s_.height + fresh.begin) * s_.width * s_.inputs, s_.inputs, fresh.size() * s_.width,
              s_.inputs, converted);
          for_each_panel(w_.expand, w_.expand.panels(), [&](int64_t channel, int64_t vecs) {
            const Range channels{channel, channel + vecs * kLanes};
            int64_t row = rows.begin;
            for (int64_t i = fresh.begin; i <= fresh.end; ++i) {
              for (; row < rows.end && read_rows(s_, {row, row + 1}).end <= i; ++row)
                filter(
                    ring, row * s_.stride, filtered + (row - rows.begin) * out_width * pixel, channels, channel, pixel,
                    pixel);
              if (i == fresh.end) break;
              float* out = ring.row(i);
              expand(
                  {in.data + (i - fresh.begin) * s_.width * in.stride, in.stride}, s_.width,
                  {channel / kPanel, channel / kPanel + 1}, [=](int64_t r, int64_t c) { return out + r * pixel + c; });
            }
          });
          project(
              filtered, pixel, image * s_.out_pixels() + rows.begin * out_width, rows.size() * out_width,
              w_.project.panels());
        }
      });
    });
  }

  // Small maps: a task is a few channels of some rows of an image, so that it reads its part of the weights once and
  // few rows are expanded twice; the projection follows when all channels are there.
  void by_channels() const {
    const int64_t d = s_.dilation, hidden = tile_stride(s_.expanded);
    const ChannelsCut cut(s_);
    E* filtered = tile_of<E>(workspace<1>(s_.out_rows() * hidden));
    cut.for_each_task([&](int64_t image, Range range, Range channels) {
      const Range read = read_rows(s_, range);
      const int64_t pixel = tile_stride(channels.size()), pixels = read.size() * s_.width,
                    ring_floats = Ring::floats(read.size(), s_.width, d, pixel);
      float* memory = workspace(cut.ring_floats() + cut.most_read() * s_.width * lanes_of(s_.inputs));
      const Ring ring(memory, read.size(), read.size(), s_.width, d, pixel);  // of these rows alone
      const RowsOf<E> in = as_rows(
          x_ + (image * s_.height + read.begin) * s_.width * s_.inputs, s_.inputs, pixels, s_.inputs,
          tile_of<E>(memory + ring_floats));
      expand(in, pixels, {channels.begin / kPanel, (channels.end + kPanel - 1) / kPanel}, [&](int64_t r, int64_t c) {
        return ring.row(0) + (r + r / s_.width * 2 * d) * pixel + c - channels.begin;
      });
      for (int64_t row = range.begin; row < range.end; ++row)
        filter(
            ring, row * s_.stride - read.begin, filtered + (image * s_.out_height() + row) * s_.out_width() * hidden,
            channels, 0, pixel, hidden);
    });
    for_each_block(s_.out_rows(), w_.project, [&](Range rows, Range outputs) {
      project(filtered + rows.begin * hidden, hidden, rows.begin, rows.size(), outputs);
    });
  }

  // at(row, channel) is where the activated expansion goes.
  template <typename At>
  void expand(RowsOf<E> in, int64_t rows, Range panels, const At& at) const {
    const float* shift = w_.expand_shift.data();
    multiply(in.data, in.stride, rows, w_.expand, panels, [&](int64_t r, int64_t c, Vec sums) {
      store(at(r, c), activate<Act, kRoughly<E>>(sums + load(shift + c)));
    });
  }

  // `channels` of the rows around row `centre` of the ring, where they lie from `in_ring` on, to a row of `out`, which
  // holds all.
  void filter(
      const Ring& ring, int64_t centre, E* out, Range channels, int64_t in_ring, int64_t pixel,
      int64_t out_pixel) const {
    const float* rows[3];
    for (int64_t t = 0; t < 3; ++t) rows[t] = ring.bordered(centre + (t - 1) * s_.dilation) + in_ring;
    const float *shift = w_.filter_shift.data() + channels.begin, *taps = w_.taps.data() + channels.begin * 9;
    out += channels.begin;
    filter_row(
        rows, pixel, channels.size(), s_.out_width(), s_.stride, s_.dilation, taps,
        [=](int64_t column, int64_t c, Vec sum) {
          store(out + column * out_pixel + c, activate<Act, kRoughly<E>>(sum + load(shift + c)));
        });
  }

  void project(const E* filtered, int64_t pixel, int64_t first, int64_t rows, Range panels) const {
    const T* residual = s_.skip() ? x_ + first * s_.inputs : nullptr;
    T* out = y_ + first * s_.outputs;
    const float* shift = w_.project_shift.data();
    multiply(filtered, pixel, rows, w_.project, panels, [&](int64_t r, int64_t c, Vec sums) {
      const int64_t at = r * s_.outputs + c, left = s_.outputs - c;
      Vec value = sums + load(shift + c);
      if (residual) value += load_some(residual + at, left);
      store_some(out + at, value, left);
    });
  }

  const Weights& w_;
  const InvertedResidualShape s_;
  const T* x_;
  T* y_;
};

// The parallel loops of the same call.
template <typename E>
std::vector<Region> inverted_residual_regions(const InvertedResidualWeightsOf<E>& w, const InvertedResidualShape& s) {
  const RowsCut by_rows(s);
  if (!cuts_channels(s))
    return {operations_of(by_rows.parts, [&](int64_t part) {
      int64_t sum = 0;
      by_rows.for_each_range_of(part, [&](int64_t, Range rows) {
        sum += operations(s, read_rows(s, rows).size(), rows.size(), lanes_of(s.expanded)) +
               rows.size() * s.out_width() * s.expanded * lanes_of(s.outputs);
      });
      return sum;
    })};
  const ChannelsCut cut(s);
  const Region expanded = operations_of(cut.parts(), [&](int64_t part) {
    int64_t sum = 0;
    cut.for_each_task_of(part, [&](int64_t, Range rows, Range channels) {
      sum += operations(s, read_rows(s, rows).size(), rows.size(), channels.size());
    });
    return sum;
  });
  return {expanded, BlockCut(s.out_rows(), w.project).operations(w.project)};
}

// y (batch, height / stride, width / stride, outputs) from x (batch, height, width, inputs).
template <typename E, typename T>
void evaluate_inverted_residual(
    const InvertedResidualWeightsOf<E>& w, const T* x, int64_t batch, int64_t height, int64_t width, T* y) {
  if (batch * height * width * w.outputs == 0) return;
  dispatch_activation(
      w.act, [&](auto act) { InvertedResidualForward<T, E, act>(w, x, batch, height, width, y).run(); });
}

}  // namespace mvit3
