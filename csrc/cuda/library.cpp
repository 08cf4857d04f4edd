// An empty module: importing memloc_ext._C_cuda runs the registrations of the files linked into it.
#include <Python.h>
#include <torch/csrc/stable/macros.h>

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
