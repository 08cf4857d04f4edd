// The element types that the CUDA kernels are made for.
#pragma once

namespace memloc {

enum class ElementType { kHalf, kBFloat16, kFloat, kDouble };

}  // namespace memloc
