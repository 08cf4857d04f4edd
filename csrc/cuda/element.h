// Elements in kernels, and how many threads they take.
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

// And back, to the nearest.
template <typename T>
__device__ __forceinline__ T narrow(Compute<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// Blocks for so many items, of which a block takes every gridDim.x-th.
inline unsigned grid_for(int64_t items) { return static_cast<unsigned>(std::min<int64_t>(items, int64_t{1} << 30)); }

}  // namespace memloc
