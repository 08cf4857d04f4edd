// Example-tied dropout on CUDA: what the glue (a torch file) asks of the kernels (a file without torch).
#pragma once

#include <cuda_runtime_api.h>

#include "example_tied_dropout.h"

namespace memloc {

// y and x hold elements of `width` bytes (2, 4 or 8); layout has at least one element. Launches on `stream`.
cudaError_t example_tied_dropout_cuda(void* y, const void* x, const int64_t* ids, int width, const TiedMask& mask,
                                      const Layout& layout, cudaStream_t stream);

}  // namespace memloc
