// Two tensors of any strides as one nest of loops.
#pragma once

#include <algorithm>
#include <cstdint>

namespace memloc {

// One loop over the elements: how far a step moves in x, in y, along what rows are known by, and along the channels.
struct Loop {
  int64_t size, x, y, id, channel;
};

// The elements of a tensor x, and of a tensor y made from it, as nested loops, outermost first, in the order in which y
// lies in memory. Loops that step as one are merged, so a contiguous [B, C, H, W] is rows, channels, plane, and a
// channels-last one is rows, plane, channels.
struct Layout {
  static constexpr int kMaxLoops = 25;  // as many dimensions as torch's own elementwise kernels take on CUDA
  Loop loop[kMaxLoops];
  int count = 0;

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < count; ++i) n *= loop[i].size;
    return n;
  }
  const Loop& inner() const { return loop[count - 1]; }

  // Puts the loops in y's memory order and merges those that step as one; leaves at least one.
  void simplify() {
    std::stable_sort(loop, loop + count, [](const Loop& a, const Loop& b) { return a.y > b.y; });
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      const Loop next = loop[i];
      if (next.size == 1) continue;
      Loop* last = kept > 0 ? &loop[kept - 1] : nullptr;
      const bool as_one = last != nullptr && last->x == next.x * next.size && last->y == next.y * next.size &&
                          last->id == next.id * next.size && last->channel == next.channel * next.size;
      if (as_one) {
        const int64_t size = last->size * next.size;
        *last = next;
        last->size = size;
      } else {
        loop[kept++] = next;
      }
    }
    if (kept == 0) loop[kept++] = Loop{1, 1, 1, 0, 0};
    count = kept;
  }
};

}  // namespace memloc
