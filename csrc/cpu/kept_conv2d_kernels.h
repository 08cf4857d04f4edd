// The CPU kernels of a convolution that reads some channels of each example, and how an instruction set provides them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv2d.h"
#include "cpu/compute.h"
#include "cpu/instruction_set.h"
#include "summation.h"

namespace memloc {

// One group of a convolution. A row of the filters is one kernel offset of one input channel.
template <typename E>
struct KeptConv2dProblem {
  const E* x;  // [batch, inputs, height, width] of these strides
  int64_t x_batch, x_channel, x_row, x_column;
  const int64_t *kept, *first;  // example b reads channels kept[first[b]] .. kept[first[b + 1] - 1]
  const E* rows;                // [panels of outputs][inputs][offsets][tile_columns], zero padded
  E* row_sums;                  // the same shape: the gradient of the rows
  const E* bias;                // [outputs] or null
  const E* grad;                // [outputs][positions] of an example, grad_batch apart
  E* result;                    // [outputs][positions], or [inputs][height][width]; result_batch apart
  int64_t grad_batch, result_batch;
  int64_t batch, inputs, outputs, panels;
  Axis y, x_axis;

  int64_t offsets() const { return y.kernel * x_axis.kernel; }
  int64_t most_kept() const {
    int64_t most = 0;
    for (int64_t b = 0; b < batch; ++b) most = std::max(most, first[b + 1] - first[b]);
    return most;
  }
};

// Tasks [begin, end) of `parts` for each example, or of `parts` for each panel of outputs.
template <typename E>
using KeptConv2dKernel = void (*)(const KeptConv2dProblem<E>&, int64_t parts, int64_t begin, int64_t end);

template <typename E>
struct KeptConv2dKernels {
  KeptConv2dKernel<E> forward, input_grad, weight_grad;
  // to[c * to_step + r] = from[r * from_step + c]
  void (*transpose)(E* to, int64_t to_step, const E* from, int64_t from_step, int64_t rows, int64_t columns);
  int64_t tile_columns;
};

template <InstructionSet kSet, typename E>
KeptConv2dKernels<E> kept_conv2d_kernels();

}  // namespace memloc
