// Memory-bound: reads activation and grad once, 16 bytes at a time where they are dense. Three decompositions, by how a
// plane of positions lies:
//   planes    positions beside each other (NCHW): a team of 1 to 32 lanes per plane, or a block per large one
//   channels  channels beside each other (NHWC, tokens): a block takes some channels of one example, its columns 16
//             bytes of them each, its rows every so many positions
//   strided   anything else: a warp per plane
// A thread adds up kRun products in the type of computation, and those sums in double, always in the same order.
#include "cuda/channel_saliency_kernel.h"
#include "cuda/grad_sqnorm_reduce.h"

namespace memloc {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;              // to a multiprocessor, at least: leaves a thread 64 registers, one less 80
constexpr int64_t kBlockVectors = 512;  // of 16 bytes: planes of so many or more are a block's
constexpr int kFewestColumns = 8, kMostColumns = 32;
constexpr int kRun = 32;
constexpr int kInFlight = 2;  // vectors of each operand that a thread loads before it multiplies the first
static_assert(kInFlight == 2, "the second vector may be missing");

template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Piece {
  T element[kLanes];
};

// sum[j] += a[j] * g[j], summed over kInFlight pieces of which the first `count` are there: those `step_a` and `step_g`
// elements apart.
template <typename T, int kLanes>
__device__ __forceinline__ void add_products(Compute<T> (&sum)[kLanes], const T* a, const T* g, int64_t step_a,
                                             int64_t step_g, int64_t count) {
  using Vector = Piece<T, kLanes>;
  Vector x[kInFlight] = {}, y[kInFlight] = {};
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (i >= count) continue;
    x[i] = *reinterpret_cast<const Vector*>(a + i * step_a);
    y[i] = *reinterpret_cast<const Vector*>(g + i * step_g);
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) sum[j] += compute(x[i].element[j]) * compute(y[i].element[j]);
  }
}

template <typename T>
constexpr int kVector = 16 / sizeof(T);

// This thread's share of the sum of a[i] * g[i] over i < n.
template <typename T>
__device__ __forceinline__ double dot(const T* a, const T* g, int64_t n, int thread, int threads) {
  constexpr int kLanes = kVector<T>;
  double total = 0;
  const auto address_a = reinterpret_cast<uintptr_t>(a), address_g = reinterpret_cast<uintptr_t>(g);
  int64_t head = min(n, static_cast<int64_t>((16 - address_a % 16) % 16 / sizeof(T)));
  if ((address_a - address_g) % 16 != 0) head = n;
  const int64_t vectors = (n - head) / kLanes;
  const auto add_scalars = [&](int64_t first, int64_t end) {
    for (int64_t i = first + thread; i < end; i += threads) total += compute(a[i]) * compute(g[i]);
  };
  add_scalars(0, head);
  for (int64_t run = thread; run < vectors; run += int64_t{kRun} * threads) {
    const int64_t end = min(run + int64_t{kRun} * threads, vectors);
    Compute<T> sum[kLanes] = {};
#pragma unroll 1
    for (int64_t i = run; i < end; i += kInFlight * threads) {
      const int64_t at = head + i * kLanes, step = int64_t{threads} * kLanes;
      add_products(sum, a + at, g + at, step, step, i + threads < end ? kInFlight : 1);
    }
#pragma unroll
    for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma unroll
      for (int j = 0; j < width; ++j) sum[j] += sum[j + width];
    }
    total += sum[0];
  }
  add_scalars(head + vectors * kLanes, n);
  return total;
}

// Sum over a team of lanes, a power of two, for its first lane. Every lane of the warp has to call it.
__device__ __forceinline__ double team_sum(double value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, step, lanes);
  return value;
}

// lanes: threads of a team; the block's, or at most a warp's.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    planes_kernel(const T* __restrict__ a, const T* __restrict__ g, const SaliencyLoop batch,
                  const SaliencyLoop channel, int64_t positions, int lanes, Compute<T>* __restrict__ out) {
  const int64_t planes = batch.size * channel.size;
  const int teams = kThreads / lanes, lane = threadIdx.x % lanes;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(teams); first < planes;
       first += gridDim.x * static_cast<int64_t>(teams)) {
    const int64_t plane = first + threadIdx.x / lanes;
    double sum = 0;
    if (plane < planes) {
      const int64_t b = plane / channel.size, c = plane % channel.size;
      sum = dot(a + b * batch.a + c * channel.a, g + b * batch.g + c * channel.g, positions, lane, lanes);
    }
    sum = teams == 1 ? block_sum(sum, threadIdx.x, kThreads) : team_sum(sum, lanes);
    if (lane == 0 && plane < planes) out[plane] = static_cast<Compute<T>>(sum);
  }
}

// kLanes channels to a column of the block: 16 bytes of them where the layout allows, else one.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocks - 1)
    channels_kernel(const T* __restrict__ a, const T* __restrict__ g, const SaliencyLayout layout, int64_t lines,
                    Compute<T>* __restrict__ out) {
  __shared__ double parts[kLanes][kThreads];
  const SaliencyLoop inner = layout.inner();
  const int64_t channels = layout.channel.size, pieces = channels / kLanes;
  const int64_t tiles = (pieces + blockDim.x - 1) / blockDim.x;
  const int self = threadIdx.y * blockDim.x + threadIdx.x;
  for (int64_t item = blockIdx.x; item < layout.batch.size * tiles; item += gridDim.x) {
    const int64_t b = item / tiles, piece = item % tiles * blockDim.x + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) parts[j][self] = 0;
    for (int64_t line = 0; piece < pieces && line < lines; ++line) {
      int64_t at_a, at_g;
      layout.start_of(line, &at_a, &at_g);
      const T* const from_a = a + b * layout.batch.a + piece * kLanes + at_a;
      const T* const from_g = g + b * layout.batch.g + piece * kLanes + at_g;
      const int rows = blockDim.y;
      for (int64_t run = threadIdx.y; run < inner.size; run += int64_t{kRun} * rows) {
        const int64_t end = min(run + int64_t{kRun} * rows, inner.size);
        Compute<T> sum[kLanes] = {};
#pragma unroll 1
        for (int64_t i = run; i < end; i += kInFlight * rows) {
          add_products(sum, from_a + i * inner.a, from_g + i * inner.g, rows * inner.a, rows * inner.g,
                       i + rows < end ? kInFlight : 1);
        }
#pragma unroll
        for (int j = 0; j < kLanes; ++j) parts[j][self] += sum[j];
      }
    }
    __syncthreads();
    for (int i = self; i < static_cast<int>(blockDim.x) * kLanes; i += kThreads) {
      const int column = i % blockDim.x, j = i / blockDim.x;
      const int64_t channel = (item % tiles * blockDim.x + column) * kLanes + j;
      if (channel >= channels) continue;
      double total = 0;
      for (int row = 0; row < blockDim.y; ++row) total += parts[j][row * blockDim.x + column];
      out[b * channels + channel] = static_cast<Compute<T>>(total);
    }
    __syncthreads();  // before the next item writes to parts
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    strided_kernel(const T* __restrict__ a, const T* __restrict__ g, const SaliencyLayout layout, int64_t positions,
                   Compute<T>* __restrict__ out) {
  constexpr int kWarps = kThreads / kWarp;
  const SaliencyLoop inner = layout.inner();
  const int64_t planes = layout.batch.size * layout.channel.size;
  for (int64_t plane = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp; plane < planes;
       plane += gridDim.x * int64_t{kWarps}) {
    const int64_t b = plane / layout.channel.size, c = plane % layout.channel.size;
    const T* const from_a = a + b * layout.batch.a + c * layout.channel.a;
    const T* const from_g = g + b * layout.batch.g + c * layout.channel.g;
    double sum = 0;
    for (int64_t position = threadIdx.x % kWarp; position < positions; position += kWarp) {
      int64_t at_a, at_g;
      layout.start_of(position / inner.size, &at_a, &at_g);
      at_a += position % inner.size * inner.a;
      at_g += position % inner.size * inner.g;
      sum += static_cast<double>(compute(from_a[at_a])) * static_cast<double>(compute(from_g[at_g]));
    }
    sum = team_sum(sum, kWarp);
    if (threadIdx.x % kWarp == 0) out[plane] = static_cast<Compute<T>>(sum);
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
bool vectors_fit(const T* a, const T* g, const SaliencyLayout& l) {
  const auto fits = [](const SaliencyLoop& loop) {
    return loop.size == 1 || (loop.a % kVector<T> == 0 && loop.g % kVector<T> == 0);
  };
  bool fit = reinterpret_cast<uintptr_t>(a) % 16 == 0 && reinterpret_cast<uintptr_t>(g) % 16 == 0 &&
             l.channel.size % kVector<T> == 0 && fits(l.batch);
  for (int i = 0; i < l.count; ++i) fit = fit && fits(l.loop[i]);
  return fit;
}

template <typename T>
cudaError_t launch(const T* a, const T* g, const SaliencyLayout& l, Compute<T>* out, cudaStream_t stream) {
  const int64_t positions = l.lines() * l.inner().size, planes = l.batch.size * l.channel.size;
  if (l.count == 1 && l.planes()) {
    const int64_t vectors = divide_up(positions, kVector<T>);
    int lanes = 1;
    while (lanes < kWarp && lanes < vectors) lanes *= 2;
    if (vectors >= kBlockVectors) lanes = kThreads;
    planes_kernel<<<grid_for(divide_up(planes, kThreads / lanes)), kThreads, 0, stream>>>(a, g, l.batch, l.channel,
                                                                                          positions, lanes, out);
  } else if (l.channels()) {
    const bool vectors = vectors_fit(a, g, l);
    const int64_t pieces = vectors ? l.channel.size / kVector<T> : l.channel.size;
    unsigned columns = kFewestColumns;
    while (columns < kMostColumns && columns < pieces) columns *= 2;
    const dim3 block(columns, kThreads / columns);
    const unsigned blocks = grid_for(l.batch.size * divide_up(pieces, columns));
    if (vectors) {
      channels_kernel<T, kVector<T>><<<blocks, block, 0, stream>>>(a, g, l, l.lines(), out);
    } else {
      channels_kernel<T, 1><<<blocks, block, 0, stream>>>(a, g, l, l.lines(), out);
    }
  } else {
    strided_kernel<<<grid_for(divide_up(planes, kThreads / kWarp)), kThreads, 0, stream>>>(a, g, l, positions, out);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const void* a, const void* g, const SaliencyLayout& layout, void* out, cudaStream_t stream) {
  return launch(static_cast<const T*>(a), static_cast<const T*>(g), layout, static_cast<Compute<T>*>(out), stream);
}

}  // namespace

cudaError_t channel_saliency_cuda(const void* activation, const void* grad, ElementType type,
                                  const SaliencyLayout& layout, void* out, cudaStream_t stream) {
  switch (type) {
    case ElementType::kHalf:
      return launch<__half>(activation, grad, layout, out, stream);
    case ElementType::kBFloat16:
      return launch<__nv_bfloat16>(activation, grad, layout, out, stream);
    case ElementType::kFloat:
      return launch<float>(activation, grad, layout, out, stream);
    default:
      return launch<double>(activation, grad, layout, out, stream);
  }
}

}  // namespace memloc
