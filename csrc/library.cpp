// Every operator's schema. Kernels register themselves beside their code: cpu/<op>.cpp and cuda/<op>.cpp.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// An empty module: importing memloc_ext._C runs the registrations of the files linked into it.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

STABLE_TORCH_LIBRARY(memloc_ext, m) {
  m.def(
      "example_tied_dropout(Tensor x, Tensor example_ids, int num_generalization, float p_mem, int seed, int site=0, "
      "int channel_dim=1) -> Tensor");
  m.def(
      "example_tied_mlp(Tensor x, Tensor example_ids, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str "
      "activation, int num_generalization, float p_mem, int seed, int site=0, Tensor? w_gate=None, Tensor? "
      "b_gate=None) -> Tensor");
  m.def(
      "example_tied_mlp_backward(Tensor grad_output, Tensor x, Tensor example_ids, Tensor w_in, Tensor? b_in, Tensor "
      "w_out, Tensor? b_out, str activation, int num_generalization, float p_mem, int seed, int site, Tensor? w_gate, "
      "Tensor? b_gate, bool[7] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "kept_linear_(Tensor(a!) values, Tensor dense, Tensor weight, Tensor? bias, Tensor channels, int[] rows, int[] "
      "ends) -> ()");
  m.def(
      "kept_linear_input_(Tensor(a!) dense, Tensor values, Tensor weight, Tensor channels, int[] rows, int[] ends) -> "
      "()");
  m.def(
      "kept_linear_weight_(Tensor(a!) weight, Tensor values, Tensor dense, Tensor channels, int[] rows, int[] ends) -> "
      "()");
  m.def("turned(Tensor matrix) -> Tensor");
  m.def(
      "example_tied_conv2d(Tensor x, Tensor example_ids, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, "
      "SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, *, int num_generalization, float p_mem, int seed, "
      "int site=0) -> Tensor");
  m.def(
      "kept_conv2d(Tensor x, Tensor keep, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] "
      "dilation, SymInt groups) -> Tensor");
  m.def(
      "kept_conv2d_input_grad(Tensor grad, Tensor keep, Tensor weight, SymInt[2] input_size, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  m.def(
      "kept_conv2d_weight_grad(Tensor grad, Tensor x, Tensor keep, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] "
      "padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  m.def("linear_grad_sqnorm(Tensor input, Tensor grad_output, *, str method=\"auto\") -> Tensor");
  m.def(
      "conv2d_grad_sqnorm(Tensor input, Tensor grad_output, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] "
      "padding, SymInt[2] dilation, SymInt groups, *, str method=\"auto\") -> Tensor");
  m.def(
      "linear_grad_sqnorm_groups(Tensor input, Tensor grad_output, Tensor group_ids, SymInt num_groups) -> (Tensor, "
      "Tensor)");
  m.def(
      "conv2d_grad_sqnorm_groups(Tensor input, Tensor grad_output, Tensor group_ids, SymInt num_groups, SymInt[2] "
      "kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> (Tensor, Tensor)");
  m.def(
      "linear_grad_dot(Tensor input, Tensor grad_output, Tensor directions, Tensor? group_ids=None, SymInt "
      "num_groups=0) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv2d_grad_dot(Tensor input, Tensor grad_output, Tensor directions, Tensor? group_ids, SymInt num_groups, "
      "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> (Tensor, "
      "Tensor, Tensor)");
  m.def("linear_grad_inner(Tensor input, Tensor grad_output) -> Tensor");
  m.def(
      "conv2d_grad_inner(Tensor input, Tensor grad_output, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, SymInt groups) -> Tensor");
  m.def(
      "plan(int groups, int inputs, int outputs, int[] y, int[] x, int directions=0) -> (int, float, float, float, "
      "bool)");
  m.def(
      "account(Tensor[] inputs, Tensor[] grad_outputs, Tensor[] statistics, int[] geometry, float[] eps, Tensor? "
      "group_ids, SymInt num_groups, bool sums) -> (Tensor, Tensor, Tensor[])");
  m.def("channel_saliency(Tensor activation, Tensor grad, int channel_dim=1) -> Tensor");
  m.def(
      "linear_ablation_loss(Tensor features, Tensor weight, Tensor? bias, Tensor targets, Tensor baseline) -> (Tensor, "
      "Tensor)");
  m.def("normalization_grads(Tensor input, Tensor grad_output, Tensor mean, Tensor rstd) -> (Tensor, Tensor)");
  m.def(
      "conv2d_ablation(Tensor output, Tensor change, Tensor weight, Tensor channels, SymInt[2] stride=1, SymInt[2] "
      "padding=0, SymInt[2] dilation=1, Tensor? scale=None, Tensor? shift=None, Tensor? residual=None, bool "
      "relu=False, "
      "Tensor? examples=None) -> Tensor");
  m.def(
      "linear_ablation(Tensor output, Tensor change, Tensor weight, Tensor channels, Tensor? scale=None, "
      "Tensor? shift=None, Tensor? residual=None, bool relu=False, Tensor? examples=None) -> Tensor");
  m.def(
      "ablate_channels(Tensor input, Tensor offsets, Tensor channels, Tensor? baseline=None, int channel_dim=1) -> "
      "Tensor");
  m.def(
      "ablate_channels_(Tensor(a!) input, Tensor offsets, Tensor channels, Tensor? baseline=None, int channel_dim=1) "
      "-> ()");
}
