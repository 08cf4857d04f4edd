// Memory-bound, on what changes alone: a warp fills a segment of one channel of one row, which it finds by bisection,
// 16 bytes at a time where its positions are neighbours.
#include "cuda/ablation_kernel.h"
#include "cuda/element.h"

namespace memloc {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSegment = 8192;  // elements that a warp fills at a time, so that few large planes spread

// The row whose channels entry i is among, or `rows` where offsets name none.
__device__ __forceinline__ int64_t row_of(const AblateChannelsProblem& p, int64_t i) {
  int64_t low = 0, high = p.rows;  // the first row that ends beyond i is in [low, high]
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (p.offsets[(middle + 1) * p.offset_step] > i) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low < p.rows && p.offsets[low * p.offset_step] <= i ? low : p.rows;
}

template <typename T>
struct alignas(16) Vector {
  T element[16 / sizeof(T)];
};

// This lane's share of y[0 .. n) = value: pieces of 16 bytes, single elements before and after them.
template <typename T>
__device__ __forceinline__ void fill_line(T* y, int64_t n, T value, int lane) {
  constexpr int kLanes = 16 / sizeof(T);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(y) % 16 / sizeof(T);
  const int64_t head = min(n, misaligned == 0 ? int64_t{0} : kLanes - misaligned), vectors = (n - head) / kLanes;
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) vector.element[i] = value;
  Vector<T>* const to = reinterpret_cast<Vector<T>*>(y + head);
  for (int64_t i = lane; i < head; i += kWarp) y[i] = value;
  for (int64_t i = lane; i < vectors; i += kWarp) to[i] = vector;
  for (int64_t i = head + vectors * kLanes + lane; i < n; i += kWarp) y[i] = value;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    fill_kernel(const __grid_constant__ AblateChannelsProblem p, int64_t numel, int64_t segments) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp; item < p.entries * segments;
       item += gridDim.x * int64_t{kWarps}) {
    const int64_t entry = item / segments, begin = item % segments * kSegment;
    const int64_t row = row_of(p, entry), channel = p.off[entry * p.off_step];
    if (row == p.rows || channel < 0 || channel >= p.channels) continue;
    const T value = p.baseline == nullptr ? T{0} : static_cast<const T*>(p.baseline)[channel * p.baseline_step];
    T* const y = static_cast<T*>(p.y) + row * p.row_step + channel * p.channel_step;
    const int64_t end = min(begin + kSegment, numel);
    if (p.positions.count == 1) {
      const int64_t step = p.positions.loop[0].y;
      if (step == 1) {
        fill_line(y + begin, end - begin, value, lane);
        continue;
      }
      for (int64_t i = begin + lane; i < end; i += kWarp) y[i * step] = value;
      continue;
    }
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      int64_t rest = i, at = 0;
      for (int d = p.positions.count - 1; d >= 0; --d) {
        at += rest % p.positions.loop[d].size * p.positions.loop[d].y;
        rest /= p.positions.loop[d].size;
      }
      y[at] = value;
    }
  }
}

template <typename T>
cudaError_t launch(const AblateChannelsProblem& p, cudaStream_t stream) {
  const int64_t numel = p.positions.numel(), segments = (numel + kSegment - 1) / kSegment;
  const int64_t warps = p.entries * segments;
  fill_kernel<T><<<grid_for((warps * kWarp + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p, numel, segments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t ablate_channels_cuda(const AblateChannelsProblem& problem, cudaStream_t stream) {
  switch (problem.width) {
    case 2:
      return launch<uint16_t>(problem, stream);
    case 4:
      return launch<uint32_t>(problem, stream);
    default:
      return launch<uint64_t>(problem, stream);
  }
}

}  // namespace memloc
