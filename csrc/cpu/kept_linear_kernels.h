// The CPU kernel of a linear layer's kept channels, and how an instruction set provides it.
#pragma once

#include <cstdint>

#include "cpu/compute.h"
#include "cpu/instruction_set.h"
#include "summation.h"

namespace memloc {

constexpr int64_t kKeptColumns = 64;  // of a result, at most, at a time: whole tiles

// Rows of a matrix: all of them, or those of an index.
template <typename E>
struct IndexedRows {
  E* data;
  int64_t step;
  const int64_t* index = nullptr;

  E* row(int64_t i) const { return data + (index != nullptr ? index[i] : i) * step; }
};

// result.row(i)[j] (+)= first[i] + sum over k < depth of a.row(i)[k * a_step] * b.row(k)[j * b_step], for i < count.
// Without add it is written: with the bias of the row that index names, or 0.
template <typename E>
struct KeptProduct {
  IndexedRows<E> result;
  IndexedRows<const E> a, b;
  int64_t a_step, b_step;
  int64_t count, depth;
  bool add;
  const E* bias;  // null if there is none
};

template <typename E>
struct KeptLinearKernels {
  void (*product)(const KeptProduct<E>&, int64_t begin, int64_t end);  // at most kKeptColumns of the result
};

template <InstructionSet kSet, typename E>
KeptLinearKernels<E> kept_linear_kernels();

}  // namespace memloc
