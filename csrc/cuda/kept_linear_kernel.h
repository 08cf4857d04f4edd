// A linear layer of which each run of rows has some channels, on CUDA: what the glue (a torch file) asks of the kernels
// (a file without torch). csrc/kept_linear_args.h has the formula.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/element_type.h"

namespace memloc {

// What is computed: the runs' values; what they add to the rows; what they add to the weight, which is float32 where
// elements have 16 bits.
enum class KeptResult { kValues, kDense, kWeight };

struct KeptLinear {
  KeptResult result;
  ElementType type;
  void *values, *dense, *weight;
  const void* bias;         // or null
  const int64_t* channels;  // on the device; those that the weight does not have are taken for zeros
  int64_t dense_step, weight_step, columns, weights;
  const int64_t *rows, *ends;  // runs + 1 numbers each, on the host
  int64_t runs;
};

cudaError_t kept_linear_cuda(const KeptLinear& problem, cudaStream_t stream);

}  // namespace memloc
