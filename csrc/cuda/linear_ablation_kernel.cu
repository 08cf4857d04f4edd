// Memory-bound: a thread takes up to 16 bytes of outputs, keeps their weights, factors and terms in registers, and goes
// through a block of rows of one variant.
#include "cuda/ablation_epilogue.h"

namespace memloc {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kRows = 64;  // that share a thread's weights

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) linear_kernel(const AblationProblem p, int64_t row_blocks) {
  using C = Compute<T>;
  const TypedAblation<T> t(p);
  const int64_t pieces = p.outputs / kLanes, items = row_blocks * p.variants, all = p.batch * p.outputs;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t k = item % p.variants, first = item / p.variants * kRows, end = min(first + kRows, p.batch);
    const int64_t channel = p.channels[k];
    const bool exists = channel >= 0 && channel < p.inputs;
    T* const y = t.result + k * all;
    const int64_t from = row_of(p, k, 0) * all;
    const T* const residual = residual_at(p, t.residual, k, 0, from);
    for (int64_t piece = threadIdx.x; piece < pieces; piece += blockDim.x) {
      C weight[kLanes], scale[kLanes], shift[kLanes];
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const int64_t o = piece * kLanes + i;
        weight[i] = exists ? compute(t.weight[o * p.weight_output + channel * p.weight_input]) : C{0};
        scale[i] = value_or(t.scale, o, C{1});
        shift[i] = value_or(t.shift, o, C{0});
      }
      for (int64_t row = first + threadIdx.y; row < end; row += blockDim.y) {
        const C change = compute(t.change[k * p.batch + row]);
        C delta[kLanes];
#pragma unroll
        for (int i = 0; i < kLanes; ++i) delta[i] = exists ? change * weight[i] : C{0};
        finish<T, kLanes>(y, t.output + from, residual, row * p.outputs + piece * kLanes, p.relu, delta, scale, shift);
      }
    }
  }
}

template <typename T, int kLanes = 16 / sizeof(T)>
cudaError_t launch(const AblationProblem& p, cudaStream_t stream) {
  if constexpr (kLanes > 1) {
    if (lanes_for(p, p.outputs, kLanes, sizeof(T)) < kLanes) return launch<T, kLanes / 2>(p, stream);
  }
  const int64_t pieces = p.outputs / kLanes, row_blocks = (p.batch + kRows - 1) / kRows;
  unsigned across = 1;  // threads along the outputs: a power of two, at most the block
  while (across < pieces && across < kThreads) across *= 2;
  const dim3 block(across, kThreads / across);
  linear_kernel<T, kLanes><<<grid_for(row_blocks * p.variants), block, 0, stream>>>(p, row_blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t linear_ablation_cuda(const AblationProblem& problem, cudaStream_t stream) {
  switch (problem.type) {
    case ElementType::kHalf:
      return launch<__half>(problem, stream);
    case ElementType::kBFloat16:
      return launch<__nv_bfloat16>(problem, stream);
    case ElementType::kFloat:
      return launch<float>(problem, stream);
    default:
      return launch<double>(problem, stream);
  }
}

}  // namespace memloc
