// The kernels of a convolution that reads some channels of each example for AVX-512.
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <type_traits>

#include "cpu/kept_conv2d_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the intrinsics of gcc 12, which start from no value
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MEMLOC_VECTOR_BYTES 64
#define MEMLOC_TILE_ROWS 12

namespace memloc {
namespace {
#include "cpu/kept_conv2d_kernels.inc"
}  // namespace

template <typename E>
KeptConv2dKernels<E> kept_conv2d_avx512() {
  return kernel_table<E>();
}
template KeptConv2dKernels<float> kept_conv2d_avx512();
template KeptConv2dKernels<double> kept_conv2d_avx512();

}  // namespace memloc
#endif
