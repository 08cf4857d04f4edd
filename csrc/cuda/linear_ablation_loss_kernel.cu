// Bound by arithmetic, one exp per (feature, example, class), in one pass: the sum is rescaled when the maximum moves.
// A thread takes one example and some features, so that a logit is read once for all of these; the lanes of a warp are
// examples, beside each other in the logits and in the results, and read the same weights.
#include <algorithm>
#include <cmath>

#include "cuda/linear_ablation_loss_kernel.h"
#include "summation.h"

namespace memloc {
namespace {

constexpr int kExamples = 32, kGroups = 8;  // of a block: its columns and rows of threads
constexpr int kFeatures = 4;                // of a thread
constexpr int kBlocks = 2;                  // to a multiprocessor, at least: leaves a thread 128 registers

// Cross-entropy and first maximum of logits that come one after the other.
template <typename E>
struct Running {
  E most = -INFINITY, sum = 0, chains = 0;  // chains: the sum of those before
  E at_target = NAN;                        // stays NaN for a target out of range
  int64_t best = 0;

  __device__ __forceinline__ void add(E logit, int64_t k, int64_t target) {
    const E ratio = logit == most ? E{1} : exp(-fabs(logit - most));  // of the smaller to the larger
    chains = logit > most ? chains * ratio : chains;
    sum = logit > most ? sum * ratio + 1 : sum + ratio;
    if (!(logit <= most) && most == most) {  // the first NaN is the maximum
      most = logit;
      best = k;
    }
    if (k == target) at_target = logit;
  }

  __device__ __forceinline__ void begin_chain() {
    chains += sum;
    sum = 0;
  }

  __device__ __forceinline__ E loss() const {
    return log(chains + sum) - (at_target - most) + (most - most);  // an infinite maximum makes it NaN
  }
};

template <typename E>
__global__ void __launch_bounds__(kExamples* kGroups, kBlocks)
    loss_kernel(const LinearAblationLossProblem p, int64_t example_tiles, int64_t tiles, E* __restrict__ loss,
                int64_t* __restrict__ predicted) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t b = tile % example_tiles * kExamples + threadIdx.x;
    const int64_t first = (tile / example_tiles * kGroups + threadIdx.y) * kFeatures;
    if (b >= p.batch || first >= p.count) continue;
    const int64_t target = p.targets[b];
    const double* weight[kFeatures];
    double delta[kFeatures];
    Running<E> running[kFeatures];
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      const int64_t c = min(first + i, p.count - 1);  // beyond the last: that again, not stored
      weight[i] = p.weight + c;
      delta[i] = p.delta(b, c);
    }
    for (int64_t k = 0; k < p.classes; ++k) {
      const double whole = p.logits[k * p.batch + b] + p.bias_of(k);
#pragma unroll
      for (int i = 0; i < kFeatures; ++i) {
        if (k % kChain == 0) running[i].begin_chain();
        running[i].add(static_cast<E>(whole - weight[i][k * p.count] * delta[i]), k, target);
      }
    }
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      if (first + i >= p.count) break;
      loss[(first + i) * p.batch + b] = running[i].loss();
      predicted[(first + i) * p.batch + b] = running[i].best;
    }
#pragma unroll 1
    for (int64_t c = first; c < min(first + kFeatures, p.count); ++c) {
      if (isfinite(p.delta(b, c))) continue;
      Running<E> alone;
      for (int64_t k = 0; k < p.classes; ++k) {
        if (k % kChain == 0) alone.begin_chain();
        alone.add(static_cast<E>(p.replaced_logit(b, c, k)), k, target);
      }
      loss[c * p.batch + b] = alone.loss();
      predicted[c * p.batch + b] = alone.best;
    }
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename E>
cudaError_t launch(const LinearAblationLossProblem& p, E* loss, int64_t* predicted, cudaStream_t stream) {
  const int64_t example_tiles = divide_up(p.batch, kExamples);
  const int64_t tiles = example_tiles * divide_up(p.count, kGroups * kFeatures);
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(tiles, int64_t{1} << 30));
  loss_kernel<<<blocks, dim3(kExamples, kGroups), 0, stream>>>(p, example_tiles, tiles, loss, predicted);
  return cudaGetLastError();
}

}  // namespace

cudaError_t linear_ablation_loss_cuda(const LinearAblationLossProblem& problem, bool is_double, void* loss,
                                      int64_t* predicted, cudaStream_t stream) {
  return is_double ? launch(problem, static_cast<double*>(loss), predicted, stream)
                   : launch(problem, static_cast<float*>(loss), predicted, stream);
}

}  // namespace memloc
