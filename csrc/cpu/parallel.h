// Threads: work is cut into parts, a fixed cut for a fixed number of threads, so that results repeat from run to run.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "amx.h"

namespace mvit3 {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// While it lives, loops of the calling thread have one part: they are inside of a part of a loop that has all threads.
class OneThread {
 public:
  OneThread() : outer_(alone()) { alone() = true; }
  ~OneThread() { alone() = outer_; }
  OneThread(const OneThread&) = delete;
  static bool& alone() {
    thread_local bool value = false;
    return value;
  }

 private:
  bool outer_;
};

inline int64_t thread_count() { return OneThread::alone() ? 1 : torch::stable::get_num_threads(); }

// How many parts `elements` of work are worth: one per thread of torch's pool, fewer where a part would be too small to
// pay.
inline int64_t count_parts(int64_t elements, int64_t least_per_part = 32768) {
  return std::clamp<int64_t>(elements / least_per_part, 1, thread_count());
}

// The same where more parts cost nothing more, because nothing is added up over them: a loop that is handed over wakes
// all threads of the pool, so it is cut for all of them, into parts of an eighth of that size if need be.
inline int64_t spread_parts(int64_t elements, int64_t least_per_part = 32768) {
  return elements < 2 * least_per_part ? 1 : count_parts(elements, least_per_part / 8);
}

// The part'th of `parts` almost equal ranges of 0..total.
inline Range part_range(int64_t total, int64_t part, int64_t parts) {
  return {total * part / parts, total * (part + 1) / parts};
}

// The operations of each part of a parallel loop: products of two numbers, and what costs about as much.
using Region = std::vector<double>;

// The region of a loop whose parts have operations(part) each.
template <typename F>
Region operations_of(int64_t parts, const F& operations) {
  Region region;
  for (int64_t part = 0; part < parts; ++part) region.push_back(double(operations(part)));
  return region;
}

// The region of a loop over 0..total in `parts` parts.
inline Region even_region(int64_t total, int64_t parts, int64_t operations_each) {
  return operations_of(parts, [&](int64_t part) { return part_range(total, part, parts).size() * operations_each; });
}

// f(part) for every part, on torch's own thread pool. `f` must not throw.
template <typename F>
void for_each_part(int64_t parts, const F& f) {
  const auto run = [&](int64_t begin, int64_t end) {
    const amx::Share share;
    for (int64_t part = begin; part < end; ++part) f(part);
  };
  if (parts == 1)
    run(0, 1);
  else
    torch::stable::parallel_for(0, parts, 1, run);
}

}  // namespace mvit3
