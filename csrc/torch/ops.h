// The operators as C++ functions; their schemas are in schemas.cpp, their meaning in core/problem.h and
// mmca_ext/functional.py. Tensors first, in the order differentiable, not differentiable; then plain numbers, the same
// list everywhere (autograd.cpp and autocast.cpp pass it on without reading it).
//
// modality makes it MMCA: two key groups; image_rows, merge, image_id and gate belong to that, attn_mask, key_mask,
// is_causal and window to ordinary attention. cu_seqlens make the tensors packed (torch/arguments.h).
#pragma once

#include <c10/core/SymInt.h>

#include <tuple>

#include "torch/arguments.h"

namespace mmca {

using Tensor = at::Tensor;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using OptionalLength = std::optional<c10::SymInt>;

// -> out, lse, lse_low, group_out
FourTensors attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                      const OptionalTensor& gate, const OptionalTensor& key_mask, const OptionalTensor& modality,
                      const OptionalTensor& image_id, const OptionalTensor& cu_seqlens_q,
                      const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng_state, bool save_for_backward,
                      c10::string_view image_rows, c10::string_view merge, std::optional<double> scale, double softcap,
                      bool is_causal, std::int64_t window_left, std::int64_t window_right, OptionalLength max_seqlen_q,
                      OptionalLength max_seqlen_k, double dropout_p, bool deterministic);

// -> grad_query, grad_key, grad_value, grad_attn_mask (empty unless attn_mask_gradient), grad_gate (empty without gate)
FiveTensors attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                               const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                               const Tensor& lse_low, const Tensor& group_out, const OptionalTensor& attn_mask,
                               const OptionalTensor& gate, const OptionalTensor& key_mask,
                               const OptionalTensor& modality, const OptionalTensor& image_id,
                               const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                               const OptionalTensor& rng_state, bool attn_mask_gradient, c10::string_view image_rows,
                               c10::string_view merge, std::optional<double> scale, double softcap, bool is_causal,
                               std::int64_t window_left, std::int64_t window_right, OptionalLength max_seqlen_q,
                               OptionalLength max_seqlen_k, double dropout_p, bool deterministic);

}  // namespace mmca
