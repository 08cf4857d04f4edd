// The kernels of per-example gradient norms for AVX-512.
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <new>

#include "cpu/grad_sqnorm_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MEMLOC_VECTOR_BYTES 64
#define MEMLOC_TILE_ROWS 12
#define MEMLOC_SQUARE_ROWS 8
#define MEMLOC_SQUARE_VECTORS 2

namespace memloc {
namespace {
#include "cpu/grad_sqnorm_kernels.inc"
}  // namespace

template <typename Source>
GradSqnormKernels<Source> grad_sqnorm_avx512() {
  return kernel_table<Source>();
}
template GradSqnormKernels<float> grad_sqnorm_avx512();
template GradSqnormKernels<double> grad_sqnorm_avx512();
template GradSqnormKernels<c10::BFloat16> grad_sqnorm_avx512();
template GradSqnormKernels<c10::Half> grad_sqnorm_avx512();

}  // namespace memloc
#endif
