// New tensors on the CPU, not by the dispatcher, which takes longer than a kernel does on a small one.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "check.h"

namespace memloc {

// Uninitialised. dtype: as of aoti_torch_dtype_float32() and its like.
inline torch::stable::Tensor new_strided(const char* op, const int64_t* sizes, const int64_t* strides, int64_t dims,
                                         int32_t dtype) {
  AtenTensorHandle made;
  const AOTITorchError error =
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made);
  MEMLOC_CHECK(error == AOTI_TORCH_SUCCESS, op, ": there is no memory for the result");
  return torch::stable::Tensor(made);
}

// As torch.empty_like.
inline torch::stable::Tensor new_like(const char* op, const torch::stable::Tensor& x) {
  int32_t dtype;
  if (x.numel() == 0 || !x.is_contiguous() || aoti_torch_get_dtype(x.get(), &dtype) != AOTI_TORCH_SUCCESS) {
    return torch::stable::empty_like(x);
  }
  return new_strided(op, x.sizes().data(), x.strides().data(), x.dim(), dtype);
}

}  // namespace memloc
