// Per-example gradients of the scale and shift of a normalisation (batch, layer, group, RMS).
//
//   scale[b, c] = sum over p of grad_output[b, c, p] (input[b, c, p] - mean) rstd
//   shift[b, c] = sum over p of grad_output[b, c, p]
//
// mean and rstd are those of element (b, c, p), whatever of these they are shared over: a stride is then 0.
#pragma once

#include <cstdint>

namespace memloc {

// Where element (b, c, p) is, in elements.
struct NormalizationStrides {
  int64_t batch, channel, position;
};

struct NormalizationGrads {
  const void *input, *grad_output;  // of one type: float, double, or of 16 bits
  const void *mean, *rstd;          // double for double, else float
  void *scale, *shift;              // [batch, channels], of the type of mean
  NormalizationStrides input_strides, grad_strides, mean_strides, rstd_strides;
  int64_t batch, channels, positions;
  bool channels_inside;  // neighbours in memory are channels, of stride 1, else positions, of stride 1
};

}  // namespace memloc
