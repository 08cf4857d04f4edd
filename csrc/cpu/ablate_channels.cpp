// Rows with channels switched off, on the CPU. Memory-bound: reads what is kept, writes every result once. Threads
// share the lines of the innermost loop: a line is a plane of one channel (copied or filled whole) or the channels of
// one position (copied, then set where switched off, while they are in cache). In place only what changes is written.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ablate_channels_args.h"
#include "cpu/cursor.h"
#include "cpu/element_types.h"
#include "cpu/simd.h"

namespace memloc {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrainElements = 32768;  // least work worth a thread, as in torch's own kernels

// A tensor of one dimension.
template <typename T>
struct Values {
  const T* data;
  int64_t size, step;
  explicit Values(const Tensor& t)
      : data(static_cast<const T*>(t.const_data_ptr())), size(t.size(0)), step(t.stride(0)) {}
  T operator[](int64_t i) const { return data[i * step]; }
};

void check_values(const AblateChannelsArgs& args) {
  const Values<int64_t> offsets(args.offsets), channels(args.channels);
  for (int64_t r = 0; r <= args.rows(); ++r) {
    const int64_t least = r == 0 ? 0 : offsets[r - 1];
    MEMLOC_CHECK(r != 0 || offsets[r] == 0, args.op, ": offsets must start at 0, got ", offsets[r]);
    MEMLOC_CHECK(offsets[r] >= least, args.op, ": offsets must not decrease, got ", offsets[r], " after ", least);
  }
  MEMLOC_CHECK(offsets[args.rows()] == channels.size, args.op, ": offsets must end at ", channels.size,
               ", the number of channels given, got ", offsets[args.rows()]);
  for (int64_t i = 0; i < channels.size; ++i) {
    MEMLOC_CHECK(channels[i] >= 0 && channels[i] < args.num_channels(), args.op, ": channels must be in [0, ",
                 args.num_channels(), "), got ", channels[i]);
  }
}

template <typename T>
void fill(T* to, int64_t step, int64_t n, T value) {
  if (step == 1) {
    std::fill(to, to + n, value);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * step] = value;
  }
}

template <typename T>
struct Rows {
  T* y;
  const T* x;
  Values<int64_t> offsets, channels;
  const T* baseline;
  int64_t baseline_step, num_channels;
  Layout layout;
  bool stream;

  T value(int64_t channel) const { return baseline ? baseline[channel * baseline_step] : T{0}; }

  // Whether a row's planes follow each other in memory and stay in cache: then they are copied together, and set where
  // switched off after that.
  bool joined() const {
    const Loop inner = layout.inner(), outer = layout.count > 1 ? layout.loop[layout.count - 2] : Loop{};
    const bool dense = inner.x == 1 && inner.y == 1 && outer.x == inner.size && outer.y == inner.size;
    return dense && outer.channel == 1 && !stream;
  }

  void joined_planes(int64_t begin, int64_t end) const {
    const int64_t plane = layout.inner().size;
    while (begin < end) {
      const Cursor at(layout, begin);
      const int64_t first = at.channel, count = std::min(end - begin, num_channels - first);
      copy_line(y + at.y, x + at.x, count * plane, false);
      for (int64_t i = offsets[at.id]; i < offsets[at.id + 1]; ++i) {
        const int64_t channel = channels[i] - first;
        if (channel >= 0 && channel < count) fill(y + at.y + channel * plane, 1, plane, value(channels[i]));
      }
      begin += count;
    }
  }

  void planes(int64_t begin, int64_t end) const {
    const Loop inner = layout.inner();
    const bool dense = inner.x == 1 && inner.y == 1;
    std::vector<uint8_t> off(num_channels);
    int64_t row = -1;
    Cursor at(layout, begin);
    for (int64_t line = begin; line < end; ++line, at.next()) {
      if (at.id != row) {
        row = at.id;
        std::fill(off.begin(), off.end(), uint8_t{0});
        for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) off[channels[i]] = 1;
      }
      if (off[at.channel]) {
        fill(y + at.y, inner.y, inner.size, value(at.channel));
      } else if (dense) {
        copy_line(y + at.y, x + at.x, inner.size, stream);
      } else {
        for (int64_t i = 0; i < inner.size; ++i) y[at.y + i * inner.y] = x[at.x + i * inner.x];
      }
    }
  }

  void positions(int64_t begin, int64_t end) const {
    const Loop inner = layout.inner();
    Cursor at(layout, begin);
    for (int64_t line = begin; line < end; ++line, at.next()) {
      T* const to = y + at.y;
      if (inner.x == 1 && inner.y == 1) {
        copy_line(to, x + at.x, inner.size, false);
      } else {
        for (int64_t i = 0; i < inner.size; ++i) to[i * inner.y] = x[at.x + i * inner.x];
      }
      for (int64_t i = offsets[at.id]; i < offsets[at.id + 1]; ++i) to[channels[i] * inner.y] = value(channels[i]);
    }
  }

  void operator()(int64_t begin, int64_t end) const {
    if (layout.inner().channel != 0) {
      positions(begin, end);
    } else if (joined()) {
      joined_planes(begin, end);
    } else {
      planes(begin, end);
    }
    if (stream) finish_streaming();
  }

  // Rows [begin, end) of y alone; the layout is that of one channel of one row.
  void in_place(int64_t begin, int64_t end, int64_t row_step, int64_t channel_step) const {
    const Loop inner = layout.inner();
    const int64_t lines = layout.numel() / inner.size;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) {
        Cursor at(layout, 0);
        T* const to = y + row * row_step + channels[i] * channel_step;
        for (int64_t line = 0; line < lines; ++line, at.next()) {
          fill(to + at.y, inner.y, inner.size, value(channels[i]));
        }
      }
    }
  }
};

template <typename T>
void run(const AblateChannelsArgs& args, const Tensor& y) {
  const Tensor& x = args.input;
  const int64_t channel = args.channel(), batch = x.size(0), bytes = y.numel() * static_cast<int64_t>(sizeof(T));
  Rows<T> rows{static_cast<T*>(y.mutable_data_ptr()),
               static_cast<const T*>(x.const_data_ptr()),
               Values<int64_t>(args.offsets),
               Values<int64_t>(args.channels),
               args.baseline ? static_cast<const T*>(args.baseline->const_data_ptr()) : nullptr,
               args.baseline ? args.baseline->stride(0) : 0,
               args.num_channels(),
               Layout{},
               !args.in_place && bytes >= kStreamBytes};
  Layout& layout = rows.layout;
  if (!args.in_place) {
    layout.loop[layout.count++] = {args.rows() / batch, 0, batch * y.stride(0), batch, 0};
    layout.loop[layout.count++] = {batch, x.stride(0), y.stride(0), 1, 0};
  }
  for (int64_t d = 1; d < x.dim(); ++d) {
    const int64_t step = d == channel ? 1 : 0;
    if (!args.in_place || d != channel) layout.loop[layout.count++] = {x.size(d), x.stride(d), y.stride(d), 0, step};
  }
  layout.simplify();
  if (args.in_place) {
    const int64_t most = std::max<int64_t>(1, rows.channels.size / batch) * layout.numel();
    torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrainElements / most), [&](int64_t begin, int64_t end) {
      rows.in_place(begin, end, y.stride(0), y.stride(channel));
    });
    return;
  }
  if (layout.inner().id != 0) layout.loop[layout.count++] = {1, 1, 1, 0, 0};  // a line is within a row
  prefer_huge_pages(rows.y, bytes);
  const int64_t line = layout.inner().size;
  torch::stable::parallel_for(0, layout.numel() / line, std::max<int64_t>(1, kGrainElements / line), rows);
}

Tensor ablate(const AblateChannelsArgs& args) {
  args.check();
  check_values(args);
  const Tensor y = args.in_place ? args.input : args.make_result();
  if (y.numel() == 0) return y;
  with_bits(y, [&](auto bits) { run<decltype(bits)>(args, y); });
  return y;
}

Tensor ablate_channels(const Tensor& input, const Tensor& offsets, const Tensor& channels,
                       std::optional<Tensor> baseline, int64_t channel_dim) {
  return ablate({"ablate_channels", input, offsets, channels, baseline, channel_dim, false});
}

// Returns nothing: what an operator gives back must not share memory with what it is given, for torch.compile.
void ablate_channels_(const Tensor& input, const Tensor& offsets, const Tensor& channels,
                      std::optional<Tensor> baseline, int64_t channel_dim) {
  ablate({"ablate_channels_", input, offsets, channels, baseline, channel_dim, true});
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("ablate_channels", TORCH_BOX(&memloc::ablate_channels));
  m.impl("ablate_channels_", TORCH_BOX(&memloc::ablate_channels_));
}
