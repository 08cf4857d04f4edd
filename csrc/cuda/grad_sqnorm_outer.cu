// The outer way, memory-bound: reads x and g once, 16 bytes at a time where they are dense; a block per example. And
// the last sum of the other ways, a warp per example. Sums are in double, of which a byte read costs at most half a
// multiply-add.
#include "cuda/grad_sqnorm_kernel.h"
#include "cuda/grad_sqnorm_reduce.h"

namespace memloc {
namespace {

constexpr int kMostThreads = 256;

template <typename T>
struct alignas(16) Vector {
  T element[16 / sizeof(T)];
};

template <typename T>
__device__ __forceinline__ double square(T value) {
  const double wide = compute(value);
  return wide * wide;
}

// This thread's share of the sum of p[i * step]^2 over i < n.
template <typename T>
__device__ __forceinline__ double sum_of_squares(const T* p, int64_t n, int64_t step, int thread, int threads) {
  constexpr int kLanes = 16 / sizeof(T);
  double sum = 0;
  if (step != 1) {
    for (int64_t i = thread; i < n; i += threads) sum += square(p[i * step]);
    return sum;
  }
  const int64_t misaligned = reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T);
  const int64_t head = min(n, misaligned == 0 ? int64_t{0} : kLanes - misaligned), vectors = (n - head) / kLanes;
  for (int64_t i = thread; i < head; i += threads) sum += square(p[i]);
  const Vector<T>* const from = reinterpret_cast<const Vector<T>*>(p + head);
#pragma unroll 2
  for (int64_t i = thread; i < vectors; i += threads) {
    const Vector<T> value = from[i];
#pragma unroll
    for (int j = 0; j < kLanes; ++j) sum += square(value.element[j]);
  }
  for (int64_t i = head + vectors * kLanes + thread; i < n; i += threads) sum += square(p[i]);
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads)
    outer_kernel(const T* __restrict__ x, const T* __restrict__ g, int64_t x_batch, int64_t g_batch, int64_t x_channel,
                 int64_t g_channel, int64_t inputs, int64_t outputs, int64_t batch, Compute<T>* __restrict__ out) {
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    const double xs = block_sum(sum_of_squares(x + b * x_batch, inputs, x_channel, thread, threads), thread, threads);
    const double gs = block_sum(sum_of_squares(g + b * g_batch, outputs, g_channel, thread, threads), thread, threads);
    if (thread == 0) out[b] = static_cast<Compute<T>>(xs * gs);
  }
}

template <typename Out>
__global__ void __launch_bounds__(kMostThreads)
    finish_kernel(const double* __restrict__ partials, int64_t per_example, int64_t batch, Out* __restrict__ out) {
  constexpr int kWarps = kMostThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = blockIdx.x * int64_t{kWarps}; first < batch; first += gridDim.x * int64_t{kWarps}) {
    const int64_t b = first + threadIdx.x / kWarp;
    double sum = 0;
    for (int64_t i = lane; b < batch && i < per_example; i += kWarp) sum += partials[b * per_example + i];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, step);
    // the sum over pairs of positions cancels, down to rounding below zero; what is not a number stays that
    if (lane == 0 && b < batch) out[b] = static_cast<Out>(sum < 0 ? 0 : sum);
  }
}

template <typename T>
cudaError_t outer(const GradSqnormImages& images, void* out, cudaStream_t stream) {
  const GradSqnormShape& s = images.shape;
  const ImageView &x = images.x, &g = images.g;
  // four vectors to a thread, or fewer threads
  const int64_t wanted = (s.inputs + s.outputs) * static_cast<int64_t>(sizeof(T)) / 64;
  const int threads = static_cast<int>(std::clamp<int64_t>(wanted / kWarp * kWarp, kWarp, kMostThreads));
  outer_kernel<<<grid_for(images.batch), threads, 0, stream>>>(
      static_cast<const T*>(x.data), static_cast<const T*>(g.data), x.batch, g.batch, x.channel, g.channel, s.inputs,
      s.outputs, images.batch, static_cast<Compute<T>*>(out));
  return cudaGetLastError();
}

}  // namespace

cudaError_t grad_sqnorm_outer_cuda(const GradSqnormImages& images, void* out, cudaStream_t stream) {
  switch (images.type) {
    case ElementType::kHalf:
      return outer<__half>(images, out, stream);
    case ElementType::kBFloat16:
      return outer<__nv_bfloat16>(images, out, stream);
    case ElementType::kFloat:
      return outer<float>(images, out, stream);
    default:
      return outer<double>(images, out, stream);
  }
}

cudaError_t grad_sqnorm_finish_cuda(const double* partials, int64_t per_example, int64_t batch, bool is_double,
                                    void* out, cudaStream_t stream) {
  const unsigned blocks = grid_for((batch * kWarp + kMostThreads - 1) / kMostThreads);
  if (is_double) {
    finish_kernel<<<blocks, kMostThreads, 0, stream>>>(partials, per_example, batch, static_cast<double*>(out));
  } else {
    finish_kernel<<<blocks, kMostThreads, 0, stream>>>(partials, per_example, batch, static_cast<float*>(out));
  }
  return cudaGetLastError();
}

}  // namespace memloc
