// An empty module: importing memloc_ext._C_cuda runs the registrations of the files linked into it. And a list of all
// kernels, so that they are loaded before a graph is captured: the runtime would load each at its first launch.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <vector>

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

namespace {

std::vector<const char*>& kernels() {
  static std::vector<const char*> all;
  return all;
}

}  // namespace

// What nvcc has run for each kernel when the library loads; the linker leads it here (--wrap in setup.py).
extern "C" void __real___cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*,
                                              int*);
extern "C" void __wrap___cudaRegisterFunction(void** handle, const char* host, char* device, const char* name,
                                              int threads, void* thread, void* block, void* block_size, void* grid_size,
                                              int* warp_size) {
  kernels().push_back(host);
  __real___cudaRegisterFunction(handle, host, device, name, threads, thread, block, block_size, grid_size, warp_size);
}

namespace memloc {

void load_kernels(int32_t device) {
  static std::mutex one;
  static std::set<int32_t> loaded;
  const std::lock_guard<std::mutex> lock(one);
  if (!loaded.insert(device).second) return;
  for (const char* const kernel : kernels()) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) cudaGetLastError();  // its launch says what is wrong
  }
}

}  // namespace memloc
