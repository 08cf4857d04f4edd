// The CPU kernels for AVX-512.
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <new>
#include <type_traits>

#include "cpu/ablation_kernels.h"
#include "cpu/grad_sqnorm_kernels.h"
#include "cpu/kept_conv2d_kernels.h"
#include "cpu/kept_linear_kernels.h"

#if MEMLOC_INSTRUCTION_SETS
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the intrinsics of gcc 12, which start from no value
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MEMLOC_SET InstructionSet::kAvx512
#define MEMLOC_VECTOR_BYTES 64
#define MEMLOC_TILE_ROWS 12
#define MEMLOC_SQUARE_ROWS 8
#define MEMLOC_SQUARE_VECTORS 2
#include "cpu/kernels.inc"
#endif
