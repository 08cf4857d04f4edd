// What CPU kernels compute in.
#pragma once

#include <cstdint>

namespace memloc {

// Float, or double for double.
template <typename Source>
struct ComputeIn {
  using type = float;
};
template <>
struct ComputeIn<double> {
  using type = double;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace memloc
