// What stands before and after the direct way on tensor cores, both memory-bound: operands that do not lie as it reads
// them are copied once, with channels as neighbours; and the sums of the splits of a batch are added up.
#include "cuda/element.h"
#include "cuda/grad_sqnorm_tensor.h"

namespace memloc {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = kWarp, kChannels = 64;  // of a tile

struct Copy {
  const uint16_t* from;
  ImageView view;
  int64_t pixels, columns, groups, channels, padded;
  int64_t tiles_c, tiles_p, items;
  uint16_t* to;
};

// A tile of pixels by channels goes through shared memory: lanes run along pixels when it is read, along channels, two
// at a time, when it is written.
__global__ void __launch_bounds__(kThreads) pack_kernel(const Copy c) {
  constexpr int kRows = kThreads / kWarp, kPairs = kChannels / 2;
  __shared__ uint16_t tile[kPixels][kChannels + 2];
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  for (int64_t item = blockIdx.x; item < c.items; item += gridDim.x) {
    const int64_t first_c = item % c.tiles_c * kChannels, first_p = item / c.tiles_c % c.tiles_p * kPixels;
    const int64_t group = item / (c.tiles_c * c.tiles_p) % c.groups, b = item / (c.tiles_c * c.tiles_p * c.groups);
    const int64_t pixel = first_p + lane;
    const uint16_t* const from = c.from + b * c.view.batch + pixel / c.columns * c.view.row +
                                 pixel % c.columns * c.view.column + (group * c.channels + first_c) * c.view.channel;
#pragma unroll
    for (int i = 0; i < kChannels; i += kRows) {
      const bool there = pixel < c.pixels && first_c + i + row < c.channels;
      tile[lane][i + row] = there ? from[(i + row) * c.view.channel] : uint16_t{0};
    }
    __syncthreads();
    if (first_c + 2 * lane < c.padded) {
#pragma unroll
      for (int i = 0; i < kPixels; i += kRows) {
        if (first_p + i + row >= c.pixels) continue;
        uint16_t* const to = c.to + ((b * c.pixels + first_p + i + row) * c.groups + group) * c.padded + first_c;
        reinterpret_cast<uint32_t*>(to)[lane] = reinterpret_cast<const uint32_t*>(tile[i + row])[lane];
      }
    }
    __syncthreads();  // before the next tile is read
  }
  static_assert(kPairs == kWarp, "a lane writes one pair of channels");
}

// Lanes run along the channels of sums, which is read once; neighbours of out are offsets.
__global__ void __launch_bounds__(kThreads)
    add_splits_kernel(const float* __restrict__ sums, int64_t splits, int64_t size, int64_t outputs,
                      int64_t padded_outputs, int64_t inputs, int64_t padded_inputs, int64_t offsets,
                      float* __restrict__ out) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < size; i += gridDim.x * int64_t{kThreads}) {
    const int64_t channel = i % padded_inputs, offset = i / padded_inputs % offsets;
    const int64_t row = i / (padded_inputs * offsets), group = row / padded_outputs, output = row % padded_outputs;
    if (channel >= inputs || output >= outputs) continue;
    float sum = 0;
#pragma unroll 4
    for (int64_t split = 0; split < splits; ++split) sum += sums[split * size + i];
    out[((group * outputs + output) * inputs + channel) * offsets + offset] = sum;
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

cudaError_t grad_sqnorm_pack_cuda(const ImageView& from, int64_t count, int64_t rows, int64_t columns, int64_t groups,
                                  int64_t channels, void* to, cudaStream_t stream) {
  Copy c{static_cast<const uint16_t*>(from.data), from, rows * columns, columns, groups, channels, padded(channels)};
  c.tiles_c = divide_up(c.padded, kChannels), c.tiles_p = divide_up(c.pixels, kPixels);
  c.items = count * groups * c.tiles_c * c.tiles_p, c.to = static_cast<uint16_t*>(to);
  pack_kernel<<<grid_for(c.items), kThreads, 0, stream>>>(c);
  return cudaGetLastError();
}

cudaError_t grad_sqnorm_add_splits_cuda(const float* sums, int64_t splits, const GradSqnormShape& shape, float* out,
                                        cudaStream_t stream) {
  const int64_t offsets = shape.y.kernel * shape.x.kernel, outputs = padded(shape.outputs);
  const int64_t inputs = padded(shape.inputs), size = shape.groups * outputs * offsets * inputs;
  add_splits_kernel<<<grid_for(divide_up(size, kThreads)), kThreads, 0, stream>>>(
      sums, splits, size, shape.outputs, outputs, shape.inputs, inputs, offsets, out);
  return cudaGetLastError();
}

}  // namespace memloc
