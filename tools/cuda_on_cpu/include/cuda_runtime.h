// What the kernels use of CUDA, run on the CPU: a block's threads are fibers, whose warps run ahead of each other in an
// order of their own between any two barriers, so that a missing barrier shows. Memory that a block shares is allocated
// anew for each, filled with NaN; a sanitizer sees its ends, those of tensors, and misaligned vectors.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)

using std::isfinite;
using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};

struct __attribute__((aligned(16), may_alias)) uint4 {
  unsigned x, y, z, w;
};

inline void __stwb(uint4* to, uint4 value) { *to = value; }

struct dim3 {
  unsigned x, y, z;

  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct CUstream_st*;
struct cudaDeviceProp {
  char name[256];
  int major, minor;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

void __syncthreads();

namespace cuda_on_cpu {

// Calls run(argument) for every thread of the grid.
void launch(dim3 grid, dim3 block, size_t dynamic_bytes, void (*run)(const void*), const void* argument);

template <typename Kernel>
void launch(dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t, const Kernel& kernel) {
  launch(grid, block, dynamic_bytes, [](const void* k) { (*static_cast<const Kernel*>(k))(); }, &kernel);
}

[[noreturn]] void stop(const char* what);

// Of a kernel with launch bounds.
inline void at_most(unsigned threads) {
  if (blockDim.x * blockDim.y * blockDim.z > threads) stop("more threads than the launch bounds");
}

// The block's memory for a declaration, which `site` names.
void* shared_memory(const void* site, size_t bytes, size_t alignment);
void* dynamic_shared_memory();

// Site is the type of a lambda in the declaration, so every instance of a template has memory of its own.
template <typename T, typename Site>
T& shared(Site) {
  static const char site = 0;
  return *static_cast<T*>(shared_memory(&site, sizeof(T), alignof(T)));
}

// The value of the lane that lies `delta` behind, or has number `lane`, in this lane's group of `width`.
uint64_t shuffle(unsigned mask, uint64_t value, bool down, int lane, int width);

template <typename T>
T shuffle(unsigned mask, T value, bool down, int lane, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, down, lane, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_on_cpu::shuffle(mask, value, true, static_cast<int>(delta), width);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return cuda_on_cpu::shuffle(mask, value, false, lane, width);
}
