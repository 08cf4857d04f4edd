// The kernels of switched-off channels for AVX2 and FMA.
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <new>
#include <type_traits>

#include "cpu/ablation_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define MEMLOC_VECTOR_BYTES 32
#define MEMLOC_TILE_ROWS 6

namespace memloc {
namespace {
#include "cpu/ablation_kernels.inc"
}  // namespace

template <typename Source>
AblationKernels<Source> ablation_avx2() {
  return kernel_table<Source>();
}
template AblationKernels<float> ablation_avx2();
template AblationKernels<double> ablation_avx2();
template AblationKernels<c10::BFloat16> ablation_avx2();
template AblationKernels<c10::Half> ablation_avx2();

}  // namespace memloc
#endif
