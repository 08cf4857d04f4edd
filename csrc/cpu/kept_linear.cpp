// A linear layer of which each run of rows has some channels: the layer, and its gradients by rows and weight, on the
// CPU; and matrices turned over, so that the channels of every weight are rows. The products are in
// kept_linear_kernels.inc, compiled once per instruction set. No memory beyond the results. Threads share blocks of
// columns, of each run where runs write different memory: a result does not depend on their number, and runs are added
// to a weight in their order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "cpu/element_types.h"
#include "cpu/instruction_set.h"
#include "cpu/kept_linear_kernels.h"
#include "cpu/simd.h"
#include "kept_linear_args.h"

namespace memloc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTurned = 32;  // rows and columns of a block that is turned over

template <typename E>
KeptLinearKernels<E> kernels() {
  return for_this_machine([](auto set) { return kept_linear_kernels<set.value, E>(); });
}

void check(const KeptLinearArgs& args) {
  args.check();
  const int64_t* const channels = static_cast<const int64_t*>(args.channels.const_data_ptr());
  for (int64_t i = 0; i < args.channels.numel(); ++i) {
    MEMLOC_CHECK(channels[i] >= 0 && channels[i] < args.weight.size(0), args.op, ": channels must be in [0, ",
                 args.weight.size(0), "), got ", channels[i]);
  }
}

enum class Result { kValues, kDense, kWeight };

template <typename E>
void run(const KeptLinearArgs& args, Result which) {
  const auto data = [&](const Tensor& t, Result as) {
    return static_cast<E*>(as == which ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()));
  };
  const KeptLinearKernels<E> kernel = kernels<E>();
  const int64_t* const channels = static_cast<const int64_t*>(args.channels.const_data_ptr());
  const E* bias = args.bias ? static_cast<const E*>(args.bias->const_data_ptr()) : nullptr;
  std::vector<KeptProduct<E>> products;
  std::vector<std::pair<int64_t, int64_t>> tasks;  // a product, and a column of its result
  E* values = data(args.values, Result::kValues);
  E* const all_dense = data(args.dense, Result::kDense);
  E* const all_weight = data(args.weight, Result::kWeight);
  for (int64_t r = 0; r < args.runs(); ++r) {
    const int64_t rows = args.rows[r + 1] - args.rows[r], kept = args.ends[r + 1] - args.ends[r];
    const IndexedRows<E> dense{all_dense + args.rows[r] * args.dense.stride(0), args.dense.stride(0)};
    const IndexedRows<E> weight{all_weight, args.weight.stride(0), channels + args.ends[r]}, own{values, rows};
    const IndexedRows<const E> of_dense{dense.data, dense.step}, of_weight{weight.data, weight.step, weight.index};
    KeptProduct<E> p;
    int64_t columns = args.dense.size(1);
    if (which == Result::kValues) {
      p = {own, of_weight, {dense.data, 1}, 1, dense.step, kept, columns, false, bias};
      columns = rows;
    } else if (which == Result::kDense) {
      p = {dense, {values, 1}, of_weight, rows, 1, rows, kept, true, nullptr};
    } else {
      p = {weight, {values, rows}, of_dense, 1, 1, kept, rows, true, nullptr};
    }
    values += rows * kept;
    if (rows == 0 || kept == 0) continue;
    const int64_t number = static_cast<int64_t>(products.size());
    products.push_back(p);
    if (which == Result::kWeight && number > 0) continue;  // its tasks do the columns of all runs
    for (int64_t column = 0; column < columns; column += kKeptColumns) tasks.emplace_back(number, column);
  }
  const int64_t columns = args.dense.size(1);
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const auto [number, column] = tasks[t];
      if (which == Result::kWeight) {
        for (const KeptProduct<E>& p : products) kernel.product(p, column, std::min(column + kKeptColumns, columns));
      } else {
        const KeptProduct<E>& p = products[number];
        const int64_t width = which == Result::kValues ? p.result.step : columns;
        kernel.product(p, column, std::min(column + kKeptColumns, width));
      }
    }
  });
}

void run(const KeptLinearArgs& args, Result which) {
  check(args);
  if (args.values.scalar_type() == ScalarType::Double) {
    run<double>(args, which);
  } else {
    run<float>(args, which);
  }
}

void kept_linear(Tensor values, const Tensor& dense, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& channels, std::vector<int64_t> rows, std::vector<int64_t> ends) {
  run({"kept_linear_", values, dense, weight, bias, channels, rows, ends}, Result::kValues);
}

void kept_linear_input(Tensor dense, const Tensor& values, const Tensor& weight, const Tensor& channels,
                       std::vector<int64_t> rows, std::vector<int64_t> ends) {
  run({"kept_linear_input_", values, dense, weight, std::nullopt, channels, rows, ends}, Result::kDense);
}

void kept_linear_weight(Tensor weight, const Tensor& values, const Tensor& dense, const Tensor& channels,
                        std::vector<int64_t> rows, std::vector<int64_t> ends) {
  run({"kept_linear_weight_", values, dense, weight, std::nullopt, channels, rows, ends}, Result::kWeight);
}

// to [columns, rows] = from [rows, columns] turned over, for columns [begin, end); rows of both dense in memory. Blocks
// are read row by row first: elements of a column lie in the same places of a cache where rows are a power of two
// apart.
template <typename T>
void turn(T* to, const T* from, int64_t rows, int64_t step, int64_t begin, int64_t end) {
  T block[kTurned][kTurned + 1];
  for (int64_t column = begin; column < end; column += kTurned) {
    const int64_t width = std::min(kTurned, end - column);
    for (int64_t row = 0; row < rows; row += kTurned) {
      const int64_t height = std::min(kTurned, rows - row);
      for (int64_t r = 0; r < height; ++r) {
        const T* const line = from + (row + r) * step + column;
        for (int64_t c = 0; c < width; ++c) block[r][c] = line[c];
      }
      for (int64_t c = 0; c < width; ++c) {
        T* const line = to + (column + c) * rows + row;
        for (int64_t r = 0; r < height; ++r) line[r] = block[r][c];
      }
    }
  }
}

Tensor turned(const Tensor& matrix) {
  const char* const op = "turned: ";
  MEMLOC_CHECK(matrix.defined(), op, "matrix must be a tensor, got None");
  MEMLOC_CHECK(element_size(matrix) != 0, op, "matrix must have dtype float16, bfloat16, float32 or float64, got ",
               torch::headeronly::toString(matrix.scalar_type()));
  MEMLOC_CHECK(matrix.dim() == 2 && (matrix.size(1) <= 1 || matrix.stride(1) == 1), op,
               "matrix must have 2 dimensions, its rows dense in memory, got shape ", shape_of(matrix));
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const std::vector<int64_t> sizes{columns, rows};
  Tensor result = torch::stable::new_empty(matrix, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
  if (result.numel() == 0) return result;
  prefer_huge_pages(result.mutable_data_ptr(), result.numel() * element_size(matrix));
  with_bits(matrix, [&](auto bits) {
    using T = decltype(bits);
    T* const to = static_cast<T*>(result.mutable_data_ptr());
    const T* const from = static_cast<const T*>(matrix.const_data_ptr());
    const int64_t step = matrix.stride(0);
    torch::stable::parallel_for(0, columns, std::max<int64_t>(kTurned, 32768 / rows),
                                [&](int64_t begin, int64_t end) { turn(to, from, rows, step, begin, end); });
  });
  return result;
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("kept_linear_", TORCH_BOX(&memloc::kept_linear));
  m.impl("kept_linear_input_", TORCH_BOX(&memloc::kept_linear_input));
  m.impl("kept_linear_weight_", TORCH_BOX(&memloc::kept_linear_weight));
  m.impl("turned", TORCH_BOX(&memloc::turned));
}
