// The ways to per-example gradient norms on CUDA, the side that knows tensors: x [batch, groups * inputs, height,
// width] and g [batch, groups * outputs, rows, columns], which record no gradients.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "cuda/dispatch.h"
#include "cuda/grad_sqnorm_kernel.h"
#include "cuda/launch.h"
#include "tensor_text.h"

namespace memloc {

inline ImageView view(const torch::stable::Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// An operator's own function records no gradients, and products into a given tensor refuse to.
inline torch::stable::Tensor detached(const torch::stable::Tensor& t) { return call("aten::detach", "", t); }

// Scratch to use again and again: a part of the second-level cache, which also holds what it is made of.
inline int64_t scratch_bytes(int32_t device) {
  int cache = 0;
  check_cuda(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device), "grad_sqnorm");
  return std::max<int64_t>(cache / 3, int64_t{1} << 20);
}

// out = a b for matrices [count, *, *]. Into a given tensor: that is a call which autocast leaves alone, and which for
// 16-bit elements can be told to give the float32 that it sums in.
inline void multiply(const torch::stable::Tensor& a, const torch::stable::Tensor& b, const torch::stable::Tensor& out) {
  if (element_size(a) == 2) {
    call("aten::bmm", "dtype_out", a, b, torch::headeronly::ScalarType::Float, out);
  } else {
    call("aten::bmm", "out", a, b, out);
  }
}

// Squared norms [batch]; float64 for float64, else float32.
torch::stable::Tensor grad_sqnorm(GradSqnormMethod method, const torch::stable::Tensor& x,
                                  const torch::stable::Tensor& g, const GradSqnormShape& shape);

// Whether the direct way on tensor cores takes such operands: 16-bit elements, and offsets within an example of less
// than 2^31 elements.
bool tensor_way_applies(const torch::stable::Tensor& x, const GradSqnormShape& shape);

// That way: writes norms [batch], and if they are given sums [groups * outputs, inputs, kernel_y, kernel_x] of all
// examples' gradients; both float32. No size is zero.
void tensor_way(const torch::stable::Tensor& x, const torch::stable::Tensor& g, const GradSqnormShape& shape,
                torch::stable::Tensor& norms, torch::stable::Tensor* sums, cudaStream_t stream);

}  // namespace memloc
