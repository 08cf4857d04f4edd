// The kernels of switched-off channels for AVX-512.
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <new>
#include <type_traits>

#include "cpu/ablation_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the intrinsics of gcc 12, which start from no value
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MEMLOC_VECTOR_BYTES 64
#define MEMLOC_TILE_ROWS 12

namespace memloc {
namespace {
#include "cpu/ablation_kernels.inc"
}  // namespace

template <typename Source>
AblationKernels<Source> ablation_avx512() {
  return kernel_table<Source>();
}
template AblationKernels<float> ablation_avx512();
template AblationKernels<double> ablation_avx512();
template AblationKernels<c10::BFloat16> ablation_avx512();
template AblationKernels<c10::Half> ablation_avx512();

}  // namespace memloc
#endif
