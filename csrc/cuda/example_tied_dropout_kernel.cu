// Memory-bound: reads the kept part of x once, writes y once, 16 bytes at a time; the mask is recomputed, never stored.
// Three decompositions, by what the innermost loop of the layout is:
//   planes    one channel's positions (NCHW): a warp takes up to 32 planes, each lane draws for one of them, then the
//             whole warp copies or zeroes plane after plane, several short ones at a time
//   channels  the channels of one position (NHWC, tokens): a thread takes 16 bytes of channels, draws for them once and
//             applies that to several positions of the row
//   elements  anything else: a thread per element
#include <algorithm>
#include <type_traits>

#include "cuda/example_tied_dropout_kernel.h"

namespace memloc {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // to a multiprocessor, at least: leaves a thread 64 registers
constexpr int kWarp = 32;
constexpr int64_t kSegment = 8192;  // elements of a plane that a warp takes at a time, so that few large planes spread
constexpr int kPositions = 8;       // positions of a row that share a thread's draw
constexpr int kInFlight = 4;        // vectors that a thread loads before it stores the first

// What a loop nest of at most three steps by; an absent loop has size 1.
struct Nest {
  Loop outer, middle, inner;
};

struct alignas(16) Vector {
  uint32_t word[4];
};

__device__ __forceinline__ int round_up(int n, int step) { return (n + step - 1) / step * step; }

template <typename T>
__device__ __forceinline__ bool same_alignment(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % sizeof(Vector) == 0;
}

// `lanes` threads, this one the lane-th, write y[0 .. n): x where kept, else 0. Pieces of 16 bytes, single elements
// before and after them.
template <typename T>
__device__ __forceinline__ void write_line(T* y, const T* x, int n, bool kept, int lane, int lanes) {
  constexpr int kLanes = sizeof(Vector) / sizeof(T);
  const int misaligned = reinterpret_cast<uintptr_t>(y) % sizeof(Vector) / sizeof(T);
  int head = misaligned == 0 ? 0 : kLanes - misaligned;
  if (head > n || (kept && !same_alignment(x, y))) head = n;
  const int vectors = (n - head) / kLanes;
  const auto write_elements = [&](int first, int end) {
#pragma unroll 1
    for (int i = first + lane; i < end; i += lanes) y[i] = kept ? x[i] : T{0};
  };
  write_elements(0, head);
  Vector* const to = reinterpret_cast<Vector*>(y + head);
  const Vector* const from = reinterpret_cast<const Vector*>(x + head);
#pragma unroll 1
  for (int first = lane; first < vectors; first += kInFlight * lanes) {
    Vector value[kInFlight] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (kept && first + i * lanes < vectors) value[i] = from[first + i * lanes];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * lanes < vectors) to[first + i * lanes] = value[i];
    }
  }
  write_elements(head + vectors * kLanes, n);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    planes_kernel(T* __restrict__ y, const T* __restrict__ x, const int64_t* __restrict__ ids, const TiedMask mask,
                  const Nest nest, int64_t segments, int lines_per_warp, int lanes_per_line) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t lines = nest.outer.size * nest.middle.size * segments;
  const int64_t chunks = (lines + lines_per_warp - 1) / lines_per_warp;
  for (int64_t chunk = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp; chunk < chunks; chunk += warps) {
    const int64_t first = chunk * lines_per_warp;
    const int count = static_cast<int>(min(static_cast<int64_t>(lines_per_warp), lines - first));
    int64_t x_offset = 0, y_offset = 0;
    int length = 0;
    bool kept = false;
    if (lane < count) {
      const int64_t segment = (first + lane) % segments, plane = (first + lane) / segments;
      const int64_t outer = plane / nest.middle.size, middle = plane % nest.middle.size;
      const int64_t begin = segment * kSegment;
      x_offset = outer * nest.outer.x + middle * nest.middle.x + begin;
      y_offset = outer * nest.outer.y + middle * nest.middle.y + begin;
      length = static_cast<int>(min(kSegment, nest.inner.size - begin));
      kept = mask(ids[outer * nest.outer.id + middle * nest.middle.id],
                  outer * nest.outer.channel + middle * nest.middle.channel);
    }
    for (int i = lane / lanes_per_line; i < round_up(count, kWarp / lanes_per_line); i += kWarp / lanes_per_line) {
      const int64_t from = __shfl_sync(0xFFFFFFFFu, x_offset, i), to = __shfl_sync(0xFFFFFFFFu, y_offset, i);
      const int n = __shfl_sync(0xFFFFFFFFu, length, i);  // 0 beyond the last line
      write_line(y + to, x + from, n, __shfl_sync(0xFFFFFFFFu, kept, i), lane % lanes_per_line, lanes_per_line);
    }
  }
}

// kLanes elements of T as words, so that all of them move as one.
template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Piece {
  using Word = std::conditional_t<sizeof(T) * kLanes % sizeof(uint32_t) == 0, uint32_t, T>;
  static constexpr int kWords = kLanes * sizeof(T) / sizeof(Word);
  Word word[kWords];

  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kWords == 4) {  // one instruction, where a plain store of words that were computed becomes four
      __stwb(reinterpret_cast<uint4*>(to), {word[0], word[1], word[2], word[3]});
    } else {
      *reinterpret_cast<Piece*>(to) = *this;
    }
  }
};

// Channels [first, first + kLanes) of one example as a mask of bits; first % kLanes == 0.
template <typename T, int kLanes>
__device__ __forceinline__ Piece<T, kLanes> draw_bits(const TiedMask& mask, int64_t id, int64_t first) {
  using Word = typename Piece<T, kLanes>::Word;
  constexpr int kStep = kLanes < 4 ? kLanes : 4;  // channels of this piece that share a draw
  Piece<T, kLanes> bits{};
#pragma unroll
  for (int i = 0; i < kLanes; i += kStep) {
    const int64_t channel = first + i;
    const bool drawn = mask.threshold != 0 && channel + kStep > mask.num_generalization;
    const Quad quad = drawn ? mask.draw(id, channel / 4) : Quad{};
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const uint32_t word = kStep == 4 ? quad.word[j] : quad.at((channel + j) % 4);
      const bool kept = mask.keep(channel + j, word);
      if constexpr (sizeof(T) < sizeof(Word)) {
        constexpr int kEach = sizeof(Word) / sizeof(T);
        if (kept) bits.word[(i + j) / kEach] |= ((Word{1} << 8 * sizeof(T)) - 1) << (i + j) % kEach * 8 * sizeof(T);
      } else {
        constexpr int kEach = sizeof(T) / sizeof(Word);
#pragma unroll
        for (int k = 0; k < kEach; ++k) bits.word[(i + j) * kEach + k] = kept ? static_cast<Word>(-1) : Word{0};
      }
    }
  }
  return bits;
}

// kLanes elements of T: 16 bytes where the layout allows, else one.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    channels_kernel(T* __restrict__ y, const T* __restrict__ x, const int64_t* __restrict__ ids, const TiedMask mask,
                    const Nest nest) {
  using Elements = Piece<T, kLanes>;
  const int64_t pieces = nest.inner.size / kLanes;
  const int64_t groups = (nest.middle.size + kPositions - 1) / kPositions;
  const int64_t items = nest.outer.size * groups;
  for (int64_t item = blockIdx.x * blockDim.y + threadIdx.y; item < items;
       item += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = groups == 1 ? item : item / groups;
    const int64_t begin = groups == 1 ? 0 : item % groups * kPositions;
    const int positions = static_cast<int>(min(int64_t{kPositions}, nest.middle.size - begin));
    const T* const from = x + row * nest.outer.x + begin * nest.middle.x;
    T* const to = y + row * nest.outer.y + begin * nest.middle.y;
    const int64_t id = ids[row * nest.outer.id];
    for (int64_t piece = threadIdx.x; piece < pieces; piece += blockDim.x) {
      const Elements bits = draw_bits<T, kLanes>(mask, id, piece * kLanes);
      bool any = false;
#pragma unroll
      for (int i = 0; i < Elements::kWords; ++i) any |= bits.word[i] != 0;
#pragma unroll 1
      for (int first = 0; first < positions; first += kInFlight) {
        Elements value[kInFlight] = {};
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (!any || first + i >= positions) continue;
          value[i] = *reinterpret_cast<const Elements*>(from + (first + i) * nest.middle.x + piece * kLanes);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (first + i >= positions) continue;
#pragma unroll
          for (int j = 0; j < Elements::kWords; ++j) value[i].word[j] &= bits.word[j];
          value[i].store(to + (first + i) * nest.middle.y + piece * kLanes);
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    elements_kernel(T* __restrict__ y, const T* __restrict__ x, const int64_t* __restrict__ ids, const TiedMask mask,
                    const Layout layout, int64_t numel) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < numel;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    int64_t rest = i, from = 0, to = 0, id = 0, channel = 0;
    for (int d = layout.count - 1; d >= 0; --d) {
      const Loop& loop = layout.loop[d];
      const int64_t index = rest % loop.size;
      rest /= loop.size;
      from += index * loop.x;
      to += index * loop.y;
      id += index * loop.id;
      channel += index * loop.channel;
    }
    y[to] = mask(ids[id], channel) ? x[from] : T{0};
  }
}

// The whole device once over: as many blocks as it holds at the same time, or fewer if there is less to do.
cudaError_t grid_size(int64_t blocks_of_work, unsigned* blocks) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  *blocks = static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(blocks_of_work, int64_t{16} * processors)));
  return error;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Vector) == 0; }

template <typename T>
cudaError_t launch(T* y, const T* x, const int64_t* ids, const TiedMask& mask, const Layout& layout,
                   cudaStream_t stream) {
  constexpr int kLanes = sizeof(Vector) / sizeof(T);
  const Loop& inner = layout.inner();
  const Loop none{1, 0, 0, 0, 0};
  const Nest nest{layout.count > 2 ? layout.loop[layout.count - 3] : none,
                  layout.count > 1 ? layout.loop[layout.count - 2] : none, inner};
  const bool dense = layout.count <= 3 && inner.x == 1 && inner.y == 1;
  unsigned blocks = 0;
  if (dense && inner.channel == 0 && inner.id == 0) {
    const int64_t segments = (inner.size + kSegment - 1) / kSegment;
    const int64_t lines = nest.outer.size * nest.middle.size * segments;
    // as many lines to a warp as leave every multiprocessor of a large device its warps
    const int lines_per_warp = static_cast<int>(std::clamp<int64_t>(lines / 8192, 1, kWarp));
    // short planes share a warp: 4 lanes write 64 bytes of one at a time, and so on up to the whole warp
    int lanes_per_line = 4;
    while (lanes_per_line < kWarp && lanes_per_line * kLanes * kInFlight < inner.size) lanes_per_line *= 2;
    const int64_t chunks = (lines + lines_per_warp - 1) / lines_per_warp;
    const cudaError_t error = grid_size((chunks + kThreads / kWarp - 1) / (kThreads / kWarp), &blocks);
    if (error != cudaSuccess) return error;
    planes_kernel<<<blocks, kThreads, 0, stream>>>(y, x, ids, mask, nest, segments, lines_per_warp, lanes_per_line);
    return cudaGetLastError();
  }
  // rows outside, positions inside, whatever the order in memory: ids may vary with the outer loop only
  const bool rows_inside = nest.middle.id != 0 && nest.outer.id == 0;
  const Nest rows = rows_inside ? Nest{nest.middle, nest.outer, inner} : nest;
  if (dense && inner.channel == 1 && rows.middle.id == 0) {
    const auto divides = [](int64_t stride) { return stride % kLanes == 0; };
    const bool vectors = aligned(x) && aligned(y) && divides(inner.size) && divides(rows.outer.x) &&
                         divides(rows.outer.y) && divides(rows.middle.x) && divides(rows.middle.y);
    const int64_t pieces = vectors ? inner.size / kLanes : inner.size;
    unsigned across = kWarp;  // threads along the channels: a power of two, at most the block
    while (across < pieces && across < kThreads) across *= 2;
    while (across > 1 && across / 2 >= pieces) across /= 2;
    const dim3 block(across, kThreads / across);
    const int64_t items = rows.outer.size * ((rows.middle.size + kPositions - 1) / kPositions);
    const cudaError_t error = grid_size((items + block.y - 1) / block.y, &blocks);
    if (error != cudaSuccess) return error;
    if (vectors) {
      channels_kernel<T, kLanes><<<blocks, block, 0, stream>>>(y, x, ids, mask, rows);
    } else {
      channels_kernel<T, 1><<<blocks, block, 0, stream>>>(y, x, ids, mask, rows);
    }
    return cudaGetLastError();
  }
  const int64_t numel = layout.numel();
  const cudaError_t error = grid_size((numel + kThreads - 1) / kThreads, &blocks);
  if (error != cudaSuccess) return error;
  elements_kernel<<<blocks, kThreads, 0, stream>>>(y, x, ids, mask, layout, numel);
  return cudaGetLastError();
}

}  // namespace

cudaError_t example_tied_dropout_cuda(void* y, const void* x, const int64_t* ids, int width, const TiedMask& mask,
                                      const Layout& layout, cudaStream_t stream) {
  switch (width) {
    case 2:
      return launch(static_cast<uint16_t*>(y), static_cast<const uint16_t*>(x), ids, mask, layout, stream);
    case 4:
      return launch(static_cast<uint32_t*>(y), static_cast<const uint32_t*>(x), ids, mask, layout, stream);
    default:
      return launch(static_cast<uint64_t*>(y), static_cast<const uint64_t*>(x), ids, mask, layout, stream);
  }
}

}  // namespace memloc
