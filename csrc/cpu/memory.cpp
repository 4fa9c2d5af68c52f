#include "memory.h"

#include <algorithm>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mvit3 {
namespace {

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // the sanitizer watches what malloc hands out

// One stretch of addresses, reserved once; pages come when they are touched.
class Pool {
 public:
  Pool() {
    const int64_t physical = int64_t(sysconf(_SC_PHYS_PAGES)) * page_;
    void* p =
        mmap(nullptr, size_t(physical), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return;
#if defined(MADV_HUGEPAGE)
    madvise(p, size_t(physical), MADV_HUGEPAGE);  // a hint: failure changes nothing
#endif
    free_[static_cast<char*>(p)] = physical;
  }

  void* take(int64_t bytes) {
    bytes = (bytes + page_ - 1) / page_ * page_;
    const std::lock_guard<std::mutex> lock(mutex_);
    // First fit: ranges at low addresses are used again, those at high ones stay untouched.
    const auto found =
        std::find_if(free_.begin(), free_.end(), [&](const auto& range) { return range.second >= bytes; });
    if (found == free_.end()) return nullptr;
    const auto [begin, size] = *found;
    free_.erase(found);
    if (size > bytes) free_[begin + bytes] = size - bytes;
    taken_[begin] = bytes;
    touched_ = std::max(touched_, begin + bytes);
    return begin;
  }

  void give(void* p) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto taken = taken_.find(static_cast<char*>(p));
    char* begin = taken->first;
    int64_t size = taken->second;
    taken_.erase(taken);
    auto next = free_.lower_bound(begin);
    if (next != free_.end() && begin + size == next->first) {
      size += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin() && std::prev(next)->first + std::prev(next)->second == begin)
      std::prev(next)->second += size;
    else
      free_[begin] = size;
  }

  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t bytes = 0;
    for (const auto& [begin, size] : free_) {
      const int64_t used = std::min<int64_t>(size, touched_ - begin);
      if (used <= 0) break;
      madvise(begin, size_t(used), MADV_DONTNEED);
      bytes += used;
    }
    return bytes;
  }

 private:
  const int64_t page_ =
      sysconf(_SC_PAGESIZE);  // 4 KiB on most systems, up to 64 KiB on some: what is given back are whole pages
  std::mutex mutex_;
  std::map<char*, int64_t> free_, taken_;
  char* touched_ = nullptr;  // the end of what has ever been handed out
};

Pool& pool() {
  static Pool* const pool = new Pool;  // never destroyed: tensors may outlive static objects
  return *pool;
}

}  // namespace

void* take_memory(int64_t bytes) { return pool().take(bytes); }
void give_memory(void* p) { pool().give(p); }
int64_t release_memory() { return pool().release(); }

#else

}  // namespace

void* take_memory(int64_t) { return nullptr; }
void give_memory(void*) {}
int64_t release_memory() { return 0; }

#endif

}  // namespace mvit3
