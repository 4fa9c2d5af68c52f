// The steps between the ops of a program: a map's mean, and maps of another size.
#include "steps.h"

namespace mvit3 {
namespace {

// The mean over height and width.
class GlobalPool : public Step {
 public:
  explicit GlobalPool(Source&) {}
  MapShape shape(const Shapes& in) const override { return {1, 1, in[0].channels}; }
  void run(const Maps& in, const Map& out) const override {
    const int64_t pixels = in[0].shape.pixels(), channels = in[0].shape.channels,
                  parts = count_parts(in[0].rows() * channels);
    const float factor = float(1.0 / double(pixels));
    const int64_t vectors = lanes_of(channels) / kLanes, tasks = in[0].batch * vectors;
    for_each_part(parts, [&](int64_t part) {
      const Range mine = part_range(tasks, part, parts);
      for (int64_t task = mine.begin; task < mine.end; ++task) {
        const int64_t c = task % vectors * kLanes;
        const float* x = in[0].data + task / vectors * pixels * channels + c;
        Vec sum = 0.0f;
        for (int64_t i = 0; i < pixels; ++i) sum += load_some(x + i * channels, channels - c);
        store_some(out.data + task / vectors * channels + c, sum * factor, channels - c);
      }
    });
  }
  std::vector<Region> regions(const Shapes& in, int64_t batch) const override {
    const int64_t tasks = batch * (lanes_of(in[0].channels) / kLanes), parts = count_parts(batch * in[0].floats());
    return {even_region(tasks, parts, in[0].pixels() * kLanes)};
  }
};

// Bilinear, as torch.nn.functional.interpolate.
void resize(const Map& x, const Map& y, bool align_corners) {
  const int64_t channels = x.shape.channels, rows = y.batch * y.shape.height,
                parts = count_parts(rows * y.shape.width * channels);
  struct Place {
    int64_t low, high;
    float part;  // of `high`
  };
  const auto place = [&](int64_t i, int64_t from, int64_t to) {
    const float step = align_corners ? (to > 1 ? float(from - 1) / float(to - 1) : 0.0f) : float(from) / float(to);
    const float at = align_corners ? step * float(i) : std::max(step * (float(i) + 0.5f) - 0.5f, 0.0f);
    const int64_t low = std::min(int64_t(at), from - 1);
    return Place{low, std::min(low + 1, from - 1), at - float(low)};
  };
  for_each_part(parts, [&](int64_t part) {
    const Range mine = part_range(rows, part, parts);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const Place v = place(row % y.shape.height, x.shape.height, y.shape.height);
      const float* image = x.data + row / y.shape.height * x.shape.floats();
      for (int64_t column = 0; column < y.shape.width; ++column) {
        const Place h = place(column, x.shape.width, y.shape.width);
        const auto at = [&](int64_t r, int64_t c) { return image + (r * x.shape.width + c) * channels; };
        const float *a = at(v.low, h.low), *b = at(v.low, h.high), *c = at(v.high, h.low), *d = at(v.high, h.high);
        float* out = y.data + (row * y.shape.width + column) * channels;
        for (int64_t i = 0; i < channels; i += kLanes) {
          const int64_t left = channels - i;
          const Vec top = fma(load_some(b + i, left), h.part, load_some(a + i, left) * (1 - h.part));
          const Vec bottom = fma(load_some(d + i, left), h.part, load_some(c + i, left) * (1 - h.part));
          store_some(out + i, fma(bottom, v.part, top * (1 - v.part)), left);
        }
      }
    }
  });
}

// To the smallest size of whole patches.
class ResizeToPatches : public Step {
 public:
  explicit ResizeToPatches(Source& from)
      : patch_height_(from.patch()), patch_width_(from.patch()), align_corners_(from.flag("align_corners")) {}
  MapShape shape(const Shapes& in) const override {
    return {round_up(in[0].height, patch_height_), round_up(in[0].width, patch_width_), in[0].channels};
  }
  bool is_identity(const Shapes& in) const override {
    return in[0].height % patch_height_ == 0 && in[0].width % patch_width_ == 0;
  }
  void run(const Maps& in, const Map& out) const override { resize(in[0], out, align_corners_); }

 private:
  int64_t patch_height_, patch_width_;
  bool align_corners_;
};

// To the size of the second input.
class ResizeBack : public Step {
 public:
  explicit ResizeBack(Source&) {}
  Range inputs() const override { return {2, 2}; }
  MapShape shape(const Shapes& in) const override { return {in[1].height, in[1].width, in[0].channels}; }
  bool is_identity(const Shapes& in) const override {
    return in[0].height == in[1].height && in[0].width == in[1].width;
  }
  void run(const Maps& in, const Map& out) const override { resize(in[0], out, false); }
};

// Both maps begin at the same pixel: what x has beyond y is left out, what y has beyond x is zero.
void place_at_origin(const Map& x, const Map& y) {
  const int64_t channels = x.shape.channels, rows = y.batch * y.shape.height, row_floats = y.shape.width * channels,
                shared = std::min(x.shape.width, y.shape.width) * channels, parts = count_parts(rows * row_floats);
  for_each_part(parts, [&](int64_t part) {
    const Range mine = part_range(rows, part, parts);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const int64_t image = row / y.shape.height, i = row % y.shape.height;
      float* const out = y.data + row * row_floats;
      const int64_t copied = i < x.shape.height ? shared : 0;
      std::copy_n(
          x.data + image * x.shape.floats() + std::min(i, x.shape.height) * x.shape.width * channels, copied, out);
      std::fill(out + copied, out + row_floats, 0.0f);
    }
  });
}

// Without the last rows and columns that fill no patch.
class CropToPatches : public Step {
 public:
  explicit CropToPatches(Source& from) : patch_height_(from.patch()), patch_width_(from.patch()) {}
  MapShape shape(const Shapes& in) const override {
    const MapShape& x = in[0];
    MVIT3_CHECK(
        x.height >= patch_height_ && x.width >= patch_width_, "step crop_to_patches takes maps of at least ",
        patch_height_, " x ", patch_width_, " pixels, got ", x.height, " x ", x.width);
    return {x.height / patch_height_ * patch_height_, x.width / patch_width_ * patch_width_, x.channels};
  }
  bool is_identity(const Shapes& in) const override {
    return in[0].height % patch_height_ == 0 && in[0].width % patch_width_ == 0;
  }
  void run(const Maps& in, const Map& out) const override { place_at_origin(in[0], out); }

 private:
  int64_t patch_height_, patch_width_;
};

// To the size of the second input, with zeros behind the last row and column.
class PadBack : public Step {
 public:
  explicit PadBack(Source&) {}
  Range inputs() const override { return {2, 2}; }
  MapShape shape(const Shapes& in) const override { return {in[1].height, in[1].width, in[0].channels}; }
  bool is_identity(const Shapes& in) const override {
    return in[0].height == in[1].height && in[0].width == in[1].width;
  }
  void run(const Maps& in, const Map& out) const override { place_at_origin(in[0], out); }
};

}  // namespace

std::vector<StepKind> map_step_kinds() {
  return {
      {"global_pool", make<GlobalPool>}, {"resize_to_patches", make<ResizeToPatches>},
      {"resize_back", make<ResizeBack>}, {"crop_to_patches", make<CropToPatches>},
      {"pad_back", make<PadBack>},
  };
}

}  // namespace mvit3
