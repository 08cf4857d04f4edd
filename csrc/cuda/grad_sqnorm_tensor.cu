// The direct way on tensor cores, for 16-bit elements. One example's gradient is a product of g [outputs, positions]
// and the unfolded patches [positions, columns], whose columns run over kernel offsets and, innermost, channels. A
// block takes a tile of it, kM outputs by kN columns, and walks some examples: it adds up an example's tile in
// registers over slices of kDepth positions, squares and sums it, and goes on to the next; with kSums it also keeps the
// tile's sum over the examples. Slices of both operands are copied to shared memory where they lie, zeros for what is
// padding, kStages - 1 of them on their way while one is multiplied, across the ends of examples, so that short ones
// cost no wait.
//
// Bound: of 128 x 128 tiles by the second-level cache, 64 operations per byte from there.
//
// Both operands have channels as neighbours and are multiplied along positions: ldmatrix turns them. Eights of channels
// of a slice's row are swapped by the row's number, so that the eight rows of a matrix lie in different banks.
#include "cuda/grad_sqnorm_tensor.h"
#include "cuda/tensor_core.h"

namespace memloc {
namespace {

constexpr int kDepth = 32, kStages = 3;
constexpr int kN = 128, kWarpM = 64, kWarpN = 32, kWarpsN = kN / kWarpN;
constexpr int kEight = 8;  // elements of 16 bytes, which are copied at once
// Slices that are added up one by one: 128 products, whose sums tensor cores cut off instead of rounding them.
constexpr int kTensorChain = 2048 / kDepth;
static_assert(kDepth <= Slice::kShort, "a slice is a short step");

enum class Mode {
  kShort,
  kLong,
  kSums
};  // what the second accumulator is for: nothing, earlier chains, other examples

template <int kWarpsM_>
struct Tile {
  static constexpr int kWarpsM = kWarpsM_, kM = kWarpsM * kWarpM, kWarps = kWarpsM * kWarpsN;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBytesG = kDepth * kM * 2, kBytesX = kDepth * kN * 2;
  static constexpr int kBytes = kStages * (kBytesG + kBytesX);
};

// To a multiprocessor, at least: leaves a thread 128 registers, or 255 for both accumulators.
template <int kWarpsM, Mode kMode>
constexpr int kBlocks = (kMode == Mode::kShort ? 4 : 2) / kWarpsM;

template <typename T>
struct Problem {
  const T *x, *g;
  int64_t x_batch, g_batch;
  int x_row, x_column, x_group, g_position, g_group;
  int inputs, outputs, kernel_x, offsets, dilation_y, dilation_x, padding_y, padding_x;
  int height, width, stride_y, stride_x;
  uint32_t positions, columns, reciprocal;
  int slices;  // of an example
  int64_t batch, each, tiles_m, tiles_n, tiles, items, sum_size;
  bool more;
};

// Of a slice with rows of kEights: where an eight of a row lies, in bytes.
template <int kEights>
__device__ __forceinline__ int place(int row, int eight) {
  return (row * kEights + (eight ^ row % kEight)) * 16;
}

// A thread's part in copying slices: of each operand one eight of channels, of every so many positions.
template <typename T, typename S>
struct Copier {
  static constexpr int kEightsG = S::kM / kEight, kEightsX = kN / kEight;
  static constexpr int kStepG = S::kThreads / kEightsG, kStepX = S::kThreads / kEightsX;  // rows

  const T *x, *g;  // of the example that is copied
  int y, z;        // the pixel of position (0, 0)
  bool some_g;
  Slice slice{};

  __device__ Copier(const Problem<T>& p, int64_t tile, int64_t example) {
    const int64_t group = tile / (p.tiles_m * p.tiles_n);
    const int m = static_cast<int>(tile / p.tiles_n % p.tiles_m) * S::kM + threadIdx.x % kEightsG * kEight;
    const int n = static_cast<int>(tile % p.tiles_n) * kEightsX + threadIdx.x % kEightsX;  // counts eights
    const int eights = p.inputs / kEight, offset = n / eights;
    g = p.g + example * p.g_batch + group * p.g_group + m;
    x = p.x + example * p.x_batch + group * p.x_group + n % eights * kEight;
    some_g = m < p.outputs;
    const bool some_x = offset < p.offsets;
    y = some_x ? offset / p.kernel_x * p.dilation_y - p.padding_y : INT32_MIN;  // outside, wherever the position
    z = offset % p.kernel_x * p.dilation_x - p.padding_x;
  }

  // Copies the next slice; after an example's last comes the next one's first.
  __device__ __forceinline__ void copy(const Problem<T>& p, unsigned char* to_g, unsigned char* to_x) {
    const int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kDepth / kStepG; ++i) {
      const int row = thread / kEightsG + i * kStepG;
      const uint32_t t = slice.first.t + row;
      const bool there = some_g && t < p.positions;
      copy_async(to_g + place<kEightsG>(row, thread % kEightsG), there ? g + static_cast<int>(t) * p.g_position : p.g,
                 there);
    }
#pragma unroll
    for (int i = 0; i < kDepth / kStepX; ++i) {
      const int row = thread / kEightsX + i * kStepX;
      const Position at = slice.at(row, p.columns, p.reciprocal);
      bool there = at.t < p.positions;
      const T* from = p.x;
      if (there) {
        const int down = static_cast<int>(at.row) * p.stride_y + y;
        const int along = static_cast<int>(at.column) * p.stride_x + z;
        there = GramAxis::inside(down, p.height) && GramAxis::inside(along, p.width);
        if (there) from = x + down * p.x_row + along * p.x_column;
      }
      copy_async(to_x + place<kEightsX>(row, thread % kEightsX), from, there);
    }
    slice.first = slice.at(kDepth, p.columns, p.reciprocal);
    if (slice.first.t >= p.positions) slice.first = {}, x += p.x_batch, g += p.g_batch;
  }
};

using Registers = float[kWarpM / 16][kWarpN / 8][4];

// tile += the product of a slice, for this warp.
template <typename T, typename S>
__device__ __forceinline__ void multiply(Registers& tile, const unsigned char* g, const unsigned char* x) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = lane % 8, matrix = lane / 8;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t left[kWarpM / 16][4], right[kWarpN / 8][2];
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
      const int eight = warp / kWarpsN * (kWarpM / 8) + i * 2 + matrix % 2;
      load_matrices_transposed(left[i], g + place<S::kM / kEight>(k + matrix / 2 * 8 + row, eight));
    }
#pragma unroll
    for (int j = 0; j < kWarpN / 8; j += 2) {
      const int eight = warp % kWarpsN * (kWarpN / 8) + j + matrix / 2;
      uint32_t both[4];
      load_matrices_transposed(both, x + place<kN / kEight>(k + matrix % 2 * 8 + row, eight));
      right[j][0] = both[0], right[j][1] = both[1], right[j + 1][0] = both[2], right[j + 1][1] = both[3];
    }
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) multiply_add<T>(tile[i][j], left[i], right[j]);
    }
  }
}

// Calls f(i, j, e) for every register of a tile.
template <typename F>
__device__ __forceinline__ void each_register(const F& f) {
#pragma unroll
  for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(i, j, e);
    }
  }
}

// A warp's share of an example's squared norm, for its lane 0.
__device__ __forceinline__ double square(const Registers& tile) {
  float sum = 0;
  each_register([&](int i, int j, int e) { sum += tile[i][j][e] * tile[i][j][e]; });
  double total = sum;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_down_sync(0xFFFFFFFFu, total, step);
  return total;
}

// Writes a tile of the sums [groups, outputs, offsets x inputs] of a split, or adds to it.
template <typename T, typename S>
__device__ __forceinline__ void write(const Problem<T>& p, const Registers& sums, int64_t tile,
                                      float* __restrict__ to) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, width = p.offsets * p.inputs;
  const int64_t group = tile / (p.tiles_m * p.tiles_n);
  const int m = static_cast<int>(tile / p.tiles_n % p.tiles_m) * S::kM + warp / kWarpsN * kWarpM + lane / 4;
  const int n = static_cast<int>(tile % p.tiles_n) * kN + warp % kWarpsN * kWarpN + lane % 4 * 2;
  each_register([&](int i, int j, int e) {
    const int row = m + i * 16 + e / 2 * 8, column = n + j * 8 + e % 2;
    if (row >= p.outputs || column >= width) return;
    float* const at = to + (group * p.outputs + row) * width + column;
    *at = p.more ? *at + sums[i][j][e] : sums[i][j][e];
  });
}

// to += tile, which becomes zero.
__device__ __forceinline__ void move(Registers& to, Registers& tile) {
  each_register([&](int i, int j, int e) { to[i][j][e] += tile[i][j][e], tile[i][j][e] = 0; });
}

template <typename T, int kWarpsM, Mode kMode>
__global__ void __launch_bounds__(Tile<kWarpsM>::kThreads, kBlocks<kWarpsM, kMode>)
    tensor_kernel(const Problem<T> p, double* __restrict__ partials, float* __restrict__ sums) {
  using S = Tile<kWarpsM>;
  extern __shared__ __align__(16) unsigned char memory[];
  const auto of_g = [&](int slice) { return memory + slice % kStages * (S::kBytesG + S::kBytesX); };
  const auto of_x = [&](int slice) { return of_g(slice) + S::kBytesG; };
  for (int64_t item = blockIdx.x; item < p.items; item += gridDim.x) {
    const int64_t tile = item % p.tiles, split = item / p.tiles, first = split * p.each;
    const int slices = static_cast<int>(max(int64_t{0}, min(p.each, p.batch - first))) * p.slices;
    Copier<T, S> copier(p, tile, first);
    Registers own = {};
    [[maybe_unused]] Registers others = {};
    __syncthreads();  // all are done multiplying the previous item's slices
    for (int slice = 0; slice < kStages - 1; ++slice) {
      if (slice < slices) copier.copy(p, of_g(slice), of_x(slice));
      commit_copies();
    }
    double* to = partials + (first * p.tiles + tile) * S::kWarps + threadIdx.x / kWarp;
    for (int slice = 0, of_example = 1; slice < slices; ++slice, ++of_example) {
      wait_copies<kStages - 2>();
      __syncthreads();  // all have waited for this slice's copies, and are done multiplying the one before
      const int next = slice + kStages - 1;
      if (next < slices) copier.copy(p, of_g(next), of_x(next));
      commit_copies();
      multiply<T, S>(own, of_g(slice), of_x(slice));
      if constexpr (kMode == Mode::kLong) {
        if (of_example % kTensorChain == 0 || of_example == p.slices) move(others, own);
      }
      if (of_example < p.slices) continue;
      const double total = square(kMode == Mode::kLong ? others : own);
      if (threadIdx.x % kWarp == 0) *to = total;
      if constexpr (kMode == Mode::kSums) {
        move(others, own);
      } else {
        each_register([&](int i, int j, int e) { own[i][j][e] = 0, others[i][j][e] = 0; });
      }
      to += p.tiles * S::kWarps;
      of_example = 0;
    }
    if constexpr (kMode == Mode::kSums) write<T, S>(p, others, tile, sums + split * p.sum_size);
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Few outputs take half a tile.
bool is_narrow(const GradSqnormTensor& t) { return t.g.channels <= kWarpM; }

template <typename T, int kWarpsM>
cudaError_t launch(const GradSqnormTensor& t, double* partials, float* sums, bool more, cudaStream_t stream) {
  using S = Tile<kWarpsM>;
  const GradSqnormShape& s = t.shape;
  Problem<T> p{};
  p.x = static_cast<const T*>(t.x.data), p.g = static_cast<const T*>(t.g.data);
  p.x_batch = t.x.batch, p.x_row = t.x.row, p.x_column = t.x.column, p.x_group = t.x.group;
  p.g_batch = t.g.batch, p.g_position = t.g.column, p.g_group = t.g.group;
  p.inputs = t.x.channels, p.outputs = t.g.channels;
  p.kernel_x = static_cast<int>(s.x.kernel), p.offsets = static_cast<int>(s.y.kernel * s.x.kernel);
  p.dilation_y = static_cast<int>(s.y.dilation), p.dilation_x = static_cast<int>(s.x.dilation);
  p.padding_y = static_cast<int>(s.y.padding), p.padding_x = static_cast<int>(s.x.padding);
  p.height = static_cast<int>(s.y.size), p.stride_y = static_cast<int>(s.y.stride);
  p.width = static_cast<int>(s.x.size), p.stride_x = static_cast<int>(s.x.stride);
  p.columns = static_cast<uint32_t>(s.x.positions());
  p.positions = static_cast<uint32_t>(s.y.positions()) * p.columns;
  p.reciprocal = Slice::reciprocal(p.columns);
  p.slices = static_cast<int>(divide_up(p.positions, kDepth));
  p.tiles_m = divide_up(p.outputs, S::kM), p.tiles_n = divide_up(int64_t{p.offsets} * p.inputs, kN);
  p.tiles = s.groups * p.tiles_m * p.tiles_n, p.items = p.tiles * t.splits;
  p.batch = t.batch, p.each = divide_up(t.batch, t.splits);
  p.sum_size = t.sum_size(), p.more = more;
  const unsigned blocks = grid_for(p.items);
  if (sums != nullptr) {
    tensor_kernel<T, kWarpsM, Mode::kSums><<<blocks, S::kThreads, S::kBytes, stream>>>(p, partials, sums);
  } else if (p.slices > kTensorChain) {
    tensor_kernel<T, kWarpsM, Mode::kLong><<<blocks, S::kThreads, S::kBytes, stream>>>(p, partials, sums);
  } else {
    tensor_kernel<T, kWarpsM, Mode::kShort><<<blocks, S::kThreads, S::kBytes, stream>>>(p, partials, sums);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const GradSqnormTensor& t, double* partials, float* sums, bool more, cudaStream_t stream) {
  return is_narrow(t) ? launch<T, 1>(t, partials, sums, more, stream) : launch<T, 2>(t, partials, sums, more, stream);
}

}  // namespace

int64_t GradSqnormTensor::tiles() const {
  const int64_t columns = shape.y.kernel * shape.x.kernel * x.channels;
  return shape.groups * divide_up(g.channels, is_narrow(*this) ? kWarpM : 2 * kWarpM) * divide_up(columns, kN);
}

int64_t GradSqnormTensor::parts() const { return tiles() * kWarpsN * (is_narrow(*this) ? 1 : 2); }

int64_t GradSqnormTensor::best_splits(bool sums) const {
  const int64_t wanted = sums ? 512 : 2048;  // blocks: sums are written and read once more for each split
  return std::clamp<int64_t>(divide_up(wanted, tiles()), 1, batch);
}

cudaError_t grad_sqnorm_tensor_cuda(const GradSqnormTensor& problem, double* partials, float* sums, bool more,
                                    cudaStream_t stream) {
  return problem.half ? launch<__half>(problem, partials, sums, more, stream)
                      : launch<__nv_bfloat16>(problem, partials, sums, more, stream);
}

}  // namespace memloc
