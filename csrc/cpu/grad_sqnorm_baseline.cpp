// The kernels of per-example gradient norms for any processor.
#include <stdlib.h>
#include <string.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <new>

#include "cpu/grad_sqnorm_kernels.h"

#define MEMLOC_VECTOR_BYTES 16
#define MEMLOC_TILE_ROWS 4
#define MEMLOC_SQUARE_ROWS 3
#define MEMLOC_SQUARE_VECTORS 3

namespace memloc {
namespace {
#include "cpu/grad_sqnorm_kernels.inc"
}  // namespace

template <typename Source>
GradSqnormKernels<Source> grad_sqnorm_baseline() {
  return kernel_table<Source>();
}
template GradSqnormKernels<float> grad_sqnorm_baseline();
template GradSqnormKernels<double> grad_sqnorm_baseline();
template GradSqnormKernels<c10::BFloat16> grad_sqnorm_baseline();
template GradSqnormKernels<c10::Half> grad_sqnorm_baseline();

}  // namespace memloc
