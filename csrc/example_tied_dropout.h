// Example-tied dropout. A (site, example, channel) triple keeps one draw for life: the same in every epoch, on every
// device, in every dtype and memory format, whatever else is in the batch.
//
//   y[b, c, s] = x[b, c, s]  if keep(example_ids[b], c)  else 0
//   keep(e, c) = c < num_generalization  or  uniform(seed, site, e, c) < p_mem
//
// uniform is word c % 4 of Philox4x32-10 at counter (c / 4, site, e mod 2^32, e / 2^32) under key (seed mod 2^32,
// seed / 2^32), read as a multiple of 2^-32. Values move as bits, so nothing here depends on the dtype but its width.
//
// Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023; Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011 (Philox).
#pragma once

#include <cstdint>

#include "host_device.h"
#include "layout.h"

namespace memloc {

struct Quad {
  uint32_t word[4];

  // word[i] for an index known at run time only, which would move the array out of a GPU's registers.
  MEMLOC_HOST_DEVICE uint32_t at(int64_t i) const {
    const uint32_t low = i & 1 ? word[1] : word[0], high = i & 1 ? word[3] : word[2];
    return i & 2 ? high : low;
  }
};

// Philox4x32-10 (constants of Salmon et al., table 2): four independent 32-bit words per counter.
MEMLOC_HOST_DEVICE Quad philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

struct TiedMask {
  uint64_t seed;
  uint32_t site;
  int64_t num_generalization;
  uint64_t threshold;  // p_mem in units of 2^-32, rounded up: word < threshold exactly where word * 2^-32 < p_mem

  // The draws of channels 4 * quad .. 4 * quad + 3.
  MEMLOC_HOST_DEVICE Quad draw(int64_t example, int64_t quad) const {
    const uint64_t id = static_cast<uint64_t>(example);
    return philox(static_cast<uint32_t>(quad), site, static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32),
                  static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }
  MEMLOC_HOST_DEVICE bool keep(int64_t channel, uint32_t word) const {
    return channel < num_generalization || word < threshold;
  }
  MEMLOC_HOST_DEVICE bool operator()(int64_t example, int64_t channel) const {
    if (channel < num_generalization) return true;
    if (threshold == 0) return false;
    return keep(channel, draw(example, channel / 4).at(channel % 4));
  }
};

}  // namespace memloc
