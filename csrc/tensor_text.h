// What argument checks of several operators say and ask of a tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

namespace memloc {

inline std::string shape_of(const torch::stable::Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

// Width of the elements in bytes; 0 for a dtype that is none of float16, bfloat16, float32 and float64.
inline int element_size(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
      return 4;
    case ScalarType::Double:
      return 8;
    default:
      return 0;
  }
}

inline bool on_same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

}  // namespace memloc
