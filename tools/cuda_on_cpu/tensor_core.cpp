// Asynchronous copies, and what the lanes of a warp do together on tensor cores. Counts how often an access to shared
// memory has to be repeated because lanes need different words of a bank.
#include "cuda/tensor_core.h"

#include <algorithm>
#include <array>
#include <deque>
#include <utility>
#include <vector>

namespace cuda_on_cpu {
namespace {

constexpr int kWarp = 32;
constexpr int kRow = 16;   // bytes of a copy, and of a row of a matrix
constexpr int kLanes = 8;  // whose rows take all banks, if each goes to banks of its own

struct Copy {
  void* shared;
  const void* global;  // null for zeros
};

struct Thread {
  std::deque<std::vector<Copy>> groups;  // committed ones
  std::vector<Copy> open;                // the group that is not
  std::vector<const void*> places;       // where copies went since the last barrier
};

std::vector<Thread> threads;
uint64_t accesses, repeats;

// An access by so many lanes at most, each to a row.
void count(const void* const* rows, int lanes) {
  std::array<int, kLanes> turns{};
  for (int i = 0; i < lanes; ++i) {
    const bool first = std::find(rows, rows + i, rows[i]) == rows + i;
    turns[reinterpret_cast<uintptr_t>(rows[i]) / kRow % kLanes] += first;
  }
  if (lanes > 0) ++accesses, repeats += *std::max_element(turns.begin(), turns.end()) - 1;
}

void check(const void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % kRow != 0 || reinterpret_cast<uintptr_t>(global) % kRow != 0) {
    stop("an address that is no multiple of 16");
  }
  if (!in_shared_memory(shared, kRow)) stop("an address outside of shared memory");
}

Thread& self() {
  if (threads.size() <= static_cast<size_t>(thread_number())) threads.resize(thread_number() + 1);
  return threads[thread_number()];
}

}  // namespace

void start_block() { threads.clear(); }

// The n-th copies of a warp's lanes since the last barrier are one instruction.
void reach_barrier() {
  for (size_t first = 0; first < threads.size(); first += kLanes) {
    const size_t last = std::min(first + kLanes, threads.size());
    for (size_t n = 0, found = 1; found > 0; ++n) {
      const void* rows[kLanes];
      found = 0;
      for (size_t i = first; i < last; ++i) {
        if (n < threads[i].places.size()) rows[found++] = threads[i].places[n];
      }
      count(rows, static_cast<int>(found));
    }
    for (size_t i = first; i < last; ++i) threads[i].places.clear();
  }
}

void copy_async(void* shared, const void* global, bool valid) {
  check(shared, valid ? global : nullptr);
  std::memset(shared, 0xFF, kRow);
  self().open.push_back({shared, valid ? global : nullptr});
  self().places.push_back(shared);
}

void commit_copies() { self().groups.push_back(std::exchange(self().open, {})); }

void wait_copies(int pending) {
  auto& groups = self().groups;
  for (; groups.size() > static_cast<size_t>(pending); groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.global == nullptr) {
        std::memset(copy.shared, 0, kRow);
      } else {
        std::memcpy(copy.shared, copy.global, kRow);
      }
    }
  }
}

void load_matrices(uint32_t* to, const void* row, bool transposed) {
  struct Lane {
    uint32_t* to;
    const void* row;
    bool transposed;
  } own{to, row, transposed};
  check(row, nullptr);
  meet(&own, [](void* const* all) {
    const auto lane = [all](int i) { return static_cast<const Lane*>(all[i]); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[kLanes][kRow / 2];
      const void* rows[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        rows[r] = lane(kLanes * matrix + r)->row;
        std::memcpy(elements[r], rows[r], kRow);
      }
      count(rows, kLanes);
      for (int i = 0; i < kWarp; ++i) {
        const int row = i / 4, column = i % 4 * 2;
        const bool turned = lane(i)->transposed;
        const uint32_t low = turned ? elements[column][row] : elements[row][column];
        const uint32_t high = turned ? elements[column + 1][row] : elements[row][column + 1];
        lane(i)->to[matrix] = low | high << 16;
      }
    }
  });
}

void multiply_add(float* d, const uint32_t* a, const uint32_t* b, int count, float (*element)(uint32_t, int)) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
    int count;
    float (*element)(uint32_t, int);
  } own{d, a, b, count, element};
  meet(&own, [](void* const* all) {
    float left[16][16] = {}, right[16][8] = {};
    for (int i = 0; i < kWarp; ++i) {
      const Lane& lane = *static_cast<const Lane*>(all[i]);
      const int line = i / 4;
      for (int j = 0; j < lane.count; ++j) {
        const int k = i % 4 * lane.count + j, half = 4 * lane.count;
        for (int r = 0; r < 4; ++r) left[line + r % 2 * 8][k + r / 2 * half] = lane.element(lane.a[r], j);
        for (int r = 0; r < 2; ++r) right[k + r * half][line] = lane.element(lane.b[r], j);
      }
    }
    for (int i = 0; i < kWarp; ++i) {
      const Lane& lane = *static_cast<const Lane*>(all[i]);
      for (int r = 0; r < 4; ++r) {
        const int row = i / 4 + r / 2 * 8, column = i % 4 * 2 + r % 2;
        for (int k = 0; k < 8 * lane.count; ++k) lane.d[r] += left[row][k] * right[k][column];
      }
    }
  });
}

}  // namespace cuda_on_cpu

// Accesses of eight rows since the last call, and how many more turns they took than one each.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_banks(uint64_t* of) {
  of[0] = std::exchange(cuda_on_cpu::accesses, 0), of[1] = std::exchange(cuda_on_cpu::repeats, 0);
}
