// What the kernels of per-example gradient norms share: element types, and sums in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace memloc {

constexpr int kWarp = 32;

// Elements as what they are computed in; torch's build flags leave 16-bit types without conversions of their own.
__device__ __forceinline__ float compute(__half value) { return __half2float(value); }
__device__ __forceinline__ float compute(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float compute(float value) { return value; }
__device__ __forceinline__ double compute(double value) { return value; }

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

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

// Blocks for so many items, of which a block takes every gridDim.x-th.
inline unsigned grid_for(int64_t items) { return static_cast<unsigned>(std::min<int64_t>(items, int64_t{1} << 30)); }

}  // namespace memloc
