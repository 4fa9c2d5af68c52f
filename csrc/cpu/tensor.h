// What every CPU kernel does with its arguments: check them, make them contiguous, read per-channel parameters,
// allocate outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "../registration.h"
#include "convert.h"
#include "memory.h"

namespace mvit3 {

using torch::headeronly::ScalarType;

// Scratch memory on a cache line boundary, for plain numbers; uninitialised unless a value is given.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(allocate(size_t(size) * sizeof(T))) {}
  Scratch(int64_t size, T value) : Scratch(size) { std::fill_n(data(), size, value); }
  // Whether freeing it gives it back to the pool.
  bool pooled() const { return data_.get_deleter().pooled; }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    bool pooled;
    void operator()(T* p) const { pooled ? give_memory(p) : ::operator delete(p, kAlign); }
  };
  static std::unique_ptr<T, Free> allocate(size_t bytes) {
    void* const pooled = int64_t(bytes) >= kLeastPooled ? take_memory(int64_t(bytes)) : nullptr;
    return {static_cast<T*>(pooled ? pooled : ::operator new(bytes, kAlign)), Free{pooled != nullptr}};
  }
  std::unique_ptr<T, Free> data_;
};

// Where the elements of a contiguous tensor lie: null where it has none.
template <typename T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

template <typename T>
T* mutable_data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f with a value of the storage type of `x` (float, BFloat16 or Float16).
template <typename F>
auto dispatch_dtype(const std::string& name, const Tensor& x, F&& f) {
  const ScalarType dtype = x.scalar_type();
  MVIT3_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
      " must be float32, bfloat16 or float16 for the compiled CPU kernels");
  if (dtype == ScalarType::Float) return f(float{});
  if (dtype == ScalarType::BFloat16) return f(BFloat16{});
  return f(Float16{});
}

// Calls f with std::true_type or std::false_type.
template <typename F>
auto dispatch_bool(bool value, F&& f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

// A shape as Python writes it.
inline std::string text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string out = "(";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + (sizes.size() == 1 ? ",)" : ")");
}

inline void check_shape(const std::string& name, const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  const bool same = t.dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), t.sizes().begin());
  MVIT3_CHECK(same, name, " must have shape ", text(sizes), ", got ", text(t.sizes()));
}

// A feature map (B, H, W, C) in one of the storage types.
inline void check_map(const std::string& name, const Tensor& t) {
  MVIT3_CHECK(t.is_cpu(), name, " must be on the CPU");
  MVIT3_CHECK(t.dim() == 4, name, " must be a feature map (B, H, W, C), got shape ", text(t.sizes()));
  dispatch_dtype(name, t, [](auto) {});
}

// Convolutions with taps around a pixel, like PyTorch's, take no map without pixels; one of no images is fine.
inline void check_pixels(const std::string& name, int64_t height, int64_t width) {
  MVIT3_CHECK(height > 0 && width > 0, name, " must have at least one row and one column, got ", height, " x ", width);
}

inline void check_eps(const std::string& name, double eps) {
  MVIT3_CHECK(eps >= 0, name, " must be at least 0, got ", eps);
}

// `t`, contiguous, after checking that it can stand beside `x`: a map of this shape, of the dtype and the device of x.
inline Tensor contiguous_map(
    const std::string& name, const Tensor& t, const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  MVIT3_CHECK(t.is_cpu(), name, " must be on the CPU");
  MVIT3_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  check_shape(name, t, sizes);
  return torch::stable::contiguous(t);
}

inline Tensor contiguous_like(const std::string& name, const Tensor& t, const Tensor& x) {
  return contiguous_map(name, t, x, x.sizes());
}

// What a forward pass kept for its backward pass: `t`, contiguous.
inline Tensor contiguous_kept(
    const std::string& name, const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes,
    ScalarType dtype = ScalarType::Float) {
  MVIT3_CHECK(
      t.is_cpu() && t.scalar_type() == dtype, name,
      " must be what the forward pass returned: another dtype or device came");
  check_shape(name, t, sizes);
  return torch::stable::contiguous(t);
}

template <typename T, typename F>
void copy_channels(const Tensor& t, int64_t channels, F&& to_double, double* out) {
  const T* data = data_of<T>(t);
  for (int64_t i = 0; i < channels; ++i) out[i] = to_double(data[i]);
}

// A parameter (channels,) of any floating-point dtype, as float64.
inline std::vector<double> read_channels(const std::string& name, const Tensor& t, int64_t channels) {
  MVIT3_CHECK(t.is_cpu(), name, " must be on the CPU");
  check_shape(name, t, {channels});
  std::vector<double> values(static_cast<size_t>(channels));
  const Tensor dense = torch::stable::contiguous(t);
  if (t.scalar_type() == ScalarType::Double) {
    copy_channels<double>(dense, channels, [](double v) { return v; }, values.data());
  } else {
    dispatch_dtype(name, dense, [&](auto type) {
      copy_channels<decltype(type)>(dense, channels, [](auto v) { return double(to_float(v)); }, values.data());
    });
  }
  return values;
}

// `values` as a tensor (channels,) of the dtype of `like`.
inline Tensor write_channels(const std::vector<double>& values, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(values.size())});
  if (like.scalar_type() == ScalarType::Double) {
    std::copy(values.begin(), values.end(), mutable_data_of<double>(out));
  } else {
    dispatch_dtype("parameter", like, [&](auto type) {
      using T = decltype(type);
      T* data = mutable_data_of<T>(out);
      for (size_t i = 0; i < values.size(); ++i) data[i] = from_float<T>(float(values[i]));
    });
  }
  return out;
}

// A new contiguous tensor like `x` but for its shape; a large one in memory that the process keeps.
inline Tensor new_output(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  int64_t bytes = x.element_size();
  for (const int64_t size : sizes) bytes *= size;
  void* const memory = bytes >= kLeastPooled ? take_memory(bytes) : nullptr;
  if (!memory) return torch::stable::new_empty(x, sizes);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  return torch::stable::from_blob(memory, sizes, strides, x.device(), x.scalar_type(), &give_memory);
}

inline Tensor new_output(const Tensor& x) { return new_output(x, x.sizes()); }

// Whether an output of this size is better written past the cache.
inline bool exceeds_cache(int64_t bytes) {
#if defined(__linux__) && defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), int64_t(1) << 23);
#else
  static const int64_t cache = int64_t(1) << 23;
#endif
  return bytes > cache / 2;
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

}  // namespace mvit3
