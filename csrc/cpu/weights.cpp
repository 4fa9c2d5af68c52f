// Whether the tensors that a program was packed from are still what they were, whoever wrote them: PyTorch's count of
// versions knows nothing of fused optimisers, of `p.data`, of numpy, or of tensors made in inference mode.
//
// The memory of each tensor is cut into slices, and each slice has a sum. A call compares the next slice of every
// tensor: one that has been rewritten is noticed at once, a single element after at most kSlices calls, for 1/kSlices
// of the memory. The caller keeps the memory alive and knows that the tensors still lie there: a tensor that is held
// here could not be given another content by swap_tensors.

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

#include "tensor.h"

namespace mvit3 {
namespace {

constexpr int64_t kSlices = 128;
constexpr int64_t kLine = 64;  // bytes; no slice but the last is shorter

// Depends on every bit and on the order of the words; bytes behind the last whole word count too.
uint64_t sum_of(const char* data, int64_t bytes) {
  constexpr int64_t kLanes = 16;
  uint64_t lanes[kLanes] = {};
  int64_t at = 0;
  for (; at + kLanes * 8 <= bytes; at += kLanes * 8) {
    uint64_t words[kLanes];
    std::memcpy(words, data + at, sizeof(words));
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = ((lanes[i] << 7) | (lanes[i] >> 57)) + words[i];
  }
  uint64_t sum = 0;
  const auto mix = [&](uint64_t word) { sum = (sum ^ word) * 0x9E3779B97F4A7C15u + (sum >> 32); };
  for (const uint64_t lane : lanes) mix(lane);
  for (; at < bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, size_t(std::min<int64_t>(8, bytes - at)));
    mix(word);
  }
  return sum;
}

// Bytes from the first element of a tensor to the last one; 0 where it has none, and where they are not on the CPU.
int64_t extent(const Tensor& tensor) {
  if (tensor.numel() == 0 || !tensor.is_cpu()) return 0;
  int64_t elements = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
  return elements * int64_t(tensor.element_size());
}

struct Slice {
  const char* data;
  int64_t bytes;
  uint64_t sum;
};

class Weights {
 public:
  // One slice of each tensor for every call of a round, in the order in which they are read: they are far from the
  // caches by then.
  // `near` are the addresses of what the caller reads behind a call.
  Weights(const std::vector<Tensor>& tensors, std::vector<int64_t> near) : rounds_(kSlices), near_(std::move(near)) {
    for (const Tensor& tensor : tensors) {
      const char* const data = static_cast<const char*>(tensor.data_ptr());
      const int64_t bytes = extent(tensor), slices = std::min(kSlices, (bytes + kLine - 1) / kLine);
      const auto begin = [&](int64_t slice) {
        return slice == slices ? bytes : bytes * slice / slices / kLine * kLine;
      };
      for (int64_t call = 0; slices > 0 && call < kSlices; ++call) {
        const int64_t slice = call % slices, length = begin(slice + 1) - begin(slice);
        rounds_[call].push_back({data + begin(slice), length, sum_of(data + begin(slice), length)});
      }
    }
  }
  // Whether a slice of the next call has another sum or, with `all`, any slice.
  bool changed(bool all) {
    for (const int64_t address : near_) __builtin_prefetch(reinterpret_cast<const void*>(address));
    const int64_t call = calls_++ % kSlices;
    if (!all) return changed(rounds_[call]);
    return std::any_of(rounds_.begin(), rounds_.end(), [](const std::vector<Slice>& round) { return changed(round); });
  }

 private:
  static bool changed(const std::vector<Slice>& slices) {
    constexpr size_t kAhead = 12;
    for (size_t i = 0; i < slices.size(); ++i) {
      if (i + kAhead < slices.size()) __builtin_prefetch(slices[i + kAhead].data);
      if (sum_of(slices[i].data, slices[i].bytes) != slices[i].sum) return true;
    }
    return false;
  }

  std::vector<std::vector<Slice>> rounds_;
  std::vector<int64_t> near_;
  std::atomic<int64_t> calls_{0};
};

std::mutex weights_mutex;
std::map<int64_t, std::shared_ptr<Weights>> known_weights;

int64_t weights_new(std::vector<Tensor> tensors, std::vector<int64_t> near) {
  auto made = std::make_shared<Weights>(tensors, std::move(near));
  static int64_t last = 0;
  const std::lock_guard<std::mutex> lock(weights_mutex);
  known_weights[++last] = std::move(made);
  return last;
}

bool weights_changed(int64_t number, bool all) {
  std::shared_ptr<Weights> weights;
  {
    const std::lock_guard<std::mutex> lock(weights_mutex);
    const auto found = known_weights.find(number);
    MVIT3_CHECK(
        found != known_weights.end(), "weights must be a number of weights_new that is not freed, got ", number);
    weights = found->second;
  }
  return weights->changed(all);
}

void weights_free(int64_t number) {
  const std::lock_guard<std::mutex> lock(weights_mutex);
  known_weights.erase(number);
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_FRAGMENT(mvit3, m) {
  m.def("weights_new(Tensor[] tensors, int[] near) -> int");
  m.def("weights_changed(int weights, bool all) -> bool");
  m.def("weights_free(int weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mvit3, CompositeExplicitAutograd, m) {
  m.impl("weights_new", TORCH_BOX(&mvit3::weights_new));
  m.impl("weights_changed", TORCH_BOX(&mvit3::weights_changed));
  m.impl("weights_free", TORCH_BOX(&mvit3::weights_free));
}
