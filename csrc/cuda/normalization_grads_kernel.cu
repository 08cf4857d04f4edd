// Memory-bound: reads input and grad_output once, 16 bytes at a time where they lie so. Where positions are neighbours
// in memory, some lanes of a warp take a channel of an example; else a block takes some channels of an example, its
// columns 16 bytes of them each, its rows every so many positions. mean and rstd stay in registers where they do not
// depend on the position. A thread adds up kRun pieces in their type and those sums in float64; threads' sums are added
// in a fixed order.
#include <algorithm>

#include "cuda/grad_sqnorm_reduce.h"
#include "cuda/normalization_grads_kernel.h"

namespace memloc {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 32;
constexpr int kInFlight = 2;  // pieces of each operand that a thread loads before it uses the first
constexpr int kBlocks = 2;    // to a multiprocessor, at least: leaves a thread 128 registers
constexpr int kFewestColumns = 8, kMostColumns = 32;
static_assert(kInFlight == 2, "the second piece may be missing");

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Piece {
  T element[kLanes];
};

// mean or rstd of the elements of a piece.
template <typename E, int kLanes>
struct Statistic {
  const E* data;
  int64_t step;  // to the next piece of the thread; 0: what is loaded once holds for all
  E value[kLanes];

  // piece_step: from one element of a piece to the next; with a step, 0.
  __device__ Statistic(const E* data, int64_t step, int64_t piece_step) : data(data), step(step) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) value[j] = data[j * piece_step];
  }
  __device__ __forceinline__ void move_to(int64_t piece) {
    if (step == 0) return;
    const E next = data[piece * step];
#pragma unroll
    for (int j = 0; j < kLanes; ++j) value[j] = next;
  }
};

// Passes the sums over every step-th piece of a channel of an example (kChannels: of kLanes channels from c on), by
// element of a piece, from the first on, to add(j, scale, shift): once for each run.
template <typename T, int kLanes, bool kChannels, typename Add>
__device__ __forceinline__ void add_pieces(const NormalizationGrads& n, int64_t b, int64_t c, int64_t first,
                                           int64_t step, const Add& add) {
  using E = Compute<T>;
  using Elements = Piece<T, kLanes>;
  const int64_t pieces = kChannels ? n.positions : n.positions / kLanes;
  const int64_t width = kChannels ? 1 : kLanes;  // positions of a piece
  const int64_t x_step = n.input_strides.position * width, g_step = n.grad_strides.position * width;
  if (first >= pieces) return;
  const auto at = [&](const NormalizationStrides& s) { return b * s.batch + c * s.channel; };
  const T* const x = static_cast<const T*>(n.input) + at(n.input_strides);
  const T* const g = static_cast<const T*>(n.grad_output) + at(n.grad_strides);
  const auto statistic = [&](const void* data, const NormalizationStrides& s) {
    return Statistic<E, kLanes>(static_cast<const E*>(data) + at(s), s.position, kChannels ? s.channel : 0);
  };
  Statistic<E, kLanes> mean = statistic(n.mean, n.mean_strides), rstd = statistic(n.rstd, n.rstd_strides);
  for (int64_t run = first; run < pieces; run += kRun * step) {
    const int64_t end = min(run + kRun * step, pieces);
    E scale[kLanes] = {}, shift[kLanes] = {};
#pragma unroll 1
    for (int64_t p = run; p < end; p += kInFlight * step) {
      const int there = p + step < end ? kInFlight : 1;
      Elements value[kInFlight] = {}, grad[kInFlight] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (i >= there) continue;
        value[i] = *reinterpret_cast<const Elements*>(x + (p + i * step) * x_step);
        grad[i] = *reinterpret_cast<const Elements*>(g + (p + i * step) * g_step);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (i >= there) continue;
        mean.move_to(p + i * step), rstd.move_to(p + i * step);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const E own = compute(grad[i].element[j]);
          scale[j] += own * ((compute(value[i].element[j]) - mean.value[j]) * rstd.value[j]);
          shift[j] += own;
        }
      }
    }
    add(scale, shift);
  }
}

template <typename E>
__device__ __forceinline__ void put(const NormalizationGrads& n, int64_t line, double scale, double shift) {
  static_cast<E*>(n.scale)[line] = static_cast<E>(scale);
  static_cast<E*>(n.shift)[line] = static_cast<E>(shift);
}

template <typename E, int kLanes>
__device__ __forceinline__ E sum(E (&value)[kLanes]) {
#pragma unroll
  for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma unroll
    for (int j = 0; j < width; ++j) value[j] += value[j + width];
  }
  return value[0];
}

// `lanes` threads of a warp, a power of two, take a line.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocks) positions_kernel(const NormalizationGrads n, int lanes) {
  using E = Compute<T>;
  const int64_t lines = n.batch * n.channels, step = int64_t{gridDim.x} * (kThreads / lanes);
  const int64_t mine = blockIdx.x * int64_t{kThreads / lanes} + threadIdx.x / lanes;
  for (int64_t first = 0; first < lines; first += step) {  // the same for all lanes of a warp, which exchange sums
    const int64_t line = first + mine;
    double scale = 0, shift = 0;
    if (line < lines) {
      add_pieces<T, kLanes, false>(
          n, line / n.channels, line % n.channels, threadIdx.x % lanes, lanes,
          [&](E(&scales)[kLanes], E(&shifts)[kLanes]) { scale += sum(scales), shift += sum(shifts); });
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      scale += __shfl_down_sync(0xFFFFFFFFu, scale, offset);
      shift += __shfl_down_sync(0xFFFFFFFFu, shift, offset);
    }
    if (line < lines && threadIdx.x % lanes == 0) put<E>(n, line, scale, shift);
  }
}

// A block of blockDim.x pieces of channels by blockDim.y positions.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocks) channels_kernel(const NormalizationGrads n) {
  using E = Compute<T>;
  __shared__ double scales[kLanes][kThreads];
  __shared__ double shifts[kLanes][kThreads];
  const int64_t pieces = n.channels / kLanes, tiles = (pieces + blockDim.x - 1) / blockDim.x;
  const int self = threadIdx.y * blockDim.x + threadIdx.x;
  for (int64_t item = blockIdx.x; item < n.batch * tiles; item += gridDim.x) {
    const int64_t b = item / tiles, first = item % tiles * blockDim.x, piece = first + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) scales[j][self] = shifts[j][self] = 0;
    if (piece < pieces) {
      add_pieces<T, kLanes, true>(n, b, piece * kLanes, threadIdx.y, blockDim.y,
                                  [&](E(&scale)[kLanes], E(&shift)[kLanes]) {
#pragma unroll
                                    for (int j = 0; j < kLanes; ++j) {
                                      scales[j][self] += scale[j], shifts[j][self] += shift[j];
                                    }
                                  });
    }
    __syncthreads();
    for (int i = self; i < static_cast<int>(blockDim.x) * kLanes; i += kThreads) {
      const int column = i % blockDim.x, j = i / blockDim.x;
      const int64_t channel = (first + column) * kLanes + j;
      if (channel >= n.channels) continue;
      double scale = 0, shift = 0;
      for (int row = 0; row < blockDim.y; ++row) {
        scale += scales[j][row * blockDim.x + column], shift += shifts[j][row * blockDim.x + column];
      }
      put<E>(n, b * n.channels + channel, scale, shift);
    }
    __syncthreads();  // before the next item's sums
  }
}

// Whether the pieces of a line have kVector elements: 16 bytes, of one mean and rstd if those depend on the position.
template <typename T>
bool vectors_fit(const NormalizationGrads& n) {
  const bool inside = n.channels_inside;
  const auto dense = [&](const void* data, const NormalizationStrides& s) {
    const auto fits = [](int64_t size, int64_t stride) { return size == 1 || stride % kVector<T> == 0; };
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(n.batch, s.batch) &&
           (inside ? fits(n.positions, s.position) : fits(n.channels, s.channel));
  };
  const auto shared = [&](const NormalizationStrides& s) { return s.position == 0 || (inside && s.channel == 0); };
  return (inside ? n.channels : n.positions) % kVector<T> == 0 && dense(n.input, n.input_strides) &&
         dense(n.grad_output, n.grad_strides) && shared(n.mean_strides) && shared(n.rstd_strides);
}

template <typename T, int kLanes>
cudaError_t launch(const NormalizationGrads& n, cudaStream_t stream) {
  if (n.channels_inside) {
    const int64_t pieces = n.channels / kLanes;
    unsigned columns = kFewestColumns;
    while (columns < kMostColumns && columns < pieces) columns *= 2;
    const dim3 block(columns, kThreads / columns);
    channels_kernel<T, kLanes><<<grid_for(n.batch * ((pieces + columns - 1) / columns)), block, 0, stream>>>(n);
  } else {
    int lanes = 1;
    while (lanes < kWarp && lanes < n.positions / kLanes) lanes *= 2;
    const int64_t lines = n.batch * n.channels, lines_per_block = kThreads / lanes;
    const unsigned blocks = grid_for((lines + lines_per_block - 1) / lines_per_block);
    positions_kernel<T, kLanes><<<blocks, kThreads, 0, stream>>>(n, lanes);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const NormalizationGrads& n, cudaStream_t stream) {
  return vectors_fit<T>(n) ? launch<T, kVector<T>>(n, stream) : launch<T, 1>(n, stream);
}

}  // namespace

cudaError_t normalization_grads_cuda(const NormalizationGrads& n, ElementType type, cudaStream_t stream) {
  switch (type) {
    case ElementType::kHalf:
      return launch<__half>(n, stream);
    case ElementType::kBFloat16:
      return launch<__nv_bfloat16>(n, stream);
    case ElementType::kFloat:
      return launch<float>(n, stream);
    default:
      return launch<double>(n, stream);
  }
}

}  // namespace memloc
