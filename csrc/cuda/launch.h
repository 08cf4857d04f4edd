// What every CUDA glue file needs around a launch.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "check.h"

namespace memloc {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* op) {
  MEMLOC_CHECK(error == cudaSuccess, "CUDA error in ", op, ": ", cudaGetErrorString(error));
}

}  // namespace memloc
