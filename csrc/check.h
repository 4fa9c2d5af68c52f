// How a kernel refuses an argument.
#pragma once

#include <sstream>
#include <stdexcept>

namespace mvit3 {

template <typename... Parts>
[[noreturn, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Throws a std::runtime_error, in Python a RuntimeError, where the condition does not hold. The message is what stands
// behind the condition, and no more: STD_TORCH_CHECK would add the name of the source file.
#define MVIT3_CHECK(condition, ...)                                      \
  do {                                                                   \
    if (__builtin_expect(!(condition), false)) mvit3::fail(__VA_ARGS__); \
  } while (false)

}  // namespace mvit3
