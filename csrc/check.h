// Argument checks below every dispatch mode. The message is written for the user: operator, argument, rule, what
// arrived.
#pragma once

#include <sstream>
#include <stdexcept>

namespace memloc {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace memloc

// memloc_ext.ops turns a message that says "must have dtype" or "must be a tensor" into a TypeError, every other one
// into a ValueError.
#define MEMLOC_CHECK(condition, ...)               \
  do {                                             \
    if (!(condition)) ::memloc::fail(__VA_ARGS__); \
  } while (false)
