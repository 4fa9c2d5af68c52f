// dropout and the addition of a residual, forward and backward. Meaning: mvit3_kernels/ops/dropout/reference.py.

#include "../registration.h"
#include "parallel.h"
#include "random.h"

namespace mvit3 {
namespace {

constexpr int64_t kBlock = 4096;  // elements of a sample between two looks at the key

// y = mask * x + residual.
template <typename T>
void drop(const Tensor& x, const T* in, const T* residual, T* y, const Dropout& dropout) {
  const int64_t sample = x.size(0) ? x.numel() / x.size(0) : 0, blocks = (sample + kBlock - 1) / kBlock;
  const int64_t parts = count_parts(x.numel());
  for_each_part(parts, [&](int64_t part) {
    const Range mine = part_range(x.size(0) * blocks, part, parts);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      const int64_t first = block % blocks * kBlock, count = std::min(kBlock, sample - first);
      const int64_t start = block / blocks * sample + first;
      const uint32_t key = dropout.key(block / blocks);
      for (int64_t i = 0; i < count; i += kLanes) {
        Vec value = load_some(in + start + i, count - i);
        if (dropout.active()) value = value * dropout(key, first + i);
        if (residual) value += load_some(residual + start + i, count - i);
        store_some(y + start + i, value, count - i);
      }
    }
  });
}

// The same of tensors; `name` is that of the argument x.
Tensor drop(
    const char* name, const Tensor& x, double p, const OptionalTensor& seed, const std::optional<Tensor>& residual) {
  check_map(name, x);
  const Dropout dropout("p", p, seed, 0);
  const Tensor dense = torch::stable::contiguous(x),
               added = residual ? contiguous_like("residual", *residual, x) : dense, y = new_output(dense);
  dispatch_dtype(name, dense, [&](auto type) {
    using T = decltype(type);
    drop(dense, data_of<T>(dense), residual ? data_of<T>(added) : nullptr, mutable_data_of<T>(y), dropout);
  });
  return y;
}

struct ForwardArguments {
  Tensor x;
  double p;
  OptionalTensor seed, residual;
};

Tensor dropout_forward(const ForwardArguments& a) { return drop("x", a.x, a.p, a.seed, a.residual); }

struct BackwardArguments {
  Tensor dy;
  double p;
  OptionalTensor seed;
};

Tensor dropout_backward(const BackwardArguments& a) { return drop("dy", a.dy, a.p, a.seed, std::nullopt); }

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("dropout_forward", mvit3::boxed<mvit3::dropout_forward>);
  m.impl("dropout_backward", mvit3::boxed<mvit3::dropout_backward>);
}
