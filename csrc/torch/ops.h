// The operators as C++ functions; their schemas are in ops.cpp, their meaning in core/problem.h and
// mmca_ext/functional.py.
#pragma once

#include <tuple>

#include "torch/arguments.h"

namespace mmca {

using Tensor = at::Tensor;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// -> out, lse, lse_low
ThreeTensors attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                       const OptionalTensor& key_mask, const OptionalTensor& rng_state, std::optional<double> scale,
                       bool is_causal, std::int64_t window_left, std::int64_t window_right, double dropout_p,
                       bool save_for_backward);

// -> grad_query, grad_key, grad_value
ThreeTensors attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                                const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                const Tensor& lse_low, const OptionalTensor& attn_mask, const OptionalTensor& key_mask,
                                const OptionalTensor& rng_state, std::optional<double> scale, bool is_causal,
                                std::int64_t window_left, std::int64_t window_right, double dropout_p);

// -> out, lse, lse_low, group_out
FourTensors mmca_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& modality,
                           const OptionalTensor& image_id, const OptionalTensor& rng_state, c10::string_view image_rows,
                           c10::string_view merge, std::optional<double> scale, double dropout_p,
                           bool save_for_backward);

// -> grad_query, grad_key, grad_value
ThreeTensors mmca_attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                                     const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                     const Tensor& lse_low, const Tensor& group_out, const Tensor& modality,
                                     const OptionalTensor& image_id, const OptionalTensor& rng_state,
                                     c10::string_view image_rows, c10::string_view merge, std::optional<double> scale,
                                     double dropout_p);

}  // namespace mmca
