// What the CPU kernels share to run at the speed of memory.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

// One function for several instruction sets, picked when the library loads. The x86-64 levels name all that goes with
// AVX2 and AVX-512 (FMA among it) on every vendor's processors. Code in a lambda inside such a function is not cloned.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MEMLOC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEMLOC_CLONES
#endif

namespace memloc {

// From this size on an output does not stay in cache until it is read, so writes go past the cache: a plain write would
// first fetch the line that it overwrites.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// Asks for 2 MiB pages under a large output about to be written. A fresh one costs a page fault per 4 KiB otherwise,
// which is more time than the writing.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (bytes > 0 && end > begin)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may fail
#else
  (void)data, (void)bytes;
#endif
}

inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

#if defined(__SSE2__)
// y[i] = value(i) for i in [0, n), written past the cache in 16-byte pieces; vector(i) gives the piece that starts at
// i.
template <typename T, typename Value, typename Vector>
inline void stream_line(T* y, int64_t n, Value value, Vector vector) {
  constexpr int64_t kLanes = 16 / sizeof(T);
  int64_t i = 0;
  for (; i < n && reinterpret_cast<uintptr_t>(y + i) % 16 != 0; ++i) y[i] = value(i);
  for (; i + kLanes <= n; i += kLanes) _mm_stream_si128(reinterpret_cast<__m128i*>(y + i), vector(i));
  for (; i < n; ++i) y[i] = value(i);
}

template <typename T>
inline __m128i load_vector(const T* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
#endif

template <typename T>
inline void copy_line(T* y, const T* x, int64_t n, [[maybe_unused]] bool stream) {
#if defined(__SSE2__)
  if (stream) {
    return stream_line(y, n, [x](int64_t i) { return x[i]; }, [x](int64_t i) { return load_vector(x + i); });
  }
#endif
  std::memcpy(y, x, n * sizeof(T));
}

template <typename T>
inline void zero_line(T* y, int64_t n, [[maybe_unused]] bool stream) {
#if defined(__SSE2__)
  if (stream) {
    return stream_line(y, n, [](int64_t) { return T{0}; }, [](int64_t) { return _mm_setzero_si128(); });
  }
#endif
  std::memset(y, 0, n * sizeof(T));
}

// y = x where the mask's bits are set, 0 where they are not.
template <typename T>
inline void mask_line(T* y, const T* x, const T* mask, int64_t n, [[maybe_unused]] bool stream) {
#if defined(__SSE2__)
  if (stream) {
    return stream_line(
        y, n, [=](int64_t i) { return static_cast<T>(x[i] & mask[i]); },
        [=](int64_t i) { return _mm_and_si128(load_vector(x + i), load_vector(mask + i)); });
  }
#endif
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] & mask[i];
}

}  // namespace memloc
