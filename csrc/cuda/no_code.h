// What is said on a card that the build has no code for.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <string>

#ifndef MEMLOC_CUDA_ARCHS
#define MEMLOC_CUDA_ARCHS "others"
#endif

namespace memloc {

// No code for the card and no PTX that it could compile, or PTX that its driver is too old for.
inline bool is_no_code(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
}

inline std::string no_code(cudaError_t error, const char* op) {
  int device = 0;
  cudaDeviceProp card{};
  cudaGetDevice(&device);
  cudaGetDeviceProperties(&card, device);
  std::ostringstream text;
  text << "CUDA error in " << op << ": " << cudaGetErrorString(error) << ": " << card.name << " has no code in this "
       << "build of memloc_ext, which is for " MEMLOC_CUDA_ARCHS "; build it with MEMLOC_CUDA_ARCHS=" << card.major
       << "." << card.minor << (card.major == 9 ? "a" : "");
  return text.str();
}

}  // namespace memloc
