// What the kernels of switched-off channels do with a result before its one store.
#pragma once

#include "cuda/ablation_kernel.h"
#include "cuda/element.h"

namespace memloc {

// kLanes neighbouring elements, read and written at once.
template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Piece {
  T element[kLanes];
};

// Results [at, at + kLanes) of a variant, from what is added to the output there; y, residual are the variant's own.
template <typename T, int kLanes>
__device__ __forceinline__ void finish(T* y, const T* output, const T* residual, int64_t at, bool relu,
                                       const Compute<T> (&delta)[kLanes], const Compute<T> (&scale)[kLanes],
                                       const Compute<T> (&shift)[kLanes]) {
  using P = Piece<T, kLanes>;
  const P plain = *reinterpret_cast<const P*>(output + at);
  P rest{}, result;
  if (residual != nullptr) rest = *reinterpret_cast<const P*>(residual + at);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    Compute<T> value = (compute(plain.element[i]) + delta[i]) * scale[i] + shift[i];
    if (residual != nullptr) value += compute(rest.element[i]);
    if (relu) value = value < 0 ? 0 : value;  // what is not a number stays that
    result.element[i] = narrow<T>(value);
  }
  if constexpr (sizeof(P) == sizeof(uint4)) {
    uint4 words;
    memcpy(&words, &result, sizeof(words));
    __stwb(reinterpret_cast<uint4*>(y + at), words);  // a plain store is taken apart where a loop steps its address
  } else {
    *reinterpret_cast<P*>(y + at) = result;
  }
}

template <typename T>
__device__ __forceinline__ Compute<T> value_or(const T* values, int64_t i, Compute<T> otherwise) {
  return values == nullptr ? otherwise : compute(values[i]);
}

// The same problem, with pointers to elements.
template <typename T>
struct TypedAblation {
  T* result;
  const T *output, *residual, *change, *weight, *scale, *shift;

  explicit __device__ TypedAblation(const AblationProblem& p)
      : result(static_cast<T*>(p.result)),
        output(static_cast<const T*>(p.output)),
        residual(static_cast<const T*>(p.residual)),
        change(static_cast<const T*>(p.change)),
        weight(static_cast<const T*>(p.weight)),
        scale(static_cast<const T*>(p.scale)),
        shift(static_cast<const T*>(p.shift)) {}
};

// The row of output that row b of variant k starts from.
__device__ __forceinline__ int64_t row_of(const AblationProblem& p, int64_t k, int64_t b) {
  if (p.examples == nullptr) return b;
  const int64_t example = p.examples[k];
  return example >= 0 && example < p.examples_end ? example : 0;
}

// own, shared: where the row begins in a variant's own residual, and in one that all share.
template <typename T>
__device__ __forceinline__ const T* residual_at(const AblationProblem& p, const T* residual, int64_t k, int64_t own,
                                                int64_t shared) {
  if (residual == nullptr) return nullptr;
  return residual + (p.residual_step != 0 ? k * p.residual_step + own : shared);
}

// How many neighbours, at most kLanes and a power of two, are read and written at once, given that `n` is the distance
// of what is not neighbours.
inline int lanes_for(const AblationProblem& p, int64_t n, int most, int width) {
  int lanes = most;
  for (const void* data : {static_cast<const void*>(p.result), p.output, p.residual}) {
    while (reinterpret_cast<uintptr_t>(data) % (lanes * width) != 0) lanes /= 2;
  }
  while (n % lanes != 0) lanes /= 2;
  return lanes;
}

}  // namespace memloc
