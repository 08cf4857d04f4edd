// What every CUDA glue file needs around a launch.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cuda/element_type.h"
#include "cuda/no_code.h"

namespace memloc {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* op) {
  if (is_no_code(error)) fail(no_code(error, op));
  MEMLOC_CHECK(error == cudaSuccess, "CUDA error in ", op, ": ", cudaGetErrorString(error));
}

// Of a tensor of one of the four types.
inline ElementType element_type(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return ElementType::kHalf;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Float:
      return ElementType::kFloat;
    default:
      return ElementType::kDouble;
  }
}

}  // namespace memloc
