// How much dynamic shared memory a kernel may use.
#pragma once

#include <mutex>
#include <vector>

namespace mvit3 {

// The limit of one kernel. It belongs to the kernel and the device, whichever thread sets it, so it only ever grows:
// a thread that needs less would else take away what another one is about to launch with.
class SharedMemoryLimit {
 public:
  // From here on the kernel may use `bytes` on this device; set(bytes) is called where it may not yet.
  template <typename Set>
  void raise(int device, int bytes, const Set& set) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (size_t(device) >= allowed_.size()) allowed_.resize(device + 1, 0);
    if (bytes <= allowed_[device]) return;
    set(bytes);
    allowed_[device] = bytes;
  }

 private:
  std::mutex mutex_;
  std::vector<int> allowed_;  // by device
};

}  // namespace mvit3
