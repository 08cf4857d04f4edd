// Kernels with one property each, for test_cuda_on_cpu.py: `./cuda_on_cpu NAME` prints what the kernel wrote.
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <string>

constexpr int kThreads = 96, kBlocks = 4;

__global__ void reversed(int* out, bool wait) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  if (wait) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void divergent(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void some_lanes(int* out) {
  if (threadIdx.x < 40) out[threadIdx.x] = __shfl_down_sync(0xFFFFFFFFu, 1, 1);
}

__global__ void shuffled(int* out, int width) {
  const int lane = threadIdx.x % 32;
  const int down = __shfl_down_sync(0xFFFFFFFFu, lane, 3, width), from = __shfl_sync(0xFFFFFFFFu, lane, 35, width);
  out[blockIdx.x * kThreads + threadIdx.y * 32 + threadIdx.x] = 100 * down + from;
}

__global__ void dynamic(int* out) {
  extern __shared__ unsigned char bytes[];
  bytes[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = bytes[(threadIdx.x + 1) % kThreads];
}

__global__ void __launch_bounds__(kThreads / 2, 1) bounded(int* out) { out[threadIdx.x] = 1; }

void ask(int bytes) { cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); }

int main(int, char** arguments) {
  int out[kBlocks * kThreads] = {};
  const std::map<std::string, void (*)(int*)> kernels{
      {"reversed", [](int* p) { reversed<<<kBlocks, kThreads, 0, nullptr>>>(p, true); }},
      {"raced", [](int* p) { reversed<<<kBlocks, kThreads, 0, nullptr>>>(p, false); }},
      {"divergent", [](int* p) { divergent<<<kBlocks, kThreads, 0, nullptr>>>(p); }},
      {"some_lanes", [](int* p) { some_lanes<<<kBlocks, kThreads, 0, nullptr>>>(p); }},
      {"shuffled", [](int* p) { shuffled<<<kBlocks, dim3(kThreads / 3, 3), 0, nullptr>>>(p, 8); }},
      {"dynamic", [](int* p) { dynamic<<<kBlocks, kThreads, kThreads, nullptr>>>(p); }},
      {"bounded", [](int* p) { bounded<<<kBlocks, kThreads, 0, nullptr>>>(p); }},
      {"large", [](int* p) { dynamic<<<kBlocks, 1025, kThreads, nullptr>>>(p); }},
      {"greedy", [](int* p) { dynamic<<<kBlocks, kThreads, 49153, nullptr>>>(p); }},
      {"asked", [](int* p) { ask(60000), dynamic<<<kBlocks, kThreads, 60000, nullptr>>>(p); }},
      {"asked for less", [](int* p) { ask(59999), dynamic<<<kBlocks, kThreads, 60000, nullptr>>>(p); }},
      {"asked for all", [](int* p) { ask(232448), dynamic<<<kBlocks, kThreads, 232448, nullptr>>>(p); }},
      {"asked for more", [](int* p) { ask(232449), dynamic<<<kBlocks, kThreads, kThreads, nullptr>>>(p); }},
  };
  kernels.at(arguments[1])(out);
  if (cudaGetLastError() != cudaSuccess) return 1;
  for (int value : out) std::printf("%d ", value);
}
