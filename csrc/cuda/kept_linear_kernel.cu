// Bound by arithmetic: one launch for up to kRuns runs. A block takes tiles of 64 x 64: of the values or of the rows of
// one run, or of the weight, where it takes the channels of a range and adds up all runs' terms in their order, so that
// no two blocks write to the same memory and the bits are the same every time. Weights of kept channels are gathered as
// they are copied to shared memory; no other rows of them are read.
//
// No TF32: a user of float32 who allows it has the library's products (kept_products.py).
#include <algorithm>

#include "cuda/kept_linear_kernel.h"
#include "cuda/kept_linear_tile.h"

namespace memloc {
namespace {

constexpr int kRuns = 96;         // of a launch: what it has to know of them is an argument of the kernel
constexpr int64_t kBlocks = 256;  // that a sum of weight gradients is shared among, where there are channels enough

template <typename T>
using WeightSum = std::conditional_t<kOnTensorCores<T>, float, T>;

struct Run {
  int64_t row, channel, value, tile;  // the first ones
};

template <typename T>
struct Problem {
  T *values, *dense;
  const T* weight;
  WeightSum<T>* weight_sums;
  const T* bias;
  const int64_t* channels;
  int64_t dense_step, weight_step, columns, weights;
  int64_t tiles, column_tiles, range;  // channels of a block, for the weight
  int runs;
  Run run[kRuns + 1];

  __device__ __forceinline__ Lines<T> gathered(int64_t first, int64_t count) const {
    return {weight, weight_step, channels + first, weights, count, columns};
  }
};

__host__ __device__ inline int64_t tiles_of(int64_t lines) { return (lines + kTileLines - 1) / kTileLines; }

// The last run whose first tile is not behind this one.
template <typename T>
__device__ __forceinline__ int run_of(const Problem<T>& p, int64_t tile) {
  int low = 0, high = p.runs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.run[middle].tile <= tile ? low : high) = middle;
  }
  return low;
}

template <typename T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads) values_kernel(const __grid_constant__ Problem<T> p) {
  extern __shared__ __align__(16) unsigned char shared[];
  for (int64_t item = blockIdx.x; item < p.tiles; item += gridDim.x) {
    const int r = run_of(p, item);
    const Run &run = p.run[r], &next = p.run[r + 1];
    const int64_t rows = next.row - run.row, kept = next.channel - run.channel, tile = item - run.tile;
    const int64_t m = tile / tiles_of(rows) * kTileLines, n = tile % tiles_of(rows) * kTileLines;
    const Lines<T> dense{p.dense + run.row * p.dense_step, p.dense_step, nullptr, 0, rows, p.columns};
    ProductTile<T> product(shared);
    product.template multiply<true, true>(p.gathered(run.channel, kept), dense, m, n, p.columns);
    product.for_each([&](int i, int j, Pair<Compute<T>> sums) {
      if (m + i >= kept) return;
      const int64_t channel = p.channels[run.channel + m + i];
      if (p.bias != nullptr && static_cast<uint64_t>(channel) < static_cast<uint64_t>(p.weights)) {
        sums.element[0] += compute(p.bias[channel]), sums.element[1] += compute(p.bias[channel]);
      }
      put<false>(p.values + run.value + (m + i) * rows + n + j, sums, rows - n - j);
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads) dense_kernel(const __grid_constant__ Problem<T> p) {
  extern __shared__ __align__(16) unsigned char shared[];
  for (int64_t item = blockIdx.x; item < p.tiles; item += gridDim.x) {
    const int r = run_of(p, item);
    const Run &run = p.run[r], &next = p.run[r + 1];
    const int64_t rows = next.row - run.row, kept = next.channel - run.channel, tile = item - run.tile;
    const int64_t m = tile / p.column_tiles * kTileLines, n = tile % p.column_tiles * kTileLines;
    const Lines<T> values{p.values + run.value, rows, nullptr, 0, kept, rows};
    ProductTile<T> product(shared);
    product.template multiply<false, false>(values, p.gathered(run.channel, kept), m, n, kept);
    product.for_each([&](int i, int j, const Pair<Compute<T>>& sums) {
      if (m + i >= rows) return;
      put<true>(p.dense + (run.row + m + i) * p.dense_step + n + j, sums, p.columns - n - j);
    });
  }
}

// How many of a run's channels, which ascend, lie before one.
template <typename T>
__device__ __forceinline__ int64_t channels_before(const Problem<T>& p, int run, int64_t channel) {
  int64_t low = p.run[run].channel, high = p.run[run + 1].channel;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.channels[middle] < channel) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - p.run[run].channel;
}

template <typename T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads) weight_kernel(const __grid_constant__ Problem<T> p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int64_t first[kRuns];  // of a run's channels, those in the block's range
  __shared__ int64_t last[kRuns];
  for (int64_t item = blockIdx.x; item < p.tiles; item += gridDim.x) {
    const int64_t range = item / p.column_tiles * p.range, n = item % p.column_tiles * kTileLines;
    __syncthreads();  // all have left the last item
    for (int r = threadIdx.x; r < p.runs; r += ProductTile<T>::kThreads) {
      first[r] = channels_before(p, r, range);
      last[r] = channels_before(p, r, min(range + p.range, p.weights));
    }
    __syncthreads();
    for (int r = 0; r < p.runs; ++r) {
      const Run& run = p.run[r];
      const int64_t rows = p.run[r + 1].row - run.row, end = last[r];
      const Lines<T> values{p.values + run.value, rows, nullptr, 0, end, rows};
      const Lines<T> dense{p.dense + run.row * p.dense_step, p.dense_step, nullptr, 0, rows, p.columns};
      for (int64_t m = first[r]; m < end; m += kTileLines) {
        ProductTile<T> product(shared);
        // its first barrier also orders the last run's terms before this one's
        product.template multiply<true, false>(values, dense, m, n, rows);
        product.for_each([&](int i, int j, const Pair<Compute<T>>& sums) {
          if (m + i >= end) return;
          const int64_t channel = p.channels[run.channel + m + i];
          if (channel < range || channel >= min(range + p.range, p.weights)) return;
          put<true>(p.weight_sums + channel * p.weight_step + n + j, sums, p.columns - n - j);
        });
      }
    }
  }
}

template <typename T>
cudaError_t launch(const Problem<T>& p, KeptResult result, cudaStream_t stream) {
  constexpr int kThreads = ProductTile<T>::kThreads, kBytes = ProductTile<T>::kBytes;
  if (p.tiles == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  const unsigned blocks = grid_for(p.tiles);
  if (result == KeptResult::kValues) {
    error = cudaFuncSetAttribute(values_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error == cudaSuccess) values_kernel<T><<<blocks, kThreads, kBytes, stream>>>(p);
  } else if (result == KeptResult::kDense) {
    error = cudaFuncSetAttribute(dense_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error == cudaSuccess) dense_kernel<T><<<blocks, kThreads, kBytes, stream>>>(p);
  } else {
    error = cudaFuncSetAttribute(weight_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error == cudaSuccess) weight_kernel<T><<<blocks, kThreads, kBytes, stream>>>(p);
  }
  return error == cudaSuccess ? cudaGetLastError() : error;
}

template <typename T>
cudaError_t run(const KeptLinear& k, cudaStream_t stream) {
  Problem<T> p{};
  p.values = static_cast<T*>(k.values), p.dense = static_cast<T*>(k.dense);
  p.weight = static_cast<const T*>(k.weight), p.weight_sums = static_cast<WeightSum<T>*>(k.weight);
  p.bias = static_cast<const T*>(k.bias), p.channels = k.channels;
  p.dense_step = k.dense_step, p.weight_step = k.weight_step, p.columns = k.columns, p.weights = k.weights;
  p.column_tiles = tiles_of(k.columns);
  int64_t value = 0;
  for (int64_t r = 0; r < k.runs;) {
    p.tiles = 0;
    for (p.runs = 0; p.runs < kRuns && r < k.runs; ++p.runs, ++r) {
      const int64_t rows = k.rows[r + 1] - k.rows[r], kept = k.ends[r + 1] - k.ends[r];
      p.run[p.runs] = {k.rows[r], k.ends[r], value, p.tiles};
      value += rows * kept;
      if (k.result == KeptResult::kValues) p.tiles += tiles_of(kept) * tiles_of(rows);
      if (k.result == KeptResult::kDense && kept > 0) p.tiles += tiles_of(rows) * p.column_tiles;
    }
    p.run[p.runs] = {k.rows[r], k.ends[r], value, p.tiles};
    if (k.result == KeptResult::kWeight) {
      const int64_t kept = p.run[p.runs].channel - p.run[0].channel;
      // as many ranges as give each run a tile, or more for more blocks
      const int64_t wanted = std::max(kept / (kTileLines * p.runs), kBlocks / std::max<int64_t>(1, p.column_tiles));
      p.range = std::max<int64_t>(16, k.weights / std::max<int64_t>(1, wanted));
      p.tiles = kept == 0 ? 0 : (k.weights + p.range - 1) / p.range * p.column_tiles;
    }
    if (const cudaError_t error = launch(p, k.result, stream); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t kept_linear_cuda(const KeptLinear& problem, cudaStream_t stream) {
  switch (problem.type) {
    case ElementType::kHalf:
      return run<__half>(problem, stream);
    case ElementType::kBFloat16:
      return run<__nv_bfloat16>(problem, stream);
    case ElementType::kFloat:
      return run<float>(problem, stream);
    default:
      return run<double>(problem, stream);
  }
}

}  // namespace memloc
