// Memory-bound: reads input and grad_output once. Threads share lines: the positions of a channel of an example where
// those are neighbours in memory, else a block of channels, over all positions. A line is added up kRun positions at a
// time, and those sums in float64, so the result depends neither on the number of threads nor much on the length.
#include "normalization_grads.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cpu/grad_sqnorm_kernels.h"
#include "cpu/simd.h"
#include "normalization_grads_args.h"

// For what a function of MEMLOC_CLONES calls, which is only then compiled for its instruction sets. No vector is passed
// to a function in the end, so how that is done without AVX does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#define MEMLOC_INLINE inline __attribute__((always_inline))

namespace memloc {
namespace {

constexpr int64_t kRun = 256;              // positions added up in the type of the elements
constexpr int64_t kBlock = 128;            // channels whose sums are held at a time: in the first-level cache
constexpr int64_t kGrainElements = 16384;  // least work worth a thread

template <typename T>
MEMLOC_INLINE T* at(void* data, int64_t offset) {
  return static_cast<T*>(data) + offset;
}
template <typename T>
MEMLOC_INLINE const T* at(const void* data, const NormalizationStrides& s, int64_t b, int64_t c, int64_t p) {
  return static_cast<const T*>(data) + b * s.batch + c * s.channel + p * s.position;
}

// A few neighbours at a time; a loop with a reduction takes longer to begin and to end than most lines are long.
template <typename E>
struct Lanes {
  static constexpr int64_t kCount = 32 / sizeof(E);
  typedef E Vector __attribute__((vector_size(32)));

  static MEMLOC_INLINE Vector load(const E* from) {
    Vector v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
  static MEMLOC_INLINE E sum(const Vector& v) {
    E sum = 0, buffer[kCount];
    std::memcpy(buffer, &v, sizeof(v));
    for (int64_t k = 0; k < kCount; ++k) sum += buffer[k];
    return sum;
  }
};

// What a line along one dimension shares, or has for each of its elements.
template <typename E>
struct Statistic {
  const E* data;
  int64_t step;  // 0 or 1

  MEMLOC_INLINE E at(int64_t i) const { return data[i * step]; }
  MEMLOC_INLINE typename Lanes<E>::Vector load(int64_t i) const {
    return step ? Lanes<E>::load(data + i) : typename Lanes<E>::Vector{} + *data;
  }
};

// A run of elements in the type that is computed in: those themselves, or in the buffer.
template <typename Source, typename E>
MEMLOC_INLINE const E* computed(const Source* from, int64_t count, E* buffer) {
  if constexpr (std::is_same_v<Source, E>) {
    return from;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<E>(from[i]);
    return buffer;
  }
}

// Lines [begin, end) of batch x channels. kEach: positions have a mean or rstd of their own.
template <bool kEach, typename Source>
MEMLOC_INLINE void add_positions(const NormalizationGrads& n, int64_t begin, int64_t end) {
  using E = typename ComputeIn<Source>::type;
  using L = Lanes<E>;
  for (int64_t line = begin, b = begin / n.channels, c = begin % n.channels; line < end; ++line) {
    const Source* const x_line = at<Source>(n.input, n.input_strides, b, c, 0);
    const Source* const g_line = at<Source>(n.grad_output, n.grad_strides, b, c, 0);
    const Statistic<E> mean{at<E>(n.mean, n.mean_strides, b, c, 0), n.mean_strides.position};
    const Statistic<E> rstd{at<E>(n.rstd, n.rstd_strides, b, c, 0), n.rstd_strides.position};
    const E m = *mean.data;
    double scale = 0, shift = 0;
    for (int64_t first = 0; first < n.positions; first += kRun) {
      const int64_t count = std::min(kRun, n.positions - first);
      E x_buffer[kRun], g_buffer[kRun];
      const E *const x = computed(x_line + first, count, x_buffer), *const g =
                                                                        computed(g_line + first, count, g_buffer);
      typename L::Vector scales{}, shifts{};
      int64_t p = 0;
      for (; p + L::kCount <= count; p += L::kCount) {
        const auto value = L::load(x + p), grad = L::load(g + p);
        scales += grad * (kEach ? (value - mean.load(first + p)) * rstd.load(first + p) : value - m);
        shifts += grad;
      }
      E scale_rest = 0, shift_rest = 0;
      for (; p < count; ++p) {
        scale_rest += g[p] * (kEach ? (x[p] - mean.at(first + p)) * rstd.at(first + p) : x[p] - m);
        shift_rest += g[p];
      }
      scale += L::sum(scales) + scale_rest, shift += L::sum(shifts) + shift_rest;
    }
    *at<E>(n.scale, line) = static_cast<E>(kEach ? scale : scale * *rstd.data);
    *at<E>(n.shift, line) = static_cast<E>(shift);
    if (++c == n.channels) c = 0, ++b;
  }
}

// Blocks [begin, end) of batch x blocks of channels. kEach: channels have a mean or rstd of their own.
template <bool kEach, typename Source>
MEMLOC_INLINE void add_channels(const NormalizationGrads& n, int64_t begin, int64_t end) {
  using E = typename ComputeIn<Source>::type;
  const int64_t blocks = divide_up(n.channels, kBlock);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t b = block / blocks, first = block % blocks * kBlock, count = std::min(kBlock, n.channels - first);
    double scale[kBlock] = {}, shift[kBlock] = {};
    for (int64_t run = 0; run < n.positions; run += kRun) {
      E scale_run[kBlock] = {}, shift_run[kBlock] = {};
      for (int64_t p = run; p < std::min(run + kRun, n.positions); ++p) {
        const Source* const x = at<Source>(n.input, n.input_strides, b, first, p);
        const Source* const g = at<Source>(n.grad_output, n.grad_strides, b, first, p);
        const Statistic<E> mean{at<E>(n.mean, n.mean_strides, b, first, p), n.mean_strides.channel};
        const Statistic<E> rstd{at<E>(n.rstd, n.rstd_strides, b, first, p), n.rstd_strides.channel};
        const E m = *mean.data, r = *rstd.data;
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) {
          const E value = static_cast<E>(x[c]), grad = static_cast<E>(g[c]);
          scale_run[c] += grad * (kEach ? (value - mean.at(c)) * rstd.at(c) : (value - m) * r);
          shift_run[c] += grad;
        }
      }
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) scale[c] += scale_run[c], shift[c] += shift_run[c];
    }
    for (int64_t c = 0; c < count; ++c) {
      *at<E>(n.scale, b * n.channels + first + c) = static_cast<E>(scale[c]);
      *at<E>(n.shift, b * n.channels + first + c) = static_cast<E>(shift[c]);
    }
  }
}

template <typename Source>
MEMLOC_INLINE void add(const NormalizationGrads& n, int64_t begin, int64_t end) {
  const auto varies = [](int64_t mean, int64_t rstd) { return mean != 0 || rstd != 0; };
  if (n.channels_inside) {
    varies(n.mean_strides.channel, n.rstd_strides.channel) ? add_channels<true, Source>(n, begin, end)
                                                           : add_channels<false, Source>(n, begin, end);
  } else {
    varies(n.mean_strides.position, n.rstd_strides.position) ? add_positions<true, Source>(n, begin, end)
                                                             : add_positions<false, Source>(n, begin, end);
  }
}

MEMLOC_CLONES void add_half(const NormalizationGrads& n, int64_t begin, int64_t end) { add<c10::Half>(n, begin, end); }
MEMLOC_CLONES void add_bfloat16(const NormalizationGrads& n, int64_t begin, int64_t end) {
  add<c10::BFloat16>(n, begin, end);
}
MEMLOC_CLONES void add_float(const NormalizationGrads& n, int64_t begin, int64_t end) { add<float>(n, begin, end); }
MEMLOC_CLONES void add_double(const NormalizationGrads& n, int64_t begin, int64_t end) { add<double>(n, begin, end); }

std::tuple<torch::stable::Tensor, torch::stable::Tensor> normalization_grads(const torch::stable::Tensor& input,
                                                                             const torch::stable::Tensor& grad_output,
                                                                             const torch::stable::Tensor& mean,
                                                                             const torch::stable::Tensor& rstd) {
  using torch::headeronly::ScalarType;
  NormalizationGradsArgs args{input, grad_output, mean, rstd};
  args.check();
  torch::stable::Tensor scale = normalization_grad(args), shift = normalization_grad(args);
  if (scale.numel() == 0) return {scale, shift};
  if (input.numel() == 0) return {torch::stable::zero_(scale), torch::stable::zero_(shift)};
  add_normalization_grads(args.arrange(scale, shift), input.scalar_type());
  return {scale, shift};
}

}  // namespace

void add_normalization_grads(const NormalizationGrads& n, torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  const auto kernel = type == ScalarType::Half       ? add_half
                      : type == ScalarType::BFloat16 ? add_bfloat16
                      : type == ScalarType::Float    ? add_float
                                                     : add_double;
  const int64_t lines = n.batch * (n.channels_inside ? divide_up(n.channels, kBlock) : n.channels);
  const int64_t grain = std::max<int64_t>(1, kGrainElements * lines / (n.batch * n.channels * n.positions));
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) { kernel(n, begin, end); });
}

}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("normalization_grads", TORCH_BOX(&memloc::normalization_grads));
}
