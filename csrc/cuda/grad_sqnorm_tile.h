// Tiles of a gradient in the registers of a block, as the direct way multiplies and adds them up.
#pragma once

#include "cuda/element.h"

namespace memloc {

// A tile of kM outputs by kN columns; a thread has kThreadM x kThreadN of it, a slice is kDepth positions.
template <int kM_, int kN_, int kThreadM_, int kThreadN_, int kDepth_, int kBlocks_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kThreadM = kThreadM_, kThreadN = kThreadN_, kDepth = kDepth_;
  static constexpr int kThreads = kM / kThreadM * (kN / kThreadN);
  static constexpr int kBlocks = kBlocks_;  // to a multiprocessor, at least: bounds the registers of a thread
};

// The same where a thread also holds the sum of earlier chains, which may take as many registers again.
template <typename E, typename S>
constexpr int kLongBlocks = sizeof(E) == sizeof(double) || S::kThreadM * S::kThreadN > 32 ? 1 : S::kBlocks;

constexpr int kPad = 4;  // elements behind a line of shared memory, so that lanes along positions hit different banks

template <typename E, int kCount>
struct alignas(sizeof(E) * kCount) Piece {
  E element[kCount];
};

// kCount elements of a line for this thread: pieces of up to 16 bytes, those of neighbouring threads side by side.
template <int kWidth, int kCount, typename E>
__device__ __forceinline__ void fragment(E (&to)[kCount], const E (&line)[kWidth + kPad], int thread) {
  constexpr int kLanes = kCount < 16 / static_cast<int>(sizeof(E)) ? kCount : 16 / static_cast<int>(sizeof(E));
  constexpr int kPieces = kCount / kLanes;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const auto piece = *reinterpret_cast<const Piece<E, kLanes>*>(&line[i * (kWidth / kPieces) + thread * kLanes]);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) to[i * kLanes + j] = piece.element[j];
  }
}

template <typename S, typename E>
__device__ __forceinline__ void multiply(E (&tile)[S::kThreadM][S::kThreadN], const E (&g)[S::kDepth][S::kM + kPad],
                                         const E (&x)[S::kDepth][S::kN + kPad], int thread) {
  constexpr int kAcross = S::kN / S::kThreadN;
#pragma unroll
  for (int k = 0; k < S::kDepth; ++k) {
    E left[S::kThreadM], right[S::kThreadN];
    fragment<S::kM>(left, g[k], thread / kAcross);
    fragment<S::kN>(right, x[k], thread % kAcross);
#pragma unroll
    for (int i = 0; i < S::kThreadM; ++i) {
#pragma unroll
      for (int j = 0; j < S::kThreadN; ++j) tile[i][j] += left[i] * right[j];
    }
  }
}

// to += tile, which becomes zero.
template <typename E, int kM, int kN>
__device__ __forceinline__ void add_up(E (&to)[kM][kN], E (&tile)[kM][kN]) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) to[i][j] += tile[i][j], tile[i][j] = 0;
  }
}

}  // namespace memloc
