// Linear attention as C++ functions; schemas in schemas.cpp, meaning in core/linear_problem.h and
// mmca_ext/functional.py. Tensors first, then plain numbers, as in torch/ops.h.
#pragma once

#include "torch/ops.h"

namespace mmca {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// -> out, and the state after the last key: its S and z, float64; empty unless return_state
ThreeTensors linear_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                              const OptionalTensor& state_S, const OptionalTensor& state_z,
                              const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens_q,
                              const OptionalTensor& cu_seqlens_k, bool return_state, bool is_causal);

// -> grad_query, grad_key, grad_value, grad_state_S, grad_state_z (both empty without a state)
FiveTensors linear_attention_backward(const Tensor& grad_out, const OptionalTensor& grad_S,
                                      const OptionalTensor& grad_z, const Tensor& query, const Tensor& key,
                                      const Tensor& value, const OptionalTensor& state_S, const OptionalTensor& state_z,
                                      const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens_q,
                                      const OptionalTensor& cu_seqlens_k, bool is_causal);

}  // namespace mmca
