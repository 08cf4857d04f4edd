// Runs the blocks of a grid one after the other, each thread of a block as a fiber.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kMostShared = 49152;  // bytes of a block that did not ask for more
constexpr size_t kMostAsked = 232448;  // bytes that it may ask for, on sm_90
constexpr size_t kStack = 1 << 18;     // bytes of a fiber
constexpr int kCache = 12 << 20;       // bytes of the second level: few, so that scratch is used again
constexpr int kProcessors = 3;         // few, so that blocks of a kernel that fills the device take several turns

enum class State { kReady, kAtBarrier, kAtMeeting, kDone };

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Fiber {
  ucontext_t context;
  uint3 index;
  State state;
  void* brought;  // for the lanes of its warp that it meets
  void (*together)(void* const*);
};

struct Shared {
  std::unique_ptr<void, Free> data;
  size_t bytes;
};

std::mutex one_launch;  // at a time: the names of threads and blocks are global
cudaError_t last_error = cudaSuccess;
ucontext_t scheduler;
std::vector<Fiber> fibers;
int current;
void (*kernel)(const void*);
const void* kernel_argument;
std::map<const void*, Shared> memory;
std::map<const void*, size_t> asked;  // bytes, by kernel
size_t shared_bytes, most_shared;

char* stack_of(size_t fiber) {
  static char* const stacks = [] {
    void* const all = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) stop("no memory for stacks");
    return static_cast<char*>(all);
  }();
  return stacks + fiber * kStack;
}

void run_fiber() {
  kernel(kernel_argument);
  fibers[current].state = State::kDone;
}

void wait(State state) {
  Fiber& self = fibers[current];
  self.state = state;
  swapcontext(&self.context, &scheduler);
}

bool all(int first, int count, State state) {
  return std::all_of(&fibers[first], &fibers[first] + count, [state](const Fiber& f) { return f.state == state; });
}

void set_all(int first, int count, State state) {
  for (int i = first; i < first + count; ++i) fibers[i].state = state;
}

// Numbers below n in an order that depends on the seed.
class Order {
 public:
  Order(uint64_t seed, int n) : start_(static_cast<int>((seed >> 33) % n)), step_(seed >> 48), n_(n) {
    while (std::gcd(step_, n) != 1) ++step_;  // so that start + i * step meets all
  }

  int operator[](int i) const { return static_cast<int>((start_ + i * step_) % n_); }

 private:
  int start_;
  int64_t step_;
  int n_;
};

// Runs a warp until all of its threads have returned or wait for others.
void run_warp(int first, const Order& order) {
  const int lanes = std::min(kWarp, static_cast<int>(fibers.size()) - first);
  for (bool ran = true; ran;) {
    ran = false;
    for (int i = 0; i < kWarp; ++i) {
      const int lane = order[i];
      if (lane >= lanes || fibers[first + lane].state != State::kReady) continue;
      current = first + lane;
      threadIdx = fibers[current].index;
      swapcontext(&scheduler, &fibers[current].context);
      ran = true;
    }
  }
}

// One warp after the other goes as far as it can, in another order between any two barriers. A thread that has returned
// comes to none: what devices do then differs, so kernels must not rely on it.
void run_block(uint64_t seed) {
  const int threads = static_cast<int>(fibers.size()), warps = (threads + kWarp - 1) / kWarp;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {stack_of(i), 0, kStack};
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (;;) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;  // the generator of Knuth's MMIX
    const Order order(seed, warps);
    for (int i = 0; i < warps; ++i) run_warp(order[i] * kWarp, Order(seed ^ ~uint64_t{0}, kWarp));
    reach_barrier();
    if (all(0, threads, State::kDone)) return;
    if (!all(0, threads, State::kAtBarrier)) stop("waits for threads that do not come");
    set_all(0, threads, State::kReady);
  }
}

void* allocate(const void* site, size_t bytes, size_t alignment) {
  auto& place = memory[site];
  if (place.data == nullptr) {
    shared_bytes += bytes;
    if (shared_bytes > most_shared) stop("more shared memory than a block has");
    void* memory = nullptr;
    if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes) != 0) stop("no memory");
    place = {std::unique_ptr<void, Free>(memory), bytes};
    std::memset(memory, 0xFF, bytes);
  }
  return place.data.get();
}

bool fits(dim3 grid, dim3 block, size_t bytes, size_t most) {
  const auto in = [](uint64_t value, uint64_t most) { return value > 0 && value <= most; };
  return in(grid.x, INT32_MAX) && in(grid.y, 65535) && in(grid.z, 65535) && block.z <= 64 &&
         in(uint64_t{block.x} * block.y * block.z, kMostThreads) && bytes <= most;
}

}  // namespace

void stop(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z, what);
  std::abort();
}

void launch(const void* function, dim3 grid, dim3 block, size_t dynamic_bytes, void (*run)(const void*),
            const void* argument) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const auto more = asked.find(function);
  most_shared = more == asked.end() ? kMostShared : kMostAsked;
  if (!fits(grid, block, dynamic_bytes, more == asked.end() ? kMostShared : more->second)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = grid, blockDim = block, kernel = run, kernel_argument = argument;
  fibers.resize(size_t{block.x} * block.y * block.z);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        memory.clear();
        shared_bytes = 0;
        start_block();
        if (dynamic_bytes > 0) allocate(nullptr, dynamic_bytes, 16);
        run_block((uint64_t{z} * grid.y + y) * grid.x + x);
      }
    }
  }
}

void* shared_memory(const void* site, size_t bytes, size_t alignment) { return allocate(site, bytes, alignment); }

void* dynamic_shared_memory() { return memory.at(nullptr).data.get(); }

bool in_shared_memory(const void* first, size_t bytes) {
  const char* const begin = static_cast<const char*>(first);
  return std::any_of(memory.begin(), memory.end(), [=](const auto& place) {
    const char* const own = static_cast<const char*>(place.second.data.get());
    return own <= begin && begin + bytes <= own + place.second.bytes;
  });
}

cudaError_t set_attribute(const void* function, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (value < 0 || static_cast<size_t>(value) > kMostAsked) return last_error = cudaErrorInvalidValue;
  asked[function] = value;
  return cudaSuccess;
}

int thread_number() { return current; }

void meet(void* own, void (*together)(void* const*)) {
  Fiber& self = fibers[current];
  const int first = current / kWarp * kWarp;
  self.state = State::kAtMeeting, self.brought = own, self.together = together;
  if (first + kWarp > static_cast<int>(fibers.size()) || !all(first, kWarp, State::kAtMeeting)) {
    wait(State::kAtMeeting);
    return;
  }
  void* lanes[kWarp];
  for (int i = 0; i < kWarp; ++i) {
    if (fibers[first + i].together != together) stop("lanes of a warp meet in different instructions");
    lanes[i] = fibers[first + i].brought;
  }
  together(lanes);
  set_all(first, kWarp, State::kReady);
}

uint64_t shuffle(unsigned mask, uint64_t value, bool down, int lane, int width) {
  if (mask != 0xFFFFFFFFu) stop("a shuffle among some lanes of a warp");
  struct Lane {
    uint64_t value;
    int from;
  };
  const int own = current % kWarp, group = own / width * width;
  const int from = down ? (own + lane < group + width ? own + lane : own) : group + lane % width;
  Lane brought{value, from};
  meet(&brought, [](void* const* lanes) {
    uint64_t values[kWarp];
    for (int i = 0; i < kWarp; ++i) values[i] = static_cast<Lane*>(lanes[i])->value;
    for (int i = 0; i < kWarp; ++i) static_cast<Lane*>(lanes[i])->value = values[static_cast<Lane*>(lanes[i])->from];
  });
  return brought.value;
}

}  // namespace cuda_on_cpu

void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::kAtBarrier); }

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::kProcessors
           : attribute == cudaDevAttrL2CacheSize       ? cuda_on_cpu::kCache
                                                       : int{cuda_on_cpu::kMostAsked};
  return cudaSuccess;
}

namespace memloc {
void load_kernels(int32_t) {}  // of csrc/cuda/library.cpp; all are there
}  // namespace memloc

// In place of torch's: there is one stream, and no device to switch to.
#pragma GCC visibility push(hidden)
extern "C" {
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

int aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

int aoti_torch_delete_device_guard(void*) { return 0; }
}
#pragma GCC visibility pop
