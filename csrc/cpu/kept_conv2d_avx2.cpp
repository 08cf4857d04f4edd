// The kernels of a convolution that reads some channels of each example for AVX2 and FMA.
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <type_traits>

#include "cpu/kept_conv2d_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define MEMLOC_VECTOR_BYTES 32
#define MEMLOC_TILE_ROWS 6

namespace memloc {
namespace {
#include "cpu/kept_conv2d_kernels.inc"
}  // namespace

template <typename E>
KeptConv2dKernels<E> kept_conv2d_avx2() {
  return kernel_table<E>();
}
template KeptConv2dKernels<float> kept_conv2d_avx2();
template KeptConv2dKernels<double> kept_conv2d_avx2();

}  // namespace memloc
#endif
