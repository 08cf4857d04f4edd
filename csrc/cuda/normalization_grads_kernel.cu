// Memory-bound: reads input and grad_output once. Where positions are neighbours in memory, some lanes of a warp take a
// channel of an example; else a block takes a few channels of an example, its rows of threads every so many positions.
// A thread adds up kRun elements in their type and those sums in float64; threads' sums are added in a fixed order.
#include <algorithm>

#include "cuda/grad_sqnorm_reduce.h"
#include "cuda/normalization_grads_kernel.h"

namespace memloc {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;
constexpr int kRun = 32;
constexpr int kBlocks = 2;  // to a multiprocessor, at least: leaves a thread 128 registers

template <typename T>
__device__ __forceinline__ const T* at(const void* data, const NormalizationStrides& s, int64_t b, int64_t c) {
  return static_cast<const T*>(data) + b * s.batch + c * s.channel;
}

struct Sums {
  double scale, shift;
};

// Every step-th position of a channel of an example, from the first on.
template <typename T>
__device__ __forceinline__ Sums add_positions(const NormalizationGrads& n, int64_t b, int64_t c, int64_t first,
                                              int step) {
  using E = Compute<T>;
  const T *const x = at<T>(n.input, n.input_strides, b, c), *const g = at<T>(n.grad_output, n.grad_strides, b, c);
  const E *const mean = at<E>(n.mean, n.mean_strides, b, c), *const rstd = at<E>(n.rstd, n.rstd_strides, b, c);
  Sums sums{};
  for (int64_t run = first; run < n.positions; run += int64_t{kRun} * step) {
    const int64_t end = min(run + int64_t{kRun} * step, n.positions);
    E scale = 0, shift = 0;
#pragma unroll 4
    for (int64_t p = run; p < end; p += step) {
      const E value = compute(x[p * n.input_strides.position]), grad = compute(g[p * n.grad_strides.position]);
      scale += grad * ((value - mean[p * n.mean_strides.position]) * rstd[p * n.rstd_strides.position]);
      shift += grad;
    }
    sums.scale += scale, sums.shift += shift;
  }
  return sums;
}

template <typename E>
__device__ __forceinline__ void put(const NormalizationGrads& n, int64_t line, const Sums& sums) {
  static_cast<E*>(n.scale)[line] = static_cast<E>(sums.scale);
  static_cast<E*>(n.shift)[line] = static_cast<E>(sums.shift);
}

// `lanes` threads of a warp, a power of two, take a line.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) positions_kernel(const NormalizationGrads n, int lanes) {
  const int64_t lines = n.batch * n.channels, step = int64_t{gridDim.x} * (kThreads / lanes);
  const int64_t mine = blockIdx.x * int64_t{kThreads / lanes} + threadIdx.x / lanes;
  for (int64_t first = 0; first < lines; first += step) {  // the same for all lanes of a warp, which exchange sums
    const int64_t line = first + mine;
    Sums sums{};
    if (line < lines) sums = add_positions<T>(n, line / n.channels, line % n.channels, threadIdx.x % lanes, lanes);
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      sums.scale += __shfl_down_sync(0xFFFFFFFFu, sums.scale, offset);
      sums.shift += __shfl_down_sync(0xFFFFFFFFu, sums.shift, offset);
    }
    if (line < lines && threadIdx.x % lanes == 0) put<Compute<T>>(n, line, sums);
  }
}

// A block of kWarp channels by kRows positions.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) channels_kernel(const NormalizationGrads n) {
  __shared__ Sums rows[kRows][kWarp];
  const int64_t blocks = (n.channels + kWarp - 1) / kWarp;
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  for (int64_t block = blockIdx.x; block < n.batch * blocks; block += gridDim.x) {
    const int64_t b = block / blocks, c = block % blocks * kWarp + lane;
    if (c < n.channels) rows[row][lane] = add_positions<T>(n, b, c, row, kRows);
    __syncthreads();
    if (row == 0 && c < n.channels) {
      Sums sums = rows[0][lane];
      for (int i = 1; i < kRows; ++i) sums.scale += rows[i][lane].scale, sums.shift += rows[i][lane].shift;
      put<Compute<T>>(n, b * n.channels + c, sums);
    }
    __syncthreads();  // before the next block's sums
  }
}

template <typename T>
cudaError_t launch(const NormalizationGrads& n, cudaStream_t stream) {
  if (n.channels_inside) {
    channels_kernel<T><<<grid_for(n.batch * ((n.channels + kWarp - 1) / kWarp)), kThreads, 0, stream>>>(n);
  } else {
    int lanes = 1;
    while (lanes < kWarp && lanes < n.positions) lanes *= 2;
    const int64_t lines = n.batch * n.channels, lines_per_block = kThreads / lanes;
    positions_kernel<T><<<grid_for((lines + lines_per_block - 1) / lines_per_block), kThreads, 0, stream>>>(n, lanes);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t normalization_grads_cuda(const NormalizationGrads& n, ElementType type, cudaStream_t stream) {
  switch (type) {
    case ElementType::kHalf:
      return launch<__half>(n, stream);
    case ElementType::kBFloat16:
      return launch<__nv_bfloat16>(n, stream);
    case ElementType::kFloat:
      return launch<float>(n, stream);
    default:
      return launch<double>(n, stream);
  }
}

}  // namespace memloc
