// Per-example gradient norms. A layer's weight gradient is a sum over examples; this is the squared Frobenius norm of
// each example's own share of it, which is never materialised.
//
//   linear   G_b = sum over positions t of g[b, t, :] x[b, t, :]^T           out[b] = ||G_b||^2
//   conv2d   the same with the unfolded patch at t for x[b, t, :], summed over the groups
//
// Ways, in multiply-adds per example and group (T positions, p outputs, d inputs, k kernel offsets):
//   outer          ||x||^2 ||g||^2, for T = 1                                         d + p
//   direct         tiles of G_b in registers, squared and summed                      T k d p
//   gram           sum over t, t' of (x_t . x_t') (g_t . g_t')                        T^2 (d + p + 1)
//   shifted_gram   the same for a convolution: patches overlap, so the Gram of its    U V d + T V p + k T V / 2
//                  pixels serves all k offsets: U pixels against V positions of a
//                  zero-padded row-major image (per residue class of the stride)
//
// Source: Goodfellow, "Efficient per-example gradient computations", 2015 (outer); Rochette, Manoel, Tramel, "Efficient
// per-example gradient computations in convolutional neural networks", 2019 (direct and gram for convolutions).
#pragma once

#include <algorithm>
#include <cstdint>

namespace memloc {

enum class GradSqnormMethod { kOuter, kDirect, kGram };

// One axis of a convolution. Kernel offsets i with the same residue (i * dilation) mod stride meet the same pixels:
// those of that residue in padded coordinates. Counted among them, position r of such an offset is at r + shift(i).
struct Axis {
  int64_t size, kernel, stride, padding, dilation;

  int64_t positions() const { return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; }
  int64_t residue(int64_t offset) const { return offset * dilation % stride; }
  // How many residues the offsets have: those of offsets 0 .. residues() - 1, which then repeat.
  int64_t residues() const {
    int64_t n = 1;
    while (n < kernel && residue(n) != 0) ++n;
    return n;
  }
  int64_t shift(int64_t offset) const { return offset * dilation / stride; }
  // Positions and the furthest shift: so many pixels of a residue, with padding, meet any position.
  int64_t extent() const { return positions() + shift(kernel - 1); }
  // Pixels of a residue that are not padding: [first_pixel, end_pixel), clipped to those that meet a position.
  int64_t first_pixel(int64_t residue) const { return std::max<int64_t>(0, (padding - residue + stride - 1) / stride); }
  int64_t end_pixel(int64_t residue) const {
    const int64_t end = (padding + size - residue + stride - 1) / stride;
    return std::max(first_pixel(residue), std::min(extent(), end));
  }
};

// What the count of multiply-adds depends on; a linear layer has 1 x 1 kernel offsets and 1 x T positions.
struct GradSqnormShape {
  int64_t groups, inputs, outputs;  // inputs and outputs of one group
  Axis y, x;

  double positions() const { return 1.0 * y.positions() * x.positions(); }
  double direct() const { return positions() * y.kernel * x.kernel * inputs * outputs * groups; }
  double gram() const {
    const double padded = 1.0 * y.extent() * x.extent(), span = 1.0 * y.positions() * x.extent();
    double pixels = 0;  // of all residues that an offset has
    for (int64_t i = 0; i < y.residues(); ++i) {
      for (int64_t j = 0; j < x.residues(); ++j) {
        const int64_t b = y.residue(i), a = x.residue(j);
        pixels += 1.0 * (y.end_pixel(b) - y.first_pixel(b)) * (x.end_pixel(a) - x.first_pixel(a));
      }
    }
    const double sums = 0.5 * y.kernel * x.kernel * positions() * span;
    return groups * (pixels * padded * inputs + positions() * span * outputs + sums);
  }
  bool outer_applies() const { return positions() == 1 && y.kernel == 1 && x.kernel == 1 && groups == 1; }
  double outer() const { return 1.0 * inputs + outputs; }

  // Scratch of the Gram way for one example, in elements.
  double gram_scratch() const {
    const double padded = 1.0 * y.extent() * x.extent();
    return (std::min(padded, 1.0 * y.size * x.size) + positions() + inputs + outputs) * padded;
  }

  GradSqnormMethod choose() const {
    if (outer_applies()) return GradSqnormMethod::kOuter;
    // In multiply-adds of the direct way, measured on two cores with AVX-512: the Gram's smaller products run at 1
    // / 1.4 of its rate, and putting an element into panels costs as much as 45 of them (twice that for the Gram's two
    // panels).
    const double elements = groups * (1.0 * y.size * x.size * inputs + positions() * outputs);
    const bool cheaper = 1.55 * gram() + 90 * elements < direct() + 45 * elements;
    return cheaper && gram_scratch() <= kMostScratch ? GradSqnormMethod::kGram : GradSqnormMethod::kDirect;
  }

  static constexpr double kMostScratch = 16 << 20;  // elements, per thread
};

}  // namespace memloc
