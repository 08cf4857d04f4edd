// The kernel of a linear layer's kept channels for AVX-512.
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <type_traits>

#include "cpu/kept_linear_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the intrinsics of gcc 12, which start from no value
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MEMLOC_VECTOR_BYTES 64
#define MEMLOC_TILE_ROWS 12

namespace memloc {
namespace {
#include "cpu/kept_linear_kernels.inc"
}  // namespace

template <typename E>
KeptLinearKernels<E> kept_linear_avx512() {
  return kernel_table<E>();
}
template KeptLinearKernels<float> kept_linear_avx512();
template KeptLinearKernels<double> kept_linear_avx512();

}  // namespace memloc
#endif
