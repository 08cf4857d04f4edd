// The kernels of switched-off channels for any processor.
#include <stdlib.h>
#include <string.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <new>
#include <type_traits>

#include "cpu/ablation_kernels.h"

#define MEMLOC_VECTOR_BYTES 16
#define MEMLOC_TILE_ROWS 4

namespace memloc {
namespace {
#include "cpu/ablation_kernels.inc"
}  // namespace

template <typename Source>
AblationKernels<Source> ablation_baseline() {
  return kernel_table<Source>();
}
template AblationKernels<float> ablation_baseline();
template AblationKernels<double> ablation_baseline();
template AblationKernels<c10::BFloat16> ablation_baseline();
template AblationKernels<c10::Half> ablation_baseline();

}  // namespace memloc
