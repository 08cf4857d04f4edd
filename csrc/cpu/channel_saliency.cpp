// Memory-bound: reads activation and grad once. Threads share the planes where positions lie beside each other, and
// blocks of channels of an example where channels do. Products are added up in the type of computation over runs too
// short to lose digits, these in double, always in the same order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "channel_saliency_args.h"
#include "cpu/element_types.h"
#include "cpu/simd.h"

namespace memloc {
namespace {

using torch::stable::Tensor;

constexpr int64_t kRun = 256;              // products of a plane that are added up before double takes over
constexpr int64_t kLanes = 16;             // partial sums of a run
constexpr int64_t kPositions = 32;         // positions, likewise, where channels lie beside each other
constexpr int64_t kChannels = 256;         // of a block
constexpr int64_t kGrainElements = 32768;  // least work worth a thread, as in torch's own kernels

template <typename Source>
using Compute = std::conditional_t<std::is_same_v<Source, double>, double, float>;

// total[c] += sum over a line of positions of the plane of channel c, for c < channels. Products are formed apart from
// their sums, and those of short planes that follow each other at once, so that 16-bit elements are vectors too.
template <typename Source>
MEMLOC_CLONES void add_planes(double* __restrict__ total, const Source* a, const Source* g, const SaliencyLoop& line,
                              const SaliencyLoop& channels) {
  using E = Compute<Source>;
  const bool follow = channels.a == line.size && channels.g == line.size;
  const int64_t at_once = follow ? std::max<int64_t>(1, kRun / line.size) : 1;
  for (int64_t c = 0; c < channels.size; c += at_once) {
    const int64_t planes = std::min(at_once, channels.size - c);
    const Source *const from_a = a + c * channels.a, *const from_g = g + c * channels.g;
    for (int64_t start = 0; start < planes * line.size; start += kRun) {
      const int64_t count = std::min(kRun, planes * line.size - start), length = planes == 1 ? count : line.size;
      E products[kRun];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        products[i] = static_cast<E>(from_a[start + i]) * static_cast<E>(from_g[start + i]);
      }
      const E* product = products;
      for (int64_t plane = 0; plane < planes; ++plane, product += length) {
        E lanes[kLanes] = {}, sum = 0;
        int64_t i = 0;
        for (; i + kLanes <= length; i += kLanes) {
#pragma omp simd
          for (int64_t k = 0; k < kLanes; ++k) lanes[k] += product[i + k];
        }
        for (; i < length; ++i) sum += product[i];
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < kLanes; ++k) sum += lanes[k];
        total[c + plane] += sum;
      }
    }
  }
}

// The same for any strides.
template <typename Source>
void add_strided(double* total, const Source* a, const Source* g, const SaliencyLoop& line,
                 const SaliencyLoop& channels) {
  for (int64_t c = 0; c < channels.size; ++c, a += channels.a, g += channels.g) {
    for (int64_t i = 0; i < line.size; ++i) {
      total[c] += static_cast<double>(a[i * line.a]) * static_cast<double>(g[i * line.g]);
    }
  }
}

// The same for channels beside each other, of which there are at most kChannels.
template <typename Source>
MEMLOC_CLONES void add_channels(double* __restrict__ total, const Source* a, const Source* g, const SaliencyLoop& line,
                                const SaliencyLoop& loop) {
  using E = Compute<Source>;
  const int64_t positions = line.size, a_step = line.a, g_step = line.g, channels = loop.size;
  for (int64_t start = 0; start < positions; start += kPositions) {
    const int64_t end = std::min(positions, start + kPositions);
    E sum[kChannels] = {};
    int64_t p = start;
    for (; p + 4 <= end; p += 4) {  // sums are loaded and stored once for four positions
      const Source *a0 = a + p * a_step, *a1 = a0 + a_step, *a2 = a1 + a_step, *a3 = a2 + a_step;
      const Source *g0 = g + p * g_step, *g1 = g0 + g_step, *g2 = g1 + g_step, *g3 = g2 + g_step;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const E first = static_cast<E>(a0[c]) * static_cast<E>(g0[c]) + static_cast<E>(a1[c]) * static_cast<E>(g1[c]);
        const E second = static_cast<E>(a2[c]) * static_cast<E>(g2[c]) + static_cast<E>(a3[c]) * static_cast<E>(g3[c]);
        sum[c] += first + second;
      }
    }
    for (; p < end; ++p) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += static_cast<E>(a[p * a_step + c]) * static_cast<E>(g[p * g_step + c]);
      }
    }
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) total[c] += sum[c];
  }
}

template <typename Source>
void run(const ChannelSaliencyArgs& args, const SaliencyLayout& l, Tensor& out) {
  using E = Compute<Source>;
  const Source* const a = static_cast<const Source*>(args.activation.const_data_ptr());
  const Source* const g = static_cast<const Source*>(args.grad.const_data_ptr());
  E* const sums = static_cast<E*>(out.mutable_data_ptr());
  const auto add = l.planes() ? add_planes<Source> : l.channels() ? add_channels<Source> : add_strided<Source>;
  const int64_t lines = l.lines(), plane = lines * l.inner().size;
  const int64_t block = l.channels() ? kChannels : std::clamp<int64_t>(kGrainElements / plane, 1, kChannels);
  const int64_t blocks = (l.channel.size + block - 1) / block;  // of an example
  const auto task = [&](int64_t b, int64_t first) {
    const SaliencyLoop channels{std::min(block, l.channel.size - first), l.channel.a, l.channel.g};
    const Source* const from_a = a + b * l.batch.a + first * l.channel.a;
    const Source* const from_g = g + b * l.batch.g + first * l.channel.g;
    double total[kChannels] = {};
    for (int64_t line = 0; line < lines; ++line) {
      int64_t at_a, at_g;
      l.start_of(line, &at_a, &at_g);
      add(total, from_a + at_a, from_g + at_g, l.inner(), channels);
    }
    for (int64_t c = 0; c < channels.size; ++c) sums[b * l.channel.size + first + c] = static_cast<E>(total[c]);
  };
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (plane * block));
  torch::stable::parallel_for(0, l.batch.size * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i / blocks, i % blocks * block);
  });
}

Tensor channel_saliency(const Tensor& activation, const Tensor& grad, int64_t channel_dim) {
  const ChannelSaliencyArgs args{activation, grad, channel_dim};
  args.check();
  Tensor out = args.result();
  if (activation.numel() == 0) return out;
  const SaliencyLayout layout = args.layout();
  with_element(activation, [&](auto element) { run<decltype(element)>(args, layout, out); });
  return out;
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) { m.impl("channel_saliency", TORCH_BOX(&memloc::channel_saliency)); }
