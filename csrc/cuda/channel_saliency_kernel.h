// Channel saliency on CUDA: what the glue (a torch file) asks of the kernels (a file without torch).
#pragma once

#include <cuda_runtime_api.h>

#include "channel_saliency.h"
#include "cuda/element_type.h"

namespace memloc {

// out [batch, channels]: double for double elements, else float. No size is zero. Launches on `stream`.
cudaError_t channel_saliency_cuda(const void* activation, const void* grad, ElementType type,
                                  const SaliencyLayout& layout, void* out, cudaStream_t stream);

}  // namespace memloc
