// From tensors to a Problem: every argument is checked here, before any kernel runs. Each error names the operator, the
// argument, what it got and what is accepted.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "core/problem.h"

namespace mmca {

using OptionalTensor = std::optional<at::Tensor>;

// What a forward returns. lse_low and group_out are for the backward (core/problem.h).
struct Results {
  at::Tensor out, lse, lse_low, group_out;
};

// A Problem, and the tensors that own memory it points to and nobody else holds.
struct Arguments {
  const char* op;
  Problem problem;
  at::Tensor key_mask, attn_mask, modality, image_id, grad_lse;
  at::Device device;

  // query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv): shapes, dtype, device, scale.
  Arguments(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
            std::optional<double> scale);

  void set_band(bool is_causal, std::int64_t window_left, std::int64_t window_right);
  void set_masks(const OptionalTensor& attn_mask, const OptionalTensor& key_mask);
  void set_modality(const at::Tensor& modality, const OptionalTensor& image_id, c10::string_view image_rows,
                    c10::string_view merge);
  void set_dropout(double dropout_p, const OptionalTensor& rng_state);

  // Allocates the results and points the problem at them. What only the backward needs is empty unless saved.
  Results allocate_results(const at::Tensor& query, bool save_for_backward);
  // The same for results that exist, with the gradients arriving at them.
  void set_results(const Results& results, const at::Tensor& grad_out, const OptionalTensor& grad_lse);
  // Allocates and returns the gradients of query, key and value.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> allocate_gradients(const at::Tensor& query, const at::Tensor& key,
                                                                    const at::Tensor& value);

 private:
  at::ScalarType dtype_;
};

}  // namespace mmca
