// The kernels of a convolution that reads some channels of each example for any processor.
#include <stdlib.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <new>
#include <type_traits>

#include "cpu/kept_conv2d_kernels.h"

#define MEMLOC_VECTOR_BYTES 16
#define MEMLOC_TILE_ROWS 4

namespace memloc {
namespace {
#include "cpu/kept_conv2d_kernels.inc"
}  // namespace

template <typename E>
KeptConv2dKernels<E> kept_conv2d_baseline() {
  return kernel_table<E>();
}
template KeptConv2dKernels<float> kept_conv2d_baseline();
template KeptConv2dKernels<double> kept_conv2d_baseline();

}  // namespace memloc
