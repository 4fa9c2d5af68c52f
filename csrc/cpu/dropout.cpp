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

struct ForwardArguments {
  Tensor x;
  double p;
  OptionalTensor seed, residual;
};

Tensor dropout_forward(const ForwardArguments& a) {
  check_map("x", a.x);
  return dispatch_dtype("x", a.x, [&](auto type) {
    using T = decltype(type);
    const Dropout dropout("p", a.p, a.seed, 0);
    const Tensor x = torch::stable::contiguous(a.x);
    const Tensor residual = a.residual ? contiguous_like("residual", *a.residual, a.x) : x;
    Tensor y = new_output(x);
    drop(x, data_of<T>(x), a.residual ? data_of<T>(residual) : nullptr, mutable_data_of<T>(y), dropout);
    return y;
  });
}

struct BackwardArguments {
  Tensor dy;
  double p;
  OptionalTensor seed;
};

Tensor dropout_backward(const BackwardArguments& a) {
  check_map("dy", a.dy);
  return dispatch_dtype("dy", a.dy, [&](auto type) {
    using T = decltype(type);
    const Dropout dropout("p", a.p, a.seed, 0);
    const Tensor dy = torch::stable::contiguous(a.dy);
    Tensor dx = new_output(dy);
    drop<T>(dy, data_of<T>(dy), nullptr, mutable_data_of<T>(dx), dropout);
    return dx;
  });
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) {
  m.impl("dropout_forward", mvit3::boxed<mvit3::dropout_forward>);
  m.impl("dropout_backward", mvit3::boxed<mvit3::dropout_backward>);
}
