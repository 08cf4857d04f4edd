// A walk over the lines of a layout.
#pragma once

#include <cstdint>

#include "layout.h"

namespace memloc {

// Where a line starts: walks the loops outside the innermost one, from any of its steps on.
struct Cursor {
  const Layout& layout;
  int64_t index[Layout::kMaxLoops] = {};
  int64_t x = 0, y = 0, id = 0, channel = 0;

  Cursor(const Layout& l, int64_t line) : layout(l) {
    for (int i = layout.count - 2; i >= 0; --i) {
      move(layout.loop[i], index[i] = line % layout.loop[i].size);
      line /= layout.loop[i].size;
    }
  }
  void move(const Loop& loop, int64_t steps) {
    x += steps * loop.x;
    y += steps * loop.y;
    id += steps * loop.id;
    channel += steps * loop.channel;
  }
  void next() {
    for (int i = layout.count - 2; i >= 0; --i) {
      move(layout.loop[i], 1);
      if (++index[i] < layout.loop[i].size) return;
      move(layout.loop[i], -index[i]);
      index[i] = 0;
    }
  }
};

}  // namespace memloc
