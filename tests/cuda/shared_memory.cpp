// Two threads of different needs and one kernel: what each may use is never taken away.

#include <cstdlib>
#include <atomic>
#include <thread>

#include "shared_memory.h"

int main() {
  mvit3::SharedMemoryLimit limit;
  std::atomic<int> attribute[3] = {};  // of the kernel, by device, as the driver keeps it
  std::atomic<int> calls = 0;
  const auto raise = [&](int device, int bytes) {
    limit.raise(device, bytes, [&](int most) {
      attribute[device] = most;
      ++calls;
    });
    if (attribute[device] < bytes) std::abort();
  };
  raise(1, 60000);
  std::thread([&] { raise(1, 38000); }).join();
  if (attribute[1] != 60000 || calls != 1) std::abort();
  raise(0, 38000);
  raise(1, 100000);
  if (attribute[0] != 38000 || attribute[1] != 100000 || calls != 3) std::abort();
  std::thread threads[8];
  for (int i = 0; i < 8; ++i)
    threads[i] = std::thread([&, i] {
      for (int n = 1; n < 1000; ++n) raise(n % 3, n * (i + 1));
    });
  for (std::thread& thread : threads) thread.join();
}
