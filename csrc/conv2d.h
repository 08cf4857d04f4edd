// The geometry of a convolution along one of its axes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace memloc {

// One axis of a convolution. Kernel offsets i with the same residue (i * dilation) mod stride meet the same pixels:
// those of that residue in padded coordinates. Counted among them, position r of such an offset is at r + shift(i).
struct Axis {
  int64_t size, kernel, stride, padding, dilation;

  int64_t positions() const { return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; }
  int64_t residue(int64_t offset) const { return offset * dilation % stride; }
  // How many residues the offsets have: those of offsets 0 .. residues() - 1, which then repeat.
  int64_t residues() const { return std::min(kernel, stride / std::gcd(stride, dilation)); }
  int64_t shift(int64_t offset) const { return offset * dilation / stride; }
  // Positions and the furthest shift: so many pixels of a residue, with padding, meet any position.
  int64_t extent() const { return positions() + shift(kernel - 1); }
  // Pixels of a residue that are not padding: [first_pixel, end_pixel), clipped to those that meet a position.
  int64_t first_pixel(int64_t residue) const { return std::max<int64_t>(0, (padding - residue + stride - 1) / stride); }
  int64_t end_pixel(int64_t residue) const {
    const int64_t end = (padding + size - residue + stride - 1) / stride;
    return std::max(first_pixel(residue), std::min(extent(), end));
  }
  // Pairs of them, over the residues that the offsets have.
  double pixel_pairs() const {
    double sum = 0;
    for (int64_t i = 0; i < residues(); ++i) {
      const double pixels = end_pixel(residue(i)) - first_pixel(residue(i));
      sum += pixels * pixels;
    }
    return sum;
  }
  // Whether there is such an axis; numbers below 2^31 keep every product of two of them in range.
  bool valid() const {
    for (const int64_t n : {size, kernel, stride, padding, dilation}) {
      if (n < 0 || n >= int64_t{1} << 31) return false;
    }
    return kernel > 0 && stride > 0 && dilation > 0 && dilation * (kernel - 1) < size + 2 * padding;
  }
};

}  // namespace memloc
