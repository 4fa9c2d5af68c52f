// What a step of the inference engine is built from.
#pragma once

#include <string>
#include <vector>

#include "activation.h"
#include "tensor.h"

namespace mvit3 {

// Hands a step's constructor its weights, integers and numbers. Each call takes the next one of its kind, so a
// constructor takes them in the order in which the caller listed them. C++ does not say in which order the arguments of
// a call f(x, y) are computed, but it does for a list in braces, from left to right: a constructor that needs several
// values takes them in one, as in Step{from.vector(), from.matrix()}.
class Source {
 public:
  Source(
      const std::string& kind, const std::vector<Tensor>& weights, const std::vector<int64_t>& integers,
      const std::vector<double>& numbers)
      : kind_(kind), weights_(weights), integers_(integers), numbers_(numbers) {}

  // A weight with as many dimensions as its layout needs.
  const Tensor& weight() { return take(weights_, weight_, "weights"); }
  const Tensor& matrix() { return of_dim(2, weight()); }
  const Tensor& vector() { return of_dim(1, weight()); }
  int64_t integer(const char* what, int64_t least, int64_t most) {
    const int64_t value = take(integers_, integer_, "integers");
    MVIT3_CHECK(
        least <= value && value <= most, "step ", kind_, ": ", what, " must be ", least, " to ", most, ", got ", value);
    return value;
  }
  double number() { return take(numbers_, number_, "numbers"); }
  double eps() {
    const double value = number();
    check_eps("step " + kind_ + ": eps", value);
    return value;
  }

  int64_t stride() { return integer("stride", 1, 2); }
  int64_t dilation() { return integer("dilation", 1, kMost); }
  int64_t activation() { return integer("act", kIdentity, kRelu); }
  int64_t patch() { return integer("a patch size", 1, kMost); }
  bool flag(const char* what) { return integer(what, 0, 1) == 1; }

  void check_empty() const {
    check_all(weights_, weight_, "weights");
    check_all(integers_, integer_, "integers");
    check_all(numbers_, number_, "numbers");
  }

 private:
  template <typename T>
  const T& take(const std::vector<T>& from, size_t& at, const char* what) {
    MVIT3_CHECK(at < from.size(), "step ", kind_, " needs more ", what, ", got ", from.size());
    return from[at++];
  }

  template <typename T>
  void check_all(const std::vector<T>& from, size_t taken, const char* what) const {
    MVIT3_CHECK(taken == from.size(), "step ", kind_, " takes ", taken, " ", what, ", got ", from.size());
  }

  const Tensor& of_dim(int64_t dim, const Tensor& weight) const {
    MVIT3_CHECK(
        weight.dim() == dim && weight.size(0) >= 1, "step ", kind_, ": weights[", weight_ - 1, "] must have ", dim,
        " dimensions, got shape ", text(weight.sizes()));
    return weight;
  }

  static constexpr int64_t kMost = int64_t(1) << 20;

  const std::string& kind_;
  const std::vector<Tensor>& weights_;
  const std::vector<int64_t>& integers_;
  const std::vector<double>& numbers_;
  size_t weight_ = 0, integer_ = 0, number_ = 0;
};

}  // namespace mvit3
