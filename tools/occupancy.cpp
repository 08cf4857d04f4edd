// Reads lines of "architecture registers shared-bytes threads" of a kernel, and writes how many of its blocks a
// multiprocessor holds at a time by NVIDIA's own rules, and how many warps of the warps that it could hold.
#include <cuda_occupancy.h>

#include <cstdio>
#include <map>

struct Device {
  int threads;          // of a multiprocessor
  size_t shared, most;  // bytes: of a multiprocessor, of a block
};

// Table "technical specifications per compute capability" of the CUDA programming guide; all have 65536 registers.
static const std::map<int, Device> kDevices{{80, {2048, 164 << 10, 163 << 10}},
                                            {90, {2048, 228 << 10, 227 << 10}},
                                            {100, {2048, 228 << 10, 227 << 10}},
                                            {120, {1536, 100 << 10, 99 << 10}}};

int main() {
  int architecture, registers, threads;
  size_t shared;
  while (std::scanf("%d %d %zu %d", &architecture, &registers, &shared, &threads) == 4) {
    const auto found = kDevices.find(architecture);
    if (found == kDevices.end()) {
      std::fprintf(stderr, "occupancy: nothing is known of sm_%d; add it to tools/occupancy.cpp\n", architecture);
      return 1;
    }
    const Device& device = found->second;
    cudaOccDeviceProp properties;
    properties.computeMajor = architecture / 10;
    properties.computeMinor = architecture % 10;
    properties.maxThreadsPerBlock = 1024;
    properties.maxThreadsPerMultiprocessor = device.threads;
    properties.regsPerBlock = properties.regsPerMultiprocessor = 65536;
    properties.warpSize = 32;
    properties.sharedMemPerBlock = 48 << 10;
    properties.sharedMemPerMultiprocessor = device.shared;
    properties.sharedMemPerBlockOptin = device.most;
    properties.reservedSharedMemPerBlock = 1 << 10;
    properties.numSms = 1;
    cudaOccFuncAttributes attributes;
    attributes.maxThreadsPerBlock = threads;
    attributes.numRegs = registers;
    attributes.sharedSizeBytes = shared;
    attributes.numBlockBarriers = 1;
    cudaOccResult result;
    const cudaOccDeviceState state;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &attributes, &state, threads, 0) !=
        CUDA_OCC_SUCCESS) {
      std::fprintf(stderr, "occupancy: no answer for sm_%d\n", architecture);
      return 1;
    }
    const int blocks = result.activeBlocksPerMultiprocessor;
    std::printf("%d %d %d\n", blocks, blocks * ((threads + 31) / 32), device.threads / 32);
  }
}
