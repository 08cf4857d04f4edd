// New tensors on the CPU, not by the dispatcher, which takes longer than a kernel does on a small one.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "check.h"

namespace memloc {

// Uninitialised and contiguous. dtype: as of aoti_torch_dtype_float32() and its like.
inline torch::stable::Tensor new_tensor(const char* op, const int64_t* sizes, int64_t dims, int32_t dtype) {
  int64_t strides[25];  // more dimensions than any of the operators takes
  double elements = 1;
  for (int64_t d = 0; d < dims; ++d) elements *= static_cast<double>(std::max<int64_t>(1, sizes[d]));
  MEMLOC_CHECK(elements < 1e15, op, ": a result must have less than 10^15 elements, got ", elements);
  for (int64_t d = dims, step = 1; d-- > 0; step *= std::max<int64_t>(1, sizes[d])) strides[d] = step;
  AtenTensorHandle made;
  MEMLOC_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made) ==
                   AOTI_TORCH_SUCCESS,
               op, ": no memory for ", elements, " elements");
  return torch::stable::Tensor(made);
}

// As torch.empty_like.
inline torch::stable::Tensor new_like(const char* op, const torch::stable::Tensor& x) {
  int32_t dtype;
  if (!x.is_contiguous() || aoti_torch_get_dtype(x.get(), &dtype) != AOTI_TORCH_SUCCESS) {
    return torch::stable::empty_like(x);
  }
  return new_tensor(op, x.sizes().data(), x.dim(), dtype);
}

}  // namespace memloc
