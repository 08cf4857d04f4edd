// How sums are kept from losing digits, on every device.
#pragma once

#include <cstdint>

namespace memloc {

// Products that are added up one by one; longer sums are sums of such chains. The rounding errors of a chain grow with
// its length, at random with the root of it (Higham, "The accuracy of floating point summation", 1993).
constexpr int64_t kChain = 256;

}  // namespace memloc
