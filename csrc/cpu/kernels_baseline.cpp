// The CPU kernels for any processor.
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
#include "cpu/grad_sqnorm_kernels.h"
#include "cpu/kept_conv2d_kernels.h"
#include "cpu/kept_linear_kernels.h"

#define MEMLOC_SET InstructionSet::kBaseline
#define MEMLOC_VECTOR_BYTES 16
#define MEMLOC_TILE_ROWS 4
#define MEMLOC_SQUARE_ROWS 3
#define MEMLOC_SQUARE_VECTORS 3
#include "cpu/kernels.inc"
