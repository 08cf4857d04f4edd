// Kernels for test_tensor_core.py, as a program for a device or for its stand-in: `./tensor_core NAME` reads a and b,
// [16, 16] each, and prints what the kernel wrote.
#include <cmath>
#include <cstdio>
#include <map>
#include <string>

#include "cuda/tensor_core.h"

#ifndef __CUDACC__
#define __managed__
cudaError_t cudaDeviceSynchronize() { return cudaGetLastError(); }
extern "C" void cuda_on_cpu_banks(uint64_t* of);
#endif

using namespace memloc;

constexpr int kSize = 16, kSizes = kSize * kSize;

__device__ __managed__ float a[kSizes], b[kSizes], out[kSizes];

// Accumulators of two tiles side by side, to out [16, 16].
__device__ void store(const float (&sums)[2][4]) {
  const int lane = threadIdx.x;
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * kSize + n * 8 + lane % 4 * 2 + i % 2] = sums[n][i];
  }
}

// 1 + a b. kTurned: b lies in shared memory column by column.
template <typename T, bool kTurned>
__global__ void product() {
  __shared__ alignas(16) T left[kSize][kSize];
  __shared__ alignas(16) T right[kSize][kSize];
  const int lane = threadIdx.x;
  for (int i = lane; i < kSizes; i += kWarp) {
    const int row = i / kSize, column = i % kSize;
    left[row][column] = narrow<T>(a[i]);
    (kTurned ? right[column][row] : right[row][column]) = narrow<T>(b[i]);
  }
  __syncthreads();
  uint32_t of_a[4], of_b[4];
  load_matrices(of_a, &left[lane % 16][lane / 16 * 8]);
  if (kTurned) {
    load_matrices(of_b, &right[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
  } else {
    load_matrices_transposed(of_b, &right[lane % 16][lane / 16 * 8]);
  }
  float sums[2][4] = {{1, 1, 1, 1}, {1, 1, 1, 1}};
  for (int n = 0; n < 2; ++n) multiply_add<T>(sums[n], of_a, {of_b[2 * n], of_b[2 * n + 1]});
  store(sums);
}

__global__ void product_tf32() {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  float sums[2][4] = {{1, 1, 1, 1}, {1, 1, 1, 1}};
  for (int k = column; k < kSize; k += 8) {
    uint32_t of_a[4];
    for (int i = 0; i < 4; ++i) of_a[i] = to_tf32(a[(row + i % 2 * 8) * kSize + k + i / 2 * 4]);
    for (int n = 0; n < 2; ++n) {
      const float* const from = b + k * kSize + n * 8 + row;
      multiply_add_tf32(sums[n], of_a, {to_tf32(from[0]), to_tf32(from[4 * kSize])});
    }
  }
  store(sums);
}

// Two groups of copies, of a's first and of its second half, of which every other one is zeros, and a copy that no
// group has; every thread then reads what its neighbour's copies wrote.
template <int kPending>
__global__ void copied() {
  __shared__ alignas(16) float to[3][kSizes / 2];
  const int lane = threadIdx.x, place = 4 * lane, neighbour = 4 * (kWarp - 1 - lane);
  for (int i = 0; i < 4; ++i) to[0][place + i] = to[1][place + i] = to[2][place + i] = 7;
  copy_async(&to[0][place], a + place, true);
  commit_copies();
  copy_async(&to[1][place], lane % 2 ? a + kSizes / 2 + place : nullptr, lane % 2);
  commit_copies();
  copy_async(&to[2][place], a, true);
  if constexpr (kPending < 3) wait_copies<kPending>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    out[neighbour + i] = to[0][neighbour + i], out[kSizes / 2 + neighbour + i] = to[1][neighbour + i];
  }
#ifndef __CUDACC__
  if (!std::isnan(to[2][neighbour])) cuda_on_cpu::stop("a copy that was not waited for has arrived");
#endif
}

// Copies a row per lane, rows so many bytes apart, and loads them.
template <int kPitch>
__global__ void rows_apart() {
  __shared__ alignas(16) unsigned char rows[kWarp * kPitch];
  unsigned char* const own = rows + threadIdx.x * kPitch;
  copy_async(own, a, true);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  uint32_t loaded[4];
  load_matrices(loaded, own);
  out[threadIdx.x] = static_cast<float>(loaded[0]);
}

__global__ void same_row() {
  __shared__ alignas(16) float row[4];
  row[threadIdx.x % 4] = 0;
  __syncthreads();
  uint32_t loaded[4];
  load_matrices(loaded, row);
  out[threadIdx.x] = static_cast<float>(loaded[0]);
}

__global__ void some_lanes() {
  float sums[4] = {};
  if (threadIdx.x < 16) multiply_add<__half>(sums, {0, 0, 0, 0}, {0, 0});
}

__global__ void different_instructions() {
  __shared__ alignas(16) float row[4];
  uint32_t loaded[4];
  float sums[4] = {};
  if (threadIdx.x < 16) {
    load_matrices(loaded, row);
  } else {
    multiply_add<__half>(sums, {0, 0, 0, 0}, {0, 0});
  }
}

__global__ void misaligned() {
  __shared__ alignas(16) float row[8];
  copy_async(row + 1, a, true);
}

__global__ void elsewhere(float* to) { copy_async(to, a, true); }

int main(int, char** arguments) {
  for (float* operand : {a, b}) {
    for (int i = 0; i < kSizes; ++i) {
      if (std::scanf("%f", operand + i) != 1) return 1;
    }
  }
  const std::map<std::string, void (*)()> kernels{
      {"float16", [] { product<__half, false><<<1, kWarp, 0, nullptr>>>(); }},
      {"float16 turned", [] { product<__half, true><<<1, kWarp, 0, nullptr>>>(); }},
      {"bfloat16", [] { product<__nv_bfloat16, false><<<1, kWarp, 0, nullptr>>>(); }},
      {"bfloat16 turned", [] { product<__nv_bfloat16, true><<<1, kWarp, 0, nullptr>>>(); }},
      {"tf32", [] { product_tf32<<<1, kWarp, 0, nullptr>>>(); }},
      {"copied 0", [] { copied<0><<<1, kWarp, 0, nullptr>>>(); }},
      {"copied 1", [] { copied<1><<<1, kWarp, 0, nullptr>>>(); }},
      {"copied 2", [] { copied<2><<<1, kWarp, 0, nullptr>>>(); }},
      {"copied 3", [] { copied<3><<<1, kWarp, 0, nullptr>>>(); }},
      {"rows 16", [] { rows_apart<16><<<1, kWarp, 0, nullptr>>>(); }},
      {"rows 32", [] { rows_apart<32><<<1, kWarp, 0, nullptr>>>(); }},
      {"rows 128", [] { rows_apart<128><<<1, kWarp, 0, nullptr>>>(); }},
      {"rows 144", [] { rows_apart<144><<<1, kWarp, 0, nullptr>>>(); }},
      {"same row", [] { same_row<<<1, kWarp, 0, nullptr>>>(); }},
      {"some lanes", [] { some_lanes<<<1, kWarp, 0, nullptr>>>(); }},
      {"different instructions", [] { different_instructions<<<1, kWarp, 0, nullptr>>>(); }},
      {"misaligned", [] { misaligned<<<1, kWarp, 0, nullptr>>>(); }},
      {"elsewhere", [] { elsewhere<<<1, kWarp, 0, nullptr>>>(out); }},
  };
  kernels.at(arguments[1])();
  if (cudaGetLastError() != cudaSuccess || cudaDeviceSynchronize() != cudaSuccess) return 2;
  for (float value : out) std::printf("%.9g ", value);
#ifndef __CUDACC__
  uint64_t banks[2];
  cuda_on_cpu_banks(banks);
  std::printf("\n%d %d\n", static_cast<int>(banks[0]), static_cast<int>(banks[1]));
#endif
}
