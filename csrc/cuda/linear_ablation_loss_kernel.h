// linear_ablation_loss on CUDA: what the glue (a torch file) asks of the kernels (a file without torch).
#pragma once

#include <cuda_runtime_api.h>

#include "linear_ablation_loss.h"

namespace memloc {

// loss [count, batch], double or float, and predicted [count, batch]; neither size is zero. Launches on `stream`.
cudaError_t linear_ablation_loss_cuda(const LinearAblationLossProblem& problem, bool is_double, void* loss,
                                      int64_t* predicted, cudaStream_t stream);

}  // namespace memloc
