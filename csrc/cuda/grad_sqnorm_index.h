// Where the CUDA kernels of per-example gradient norms find a position's pixels: arithmetic on indices, no tensor, the
// same on host and device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "grad_sqnorm.h"
#include "host_device.h"

namespace memloc {

struct Range {
  int64_t first, count;

  int64_t end() const { return first + count; }
};

// One axis of a convolution, seen by the kernel offsets of one residue: they meet every stride-th pixel. Position r
// meets, at the m-th of these offsets, pixel r + shift + m * step, counted among the pixels of the residue in padded
// coordinates; those in `pixels` are no padding.
struct Residue {
  int64_t shift, step, offsets;
  Range pixels;
  int64_t origin, stride;  // in the image, pixel q is at origin + q * stride

  // The residue of kernel offset `first`, which is below axis.residues().
  Residue(const Axis& axis, int64_t first)
      : shift(axis.shift(first)),
        step(axis.dilation / std::gcd(axis.stride, axis.dilation)),
        offsets((axis.kernel - first + axis.residues() - 1) / axis.residues()),
        pixels{axis.first_pixel(axis.residue(first)), 0},
        origin(axis.residue(first) - axis.padding),
        stride(axis.stride) {
    pixels.count = axis.end_pixel(axis.residue(first)) - pixels.first;
  }

  // Those pixels that positions of a range meet: possibly none.
  Range met_by(const Range& positions) const {
    const int64_t first = std::max(pixels.first, positions.first + shift);
    const int64_t end = std::min(pixels.end(), positions.end() + shift + (offsets - 1) * step);
    return {first, std::max<int64_t>(0, end - first)};
  }
};

// A part of the plane of positions, or of the pixels of a residue.
struct Box {
  Range y, x;

  int64_t count() const { return y.count * x.count; }
};

// Pairs of positions (left, right) whose Grams are in scratch at the same time. A band's left positions are whole rows
// of the image, or a part of one row; its right ones are all that do not lie before them, and a few that do.
struct Band {
  Box left, right;
};

// Bands of about `most` left positions that together hold every pair of positions in one order at least.
struct Bands {
  int64_t rows, columns, most;

  int64_t band_rows() const { return std::clamp<int64_t>(most / columns, 1, rows); }
  int64_t band_columns() const { return std::clamp<int64_t>(most, 1, columns); }
  int64_t across() const { return (columns + band_columns() - 1) / band_columns(); }
  int64_t count() const { return (rows + band_rows() - 1) / band_rows() * across(); }
  Band operator[](int64_t i) const {
    const int64_t r = i / across() * band_rows(), c = i % across() * band_columns();
    const Range left_y{r, std::min(band_rows(), rows - r)}, left_x{c, std::min(band_columns(), columns - c)};
    const int64_t first = r == rows - 1 ? c : 0;  // no row below this one needs the columns before
    return {{left_y, left_x}, {{r, rows - r}, {first, columns - first}}};
  }
};

// What a kernel knows of one axis of a band and a residue: positions and pixels count from the first of their boxes.
struct GramAxis {
  int32_t left_shift, right_shift, step, offsets;  // position r meets pixel r + shift + m * step
  int32_t left_pixels, right_pixels;               // others are padding, and count as zero

  GramAxis() = default;
  GramAxis(const Residue& residue, const Range& left, const Range& right)
      : left_shift(static_cast<int32_t>(left.first + residue.shift - residue.met_by(left).first)),
        right_shift(static_cast<int32_t>(right.first + residue.shift - residue.met_by(right).first)),
        step(static_cast<int32_t>(residue.step)),
        offsets(static_cast<int32_t>(residue.offsets)),
        left_pixels(static_cast<int32_t>(residue.met_by(left).count)),
        right_pixels(static_cast<int32_t>(residue.met_by(right).count)) {}

  MEMLOC_HOST_DEVICE static bool inside(int32_t pixel, int32_t pixels) {
    return static_cast<uint32_t>(pixel) < static_cast<uint32_t>(pixels);
  }
};

// Position t of an image of so many columns, as row and column.
struct Position {
  uint32_t t, row, column;
};

// The first of a slice of positions, below 2^31 all of them, so that one past the last does not overflow. Steps from it
// without a division: of less than kShort to one of its positions, or to the next slice.
struct Slice {
  static constexpr uint32_t kShort = 32;
  Position first;

  // Division by columns for what a column and a short step add up to; columns below kShort.
  MEMLOC_HOST_DEVICE static uint32_t reciprocal(uint32_t columns) { return (65536 + columns - 1) / columns; }
  MEMLOC_HOST_DEVICE Position at(uint32_t step, uint32_t columns, uint32_t reciprocal) const {
    const uint32_t along = first.column + step;
    const uint32_t down = columns < kShort ? along * reciprocal >> 16 : along >= columns;
    return {first.t + step, first.row + down, along - down * columns};
  }
};

// A column of the unfolded patches: input channel and kernel offset.
struct Column {
  int64_t channel;
  int32_t y, x;  // pixel of position (0, 0), below zero in the padding
};

// Column n; its order matters only for where neighbours lie in memory.
MEMLOC_HOST_DEVICE Column column_at(int64_t n, int64_t inputs, int64_t kernel_y, int64_t kernel_x, int64_t dilation_y,
                                    int64_t dilation_x, int64_t padding_y, int64_t padding_x, bool channels_inner) {
  const int64_t offsets = kernel_y * kernel_x;
  const int64_t channel = channels_inner ? n % inputs : n / offsets, offset = channels_inner ? n / inputs : n % offsets;
  return {channel, static_cast<int32_t>(offset / kernel_x * dilation_y - padding_y),
          static_cast<int32_t>(offset % kernel_x * dilation_x - padding_x)};
}

}  // namespace memloc
