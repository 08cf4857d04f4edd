// Switched-off channels on CUDA: what the glue (torch files) asks of the kernels (files without torch).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "conv2d.h"
#include "cuda/element_type.h"
#include "layout.h"

namespace memloc {

// All tensors but weight are dense. A linear layer's batch is its rows: every position of every example. No size is
// zero.
struct AblationProblem {
  ElementType type;
  void* result;           // [variants][batch], each as output's
  const void* output;     // [batch][outputs][positions], or [batch][outputs] of a linear layer
  const void* residual;   // null if there is none
  int64_t residual_step;  // from one variant's residual to the next one's; 0 if they share it
  const void* change;     // [variants][batch], each an image, or one value of a linear layer
  const void* weight;     // [outputs][inputs][kernel rows][kernel columns], with these strides:
  int64_t weight_output, weight_input, weight_row, weight_column;
  const int64_t* examples;    // [variants], the row of output and of a shared residual; null for the batch's own
  int64_t examples_end;       // rows of output; what is not in [0, examples_end) is taken for 0
  const int64_t* channels;    // [variants]; one that is not in [0, inputs) has no weights
  const void *scale, *shift;  // [outputs], null for 1 and 0
  int64_t variants, batch, outputs, inputs;
  Axis y, x;  // of a convolution
  bool relu;
};

cudaError_t conv2d_ablation_cuda(const AblationProblem& problem, cudaStream_t stream);
cudaError_t linear_ablation_cuda(const AblationProblem& problem, cudaStream_t stream);

// Rows with channels switched off. `positions` walks one channel of one row of y.
struct AblateChannelsProblem {
  void* y;
  int width;  // of elements, in bytes: 2, 4 or 8
  int64_t rows, row_step, channels, channel_step;
  const int64_t *offsets, *off;  // [rows + 1], [entries]; those out of range are ignored
  int64_t offset_step, entries, off_step;
  const void* baseline;  // null for 0
  int64_t baseline_step;
  Layout positions;
};

cudaError_t ablate_channels_cuda(const AblateChannelsProblem& problem, cudaStream_t stream);

}  // namespace memloc
