// Memory-bound on the write: a block keeps some rows of a channel's image, between zeros, and the filters of some
// outputs in shared memory; a thread takes up to 16 bytes of neighbouring positions of eight outputs, whose sums stay
// in registers until each is finished and stored. A piece of memory is read in steps of the piece's width by the
// threads of a warp, so the image lies in as many parts as a piece has elements: neighbouring threads meet neighbouring
// banks. What is too large for shared memory goes element by element, straight from global memory.
#include "cuda/ablation_epilogue.h"
#include "host_device.h"
#include "summation.h"

namespace memloc {
namespace {

constexpr int kThreads = 256;
constexpr int kOutputs = 8;                // of a thread
constexpr int64_t kSharedBytes = 24576;    // of the image, and as much of filters
constexpr int64_t kPiecesPerBlock = 1024;  // enough to share an image, few enough to occupy the device

// How a problem is cut: a block takes `groups` times kOutputs outputs at `rows` rows of positions.
struct Cut {
  int64_t positions, columns;  // of all rows, of one
  int64_t rows, row_chunks;
  int64_t groups, group_chunks;
  int64_t image_rows, wide, part;  // of shared memory: image_rows * wide elements in kLanes parts of `part`
  int64_t taps;

  MEMLOC_HOST_DEVICE int64_t items(const AblationProblem& p) const {
    return p.variants * p.batch * row_chunks * group_chunks;
  }
};

template <typename T>
__device__ __forceinline__ Compute<T> weight_at(const AblationProblem& p, const T* weight, int64_t o, int64_t channel,
                                                int64_t tap) {
  const int64_t i = tap / p.x.kernel, j = tap % p.x.kernel;
  return compute(weight[o * p.weight_output + channel * p.weight_input + i * p.weight_row + j * p.weight_column]);
}

// to += from, which becomes zero.
template <typename C, int kLanes>
__device__ __forceinline__ void add_up(C (&to)[kOutputs][kLanes], C (&from)[kOutputs][kLanes]) {
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) to[o][l] += from[o][l], from[o][l] = 0;
  }
}

// kLong: for more kernel offsets than a chain has, whose sums take as many registers again.
template <typename T, int kLanes, bool kLong>
__device__ __forceinline__ void conv2d(const AblationProblem& p, const Cut& cut) {
  using C = Compute<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  C* const filters = reinterpret_cast<C*>(shared);  // [groups][taps][kOutputs]
  C* const image = filters + cut.groups * cut.taps * kOutputs;
  const TypedAblation<T> t(p);
  const int wide = static_cast<int>(cut.wide), part = static_cast<int>(cut.part), taps = static_cast<int>(cut.taps);
  // from one tap to the next, and beyond a row's last to the next row; a dilation that nothing is dilated by may be
  // huge
  const int kernel_x = static_cast<int>(p.x.kernel), next_tap = kernel_x > 1 ? static_cast<int>(p.x.dilation) : 0;
  const int next_row = (p.y.kernel > 1 ? static_cast<int>(p.y.dilation) * wide : 0) - kernel_x * next_tap;
  const int64_t example = p.outputs * cut.positions;
  for (int64_t item = blockIdx.x, items = cut.items(p); item < items; item += gridDim.x) {
    int64_t rest = item;
    const int64_t group_chunk = rest % cut.group_chunks, k = (rest /= cut.group_chunks) % p.variants;
    const int64_t row_chunk = (rest /= p.variants) % cut.row_chunks, b = rest / cut.row_chunks;
    const int64_t first_row = row_chunk * cut.rows, first_output = group_chunk * cut.groups * kOutputs;
    const int64_t channel = p.channels[k];
    const bool exists = channel >= 0 && channel < p.inputs;

    const T* const change = t.change + (k * p.batch + b) * p.y.size * p.x.size;
    for (int i = threadIdx.x; i < cut.image_rows * wide; i += blockDim.x) {
      const int64_t y = first_row * p.y.stride + i / wide - p.y.padding, x = i % wide - p.x.padding;
      const bool inside = exists && y >= 0 && y < p.y.size && x >= 0 && x < p.x.size;
      image[i % kLanes * part + i / kLanes] = inside ? compute(change[y * p.x.size + x]) : C{0};
    }
    for (int i = threadIdx.x; i < cut.groups * taps * kOutputs; i += blockDim.x) {
      const int64_t o = first_output + i / (taps * kOutputs) * kOutputs + i % kOutputs;
      filters[i] = exists && o < p.outputs ? weight_at(p, t.weight, o, channel, i / kOutputs % taps) : C{0};
    }
    __syncthreads();

    const int64_t base = (k * p.batch + b) * example;
    const int64_t from_example = row_of(p, k, b) * example;
    const T* const residual = residual_at(p, t.residual, k, b * example, from_example);
    const int pieces = static_cast<int>(min(cut.rows * cut.columns, cut.positions - first_row * cut.columns)) / kLanes;
    const int columns = static_cast<int>(cut.columns);
    for (int i = threadIdx.x; i < cut.groups * pieces; i += blockDim.x) {
      const int group = i / pieces, position = i % pieces * kLanes;
      const int64_t output = first_output + group * kOutputs;
      if (output >= p.outputs) break;
      int from[kLanes];
#pragma unroll
      for (int l = 0; l < kLanes; ++l) {
        const int row = (position + l) / columns, column = (position + l) % columns;
        from[l] = row * static_cast<int>(p.y.stride) * wide + column * static_cast<int>(p.x.stride);
      }
      C sum[kOutputs][kLanes] = {};
      [[maybe_unused]] C chains[kLong ? kOutputs : 1][kLanes] = {};
      const C* filter = filters + group * taps * kOutputs;
      int offset = 0;
      for (int tap = 0, j = 0; tap < taps; ++tap, filter += kOutputs) {
        if constexpr (kLong) {
          if (tap % kChain == 0) add_up(chains, sum);
        }
        C patch[kLanes];
#pragma unroll
        for (int l = 0; l < kLanes; ++l) {
          const unsigned at = from[l] + offset;
          patch[l] = image[at % kLanes * part + at / kLanes];
        }
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
          const C factor = filter[o];
#pragma unroll
          for (int l = 0; l < kLanes; ++l) sum[o][l] += factor * patch[l];
        }
        offset += next_tap;
        if (++j == kernel_x) j = 0, offset += next_row;
      }
      if constexpr (kLong) add_up(sum, chains);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        if (output + o >= p.outputs) break;
        C scale[kLanes], shift[kLanes];
#pragma unroll
        for (int l = 0; l < kLanes; ++l) {
          scale[l] = value_or(t.scale, output + o, C{1});
          shift[l] = value_or(t.shift, output + o, C{0});
        }
        const int64_t at = (output + o) * cut.positions + first_row * cut.columns + position;
        finish<T, kLanes>(t.result + base, t.output + from_example, residual, at, p.relu, sum[o], scale, shift);
      }
    }
    __syncthreads();  // before the next image
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) conv2d_kernel(const AblationProblem p, const Cut cut) {
  conv2d<T, kLanes, false>(p, cut);
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) long_conv2d_kernel(const AblationProblem p, const Cut cut) {
  conv2d<T, kLanes, true>(p, cut);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) elements_kernel(const AblationProblem p, const Cut cut) {
  using C = Compute<T>;
  const TypedAblation<T> t(p);
  const int64_t example = p.outputs * cut.positions, all = p.batch * example;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < p.variants * all;
       i += gridDim.x * int64_t{kThreads}) {
    const int64_t k = i / all, at = i % all, b = at / example, o = at % example / cut.positions;
    const int64_t row = at % cut.positions / cut.columns, column = at % cut.columns;
    const int64_t channel = p.channels[k];
    const T* const change = t.change + (k * p.batch + b) * p.y.size * p.x.size;
    C sum[1] = {}, chain = 0;
    for (int64_t tap = 0; tap < cut.taps && channel >= 0 && channel < p.inputs; ++tap) {
      if (tap % kChain == 0) sum[0] += chain, chain = 0;
      const int64_t y = row * p.y.stride + tap / p.x.kernel * p.y.dilation - p.y.padding;
      const int64_t x = column * p.x.stride + tap % p.x.kernel * p.x.dilation - p.x.padding;
      if (y < 0 || y >= p.y.size || x < 0 || x >= p.x.size) continue;
      chain += weight_at(p, t.weight, o, channel, tap) * compute(change[y * p.x.size + x]);
    }
    sum[0] += chain;
    const C scale[1] = {value_or(t.scale, o, C{1})}, shift[1] = {value_or(t.shift, o, C{0})};
    const int64_t from_example = row_of(p, k, b) * example;
    const T* const residual = residual_at(p, t.residual, k, b * example, from_example);
    T* const result = t.result + k * all + b * example;
    finish<T, 1>(result, t.output + from_example, residual, at % example, p.relu, sum, scale, shift);
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts a problem for pieces of `lanes` elements that are computed in `width` bytes; false if it does not fit.
bool cut_for(const AblationProblem& p, int lanes, int width, Cut* cut) {
  const int64_t rows = p.y.positions(), most = kSharedBytes / width;
  cut->columns = p.x.positions();
  cut->positions = rows * cut->columns;
  cut->taps = p.y.kernel * p.x.kernel;
  cut->wide = p.x.size + 2 * p.x.padding;
  const int64_t span = p.y.dilation * (p.y.kernel - 1);  // image rows that a row of positions reaches beyond its first
  if (cut->taps * kOutputs > most || cut->wide * (span + 1) > most) return false;
  cut->rows = std::min(rows, (most / cut->wide - span - 1) / p.y.stride + 1);
  if (cut->rows < rows) cut->rows -= cut->rows % lanes;  // every chunk starts at a whole piece
  if (cut->rows == 0) return false;
  cut->row_chunks = divide_up(rows, cut->rows);
  cut->image_rows = (cut->rows - 1) * p.y.stride + span + 1;
  cut->part = divide_up(cut->image_rows * cut->wide, lanes);
  const int64_t pieces = divide_up(cut->rows * cut->columns, lanes), groups = divide_up(p.outputs, kOutputs);
  cut->groups = std::clamp<int64_t>(kPiecesPerBlock / pieces, 1, std::min(groups, most / (cut->taps * kOutputs)));
  cut->group_chunks = divide_up(groups, cut->groups);
  return true;
}

template <typename T, int kLanes = 16 / sizeof(T)>
cudaError_t launch(const AblationProblem& p, cudaStream_t stream) {
  using C = Compute<T>;
  Cut cut{};
  const bool fits = cut_for(p, kLanes, sizeof(C), &cut);
  if (!fits || lanes_for(p, cut.positions, kLanes, sizeof(T)) < kLanes) {
    if constexpr (kLanes > 1) return launch<T, kLanes / 2>(p, stream);
    const int64_t blocks = divide_up(p.variants * p.batch * p.outputs * cut.positions, kThreads);
    elements_kernel<T><<<grid_for(blocks), kThreads, 0, stream>>>(p, cut);
    return cudaGetLastError();
  }
  // no more threads than leave the last turn full
  const int64_t pieces = cut.groups * (cut.rows * cut.columns / kLanes);
  const int64_t even = divide_up(pieces, divide_up(pieces, kThreads));
  const int threads = static_cast<int>(divide_up(std::max<int64_t>(even, 1), 32) * 32);
  const size_t bytes = (cut.groups * cut.taps * kOutputs + cut.part * kLanes) * sizeof(C);
  if constexpr (sizeof(C) < sizeof(double)) {  // whose filters are shorter than two chains
    if (cut.taps > kChain) {
      long_conv2d_kernel<T, kLanes><<<grid_for(cut.items(p)), threads, bytes, stream>>>(p, cut);
      return cudaGetLastError();
    }
  }
  conv2d_kernel<T, kLanes><<<grid_for(cut.items(p)), threads, bytes, stream>>>(p, cut);
  return cudaGetLastError();
}

}  // namespace

cudaError_t conv2d_ablation_cuda(const AblationProblem& problem, cudaStream_t stream) {
  switch (problem.type) {
    case ElementType::kHalf:
      return launch<__half>(problem, stream);
    case ElementType::kBFloat16:
      return launch<__nv_bfloat16>(problem, stream);
    case ElementType::kFloat:
      return launch<float>(problem, stream);
    default:
      return launch<double>(problem, stream);
  }
}

}  // namespace memloc
