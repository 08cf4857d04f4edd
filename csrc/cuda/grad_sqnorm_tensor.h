// The direct way on tensor cores: what the glue (a torch file) asks of the kernels (files without torch).
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/grad_sqnorm_kernel.h"

namespace memloc {

// A 16-bit operand whose channels are neighbours, in eights: every stride but the channels' is a multiple of 8
// elements, and data is aligned to 16 bytes. Offsets within an example are below 2^31 elements.
struct ChannelsLast {
  const void* data;
  int64_t batch;
  int32_t row, column, group;  // group: from one group's channels to the next one's
  int32_t channels;            // of a group, with zeros up to a multiple of 8
};

// Elements of an operand that is packed for the kernel: [examples, rows, columns, groups, padded(channels)].
inline int64_t padded(int64_t channels) { return (channels + 7) / 8 * 8; }

// Squared norms, and sums, of the gradients of `batch` examples by tiles of the gradient.
struct GradSqnormTensor {
  ChannelsLast x, g;  // g's rows follow each other like the positions in one
  bool half;          // else bfloat16
  int64_t batch, splits;
  GradSqnormShape shape;

  // Into so many the examples are split, for blocks to occupy a device. It does not depend on the device, nor does the
  // order of the sums.
  int64_t best_splits(bool sums) const;
  // Doubles whose sum is an example's squared norm.
  int64_t parts() const;
  // Floats of a sum of gradients, [groups, padded outputs, offsets, padded inputs].
  int64_t sum_size() const { return shape.groups * g.channels * shape.y.kernel * shape.x.kernel * x.channels; }

 private:
  int64_t tiles() const;
};

// Writes partials [batch, parts()]. Where sums [splits, sum_size()] are given, writes there, or adds if there are
// `more`, the sum of the gradients of each split's examples.
cudaError_t grad_sqnorm_tensor_cuda(const GradSqnormTensor& problem, double* partials, float* sums, bool more,
                                    cudaStream_t stream);

// to [count, rows, columns, groups, padded(channels)] = from, whose groups have so many channels; of 16-bit elements.
cudaError_t grad_sqnorm_pack_cuda(const ImageView& from, int64_t count, int64_t rows, int64_t columns, int64_t groups,
                                  int64_t channels, void* to, cudaStream_t stream);

// out [groups * outputs, inputs, offsets] = the sum over splits of sums [splits, groups, padded(outputs), offsets,
// padded(inputs)].
cudaError_t grad_sqnorm_add_splits_cuda(const float* sums, int64_t splits, const GradSqnormShape& shape, float* out,
                                        cudaStream_t stream);

}  // namespace memloc
