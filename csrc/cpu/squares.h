// Sums of squares on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace memloc {
namespace {

// Sum of squares: in float over blocks too short to lose digits, these in double.
MEMLOC_CLONES double square(const float* p, int64_t n) {
  constexpr int64_t kBlock = 256, kLanes = 16;
  double sum = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    float lanes[kLanes] = {};
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += p[i + k] * p[i + k];
    }
    for (; i < end; ++i) lanes[0] += p[i] * p[i];
    for (int64_t k = 0; k < kLanes; ++k) sum += lanes[k];
  }
  return sum;
}

template <typename Source>
double square(const Source* p, int64_t n, int64_t step) {
  if constexpr (std::is_same_v<Source, float>) {
    if (step == 1) return square(p, n);
  }
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double value = static_cast<double>(p[i * step]);
    sum += value * value;
  }
  return sum;
}

}  // namespace
}  // namespace memloc
