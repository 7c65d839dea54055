// The operators on any device: arguments become a Problem, which the device's backend solves.
#include "torch/ops.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include "torch/backend.h"

namespace mmca {
namespace {

Arguments make_arguments(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                         const OptionalTensor& gate, const OptionalTensor& key_mask, const OptionalTensor& modality,
                         const OptionalTensor& image_id, const OptionalTensor& cu_seqlens_q,
                         const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng_state,
                         c10::string_view image_rows, c10::string_view merge, std::optional<double> scale,
                         double softcap, bool is_causal, std::int64_t window_left, std::int64_t window_right,
                         const OptionalLength& max_seqlen_q, const OptionalLength& max_seqlen_k, double dropout_p,
                         bool deterministic) {
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
  arguments.problem.deterministic = deterministic || at::globalContext().deterministicAlgorithms();
  return arguments;
}

}  // namespace

FourTensors attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                      const OptionalTensor& gate, const OptionalTensor& key_mask, const OptionalTensor& modality,
                      const OptionalTensor& image_id, const OptionalTensor& cu_seqlens_q,
                      const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng_state, bool save_for_backward,
                      c10::string_view image_rows, c10::string_view merge, std::optional<double> scale, double softcap,
                      bool is_causal, std::int64_t window_left, std::int64_t window_right, OptionalLength max_seqlen_q,
                      OptionalLength max_seqlen_k, double dropout_p, bool deterministic) {
  Arguments arguments = make_arguments(query, key, value, attn_mask, gate, key_mask, modality, image_id, cu_seqlens_q,
                                       cu_seqlens_k, rng_state, image_rows, merge, scale, softcap, is_causal,
                                       window_left, window_right, max_seqlen_q, max_seqlen_k, dropout_p, deterministic);
  const Results results = arguments.allocate_results(query, save_for_backward);
  arguments.run(Operation::attention_forward);
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
                               OptionalLength max_seqlen_k, double dropout_p, bool deterministic) {
  Arguments arguments = make_arguments(query, key, value, attn_mask, gate, key_mask, modality, image_id, cu_seqlens_q,
                                       cu_seqlens_k, rng_state, image_rows, merge, scale, softcap, is_causal,
                                       window_left, window_right, max_seqlen_q, max_seqlen_k, dropout_p, deterministic);
  arguments.set_results({out, lse, lse_low, group_out}, grad_out, grad_lse);
  arguments.allocate_gradients(query, key, value, attn_mask_gradient);
  arguments.run(Operation::attention_backward);
  const Gradients gradients = arguments.gradients();
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, query.options()); };
  return {gradients.query, gradients.key, gradients.value, or_empty(gradients.attn_mask), or_empty(gradients.gate)};
}

}  // namespace mmca
