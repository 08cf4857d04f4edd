// The CPU kernels of switched-off channels, and how an instruction set provides them.
#pragma once

#include <cstdint>

#include "conv2d.h"
#include "cpu/compute.h"
#include "cpu/instruction_set.h"
#include "summation.h"

namespace memloc {

// All tensors are dense. A linear layer's batch is its rows: every position of every example.
template <typename Source>
struct AblationProblem {
  using E = typename ComputeIn<Source>::type;
  Source* result;           // [variants][batch], each as output's
  const Source* output;     // [batch][outputs][positions], or [batch][outputs] of a linear layer
  const Source* residual;   // null if there is none
  const int64_t* examples;  // [variants], the row of output and of a shared residual; null for the batch's own
  int64_t residual_step;    // from one variant's residual to the next one's; 0 if they share it
  const Source* change;     // [variants][batch], each an image, or one value of a linear layer
  const E* filters;         // [variants] of packed filters
  int64_t filter_step;      // from one variant's to the next one's
  const E *scale, *shift;   // [outputs], with zeros up to a whole vector
  int64_t variants, batch, outputs;
  Axis y, x;  // of a convolution
  bool relu;
  bool stream;  // write past the cache where whole vectors are aligned
};

// Tasks [begin, end): of a convolution (example, variant), of a linear layer (block of rows, variant).
template <typename Source>
using AblationKernel = void (*)(const AblationProblem<Source>&, int64_t begin, int64_t end);

constexpr int64_t kAblationRows = 64;  // of a linear layer's block

template <typename Source>
struct AblationKernels {
  AblationKernel<Source> conv2d, linear;
  int64_t tile_rows;  // filters are packed [panels][kernel offsets][tile_rows], zero padded
  int64_t lanes;      // of a vector
};

template <InstructionSet kSet, typename Source>
AblationKernels<Source> ablation_kernels();

}  // namespace memloc
