// Channel saliency: to first order, how much a loss falls when a channel of one example is switched off.
//
//   out[b, c] = sum over positions s of activation[b, c, s] * grad[b, c, s]
//
// Both are read once, where they lie; no product is stored.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host_device.h"

namespace memloc {

// One loop: how far a step moves in activation and in grad.
struct SaliencyLoop {
  int64_t size, a, g;

  MEMLOC_HOST_DEVICE bool dense() const { return a == 1 && g == 1; }
};

// The loops over examples, channels and positions; those over positions outermost first, merged where they step as one,
// so that the positions of any usual memory format are one loop.
struct SaliencyLayout {
  static constexpr int kMaxLoops = 23;
  SaliencyLoop batch, channel, loop[kMaxLoops];
  int count = 0;  // of loops over positions; at least 1 after simplify

  MEMLOC_HOST_DEVICE const SaliencyLoop& inner() const { return loop[count - 1]; }

  // Runs of the innermost loop in a plane.
  MEMLOC_HOST_DEVICE int64_t lines() const {
    int64_t n = 1;
    for (int i = 0; i + 1 < count; ++i) n *= loop[i].size;
    return n;
  }

  // Where a line of a plane starts, from the plane's first element.
  MEMLOC_HOST_DEVICE void start_of(int64_t line, int64_t* a, int64_t* g) const {
    *a = *g = 0;
    for (int i = count - 2; i >= 0; --i) {
      const int64_t index = line % loop[i].size;
      line /= loop[i].size;
      *a += index * loop[i].a;
      *g += index * loop[i].g;
    }
  }

  // Positions lie beside each other, or else channels do, in both.
  bool planes() const { return inner().dense() && inner().size > 1; }
  bool channels() const { return !planes() && channel.dense(); }

  void simplify() {
    std::stable_sort(loop, loop + count, [](const SaliencyLoop& x, const SaliencyLoop& y) { return x.a > y.a; });
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      const SaliencyLoop next = loop[i];
      if (next.size == 1) continue;
      SaliencyLoop* const last = kept > 0 ? &loop[kept - 1] : nullptr;
      if (last != nullptr && last->a == next.a * next.size && last->g == next.g * next.size) {
        *last = {last->size * next.size, next.a, next.g};
      } else {
        loop[kept++] = next;
      }
    }
    if (kept == 0) loop[kept++] = {1, 1, 1};
    count = kept;
  }
};

}  // namespace memloc
