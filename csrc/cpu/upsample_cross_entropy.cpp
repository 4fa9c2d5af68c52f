// upsample_cross_entropy: the cross-entropy of bilinearly up-sampled logits, which exist one pixel at a time. Meaning:
// mvit3_kernels/ops/upsample_cross_entropy/reference.py.
//
// One walk over the labels does both ways: a pixel's logits are mixed from four pixels of the small map, their softmax
// gives its loss and, times the four shares, its part of the small map's gradient. With smoothing e, class weights w
// and their sum W a pixel of label t has the loss
//   a lse(z) - b z_t - sum_c s_c z_c,   b = (1 - e) w_t,  s_c = e w_c / C,  a = b + e W / C,
// and the gradient a softmax(z) - b onehot(t) - s.

#include <atomic>
#include <optional>

#include "upsample.h"

namespace mvit3 {
namespace {

struct ForwardArguments {
  Tensor logits, target;
  bool align_corners;
  int64_t ignore_index;
  OptionalTensor weight;
  double label_smoothing;
  bool keep;
};

// What a pixel's loss depends on beside its logits.
struct Terms {
  int64_t ignore;
  float rest;                   // 1 - smoothing
  std::vector<float> weight;    // of each class; empty: 1
  std::vector<float> smoothed;  // s, (lanes,); empty without smoothing
  float smooth = 0.0f;          // e W / C

  Terms(const ForwardArguments& a, int64_t classes, int64_t lanes)
      : ignore(a.ignore_index), rest(float(1.0 - a.label_smoothing)) {
    Values w(classes, 1.0);
    if (a.weight) {
      w = read_channels("weight", *a.weight, classes);
      weight.assign(w.begin(), w.end());
    }
    if (a.label_smoothing == 0.0) return;
    smoothed.assign(lanes, 0.0f);
    double sum = 0.0;
    for (int64_t c = 0; c < classes; ++c) {
      smoothed[c] = float(a.label_smoothing * w[c] / double(classes));
      sum += a.label_smoothing * w[c] / double(classes);
    }
    smooth = float(sum);
  }
  float of(int64_t label) const { return weight.empty() ? 1.0f : weight[label]; }
};

// exp2(0) is this much below 1. The largest logit's exponential is that of 0, and the loss of a pixel that is sure of
// its label is the logarithm of a sum barely above 1.
constexpr double kBelowOne = 1.0 - double(0.99999994f);

struct Sums {
  double loss = 0.0, weight = 0.0;
};

// The vectors of one pixel: in registers where their number N is known, else (0) in memory.
template <int N>
struct Lanes {
  Vec v[N];
  Lanes(float*, int64_t) {}
  static constexpr int64_t count(int64_t) { return N; }
  Vec get(int64_t i) const { return v[i]; }
  void set(int64_t i, Vec x) { v[i] = x; }
};
template <>
struct Lanes<0> {
  float* v;
  Lanes(float* memory, int64_t) : v(memory) {}
  static int64_t count(int64_t lanes) { return lanes / kLanes; }
  Vec get(int64_t i) const { return load(v + i * kLanes); }
  void set(int64_t i, Vec x) { store(v + i * kLanes, x); }
};

// One output row: `row` is the map's mixed row, (w, lanes); `gradient`, if not null, gets what the loss's gradient adds
// to that row.
template <int N>
class RowWalk {
 public:
  RowWalk(const Upsampling& up, const Terms& terms) : up_(up), terms_(terms), valid_(up.classes), lanes_(up.lanes()) {}

  // The first label that is none, if there is one.
  std::optional<int64_t> operator()(const float* row, const int64_t* labels, float* gradient, Sums& sums) {
    float* const memory = N ? nullptr : workspace<1>(3 * lanes_);
    Lanes<N> z(memory, 0), near(memory + (N ? 0 : lanes_), 0), far(memory + (N ? 0 : 2 * lanes_), 0);
    const int64_t n = Lanes<N>::count(lanes_);
    int64_t cell = -1;
    double product = 1.0;  // of sums of exponentials, whose logarithm is taken for many pixels at once
    const auto flush = [&] {
      if (cell < 0 || !gradient) return;
      float *low = gradient + up_.columns.low[cell] * lanes_, *high = gradient + up_.columns.high[cell] * lanes_;
      for (int64_t i = 0; i < n; ++i) {
        store(low + i * kLanes, load(low + i * kLanes) + near.get(i));
        store(high + i * kLanes, load(high + i * kLanes) + far.get(i));
      }
    };
    for (int64_t x = 0; x < up_.columns.size(); ++x) {
      const int64_t label = labels[x];
      if (label == terms_.ignore) continue;
      if (label < 0 || label >= up_.classes) return label;
      if (cell < 0 || up_.columns.low[x] != up_.columns.low[cell] || up_.columns.high[x] != up_.columns.high[cell]) {
        flush();
        cell = x;
        for (int64_t i = 0; i < n; ++i) near.set(i, 0.0f), far.set(i, 0.0f);
      }
      const float share = up_.columns.share[x], rest = 1.0f - share, weight = terms_.of(label);
      const float *low = row + up_.columns.low[x] * lanes_, *high = row + up_.columns.high[x] * lanes_;
      const float at_label = low[label] * rest + high[label] * share;
      const float b = terms_.rest * weight, a = b + terms_.smooth;
      const float most = mix(low, high, share, rest, n, z);
      if (!terms_.smoothed.empty()) sums.loss -= smoothed_logits(z, n);
      const float sum = exponentials(z, n, most);
      sums.weight += weight;
      sums.loss += double(a) * most - double(b) * at_label;
      if (terms_.weight.empty() && terms_.smoothed.empty()) {
        product *= sum + kBelowOne;
        if (!(product < 1e200)) sums.loss += std::log(product), product = 1.0;
      } else {
        sums.loss += double(a) * std::log(sum + kBelowOne);
      }
      if (!gradient || a == 0.0f) continue;
      // In front of the sums over pixels: where a pixel is sure of its label the two nearly cancel.
      subtract_label(z, label, sum * (b / a));
      const Vec to_near = rest * (a / sum), to_far = share * (a / sum);
      for (int64_t i = 0; i < n; ++i) {
        near.set(i, fma(z.get(i), to_near, near.get(i)));
        far.set(i, fma(z.get(i), to_far, far.get(i)));
      }
      float *low_gradient = gradient + up_.columns.low[x] * lanes_,
            *high_gradient = gradient + up_.columns.high[x] * lanes_;
      if (!terms_.smoothed.empty()) subtract_smoothed(low_gradient, high_gradient, rest, share);
    }
    sums.loss += std::log(product);
    flush();
    return std::nullopt;
  }

 private:
  // z and its maximum; -inf behind the classes.
  MVIT3_INLINE float mix(const float* low, const float* high, Vec share, Vec rest, int64_t n, Lanes<N>& z) const {
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    Vec most = kLowest;
    for (int64_t i = 0; i < n; ++i) {
      Vec v = fma(load(high + i * kLanes), share, load(low + i * kLanes) * rest);
      if (i == n - 1) v = valid_.keep(v, kLowest);
      z.set(i, v);
      most = max(most, v);
    }
    return max_of_lanes(most);
  }

  // z to exp(z - most), and their sum.
  MVIT3_INLINE float exponentials(Lanes<N>& z, int64_t n, float most) const {
    const Vec shift = most;
    Vec sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const Vec e = exp2((z.get(i) - shift) * kLog2e);
      z.set(i, e);
      sum += e;
    }
    return sum_of_lanes(sum);
  }

  // z - value at the label.
  MVIT3_INLINE void subtract_label(Lanes<N>& z, int64_t label, float value) const {
    const int64_t i = label / kLanes;
    const Vec lane = float(label % kLanes);
    const Vec one = select_at_least(valid_.index, lane, select_greater(valid_.index, lane, 0.0f, 1.0f), 0.0f);
    z.set(i, fnma(one, value, z.get(i)));
  }

  double smoothed_logits(const Lanes<N>& z, int64_t n) const {
    Vec sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      Vec v = z.get(i);
      if (i == n - 1) v = valid_.keep(v, 0.0f);
      sum = fma(v, load(terms_.smoothed.data() + i * kLanes), sum);
    }
    return sum_of_lanes(sum);
  }

  void subtract_smoothed(float* low, float* high, float rest, float share) const {
    for (int64_t c = 0; c < lanes_; c += kLanes) {
      const Vec s = load(terms_.smoothed.data() + c);
      store(low + c, fnma(s, rest, load(low + c)));
      store(high + c, fnma(s, share, load(high + c)));
    }
  }

  const Upsampling& up_;
  const Terms& terms_;
  const ValidLanes valid_;
  const int64_t lanes_;
};

// The rows of the small map that a band of output rows reads, and their gradient.
struct BandGradient {
  Range rows{0, 0};
  float* values = nullptr;  // (rows, w, lanes)
};

template <typename T, int N>
std::optional<int64_t> walk_band(
    const Upsampling& up, const Terms& terms, const T* image, const int64_t* labels, Range rows, BandGradient out,
    Sums& sums) {
  const int64_t row_floats = up.inner_width * up.lanes(), width = up.columns.size();
  Scratch<float> memory(2 * row_floats);
  float *row = memory.data(), *gradient = out.values ? memory.data() + row_floats : nullptr;
  RowWalk<N> walk(up, terms);
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    mix_rows(up, image, y, row);
    if (gradient) std::fill_n(gradient, row_floats, 0.0f);
    if (const auto wrong = walk(row, labels + y * width, gradient, sums)) return wrong;
    if (!gradient) continue;
    const Vec share = up.rows.share[y], rest = Vec(1.0f) - share;
    float *low = out.values + (up.rows.low[y] - out.rows.begin) * row_floats,
          *high = out.values + (up.rows.high[y] - out.rows.begin) * row_floats;
    for (int64_t i = 0; i < row_floats; i += kLanes) {
      const Vec g = load(gradient + i);
      store(low + i, fma(g, rest, load(low + i)));
      store(high + i, fma(g, share, load(high + i)));
    }
  }
  return std::nullopt;
}

// The sum of the bands' gradients, (h, w, classes).
void write_gradient(const Upsampling& up, const BandGradient* bands, int64_t count, float* out) {
  const int64_t lanes = up.lanes();
  for (int64_t pixel = 0; pixel < up.inner_pixels(); ++pixel)
    for (int64_t c = 0; c < up.classes; c += kLanes) {
      Vec sum = 0.0f;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t y = pixel / up.inner_width - bands[k].rows.begin;
        if (y >= 0 && y < bands[k].rows.size())
          sum += load(bands[k].values + (y * up.inner_width + pixel % up.inner_width) * lanes + c);
      }
      store_some(out + pixel * up.classes + c, sum, std::min<int64_t>(kLanes, up.classes - c));
    }
}

template <typename T, int N>
Sums walk_all(const Upsampling& up, const Terms& terms, const T* logits, const int64_t* target, float* gradient) {
  const Bands bands(up);
  std::vector<Sums> sums(bands.total);
  std::vector<BandGradient> parts(bands.total);
  std::vector<Scratch<float>> memory;
  const int64_t row_floats = up.inner_width * up.lanes();
  for (int64_t i = 0; i < bands.total && gradient; ++i) {
    const Range rows = bands.rows(up, i);
    if (rows.size() > 0) parts[i].rows = {up.rows.low[rows.begin], up.rows.high[rows.end - 1] + 1};
    memory.emplace_back(bands.per_image > 1 ? parts[i].rows.size() * row_floats : 0, 0.0f);
    parts[i].values = memory.back().data();
  }
  std::atomic<bool> failed{false};
  std::atomic<int64_t> wrong{0};
  for_each_part(bands.total, [&](int64_t i) {
    const int64_t image = bands.image(i);
    Scratch<float> own(gradient && bands.per_image == 1 ? parts[i].rows.size() * row_floats : 0, 0.0f);
    if (gradient && bands.per_image == 1) parts[i].values = own.data();
    const auto label = walk_band<T, N>(
        up, terms, logits + image * up.inner_pixels() * up.classes, target + image * up.pixels(), bands.rows(up, i),
        parts[i], sums[i]);
    if (label) wrong = *label, failed = true;
    if (gradient && bands.per_image == 1)
      write_gradient(up, &parts[i], 1, gradient + image * up.inner_pixels() * up.classes);
  });
  MVIT3_CHECK(!failed, "target must hold labels of 0 to ", up.classes - 1, " or ignore_index, got ", int64_t(wrong));
  if (gradient && bands.per_image > 1)
    for_each_part(up.batch, [&](int64_t b) {
      write_gradient(up, &parts[b * bands.per_image], bands.per_image, gradient + b * up.inner_pixels() * up.classes);
    });
  Sums total;
  for (const Sums& one : sums) total.loss += one.loss, total.weight += one.weight;
  return total;
}

// The mean loss, the weight of the pixels that it is the mean of, and the gradient of the sum (or nothing).
std::array<Tensor, 3> upsample_cross_entropy_forward(const ForwardArguments& a) {
  check_map("logits", a.logits);
  MVIT3_CHECK(
      a.target.is_cpu() && a.target.scalar_type() == ScalarType::Long && a.target.dim() == 3 &&
          a.target.size(0) == a.logits.size(0),
      "target must be an int64 tensor (B, H, W) on the CPU with the batch of logits");
  MVIT3_CHECK(
      a.label_smoothing >= 0.0 && a.label_smoothing <= 1.0, "label_smoothing must be 0 to 1, got ", a.label_smoothing);
  check_pixels("logits", a.logits.size(1), a.logits.size(2));
  const Tensor dense = torch::stable::contiguous(a.logits), labels = torch::stable::contiguous(a.target);
  const Upsampling up(dense, labels.size(1), labels.size(2), a.align_corners);
  MVIT3_CHECK(up.classes > 0, "logits must have at least one class");
  const Terms terms(a, up.classes, up.lanes());
  const Tensor gradient = a.keep ? torch::stable::new_empty(dense, dense.sizes(), ScalarType::Float)
                                 : torch::stable::new_empty(dense, {0}, ScalarType::Float);
  const Tensor loss = torch::stable::new_empty(dense, {}, ScalarType::Float),
               weight = torch::stable::new_empty(dense, {}, ScalarType::Float);
  const Sums sums = dispatch_dtype("logits", dense, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto vectors) {
      return walk_all<T, decltype(vectors)::value>(
          up, terms, data_of<T>(dense), data_of<int64_t>(labels), a.keep ? mutable_data_of<float>(gradient) : nullptr);
    };
    if (up.lanes() == kLanes) return run(std::integral_constant<int, 1>{});
    if (up.lanes() == 2 * kLanes) return run(std::integral_constant<int, 2>{});
    return run(std::integral_constant<int, 0>{});
  });
  // Where no pixel counts the loss is NaN, as PyTorch's, and the gradient 0.
  const bool counts = sums.weight != 0.0;  // the weights of classes may be negative
  *mutable_data_of<float>(loss) = counts ? float(sums.loss / sums.weight) : std::numeric_limits<float>::quiet_NaN();
  *mutable_data_of<float>(weight) = counts ? float(sums.weight) : 1.0f;
  return {loss, weight, gradient};
}

struct BackwardArguments {
  Tensor dloss, logits, total, gradient;
};

Tensor upsample_cross_entropy_backward(const BackwardArguments& a) {
  check_map("logits", a.logits);
  const Tensor gradient = contiguous_kept("gradient", a.gradient, a.logits.sizes());
  const Tensor out = new_output(torch::stable::contiguous(a.logits));
  const Tensor total = contiguous_kept("total", a.total, {}), dloss = contiguous_kept("dloss", a.dloss, {});
  const float scale = *data_of<float>(dloss) / *data_of<float>(total);
  dispatch_dtype("logits", out, [&](auto type) {
    using T = decltype(type);
    const float* in = data_of<float>(gradient);
    T* to = mutable_data_of<T>(out);
    const int64_t count = gradient.numel(), parts = count_parts(count);
    for_each_part(parts, [&](int64_t part) {
      const Range range = part_range(count, part, parts);
      for (int64_t i = range.begin; i < range.end; i += kLanes)
        store_some(
            to + i, load_some(in + i, std::min<int64_t>(kLanes, range.end - i)) * scale,
            std::min<int64_t>(kLanes, range.end - i));
    });
  });
  return out;
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("upsample_cross_entropy_forward", mvit3::boxed<mvit3::upsample_cross_entropy_forward>);
  m.impl("upsample_cross_entropy_backward", mvit3::boxed<mvit3::upsample_cross_entropy_backward>);
}
