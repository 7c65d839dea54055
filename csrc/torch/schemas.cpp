// Schemas of the operators, and their implementation (ops.h, linear_ops.h) for each device. Autograd: autograd.cpp,
// linear_autograd.cpp; autocast: autocast.cpp; fake kernels and the gradient of the backward: mmca_ext/_ops.py,
// mmca_ext/_linear_ops.py.
#include <torch/library.h>

#include "torch/linear_ops.h"

namespace mmca {

// clang-format off
#define MMCA_TENSORS \
  "Tensor? attn_mask, Tensor? gate, Tensor? key_mask, Tensor? modality, Tensor? image_id, Tensor? cu_seqlens_q, " \
  "Tensor? cu_seqlens_k, Tensor? rng_state, "
#define MMCA_NUMBERS \
  "str image_rows, str merge, float? scale, float softcap, bool is_causal, int window_left, int window_right, " \
  "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, bool deterministic"
#define MMCA_LINEAR_TENSORS \
  "Tensor query, Tensor key, Tensor value, Tensor? state_S, Tensor? state_z, Tensor? key_mask, Tensor? cu_seqlens_q, " \
  "Tensor? cu_seqlens_k, "

TORCH_LIBRARY(mmca_ext, m) {
  m.def("attention(Tensor query, Tensor key, Tensor value, " MMCA_TENSORS "bool save_for_backward, " MMCA_NUMBERS ") "
        "-> (Tensor out, Tensor lse, Tensor lse_low, Tensor group_out)");
  m.def("attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
        "Tensor lse, Tensor lse_low, Tensor group_out, " MMCA_TENSORS "bool attn_mask_gradient, " MMCA_NUMBERS ") "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_mask, Tensor grad_gate)");
  // Given the gradients that arrive at attention_backward's five results: those of grad_out, grad_lse, query, key,
  // value, attn_mask and gate; empty where there is none.
  m.def("attention_double_backward(Tensor?[] grads, Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
        "Tensor value, " MMCA_TENSORS MMCA_NUMBERS ") -> Tensor[]");

  m.def("linear_attention(" MMCA_LINEAR_TENSORS "bool return_state, bool is_causal) "
        "-> (Tensor out, Tensor S, Tensor z)");
  m.def("linear_attention_backward(Tensor grad_out, Tensor? grad_S, Tensor? grad_z, " MMCA_LINEAR_TENSORS
        "bool is_causal) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_state_S, Tensor grad_state_z)");
  // Given the gradients that arrive at linear_attention_backward's five results: those of grad_out, grad_S, grad_z,
  // query, key, value, state_S and state_z; empty where there is none.
  m.def("linear_attention_double_backward(Tensor?[] grads, Tensor grad_out, Tensor? grad_S, Tensor? grad_z, "
        MMCA_LINEAR_TENSORS "bool is_causal) -> Tensor[]");
}
// clang-format on

namespace {
void implement(torch::Library& m) {
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
  m.impl("linear_attention", &linear_attention);
  m.impl("linear_attention_backward", &linear_attention_backward);
}
}  // namespace

TORCH_LIBRARY_IMPL(mmca_ext, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(mmca_ext, CUDA, m) { implement(m); }  // without CUDA kernels too: the error is ours then

}  // namespace mmca
