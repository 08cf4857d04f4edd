// The sum over pairs of positions of the Gram ways. Bound by the loads of the pixels' Gram, one for each pair and
// kernel offset, most of which hit the first-level cache: a row of that Gram serves neighbouring positions and offsets.
//
// A thread holds a right position and a strip of left ones, neighbours in a row of the image: their sums over the
// kernel offsets are in registers, and lanes along the right positions read neighbouring elements. Grams are symmetric,
// so a pair counts twice in one order and not in the other. A block takes every parts-th strip of one example.
#include "cuda/grad_sqnorm_kernel.h"
#include "cuda/grad_sqnorm_reduce.h"
#include "summation.h"

namespace memloc {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 6;  // to a multiprocessor, at least: leaves a thread 80 registers
constexpr int kStrip = 8;
constexpr int kOffsets = 16;  // of a block's rows and columns
static_assert(kOffsets * kOffsets <= kChain, "a block of kernel offsets is added up one by one");

template <typename E>
struct Pairs {
  const E *positions, *pixels;
  int64_t count;
  GramAxis y, x;
  int left_columns, right_columns, right_from;  // right positions start right_from columns before the left ones
  int64_t strips;
  int strips_across;
  int64_t left, right, left_pixels, right_pixels;  // sizes of the Grams
  uint32_t apart;                                  // right_pixels
};

// sum[m] = sum over a block of kernel offsets, from (first_i, first_j) on, of the Gram of the pixels that left position
// (row, column + m) and right position (right_row, right_column) meet.
template <bool kLong, typename E>
__device__ __forceinline__ void sum_offsets(E (&sum)[kStrip], const Pairs<E>& p, const E* __restrict__ pixels,
                                            int first_i, int first_j, int row, int column, int right_row,
                                            int right_column) {
#pragma unroll
  for (int m = 0; m < kStrip; ++m) sum[m] = 0;
  const int first_v = row + p.y.left_shift, first_w = right_row + p.y.right_shift;
  const int first_u = column + p.x.left_shift, first_z = right_column + p.x.right_shift;
  // one more kernel offset moves along the diagonal of the pixels' Gram
  const int64_t step_i = p.y.step * (p.x.left_pixels * p.right_pixels + p.x.right_pixels);
  const int64_t step_j = p.x.step * (p.right_pixels + 1);
  const E* line = pixels + (static_cast<int64_t>(first_v) * p.x.left_pixels + first_u) * p.right_pixels +
                  static_cast<int64_t>(first_w) * p.x.right_pixels + first_z + first_i * step_i + first_j * step_j;
  const uint32_t apart = p.apart;
  for (int i = first_i; i < (kLong ? min(first_i + kOffsets, p.y.offsets) : p.y.offsets); ++i, line += step_i) {
    const int v = first_v + i * p.y.step, w = first_w + i * p.y.step;
    if (!GramAxis::inside(v, p.y.left_pixels) || !GramAxis::inside(w, p.y.right_pixels)) continue;
    const E* from = line;
    int u = first_u + first_j * p.x.step, z = first_z + first_j * p.x.step;
    const int end = kLong ? min(first_j + kOffsets, p.x.offsets) : p.x.offsets;
#pragma unroll 1
    for (int j = first_j; j < end; ++j, from += step_j, u += p.x.step, z += p.x.step) {
      if (!GramAxis::inside(z, p.x.right_pixels)) continue;
#pragma unroll
      for (int m = 0; m < kStrip; ++m) {
        if (GramAxis::inside(u + m, p.x.left_pixels)) sum[m] += from[uint64_t{apart} * m];
      }
    }
  }
}

// Sums over a block of offsets are of E; their products with the positions' Gram cancel over the pairs, so those are
// added in double. That is one conversion and one multiply-add for all the offsets of a block and a pair.
template <typename E, bool kLong>
__global__ void __launch_bounds__(kThreads, (kLong ? kBlocks - 1 : kBlocks))
    gram_kernel(const Pairs<E> p, double* __restrict__ partials, int parts) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t items = p.count * parts;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t n = item / parts;
    const E* const positions = p.positions + n * p.left * p.right;
    const E* const pixels = p.pixels + n * p.left_pixels * p.right_pixels;
    double total = 0;
    for (int64_t strip = item % parts * blockDim.y + threadIdx.y; strip < p.strips;
         strip += static_cast<int64_t>(parts) * blockDim.y) {
      const int row = static_cast<int>(strip / p.strips_across);
      const int column = static_cast<int>(strip % p.strips_across) * kStrip;
      const int64_t own = static_cast<int64_t>(row) * p.right_columns + column + p.right_from;
      const E* const weights = positions + (static_cast<int64_t>(row) * p.left_columns + column) * p.right;
      for (int64_t t = own + threadIdx.x; t < p.right; t += blockDim.x) {
        const int right_row = static_cast<int>(static_cast<uint32_t>(t) / static_cast<uint32_t>(p.right_columns));
        const int right_column = static_cast<int>(t - static_cast<int64_t>(right_row) * p.right_columns);
        for (int i = 0; i < (kLong ? p.y.offsets : 1); i += kOffsets) {
          for (int j = 0; j < (kLong ? p.x.offsets : 1); j += kOffsets) {
            E sum[kStrip];
            sum_offsets<kLong>(sum, p, pixels, i, j, row, column, right_row, right_column);
#pragma unroll
            for (int m = 0; m < kStrip; ++m) {
              if (column + m < p.left_columns && t >= own + m) {
                const double product = static_cast<double>(weights[m * p.right + t]) * static_cast<double>(sum[m]);
                total += t == own + m ? product : 2 * product;
              }
            }
          }
        }
      }
    }
    total = block_sum(total, thread, kThreads);
    if (thread == 0) partials[item] += total;
  }
}

// Lanes along the right positions: a power of two, at most the block.
unsigned lanes_for(int64_t right) {
  unsigned lanes = 1;
  while (lanes < right && lanes < kThreads) lanes *= 2;
  return lanes;
}

int64_t strips_across(const Box& left) { return (left.x.count + kStrip - 1) / kStrip; }

template <typename E>
cudaError_t launch(const GramPairs& g, double* partials, int64_t parts, cudaStream_t stream) {
  const Box &left = g.band.left, &right = g.band.right;
  Pairs<E> p{static_cast<const E*>(g.positions), static_cast<const E*>(g.pixels), g.count, g.y, g.x};
  p.left_columns = static_cast<int>(left.x.count);
  p.right_columns = static_cast<int>(right.x.count);
  p.right_from = static_cast<int>(left.x.first - right.x.first);
  p.strips_across = static_cast<int>(strips_across(left));
  p.strips = left.y.count * p.strips_across;
  p.left = left.count();
  p.right = right.count();
  p.left_pixels = static_cast<int64_t>(g.y.left_pixels) * g.x.left_pixels;
  p.right_pixels = static_cast<int64_t>(g.y.right_pixels) * g.x.right_pixels;
  p.apart = static_cast<uint32_t>(p.right_pixels);
  const unsigned lanes = lanes_for(p.right);
  const dim3 block(lanes, kThreads / lanes);
  const int each = static_cast<int>(parts);
  if (int64_t{p.y.offsets} * p.x.offsets > kChain) {
    gram_kernel<E, true><<<grid_for(g.count * parts), block, 0, stream>>>(p, partials, each);
  } else {
    gram_kernel<E, false><<<grid_for(g.count * parts), block, 0, stream>>>(p, partials, each);
  }
  return cudaGetLastError();
}

}  // namespace

int64_t grad_sqnorm_gram_parts(const Bands& bands, int64_t count) {
  constexpr int64_t kWanted = 2048;  // about twice what a large device holds at a time
  const Band first = bands[0];       // the largest
  const int64_t rows = kThreads / lanes_for(first.right.count());
  const int64_t most = (first.left.y.count * strips_across(first.left) + rows - 1) / rows;
  return std::clamp<int64_t>((kWanted + count - 1) / count, 1, most);
}

cudaError_t grad_sqnorm_gram_cuda(const GramPairs& pairs, double* partials, int64_t parts, cudaStream_t stream) {
  return pairs.is_double ? launch<double>(pairs, partials, parts, stream)
                         : launch<float>(pairs, partials, parts, stream);
}

}  // namespace memloc
