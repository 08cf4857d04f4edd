// The CPU kernels of per-example gradient norms, and how an instruction set provides them.
#pragma once

#include <cstdint>

#include "cpu/compute.h"
#include "cpu/instruction_set.h"
#include "grad_sqnorm.h"
#include "summation.h"

namespace memloc {

// A strided operand [batch, channels, rows, columns]; a linear layer is an image of one row, whose columns are its
// positions.
template <typename Source>
struct Operand {
  const Source* data;
  int64_t batch, channel, row, column;  // strides, in elements
};

template <typename Source>
struct GradSqnormProblem {
  Operand<Source> x, g;
  int64_t groups, inputs, outputs;  // inputs and outputs of one group
  Axis row, column;
};

// How one example and group is packed for tiles of the gradient: g [g_panels][positions][tile_rows], x
// [x_panels][x_positions][tile_columns], zero padded.
struct GradSqnormLayout {
  int64_t tile_rows, tile_columns;
  int64_t rows, columns, positions;
  int64_t padded_y, padded_x;  // of the image, with its padding
  // Patches are packed, offsets beside channels, where few input channels would fill a panel of pixels with zeros, and
  // where they are fewer than the pixels. Otherwise all offsets read the panels of the padded image where they lie.
  bool patches;
  int64_t width;    // columns of the packed x: inputs, times the offsets in patches
  int64_t offsets;  // kernel offsets that a panel of x meets: 1 of patches
  int64_t x_positions, x_panels, g_panels;

  GradSqnormLayout(int64_t inputs, int64_t outputs, const Axis& row, const Axis& column, int64_t tile_rows,
                   int64_t tile_columns)
      : tile_rows(tile_rows), tile_columns(tile_columns) {
    rows = row.positions(), columns = column.positions(), positions = rows * columns;
    padded_y = row.size + 2 * row.padding, padded_x = column.size + 2 * column.padding;
    offsets = row.kernel * column.kernel;
    const bool narrow = offsets > 1 && inputs < tile_columns;
    const bool few =
        divide_up(inputs * offsets, tile_columns) * positions < divide_up(inputs, tile_columns) * padded_y * padded_x;
    patches = narrow || few;
    width = patches ? inputs * offsets : inputs;
    if (patches) offsets = 1;
    x_positions = patches ? positions : padded_y * padded_x;
    x_panels = divide_up(width, tile_columns), g_panels = divide_up(outputs, tile_rows);
  }

  int64_t x_panel() const { return x_positions * tile_columns; }
  int64_t g_panel() const { return positions * tile_rows; }
  int64_t x_size() const { return x_panels * x_panel(); }
  int64_t g_size() const { return g_panels * g_panel(); }
};

// Norms, group sums and inner products of some examples, for some groups of the convolution, and how threads share
// them.
template <typename Source>
struct GradSqnormChunk {
  using E = typename ComputeIn<Source>::type;
  GradSqnormProblem<Source> problem;
  GradSqnormLayout layout;
  const int64_t *examples, *ids;  // [count] of the chunk: examples in order of their ids, and those
  int64_t count;
  int64_t first_group, groups;         // of the convolution
  E *xs, *gs;                          // packed: [count][groups] of the layout's
  int64_t n_block, m_block;            // panels of x and of g that are one task's
  int64_t n_blocks, m_blocks, slices;  // tasks: [slices][groups][n_blocks][m_blocks]; a slice is a part of the examples
  E* sums;                             // [slices][num_groups][all groups * outputs][inputs * kernel offsets], or null
  int64_t sum_size, slice_size;        // of one id's sum or a direction, and of a slice's sums
  const E* directions;                 // [num_directions][sum_size]
  int64_t num_directions;
  double* partial;  // [1 + num_directions][groups * n_blocks * m_blocks][count]: squared norms, inner products

  int64_t pack_tasks() const { return count * groups * (layout.x_panels + layout.g_panels); }
  int64_t blocks() const { return groups * n_blocks * m_blocks; }
};

// Some tiles of the gradients of all examples, for a group of the convolution, and their products with each other.
template <typename Source>
struct GradInnerChunk {
  using E = typename ComputeIn<Source>::type;
  static constexpr int64_t kBlock = 12;  // examples whose products with as many others are a task
  GradSqnormProblem<Source> problem;
  GradSqnormLayout layout;
  int64_t batch, group;
  int64_t first_n, n_panels, first_m, m_panels;  // panels of x and of g that are packed
  E *xs, *gs;                                    // [batch][n_panels] of the layout's, [batch][m_panels]
  int64_t first_tile, tiles;                     // of [n_panels][kernel offsets][m_panels]
  E* rows;                                       // [batch][row_size]: these tiles
  int64_t row_size;
  double* inner;  // [batch][batch], the upper triangle

  int64_t blocks() const { return divide_up(batch, kBlock); }
};

// sqnorm[b] = squared norm, for b in [begin, end). Source: float, double, or a 16-bit type that is computed in float.
template <typename Source>
using GradSqnormKernel = void (*)(const GradSqnormProblem<Source>&, double* sqnorm, int64_t begin, int64_t end);

// Tasks [begin, end) of a chunk.
template <typename Source>
using GradSqnormChunkKernel = void (*)(const GradSqnormChunk<Source>&, int64_t begin, int64_t end);

template <typename Source>
using GradInnerChunkKernel = void (*)(const GradInnerChunk<Source>&, int64_t begin, int64_t end);

template <typename Source>
struct GradSqnormKernels {
  GradSqnormKernel<Source> direct, gram;
  GradSqnormChunkKernel<Source> pack, add;
  GradInnerChunkKernel<Source> pack_pairs, tiles_of_pairs, products_of_pairs;
  int64_t tile_rows, tile_columns;
};

template <InstructionSet kSet, typename Source>
GradSqnormKernels<Source> grad_sqnorm_kernels();

}  // namespace memloc
