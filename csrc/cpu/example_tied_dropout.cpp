// Memory-bound: reads the kept part of x once, writes y once; the mask is recomputed, never stored. Threads share the
// lines of the innermost loop: a line is a plane of one channel (copied or zeroed whole), the channels of one position
// (masked), or, in transposed layouts, a run of examples.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/cursor.h"
#include "cpu/element_types.h"
#include "cpu/new_tensor.h"
#include "cpu/simd.h"
#include "example_tied_dropout_args.h"

namespace memloc {
namespace {

constexpr int64_t kBlock = 1024;           // channels whose mask is held at a time, on the stack: 8 KiB at most
constexpr int64_t kGrainElements = 32768;  // least work worth a thread, as in torch's own kernels

// words[4 * q + j] = word j of quad first + q.
MEMLOC_CLONES void draw_quads(uint32_t* __restrict__ words, const TiedMask& mask, int64_t example, int64_t first,
                              int64_t count) {
  const TiedMask m = mask;
#pragma omp simd
  for (int64_t q = 0; q < count; ++q) {
    const Quad quad = m.draw(example, first + q);
    for (int j = 0; j < 4; ++j) words[4 * q + j] = quad.word[j];
  }
}

// words[4 * i + j] = word j of a quad of channels, of the i-th example.
MEMLOC_CLONES void draw_examples(uint32_t* __restrict__ words, const TiedMask& mask, const int64_t* __restrict__ ids,
                                 int64_t stride, int64_t count, int64_t quad) {
  const TiedMask m = mask;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Quad drawn = m.draw(ids[i * stride], quad);
    for (int j = 0; j < 4; ++j) words[4 * i + j] = drawn.word[j];
  }
}

// bits[i] = all ones if channel first + i is kept, else 0; first is a multiple of 4.
template <typename T>
void mask_bits(T* bits, const TiedMask& mask, int64_t example, int64_t first, int64_t count) {
  const int64_t kept = std::clamp<int64_t>(mask.num_generalization - first, 0, count);
  std::fill(bits, bits + kept, static_cast<T>(-1));
  if (mask.threshold == 0) {
    std::fill(bits + kept, bits + count, T{0});
    return;
  }
  uint32_t words[kBlock];
  const int64_t skip = kept / 4;  // quads of generalization channels alone need no draw
  draw_quads(words + 4 * skip, mask, example, first / 4 + skip, (count + 3) / 4 - skip);
  const uint32_t last = static_cast<uint32_t>(mask.threshold - 1);  // 32 bits wide, to compare twice as many at a time
  for (int64_t i = kept; i < count; ++i) bits[i] = words[i] <= last ? static_cast<T>(-1) : T{0};
}

template <typename T>
struct Lines {
  T* y;
  const T* x;
  const int64_t* ids;
  TiedMask mask;
  Layout layout;
  bool stream;

  void plane(T* to, const T* from, bool kept) const {
    const Loop inner = layout.inner();
    if (inner.x != 1 || inner.y != 1) {
      for (int64_t i = 0; i < inner.size; ++i) to[i * inner.y] = kept ? from[i * inner.x] : T{0};
    } else if (kept) {
      copy_line(to, from, inner.size, stream);
    } else {
      zero_line(to, inner.size, stream);
    }
  }

  // Planes whose neighbours in memory are the next channels of the same example: one draw for a block of them.
  void planes_by_row(int64_t begin, int64_t end) const {
    const Loop channels = layout.loop[layout.count - 2];
    uint8_t bits[kBlock];
    while (begin < end) {
      const Cursor at(layout, begin);
      const int64_t first = at.channel - at.channel % 4, skip = at.channel % 4;
      const int64_t count = std::min({end - begin, channels.size - at.channel, kBlock - skip});
      mask_bits(bits, mask, ids[at.id], first, skip + count);
      for (int64_t i = 0; i < count; ++i) {
        plane(y + at.y + i * channels.y, x + at.x + i * channels.x, bits[skip + i] != 0);
      }
      begin += count;
    }
  }

  void planes(int64_t begin, int64_t end) const {
    Cursor at(layout, begin);
    for (int64_t line = begin; line < end; ++line, at.next()) {
      plane(y + at.y, x + at.x, mask(ids[at.id], at.channel));
    }
  }

  void channels(int64_t begin, int64_t end) const {
    const Loop inner = layout.inner();
    const bool dense = inner.x == 1 && inner.y == 1;
    T bits[kBlock];
    for (int64_t first = 0; first < inner.size; first += kBlock) {
      const int64_t count = std::min(kBlock, inner.size - first);
      int64_t drawn_id = -1;  // the positions of a row share its mask
      Cursor at(layout, begin);
      for (int64_t line = begin; line < end; ++line, at.next()) {
        if (ids[at.id] != drawn_id) mask_bits(bits, mask, drawn_id = ids[at.id], first, count);
        T* const to = y + at.y + first * inner.y;
        const T* const from = x + at.x + first * inner.x;
        if (dense) {
          mask_line(to, from, bits, count, stream);
        } else {
          for (int64_t i = 0; i < count; ++i) to[i * inner.y] = bits[i] ? from[i * inner.x] : T{0};
        }
      }
    }
  }

  // Neighbours in memory are examples: neighbouring lines, which are channels, share the draws of a block of them.
  void examples(int64_t begin, int64_t end) const {
    const Loop inner = layout.inner();
    uint32_t words[kBlock] = {};
    for (int64_t first = 0; first < inner.size; first += kBlock / 4) {
      const int64_t count = std::min(kBlock / 4, inner.size - first);
      int64_t drawn_id = -1, drawn_quad = -1;
      Cursor at(layout, begin);
      for (int64_t line = begin; line < end; ++line, at.next()) {
        const int64_t* const own = ids + at.id + first * inner.id;
        const bool drawn = at.channel >= mask.num_generalization && mask.threshold != 0;
        if (drawn && (drawn_id != at.id || drawn_quad != at.channel / 4)) {
          draw_examples(words, mask, own, inner.id, count, drawn_quad = at.channel / 4);
          drawn_id = at.id;
        }
        T* const to = y + at.y + first * inner.y;
        const T* const from = x + at.x + first * inner.x;
        const uint32_t* const word = words + at.channel % 4;
        for (int64_t i = 0; i < count; ++i) {
          to[i * inner.y] = mask.keep(at.channel, word[4 * i]) ? from[i * inner.x] : T{0};
        }
      }
    }
  }

  void operator()(int64_t begin, int64_t end) const {
    if (layout.inner().channel != 0) {
      channels(begin, end);
    } else if (layout.inner().id != 0) {
      examples(begin, end);
    } else if (layout.count > 1 && layout.loop[layout.count - 2].channel != 0) {
      planes_by_row(begin, end);
    } else {
      planes(begin, end);
    }
    if (stream) finish_streaming();
  }
};

template <typename T>
void run(torch::stable::Tensor& y, const ExampleTiedDropoutArgs& args) {
  const Layout layout = args.layout(y);
  const int64_t bytes = y.numel() * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(y.mutable_data_ptr(), bytes);
  const Lines<T> lines{static_cast<T*>(y.mutable_data_ptr()),
                       static_cast<const T*>(args.x.const_data_ptr()),
                       static_cast<const int64_t*>(args.example_ids.const_data_ptr()),
                       args.mask(),
                       layout,
                       bytes >= kStreamBytes};
  const int64_t line = layout.inner().size;
  torch::stable::parallel_for(0, layout.numel() / line, std::max<int64_t>(1, kGrainElements / line), lines);
}

void check_ids(const torch::stable::Tensor& ids) {
  const int64_t* const data = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t columns = ids.dim() == 2 ? ids.size(1) : 1;
  const int64_t step = ids.dim() == 2 ? ids.stride(1) : 0;
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const int64_t id = data[i / columns * ids.stride(0) + i % columns * step];
    MEMLOC_CHECK(id >= 0, "example_tied_dropout: example_ids must be >= 0, got ", id);
  }
}

torch::stable::Tensor example_tied_dropout(const torch::stable::Tensor& x, const torch::stable::Tensor& example_ids,
                                           int64_t num_generalization, double p_mem, int64_t seed, int64_t site,
                                           int64_t channel_dim) {
  const ExampleTiedDropoutArgs args{x, example_ids, num_generalization, p_mem, seed, site, channel_dim};
  args.check();
  check_ids(example_ids);
  torch::stable::Tensor y = new_like("example_tied_dropout", x);
  if (x.numel() == 0) return y;
  with_bits(x, [&](auto bits) { run<decltype(bits)>(y, args); });
  return y;
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("example_tied_dropout", TORCH_BOX(&memloc::example_tied_dropout));
}
