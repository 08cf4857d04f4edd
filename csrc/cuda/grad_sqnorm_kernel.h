// Per-example gradient norms on CUDA: what the glue (a torch file) asks of the kernels (files without torch).
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/element_type.h"
#include "cuda/grad_sqnorm_index.h"

namespace memloc {

// A strided operand [batch, channels, rows, columns]; a linear layer is an image of one row, whose columns are its
// positions.
struct ImageView {
  const void* data;
  int64_t batch, channel, row, column;  // strides, in elements
};

// What the kernels that read the layer's own tensors are given. No size is zero.
struct GradSqnormImages {
  ImageView x, g;
  ElementType type;
  int64_t batch;
  GradSqnormShape shape;
};

// The sum over a band's pairs of the product of their Grams, for one residue of a convolution, of `count` examples (or
// groups of examples), each Gram whole and row-major.
struct GramPairs {
  const void *positions, *pixels;  // Grams [count, left, right]; float, or double
  bool is_double;
  int64_t count;
  Band band;
  GramAxis y, x;
};

// out[b]: double for double elements, else float.
cudaError_t grad_sqnorm_outer_cuda(const GradSqnormImages& images, void* out, cudaStream_t stream);

// Writes partials [batch, parts], whose sum over parts is an example's squared norm.
cudaError_t grad_sqnorm_direct_cuda(const GradSqnormImages& images, double* partials, int64_t parts,
                                    cudaStream_t stream);

// Adds to partials [count, parts].
cudaError_t grad_sqnorm_gram_cuda(const GramPairs& pairs, double* partials, int64_t parts, cudaStream_t stream);

// out[b] = sum of partials[b, 0 .. per_example), at least 0.
cudaError_t grad_sqnorm_finish_cuda(const double* partials, int64_t per_example, int64_t batch, bool is_double,
                                    void* out, cudaStream_t stream);

// How many parts occupy a device whatever the batch; of a Gram, whatever is in scratch. They do not depend on the
// device, nor does the order of the sums in the direct way.
int64_t grad_sqnorm_direct_parts(const GradSqnormImages& images);
int64_t grad_sqnorm_gram_parts(const Bands& bands, int64_t count);

}  // namespace memloc
