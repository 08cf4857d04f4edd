// The CPU kernels for AVX2 and FMA.
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
#pragma GCC target("avx2,fma,f16c")
#define MEMLOC_SET InstructionSet::kAvx2
#define MEMLOC_VECTOR_BYTES 32
#define MEMLOC_TILE_ROWS 6
#define MEMLOC_SQUARE_ROWS 4
#define MEMLOC_SQUARE_VECTORS 3
#include "cpu/kernels.inc"
#endif
