// From a tensor's dtype to the C++ type of its elements.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace memloc {

// Calls run with an element, of whose type it makes its kernel; t has one of the four types.
template <typename Run>
void with_element(const torch::stable::Tensor& t, const Run& run) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return run(c10::Half());
    case ScalarType::BFloat16:
      return run(c10::BFloat16());
    case ScalarType::Float:
      return run(float());
    default:
      return run(double());
  }
}

// The same for kernels that move values as bits.
template <typename Run>
void with_bits(const torch::stable::Tensor& t, const Run& run) {
  with_element(t, [&](auto element) {
    if constexpr (sizeof(element) == 2) {
      run(uint16_t());
    } else if constexpr (sizeof(element) == 4) {
      run(uint32_t());
    } else {
      run(uint64_t());
    }
  });
}

}  // namespace memloc
