// What the kernels of per-example gradient norms share: sums in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/element.h"

namespace memloc {

// Sum over a block of whole warps, for its thread 0; always in the same order. Every thread of the block has to call
// it.
__device__ __forceinline__ double block_sum(double value, int thread, int threads) {
  __shared__ double warps[kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, step);
  if (thread % kWarp == 0) warps[thread / kWarp] = value;
  __syncthreads();
  double sum = 0;
  if (thread == 0) {
    for (int i = 0; i < threads / kWarp; ++i) sum += warps[i];
  }
  __syncthreads();  // before a next call writes to warps
  return sum;
}

}  // namespace memloc
