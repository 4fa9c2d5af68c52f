// upsample_argmax: the class of the largest of bilinearly up-sampled logits, which exist one pixel at a time. Meaning:
// mvit3_kernels/ops/upsample_argmax/reference.py.
//
// Between two pixels of the small map the logits along a row, or down a column, are straight lines, so a class that is
// the largest at both ends of a run of output pixels is the largest everywhere between, up to rounding. Runs whose ends
// agree are filled, others halved.

#include "upsample.h"

namespace mvit3 {
namespace {

struct Arguments {
  Tensor logits;
  int64_t height, width;
  bool align_corners;
  OptionalTensor target;
};

// The first of the largest logits of output pixel x; the first NaN, if there is one.
class Largest {
 public:
  Largest(const Upsampling& up, const float* row) : up_(up), row_(row), valid_(up.classes) {}

  int64_t operator()(int64_t x) const {
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    const int64_t lanes = up_.lanes();
    const Vec share = up_.columns.share[x], rest = Vec(1.0f) - share;
    const float *low = row_ + up_.columns.low[x] * lanes, *high = row_ + up_.columns.high[x] * lanes;
    const auto mixed = [&](int64_t c) { return fma(load(high + c), share, load(low + c) * rest); };
    Vec most = kLowest, sum = 0.0f;
    for (int64_t c = 0; c < lanes; c += kLanes) {
      Vec v = mixed(c);
      sum += v;
      if (c + kLanes == lanes) v = valid_.keep(v, kLowest);
      most = max(v, most);
    }
    const bool plain = all_finite(sum);  // else a NaN may be among them
    const float largest = max_of_lanes(most);
    for (int64_t c = 0; c < lanes; c += kLanes) {
      float values[kLanes];
      store(values, mixed(c));
      const int64_t count = std::min<int64_t>(kLanes, up_.classes - c);
      for (int64_t i = 0; i < count; ++i)
        if (plain ? values[i] == largest : values[i] != values[i]) return c + i;
    }
    return plain ? 0 : first_of(mixed, largest);
  }

 private:
  // Infinities, but no NaN.
  template <typename F>
  int64_t first_of(const F& mixed, float largest) const {
    float values[kLanes];
    for (int64_t c = 0; c < up_.classes; ++c) {
      if (c % kLanes == 0) store(values, mixed(c));
      if (values[c % kLanes] == largest) return c;
    }
    return 0;
  }

  const Upsampling& up_;
  const float* row_;
  const ValidLanes valid_;
};

// The labels between two output pixels of a cell whose labels are known.
void label_between(const Largest& largest, int64_t first, int64_t last, int64_t* out) {
  if (last - first < 2) return;
  if (out[first] == out[last]) return (void)std::fill(out + first + 1, out + last, out[first]);
  const int64_t middle = (first + last) / 2;
  out[middle] = largest(middle);
  label_between(largest, first, middle, out);
  label_between(largest, middle, last, out);
}

// The end of the run of outputs from `begin` on that read the same two inputs, at most `end`.
int64_t run_end(const Axis& axis, int64_t begin, int64_t end) {
  int64_t i = begin + 1;
  while (i < end && axis.low[i] == axis.low[begin] && axis.high[i] == axis.high[begin]) ++i;
  return i;
}

// The labels of a range of an image's output rows.
template <typename T>
class RowLabels {
 public:
  RowLabels(const Upsampling& up, const T* image, int64_t* out)
      : up_(up), image_(image), out_(out), row_(workspace(up.inner_width * up.lanes())), largest_(up, row_) {}

  void operator()(Range rows) const {
    for (int64_t begin = rows.begin; begin < rows.end;) {
      const int64_t end = run_end(up_.rows, begin, rows.end);
      label(begin);
      if (end - begin > 1) label(end - 1);
      between(begin, end - 1);
      begin = end;
    }
  }

 private:
  int64_t* labels(int64_t y) const { return out_ + y * up_.columns.size(); }

  void label(int64_t y) const {
    mix_rows(up_, image_, y, row_);
    int64_t* out = labels(y);
    for (int64_t begin = 0; begin < up_.columns.size();) {
      const int64_t end = run_end(up_.columns, begin, up_.columns.size());
      out[begin] = largest_(begin);
      out[end - 1] = largest_(end - 1);
      label_between(largest_, begin, end - 1, out);
      begin = end;
    }
  }

  void between(int64_t first, int64_t last) const {
    if (last - first < 2) return;
    const int64_t middle = (first + last) / 2, *above = labels(first), *below = labels(last);
    int64_t* out = labels(middle);
    bool mixed = false;
    for (int64_t x = 0; x < up_.columns.size(); ++x) {
      if (above[x] == below[x]) {
        out[x] = above[x];
        continue;
      }
      if (!mixed) mix_rows(up_, image_, middle, row_);
      mixed = true;
      out[x] = largest_(x);
    }
    between(first, middle);
    between(middle, last);
  }

  const Upsampling& up_;
  const T* image_;
  int64_t* out_;
  float* row_;
  Largest largest_;
};

std::array<Tensor, 2> upsample_argmax_inference(const Arguments& a) {
  check_map("logits", a.logits);
  check_pixels("logits", a.logits.size(1), a.logits.size(2));
  MVIT3_CHECK(a.logits.size(3) > 0, "logits must have at least one class");
  constexpr int64_t kMost = 1 << 20;
  MVIT3_CHECK(
      a.height > 0 && a.width > 0 && a.height <= kMost && a.width <= kMost, "height and width must be 1 to ", kMost,
      ", got ", a.height, " and ", a.width);
  const Tensor dense = torch::stable::contiguous(a.logits);
  const Upsampling up(dense, a.height, a.width, a.align_corners);
  const int64_t classes = up.classes, counted = a.target ? classes : 0;
  Tensor target = dense;
  if (a.target) {
    MVIT3_CHECK(a.target->is_cpu() && a.target->scalar_type() == ScalarType::Long, "target must be int64 on the CPU");
    check_shape("target", *a.target, {up.batch, a.height, a.width});
    target = torch::stable::contiguous(*a.target);
  }
  const Tensor labels = torch::stable::new_empty(dense, {up.batch, a.height, a.width}, ScalarType::Long),
               confusion = torch::stable::new_empty(dense, {counted, counted}, ScalarType::Long);
  const Bands bands(up);
  std::vector<std::vector<int64_t>> counts(bands.total, std::vector<int64_t>(counted * counted, 0));
  dispatch_dtype("logits", dense, [&](auto type) {
    using T = decltype(type);
    for_each_part(bands.total, [&](int64_t band) {
      const int64_t image = bands.image(band);
      const Range rows = bands.rows(up, band);
      int64_t* out = mutable_data_of<int64_t>(labels) + image * up.pixels();
      RowLabels<T>(up, data_of<T>(dense) + image * up.inner_pixels() * classes, out)(rows);
      const int64_t* given = counted ? data_of<int64_t>(target) + image * up.pixels() : nullptr;
      for (int64_t i = rows.begin * a.width; i < rows.end * a.width && counted; ++i)
        if (given[i] >= 0 && given[i] < classes) ++counts[band][given[i] * classes + out[i]];
    });
  });
  int64_t* out = mutable_data_of<int64_t>(confusion);
  std::fill_n(out, counted * counted, int64_t(0));
  for (const auto& one : counts)
    for (int64_t i = 0; i < counted * counted; ++i) out[i] += one[i];
  return {labels, confusion};
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("upsample_argmax_inference", mvit3::boxed<mvit3::upsample_argmax_inference>);
}
