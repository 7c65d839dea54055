// Schemas of the operators and their CPU implementations. Autograd: autograd.cpp; autocast: autocast.cpp; fake kernels
// and the gradient of the backward: mmca_ext/_ops.py.
#include "torch/ops.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/kernel_table.h"
#include "torch/executor.h"

namespace mmca {
namespace {

Arguments make_arguments(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                         const OptionalTensor& gate, const OptionalTensor& key_mask, const OptionalTensor& modality,
                         const OptionalTensor& image_id, const OptionalTensor& cu_seqlens_q,
                         const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng_state,
                         c10::string_view image_rows, c10::string_view merge, std::optional<double> scale,
                         double softcap, bool is_causal, std::int64_t window_left, std::int64_t window_right,
                         const OptionalLength& max_seqlen_q, const OptionalLength& max_seqlen_k, double dropout_p) {
  const char* op = modality ? "mmca_ext.mmca_attention" : "mmca_ext.attention";  // as the functions are called
  const auto length = [](const OptionalLength& n) {
    return n ? std::optional<std::int64_t>(n->guard_int(__FILE__, __LINE__)) : std::nullopt;
  };
  Arguments arguments(op, query, key, value, cu_seqlens_q, cu_seqlens_k, length(max_seqlen_q), length(max_seqlen_k),
                      scale, softcap, modality.has_value());
  if (modality) {
    TORCH_CHECK_VALUE(
        !attn_mask && !key_mask && !is_causal && window_left == -1 && window_right == -1, op,
        ": modality decides what a row sees: attn_mask, key_mask, is_causal and window do not go with it");
    arguments.set_modality(*modality, image_id, image_rows, merge, gate);
  } else {
    TORCH_CHECK_VALUE(!image_id && !gate, op, ": ", gate ? "gate" : "image_id", " belongs to modality");
    TORCH_CHECK_VALUE(image_rows == "self" && merge == "sum", op, ": image_rows and merge belong to modality, got '",
                      image_rows, "' and '", merge, "' without it");
    arguments.set_band(is_causal, window_left, window_right);
    arguments.set_masks(attn_mask, key_mask);
  }
  arguments.set_dropout(dropout_p, rng_state);
  return arguments;
}

void run_on_cpu(Operation operation, const Arguments& arguments) {
  TorchExecutor executor;
  run(operation, arguments.problem, executor);
}

}  // namespace

FourTensors attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                      const OptionalTensor& gate, const OptionalTensor& key_mask, const OptionalTensor& modality,
                      const OptionalTensor& image_id, const OptionalTensor& cu_seqlens_q,
                      const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng_state, bool save_for_backward,
                      c10::string_view image_rows, c10::string_view merge, std::optional<double> scale, double softcap,
                      bool is_causal, std::int64_t window_left, std::int64_t window_right, OptionalLength max_seqlen_q,
                      OptionalLength max_seqlen_k, double dropout_p) {
  Arguments arguments = make_arguments(query, key, value, attn_mask, gate, key_mask, modality, image_id, cu_seqlens_q,
                                       cu_seqlens_k, rng_state, image_rows, merge, scale, softcap, is_causal,
                                       window_left, window_right, max_seqlen_q, max_seqlen_k, dropout_p);
  const Results results = arguments.allocate_results(query, save_for_backward);
  run_on_cpu(Operation::attention_forward, arguments);
  return {results.out, results.lse, results.lse_low, results.group_out};
}

FiveTensors attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                               const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                               const Tensor& lse_low, const Tensor& group_out, const OptionalTensor& attn_mask,
                               const OptionalTensor& gate, const OptionalTensor& key_mask,
                               const OptionalTensor& modality, const OptionalTensor& image_id,
                               const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                               const OptionalTensor& rng_state, bool attn_mask_gradient, c10::string_view image_rows,
                               c10::string_view merge, std::optional<double> scale, double softcap, bool is_causal,
                               std::int64_t window_left, std::int64_t window_right, OptionalLength max_seqlen_q,
                               OptionalLength max_seqlen_k, double dropout_p) {
  Arguments arguments = make_arguments(query, key, value, attn_mask, gate, key_mask, modality, image_id, cu_seqlens_q,
                                       cu_seqlens_k, rng_state, image_rows, merge, scale, softcap, is_causal,
                                       window_left, window_right, max_seqlen_q, max_seqlen_k, dropout_p);
  arguments.set_results({out, lse, lse_low, group_out}, grad_out, grad_lse);
  arguments.allocate_gradients(query, key, value, attn_mask_gradient);
  run_on_cpu(Operation::attention_backward, arguments);
  const Gradients gradients = arguments.gradients();
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, query.options()); };
  return {gradients.query, gradients.key, gradients.value, or_empty(gradients.attn_mask), or_empty(gradients.gate)};
}

// clang-format off
#define MMCA_TENSORS \
  "Tensor? attn_mask, Tensor? gate, Tensor? key_mask, Tensor? modality, Tensor? image_id, Tensor? cu_seqlens_q, " \
  "Tensor? cu_seqlens_k, Tensor? rng_state, "
#define MMCA_NUMBERS \
  "str image_rows, str merge, float? scale, float softcap, bool is_causal, int window_left, int window_right, " \
  "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p"

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
}
// clang-format on

TORCH_LIBRARY_IMPL(mmca_ext, CPU, m) {
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
}

}  // namespace mmca
