// The kernel of a linear layer's kept channels for any processor.
#include <stdlib.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <new>
#include <type_traits>

#include "cpu/kept_linear_kernels.h"

#define MEMLOC_VECTOR_BYTES 16
#define MEMLOC_TILE_ROWS 4

namespace memloc {
namespace {
#include "cpu/kept_linear_kernels.inc"
}  // namespace

template <typename E>
KeptLinearKernels<E> kept_linear_baseline() {
  return kernel_table<E>();
}
template KeptLinearKernels<float> kept_linear_baseline();
template KeptLinearKernels<double> kept_linear_baseline();

}  // namespace memloc
