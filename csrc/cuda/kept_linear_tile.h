// Tiles of products of matrices whose lines may be gathered, 64 x 64 to a block: 16-bit elements on tensor cores,
// slices of 64 along the sum copied to shared memory two ahead; others by multiply-adds, the next slice on its way to
// registers.
#pragma once

#include "cuda/grad_sqnorm_tile.h"
#include "cuda/tensor_core.h"
#include "summation.h"

namespace memloc {

constexpr int kTileLines = 64;

template <typename T>
constexpr bool kOnTensorCores = sizeof(T) == 2;

// Sums of two neighbours.
template <typename E>
using Pair = Piece<E, 2>;

// Writes a pair, or adds it, where as many elements are left; in one access where they lie so.
template <bool kAdd, typename T>
__device__ __forceinline__ void put(T* to, const Pair<Compute<T>>& sums, int64_t left) {
  const auto put_one = [&](T& element, int i) {
    element = narrow<T>(kAdd ? compute(element) + sums.element[i] : sums.element[i]);
  };
  if (left > 1 && reinterpret_cast<uintptr_t>(to) % sizeof(Piece<T, 2>) == 0) {
    auto& both = *reinterpret_cast<Piece<T, 2>*>(to);
    Piece<T, 2> elements{};
    if constexpr (kAdd) elements = both;
    put_one(elements.element[0], 0), put_one(elements.element[1], 1);
    if constexpr (sizeof(T) == 2) {  // an assignment would write one by one
      uint32_t bits;
      memcpy(&bits, &elements, sizeof(bits));
      *reinterpret_cast<uint32_t*>(to) = bits;
    } else {
      both = elements;
    }
  } else {
    if (left > 0) put_one(to[0], 0);
    if (left > 1) put_one(to[1], 1);
  }
}

// Lines of elements that lie side by side. Lines that are not there, and those that an index names past the last one,
// are zeros.
template <typename T>
struct Lines {
  const T* data;
  int64_t step;          // between lines
  const int64_t* index;  // of the lines taken; null for one after the other
  int64_t named;         // lines that the index may name
  int64_t lines, length;

  __device__ __forceinline__ const T* line(int64_t i) const {
    if (i >= lines) return nullptr;
    if (index != nullptr) i = index[i];
    return index == nullptr || static_cast<uint64_t>(i) < static_cast<uint64_t>(named) ? data + i * step : nullptr;
  }
  __device__ __forceinline__ bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && step * sizeof(T) % 16 == 0;
  }
};

// For 16-bit elements. A slice has 64 lines of 128 bytes, whose pieces of 16 bytes are permuted, so that eight lanes
// that access a piece of a line each, or the pieces of one, meet no bank twice.
template <typename T>
struct TensorTile {
  static constexpr int kThreads = 128, kStages = 3, kPiece = 8, kPieces = kTileLines / kPiece;
  static constexpr int kSlice = kTileLines * kTileLines;
  static constexpr int kBytes = 2 * kStages * kSlice * sizeof(T);

  float sums[2][4][4] = {};  // of a warp: 2 x 4 fragments of 16 x 8
  T* const slices;

  __device__ __forceinline__ explicit TensorTile(void* shared) : slices(static_cast<T*>(shared)) {}

  __device__ __forceinline__ static int place(int line, int piece) {
    return line * kTileLines + (piece ^ line % kPieces) * kPiece;
  }

  __device__ __forceinline__ static void fetch(T* slice, const Lines<T>& from, int64_t line, int64_t element) {
    const int piece = threadIdx.x % kPieces;
    const bool aligned = from.aligned();
    element += piece * kPiece;
#pragma unroll
    for (int i = threadIdx.x / kPieces; i < kTileLines; i += kThreads / kPieces) {
      const T* const source = from.line(line + i);
      const int64_t left = source == nullptr ? 0 : from.length - element;
      T* const to = slice + place(i, piece);
      if (aligned && (left >= kPiece || left <= 0)) {
        copy_async(to, left > 0 ? source + element : from.data, left > 0);
      } else {
        Piece<T, kPiece> elements;
#pragma unroll
        for (int j = 0; j < kPiece; ++j) elements.element[j] = j < left ? source[element + j] : T{};
        *reinterpret_cast<Piece<T, kPiece>*>(to) = elements;
      }
    }
  }

  // The fragment of 16 lines by 16 along the sum, of the left or of the right operand.
  template <bool kAlongSum, bool kLeft>
  __device__ __forceinline__ static void fragment(uint32_t (&to)[4], const T* slice, int first, int k) {
    const int lane = threadIdx.x % kWarp;
    const int x = kAlongSum == kLeft ? lane % 16 : lane % 8 + lane / 16 * 8;
    const int y = kAlongSum == kLeft ? lane / 16 : lane / 8 % 2;
    if constexpr (kAlongSum) {
      load_matrices(to, slice + place(first + x, k / kPiece + y));
    } else {
      load_matrices_transposed(to, slice + place(k + x, first / kPiece + y));
    }
  }

  // Adds the product of 64 lines of a from m on and of b from n on. kA, kB: whether lines run along the sum, else
  // across.
  template <bool kA, bool kB>
  __device__ __forceinline__ void multiply(const Lines<T>& a, const Lines<T>& b, int64_t m, int64_t n, int64_t depth) {
    const int64_t steps = (depth + kTileLines - 1) / kTileLines;
    const auto fetch_both = [&](int64_t step) {
      if (step < steps) {
        T* const slice = slices + step % kStages * 2 * kSlice;
        const int64_t k = step * kTileLines;
        fetch(slice, a, kA ? m : k, kA ? k : m);
        fetch(slice + kSlice, b, kB ? n : k, kB ? k : n);
      }
      commit_copies();
    };
    const int warp = threadIdx.x / kWarp, left = warp / 2 * 32, right = warp % 2 * 32;
    __syncthreads();  // all are done with the slices of an earlier product
    for (int64_t step = 0; step < kStages - 1; ++step) fetch_both(step);
    for (int64_t step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();  // all see this step's slices, and are done with those of the last step
      fetch_both(step + kStages - 1);
      const T* const slice = slices + step % kStages * 2 * kSlice;
#pragma unroll
      for (int k = 0; k < kTileLines; k += 16) {
        if (step * kTileLines + k >= depth) break;
        uint32_t of_a[2][4], of_b[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          fragment<kA, true>(of_a[i], slice, left + 16 * i, k);
          fragment<kB, false>(of_b[i], slice + kSlice, right + 16 * i, k);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            multiply_add<T>(sums[i][j], of_a[i], {of_b[j / 2][j % 2 * 2], of_b[j / 2][j % 2 * 2 + 1]});
          }
        }
      }
    }
  }

  // Calls take(line of a, line of b, its sum and that of the next one) for all of the tile.
  template <typename Take>
  __device__ __forceinline__ void for_each(const Take& take) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int m = warp / 2 * 32 + lane / 4, n = warp % 2 * 32 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          take(m + 16 * i + 8 * half, n + 8 * j, {sums[i][j][2 * half], sums[i][j][2 * half + 1]});
        }
      }
    }
  }
};

// For float and double.
template <typename T>
struct PlainTile {
  using S = Tile<kTileLines, kTileLines, 4, 4, 16, 2>;
  static constexpr int kThreads = S::kThreads, kAcross = S::kN / S::kThreadN;
  static constexpr int kCount = kTileLines * S::kDepth / kThreads;  // elements of a slice that a thread copies
  struct Slices {
    alignas(16) T a[2][S::kDepth][S::kM + kPad];
    alignas(16) T b[2][S::kDepth][S::kN + kPad];
  };
  static constexpr int kBytes = sizeof(Slices);

  T sums[S::kThreadM][S::kThreadN] = {};
  Slices& slices;

  __device__ __forceinline__ explicit PlainTile(void* shared) : slices(*static_cast<Slices*>(shared)) {}

  template <bool kAlongSum>
  __device__ __forceinline__ static int line(int i) {
    return kAlongSum ? threadIdx.x / S::kDepth + i * (kThreads / S::kDepth) : threadIdx.x % kTileLines;
  }
  template <bool kAlongSum>
  __device__ __forceinline__ static int depth(int i) {
    return kAlongSum ? threadIdx.x % S::kDepth : threadIdx.x / kTileLines + i * (kThreads / kTileLines);
  }

  template <bool kAlongSum>
  __device__ __forceinline__ static void fetch(T (&to)[kCount], const Lines<T>& from, int64_t first, int64_t k) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t across = first + line<kAlongSum>(i), along = k + depth<kAlongSum>(i);
      const T* const source = from.line(kAlongSum ? across : along);
      const int64_t element = kAlongSum ? along : across;
      to[i] = source != nullptr && element < from.length ? source[element] : T{0};
    }
  }

  template <bool kAlongSum>
  __device__ __forceinline__ static void store(const T (&from)[kCount], T (&slice)[S::kDepth][kTileLines + kPad]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) slice[depth<kAlongSum>(i)][line<kAlongSum>(i)] = from[i];
  }

  template <bool kA, bool kB>
  __device__ __forceinline__ void multiply(const Lines<T>& a, const Lines<T>& b, int64_t m, int64_t n, int64_t depth) {
    T of_a[kCount], of_b[kCount], chain[S::kThreadM][S::kThreadN] = {};
    const auto fetch_both = [&](int64_t k) { fetch<kA>(of_a, a, m, k), fetch<kB>(of_b, b, n, k); };
    const auto store_both = [&](int buffer) { store<kA>(of_a, slices.a[buffer]), store<kB>(of_b, slices.b[buffer]); };
    fetch_both(0);
    __syncthreads();  // all are done with the slices of an earlier product
    store_both(0);
    __syncthreads();
    int buffer = 0;
    for (int64_t k = S::kDepth;; k += S::kDepth, buffer ^= 1) {
      const bool more = k < depth;
      if (more) fetch_both(k);
      memloc::multiply<S>(chain, slices.a[buffer], slices.b[buffer], threadIdx.x);
      if (k % kChain == 0) add_up(sums, chain);
      if (!more) break;
      store_both(buffer ^ 1);  // which was multiplied before the last barrier
      __syncthreads();
    }
    add_up(sums, chain);
  }

  template <typename Take>
  __device__ __forceinline__ void for_each(const Take& take) const {
    // as `fragment` deals lines out: pieces of 16 bytes, those of neighbouring threads side by side
    constexpr int kLanes = 16 / sizeof(T) < 4 ? 16 / sizeof(T) : 4, kPieces = 4 / kLanes;
    const auto of = [](int thread, int i) {
      return i / kLanes * (kTileLines / kPieces) + thread * kLanes + i % kLanes;
    };
#pragma unroll
    for (int i = 0; i < S::kThreadM; ++i) {
#pragma unroll
      for (int j = 0; j < S::kThreadN; j += 2) {
        take(of(threadIdx.x / kAcross, i), of(threadIdx.x % kAcross, j), {sums[i][j], sums[i][j + 1]});
      }
    }
  }
};

template <typename T>
using ProductTile = std::conditional_t<kOnTensorCores<T>, TensorTile<T>, PlainTile<T>>;

}  // namespace memloc
