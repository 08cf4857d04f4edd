// Per-example gradient norms. A layer's weight gradient is a sum over examples; this is the squared Frobenius norm of
// each example's own share of it, which is never materialised.
//
//   linear   G_b = sum over positions t of g[b, t, :] x[b, t, :]^T           out[b] = ||G_b||^2
//   conv2d   the same with the unfolded patch at t for x[b, t, :], summed over the groups
//
// Ways, in multiply-adds per example (T positions, p outputs and d inputs of a group, k kernel offsets):
//   outer          ||x||^2 ||g||^2, for a single position, pixel, offset and group    d + p
//   direct         tiles of G_b in registers, squared and summed                      T k d p, for each group
//   gram           sum over t, t' of (x_t . x_t') (g_t . g_t')                        T^2 (d + p + 1/2), for each group
//   shifted_gram   the same for a convolution: patches overlap, so the Gram of its    U^2 d + T^2 p + k T W / 2
//                  U pixels (for each residue of the stride) serves all k offsets;
//                  W places in the rows of a zero-padded image that positions have
// Both Grams are symmetric: the counts are those of the whole products, of which kernels compute a little over half.
//
// Source: Goodfellow, "Efficient per-example gradient computations", 2015 (outer); Rochette, Manoel, Tramel, "Efficient
// per-example gradient computations in convolutional neural networks", 2019 (direct and gram for convolutions).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "conv2d.h"

namespace memloc {

enum class GradSqnormMethod { kOuter, kDirect, kGram };

// What the count of multiply-adds depends on; a linear layer has 1 x 1 kernel offsets and 1 x T positions.
struct GradSqnormShape {
  int64_t groups, inputs, outputs;  // inputs and outputs of one group
  Axis y, x;

  double positions() const { return 1.0 * y.positions() * x.positions(); }
  double direct() const { return positions() * y.kernel * x.kernel * inputs * outputs * groups; }
  double gram_products() const {
    return groups * (y.pixel_pairs() * x.pixel_pairs() * inputs + positions() * positions() * outputs);
  }
  double gram_sums() const { return 0.5 * groups * y.kernel * x.kernel * positions() * y.positions() * x.extent(); }
  double gram() const { return gram_products() + gram_sums(); }
  bool outer_applies() const {
    return positions() == 1 && groups == 1 && y.kernel == 1 && x.kernel == 1 && y.size + 2 * y.padding == 1 &&
           x.size + 2 * x.padding == 1;
  }
  double outer() const { return 1.0 * inputs + outputs; }

  // Scratch for one example, in elements; 64 bounds what rounding up to a tile adds.
  double scratch(GradSqnormMethod method) const {
    if (method == GradSqnormMethod::kOuter) return 0;
    const double padded = (y.size + 2.0 * y.padding) * (x.size + 2.0 * x.padding);
    if (method == GradSqnormMethod::kDirect) return (inputs + 64.0) * padded + (outputs + 64.0) * positions();
    const double places = 1.0 * y.extent() * x.extent() + 64, pixels = std::min(places, 1.0 * y.size * x.size);
    return (pixels + positions() + inputs + outputs + 256) * (places + 64);
  }

  // Times in multiply-adds of the direct way, fitted to 29 layers on one core with AVX-512, and right for AVX2 too: of
  // a Gram's products a little over half is computed, its sums wait for the cache, and putting an element into panels
  // costs as much as 30 multiply-adds, 40 for a Gram.
  double elements() const { return groups * (1.0 * y.size * x.size * inputs + positions() * outputs); }
  double direct_time() const { return direct() + 30 * elements(); }
  double gram_time() const { return 0.55 * gram_products() + 4 * gram_sums() + 40 * elements(); }

  // The Grams of an example are whole in a thread's scratch, which grows with the square of its positions: beyond
  // kMostScratch the direct way stands in, even for a Gram that was asked for.
  bool gram_fits() const { return scratch(GradSqnormMethod::kGram) <= kMostScratch; }

  GradSqnormMethod choose() const {
    if (outer_applies()) return GradSqnormMethod::kOuter;
    return gram_time() < direct_time() && gram_fits() ? GradSqnormMethod::kGram : GradSqnormMethod::kDirect;
  }

  // Whether one direct pass that also adds up the gradients of groups, and multiplies them with directions, takes less
  // time than the norms, a weight gradient per group and a forward product per direction. Adding a tile to a sum costs
  // as much as 3 more positions, multiplying it with a direction as much as 2; the rows of groups and their weight
  // gradients as much as 1.2 direct ways, measured at 1.0 for convolutions and 1.5 to 2 for matrix products.
  bool fused(int64_t directions = 0) const {
    const GradSqnormMethod way = choose();
    if (way != GradSqnormMethod::kGram) return way == GradSqnormMethod::kDirect;
    const double count = static_cast<double>(directions);
    return direct_time() + (3 + 2 * count) * direct() / positions() < gram_time() + (1.2 + count) * direct();
  }

  // On CUDA, in multiply-adds at the rate of an arithmetic unit per lane, about 30 T/s on a large device; reckoned from
  // its rates, not measured. docs/kernels.md has the arithmetic.
  //
  // The direct kernel issues at least 0.6 of its instructions as multiply-adds, in tiles that a small gradient does not
  // fill. That on tensor cores is bound by the second-level cache: 5 TB/s of it give the 8 or 6 KiB of 16 positions of
  // a tile 5.4 or 3.6 times the rate. What does not lie as it reads it is copied, 4 bytes for each element at 4 TB/s.
  double lanes_time() const {
    return positions() * filled(outputs, outputs > 8 ? 64 : 8) * filled(inputs * offsets(), 64) / 0.6;
  }
  double tensor_time() const {
    const bool large = outputs > 64;
    const double tiles = filled(outputs, large ? 128 : 64) * filled(filled(inputs, 8) * offsets(), 128);
    return filled(positions(), 32) * tiles / (large ? 5.4 : 3.6) + 30 * elements() / groups;
  }
  bool tensor_is_faster() const { return tensor_time() < lanes_time(); }

  // Library products of float32 or float64 run at 0.8 of the rate (TF32, if the user allows it, faster), of 16-bit
  // elements at 6 times it on tensor cores. A Gram is written once and read about once, 8 bytes at the 5 TB/s of a
  // second-level cache, or 50 multiply-adds; a pair of pixels that a kernel offset adds costs 6 instructions, for half
  // the pairs. Every residue takes launches of its own, which overrun the gain where there are many.
  double cuda_gram_time(bool half) const {
    if (y.residues() * x.residues() > 16) return std::numeric_limits<double>::infinity();
    const double t = positions(), pairs = y.pixel_pairs() * x.pixel_pairs();
    return (pairs * inputs + t * t * outputs) / (half ? 6 : 0.8) + 50 * (pairs + t * t) + 3 * offsets() * t * t;
  }

  GradSqnormMethod choose_cuda(bool half) const {
    if (outer_applies()) return GradSqnormMethod::kOuter;
    const double direct = half ? std::min(tensor_time(), lanes_time()) : lanes_time();
    return cuda_gram_time(half) < direct ? GradSqnormMethod::kGram : GradSqnormMethod::kDirect;
  }

  // Whether one pass on tensor cores that also sums the gradients takes less time than the norms and a library's
  // product.
  bool tensor_sums() const {
    const double norms = outer_applies() ? 0 : std::min(cuda_gram_time(true), lanes_time());
    return tensor_time() < norms + direct() / groups / 6;
  }

  static constexpr double kMostScratch = 16 << 20;  // elements, per thread

 private:
  double offsets() const { return 1.0 * y.kernel * x.kernel; }
  static double filled(double n, double tile) { return std::ceil(n / tile) * tile; }
};

}  // namespace memloc
