// Argument checks that every operator on a convolution makes.
#pragma once

#include <cstdint>
#include <vector>

#include "check.h"

namespace memloc {

// The numbers of a convolution over an image of height x width; whether the kernel fits is left to Axis::valid.
inline void check_conv2d_numbers(const char* op, int64_t height, int64_t width, const std::vector<int64_t>& kernel,
                                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                 const std::vector<int64_t>& dilation) {
  const char* const names[] = {"kernel_size", "stride", "padding", "dilation"};
  const std::vector<int64_t>* const values[] = {&kernel, &stride, &padding, &dilation};
  for (int i = 0; i < 4; ++i) {
    MEMLOC_CHECK(values[i]->size() == 2, op, ": ", names[i], " must be two numbers, got ", values[i]->size());
    const int64_t least = i == 2 ? 0 : 1;
    for (const int64_t value : *values[i]) {
      MEMLOC_CHECK(value >= least && value < (int64_t{1} << 31), op, ": ", names[i], " must be in [", least,
                   ", 2^31), got ", value);
    }
  }
  const double pixels = (height + 2.0 * padding[0]) * (width + 2.0 * padding[1]);
  MEMLOC_CHECK(pixels < 1u << 31, op, ": padding must leave an image of less than 2^31 pixels, got ", pixels);
}

}  // namespace memloc
