// The kernel of a linear layer's kept channels for AVX2 and FMA.
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <type_traits>

#include "cpu/kept_linear_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define MEMLOC_VECTOR_BYTES 32
#define MEMLOC_TILE_ROWS 6

namespace memloc {
namespace {
#include "cpu/kept_linear_kernels.inc"
}  // namespace

template <typename E>
KeptLinearKernels<E> kept_linear_avx2() {
  return kernel_table<E>();
}
template KeptLinearKernels<float> kept_linear_avx2();
template KeptLinearKernels<double> kept_linear_avx2();

}  // namespace memloc
#endif
