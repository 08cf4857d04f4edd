// The direct way, bound by multiply-adds: one example's gradient as a matrix product of g [outputs, positions] and the
// unfolded patches [positions, inputs x offsets], each tile whole in registers over the loop of positions, then squared
// and summed, never stored. A block takes every parts-th tile of one example. Slices of both operands go through shared
// memory, the next one on its way to registers while the present one is multiplied; patches are read where they lie,
// zero where they reach into the padding.
//
// Not on tensor cores: their float32 is TF32, which the user did not ask for here.
#include "cuda/grad_sqnorm_kernel.h"
#include "cuda/grad_sqnorm_reduce.h"
#include "cuda/grad_sqnorm_tile.h"
#include "summation.h"

namespace memloc {
namespace {

using Large = Tile<128, 128, 8, 8, 8, 2>;
using Small = Tile<64, 64, 4, 4, 16, 2>;
using Narrow = Tile<8, 64, 2, 4, 8, 8>;  // few outputs, as of a group of a depthwise convolution

template <typename T>
struct Operand {
  const T* data;
  int64_t batch, channel, row, column;
};

template <typename T>
struct Problem {
  Operand<T> x, g;
  int64_t inputs, outputs, width;  // of one group; width: inputs x offsets
  int64_t kernel_y, kernel_x, dilation_y, dilation_x, padding_y, padding_x;
  int height_in, width_in, stride_y, stride_x;
  uint32_t positions, columns, reciprocal;
  int64_t tiles, tiles_m, tiles_n, items, parts;
};

template <typename E, typename S>
struct Shared {
  alignas(16) E g[2][S::kDepth][S::kM + kPad];
  alignas(16) E x[2][S::kDepth][S::kN + kPad];
  Column columns[S::kN];  // channel: its offset in memory
};

// Which elements of a slice of kDepth positions by kWidth lines a thread copies. Lanes run along the channels where
// they are closer in memory than positions (kInner), else along the positions.
template <typename S, int kWidth, bool kInner>
struct Share {
  static constexpr int kCount = kWidth * S::kDepth / S::kThreads;

  __device__ __forceinline__ static int line(int i) {
    const int thread = threadIdx.x;
    return kInner ? thread % kWidth : thread / S::kDepth + i * (S::kThreads / S::kDepth);
  }
  __device__ __forceinline__ static int position(int i) {
    const int thread = threadIdx.x;
    return kInner ? thread / kWidth + i * (S::kThreads / kWidth) : thread % S::kDepth;
  }
  template <typename T, typename E>
  __device__ __forceinline__ static void store(const T (&staged)[kCount], E (&slice)[S::kDepth][kWidth + kPad]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) slice[position(i)][line(i)] = compute(staged[i]);
  }
};

// Copies this thread's elements of a slice of both operands to registers; x and g are images of one group, g from the
// tile's first output on, of which there are `outputs`.
template <typename T, typename S, bool kInner, typename E>
__device__ __forceinline__ void fetch(T (&g_staged)[Share<S, S::kM, kInner>::kCount],
                                      T (&x_staged)[Share<S, S::kN, kInner>::kCount], const Problem<T>& p,
                                      const Shared<E, S>& shared, const T* __restrict__ x, const T* __restrict__ g,
                                      int outputs, const Slice& slice) {
  using ShareG = Share<S, S::kM, kInner>;
  using ShareX = Share<S, S::kN, kInner>;
#pragma unroll
  for (int i = 0; i < ShareG::kCount; ++i) {
    const Position at = slice.at(ShareG::position(i), p.columns, p.reciprocal);
    const int m = ShareG::line(i);
    g_staged[i] = T{};
    if (m < outputs && at.t < p.positions) {
      g_staged[i] = g[m * p.g.channel + at.row * p.g.row + at.column * p.g.column];
    }
  }
#pragma unroll
  for (int i = 0; i < ShareX::kCount; ++i) {
    const Position at = slice.at(ShareX::position(i), p.columns, p.reciprocal);
    const Column column = shared.columns[ShareX::line(i)];
    x_staged[i] = T{};
    if (at.t >= p.positions) continue;
    const int y = static_cast<int>(at.row) * p.stride_y + column.y,
              z = static_cast<int>(at.column) * p.stride_x + column.x;
    if (GramAxis::inside(y, p.height_in) && GramAxis::inside(z, p.width_in)) {
      x_staged[i] = x[column.channel + y * p.x.row + z * p.x.column];
    }
  }
}

// This thread's share of the squared norm of a tile; x and g as above, columns of the patches from first_n on. kLong:
// over more positions than a chain has.
template <typename T, typename S, bool kInner, bool kLong, typename E>
__device__ __forceinline__ double tile_sqnorm(const Problem<T>& p, Shared<E, S>& shared, const T* __restrict__ x,
                                              const T* __restrict__ g, int outputs, int64_t first_n) {
  // all of the block has passed the previous tile's last barrier, and its last look at the columns before that
  for (int n = threadIdx.x; n < S::kN; n += S::kThreads) {
    Column column{0, INT32_MIN, INT32_MIN};  // outside of every image, wherever its position
    if (first_n + n < p.width) {
      column = column_at(first_n + n, p.inputs, p.kernel_y, p.kernel_x, p.dilation_y, p.dilation_x, p.padding_y,
                         p.padding_x, kInner);
      column.channel *= p.x.channel;
    }
    shared.columns[n] = column;
  }
  __syncthreads();  // and is now done multiplying the previous tile
  using ShareG = Share<S, S::kM, kInner>;
  using ShareX = Share<S, S::kN, kInner>;
  static_assert(kChain % S::kDepth == 0, "a chain is so many slices");
  E tile[S::kThreadM][S::kThreadN] = {};
  [[maybe_unused]] E chains[kLong ? S::kThreadM : 1][S::kThreadN] = {};
  T g_staged[ShareG::kCount], x_staged[ShareX::kCount];
  Slice slice{};
  fetch<T, S, kInner>(g_staged, x_staged, p, shared, x, g, outputs, slice);
  ShareG::store(g_staged, shared.g[0]);
  ShareX::store(x_staged, shared.x[0]);
  __syncthreads();
  for (int buffer = 0;; buffer ^= 1) {
    slice.first = slice.at(S::kDepth, p.columns, p.reciprocal);
    const bool more = slice.first.t < p.positions;
    if (more) fetch<T, S, kInner>(g_staged, x_staged, p, shared, x, g, outputs, slice);
    multiply<S>(tile, shared.g[buffer], shared.x[buffer], threadIdx.x);
    if (!more) break;
    ShareG::store(g_staged, shared.g[buffer ^ 1]);  // which was multiplied before the last barrier
    ShareX::store(x_staged, shared.x[buffer ^ 1]);
    if constexpr (kLong) {
      if (slice.first.t % kChain == 0) add_up(chains, tile);
    }
    __syncthreads();
  }
  if constexpr (kLong) add_up(tile, chains);
  E sum = 0;
#pragma unroll
  for (int i = 0; i < S::kThreadM; ++i) {
#pragma unroll
    for (int j = 0; j < S::kThreadN; ++j) sum += tile[i][j] * tile[i][j];
  }
  return static_cast<double>(sum);
}

template <typename T, typename S, bool kInner, bool kLong>
__global__ void __launch_bounds__(S::kThreads, (kLong ? kLongBlocks<Compute<T>, S> : S::kBlocks))
    direct_kernel(const Problem<T> p, double* __restrict__ partials) {
  __shared__ Shared<Compute<T>, S> shared;
  for (int64_t item = blockIdx.x; item < p.items; item += gridDim.x) {
    const int64_t b = item / p.parts;
    double total = 0;
    for (int64_t i = item % p.parts; i < p.tiles; i += p.parts) {
      const int64_t group = i / (p.tiles_m * p.tiles_n), m = i / p.tiles_n % p.tiles_m, n = i % p.tiles_n;
      const T* const x = p.x.data + b * p.x.batch + group * p.inputs * p.x.channel;
      const T* const g = p.g.data + b * p.g.batch + (group * p.outputs + m * S::kM) * p.g.channel;
      const int outputs = static_cast<int>(min(p.outputs - m * S::kM, int64_t{S::kM}));
      total += tile_sqnorm<T, S, kInner, kLong>(p, shared, x, g, outputs, n * S::kN);
    }
    total = block_sum(total, threadIdx.x, S::kThreads);
    if (threadIdx.x == 0) partials[item] = total;
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
Operand<T> operand(const ImageView& view) {
  return {static_cast<const T*>(view.data), view.batch, view.channel, view.row, view.column};
}

// Whether channels are closer in memory than positions. One answer for both operands, which nearly always agree; where
// they do not, one of them is only read more slowly.
bool channels_inner(const GradSqnormImages& images) {
  const GradSqnormShape& s = images.shape;
  const ImageView& view = s.inputs > 1 ? images.x : images.g;
  return view.channel < (s.x.positions() > 1 ? view.column : view.row);
}

template <typename T, typename S>
cudaError_t launch(const GradSqnormImages& images, double* partials, int64_t parts, cudaStream_t stream) {
  const GradSqnormShape& s = images.shape;
  const int64_t rows = s.y.positions(), columns = s.x.positions();
  Problem<T> p{};
  p.x = operand<T>(images.x), p.g = operand<T>(images.g);
  p.inputs = s.inputs, p.outputs = s.outputs, p.width = s.inputs * s.y.kernel * s.x.kernel;
  p.kernel_y = s.y.kernel, p.dilation_y = s.y.dilation, p.padding_y = s.y.padding;
  p.kernel_x = s.x.kernel, p.dilation_x = s.x.dilation, p.padding_x = s.x.padding;
  p.height_in = static_cast<int>(s.y.size), p.stride_y = static_cast<int>(s.y.stride);
  p.width_in = static_cast<int>(s.x.size), p.stride_x = static_cast<int>(s.x.stride);
  p.positions = static_cast<uint32_t>(rows * columns), p.columns = static_cast<uint32_t>(columns);
  p.reciprocal = Slice::reciprocal(p.columns);
  p.tiles_m = divide_up(s.outputs, S::kM), p.tiles_n = divide_up(p.width, S::kN);
  p.tiles = s.groups * p.tiles_m * p.tiles_n;
  p.parts = parts, p.items = images.batch * parts;
  const auto run = [&](auto inner) {
    const unsigned blocks = grid_for(p.items);
    if (p.positions > kChain) {
      direct_kernel<T, S, inner.value, true><<<blocks, S::kThreads, 0, stream>>>(p, partials);
    } else {
      direct_kernel<T, S, inner.value, false><<<blocks, S::kThreads, 0, stream>>>(p, partials);
    }
    return cudaGetLastError();
  };
  return channels_inner(images) ? run(std::true_type{}) : run(std::false_type{});
}

enum class TileSize { kLarge, kSmall, kNarrow };

// Calls with the tile that fits a group's gradient. In double a large one would not fit in the registers.
TileSize tile_for(const GradSqnormImages& images) {
  const GradSqnormShape& s = images.shape;
  if (s.outputs <= Narrow::kM) return TileSize::kNarrow;
  const bool large = s.outputs > Small::kM && s.inputs * s.y.kernel * s.x.kernel > Small::kN;
  return large && images.type != ElementType::kDouble ? TileSize::kLarge : TileSize::kSmall;
}

template <typename T>
cudaError_t direct(const GradSqnormImages& images, double* partials, int64_t parts, cudaStream_t stream) {
  const TileSize size = tile_for(images);
  if (size == TileSize::kNarrow) return launch<T, Narrow>(images, partials, parts, stream);
  if constexpr (sizeof(T) < sizeof(double)) {
    if (size == TileSize::kLarge) return launch<T, Large>(images, partials, parts, stream);
  }
  return launch<T, Small>(images, partials, parts, stream);
}

}  // namespace

int64_t grad_sqnorm_direct_parts(const GradSqnormImages& images) {
  // many times what a large device holds at a time, so that the last ones matter less
  constexpr int64_t kWanted = 16384;
  const GradSqnormShape& s = images.shape;
  const auto tiles = [&s](int64_t m, int64_t n) {
    return s.groups * divide_up(s.outputs, m) * divide_up(s.inputs * s.y.kernel * s.x.kernel, n);
  };
  const TileSize size = tile_for(images);
  const int64_t most = size == TileSize::kNarrow  ? tiles(Narrow::kM, Narrow::kN)
                       : size == TileSize::kLarge ? tiles(Large::kM, Large::kN)
                                                  : tiles(Small::kM, Small::kN);
  return std::clamp<int64_t>(divide_up(kWanted, images.batch), 1, most);
}

cudaError_t grad_sqnorm_direct_cuda(const GradSqnormImages& images, double* partials, int64_t parts,
                                    cudaStream_t stream) {
  switch (images.type) {
    case ElementType::kHalf:
      return direct<__half>(images, partials, parts, stream);
    case ElementType::kBFloat16:
      return direct<__nv_bfloat16>(images, partials, parts, stream);
    case ElementType::kFloat:
      return direct<float>(images, partials, parts, stream);
    default:
      return direct<double>(images, partials, parts, stream);
  }
}

}  // namespace memloc
