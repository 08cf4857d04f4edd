// Gradients of scale and shift by example on CUDA: what the glue (a torch file) asks of the kernels (a file without
// torch).
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/element_type.h"
#include "normalization_grads.h"

namespace memloc {

// No size is zero. Launches on `stream`.
cudaError_t normalization_grads_cuda(const NormalizationGrads& n, ElementType type, cudaStream_t stream);

}  // namespace memloc
