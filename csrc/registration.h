// How a function of this library becomes an op's kernel: its arguments are one structure, which is read from the
// dispatcher's stack in the order of the op's schema.
//
//   struct Arguments {
//     Tensor x;
//     ConvArguments expand, project;  // structures of their own: the arguments that belong together
//     OptionalTensor residual;
//     double eps;
//   };
//   Tensor op(const Arguments& a);  // or std::array<Tensor, N>, for N outputs
//
//   STABLE_TORCH_LIBRARY_IMPL(mvit3, CPU, m) { m.impl("op", mvit3::boxed<mvit3::op>); }
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <type_traits>
#include <utility>

#include "check.h"

namespace mvit3 {

using torch::stable::Tensor;

// A tensor that a call may leave out. (A field of type std::optional itself cannot be read: it would take what the
// stack converts to for its value.)
struct OptionalTensor : std::optional<Tensor> {
  explicit OptionalTensor(std::optional<Tensor> t) : std::optional<Tensor>(std::move(t)) {}
};

// The arguments of a call that are not read yet. It converts to the type of any field, which takes the next argument;
// to a structure, which takes one for each of its fields.
class Stack {
 public:
  Stack(const StableIValue* next, uint64_t count) : next_(next), end_(next + count) {}

  template <typename T>
  operator T() {
    if constexpr (std::is_aggregate_v<T>) {
      return read<T>(std::make_index_sequence<count_fields<T>()>());
    } else {
      MVIT3_CHECK(next_ != end_, "the schema has fewer arguments than the kernel");
      if constexpr (std::is_same_v<T, OptionalTensor>)
        return OptionalTensor(torch::stable::detail::to<std::optional<Tensor>>(*next_++));
      else
        return torch::stable::detail::to<T>(*next_++);
    }
  }

  bool empty() const { return next_ == end_; }

 private:
  // Values in braces are computed from left to right.
  template <typename T, size_t... I>
  T read(std::index_sequence<I...>) {
    return T{(void(I), *this)...};
  }

  // The number of fields of a structure: the most values that may stand in its braces.
  template <typename T, size_t... I>
  static auto takes(std::index_sequence<I...>) -> decltype(T{(void(I), std::declval<Stack&>())...}, std::true_type());
  template <typename T>
  static std::false_type takes(...);
  template <typename T, size_t N = 32>
  static constexpr size_t count_fields() {
    static_assert(N > 0, "a structure of arguments has 1 to 32 fields, each of a type that the stack converts to");
    if constexpr (decltype(takes<T>(std::make_index_sequence<N>()))::value)
      return N;
    else
      return count_fields<T, N - 1>();
  }

  const StableIValue *next_, *end_;
};

template <auto Function>
struct Boxed;

template <typename Result, typename Arguments, Result (*Function)(const Arguments&)>
struct Boxed<Function> {
  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    Stack arguments(stack, inputs);
    const Arguments a = arguments;  // takes the values over: from here on the stack holds nothing
    MVIT3_CHECK(arguments.empty(), "the schema has more arguments than the kernel");
    put(stack, outputs, Function(a));
  }

 private:
  template <size_t N>
  static void put(StableIValue* stack, uint64_t outputs, const std::array<Tensor, N>& results) {
    MVIT3_CHECK(outputs == N, "the schema has ", outputs, " outputs, the kernel ", N);
    for (size_t i = 0; i < N; ++i) stack[i] = torch::stable::detail::from(results[i]);
  }
  static void put(StableIValue* stack, uint64_t outputs, const Tensor& result) {
    put(stack, outputs, std::array<Tensor, 1>{result});
  }
};

// What `m.impl` takes for a function of one structure of arguments.
template <auto Function>
inline constexpr auto boxed = &Boxed<Function>::call;

}  // namespace mvit3
