// In place of csrc/cuda/tensor_core.h, which says what each function does: the same, by the lanes of a warp together.
// A copy takes its place in shared memory, which is filled with NaN, when it starts, and its values arrive at the wait.
#pragma once

#include "cuda/element.h"

namespace cuda_on_cpu {

void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(int pending);
void load_matrices(uint32_t* to, const void* row, bool transposed);

// Of fragments whose registers hold `count` elements each, which `element` reads.
void multiply_add(float* d, const uint32_t* a, const uint32_t* b, int count, float (*element)(uint32_t bits, int i));

}  // namespace cuda_on_cpu

namespace memloc {

inline void copy_async(void* shared, const void* global, bool valid) { cuda_on_cpu::copy_async(shared, global, valid); }

inline void commit_copies() { cuda_on_cpu::commit_copies(); }

template <int kPending>
void wait_copies() {
  cuda_on_cpu::wait_copies(kPending);
}

inline void load_matrices(uint32_t (&to)[4], const void* shared_row) {
  cuda_on_cpu::load_matrices(to, shared_row, false);
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* shared_row) {
  cuda_on_cpu::load_matrices(to, shared_row, true);
}

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  cuda_on_cpu::multiply_add(d, a, b, 2, [](uint32_t bits, int i) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&bits) + 2 * i, 2);
    return compute(value);
  });
}

inline uint32_t to_tf32(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return std::isnan(value) ? 0x7FFFFFFF : (bits + 0x1000) & ~uint32_t{0x1FFF};
}

inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_on_cpu::multiply_add(d, a, b, 1, [](uint32_t bits, int) {
    bits &= ~uint32_t{0x1FFF};
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  });
}

}  // namespace memloc
