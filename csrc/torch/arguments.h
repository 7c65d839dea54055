// From tensors to a Problem: every argument is checked here, before any kernel runs. Each error names the operator, the
// argument, what it got and what is accepted.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "torch/backend.h"

namespace mmca {

using OptionalTensor = std::optional<at::Tensor>;

// What a forward returns. lse_low and group_out are for the backward (core/problem.h).
struct Results {
  at::Tensor out, lse, lse_low, group_out;
};

// What a backward returns; undefined where there is no such argument or no gradient is wanted.
struct Gradients {
  at::Tensor query, key, value, attn_mask, gate;
};

// A Problem, and the tensors that own memory it points to and nobody else holds.
//
// Tensors are (B, H, L, D), or packed (T, H, D): then masks of pairs and of keys are refused, modality is (T,), lse
// (Hq, T). Results of the merge "none" have a first dimension of 2.
class Arguments {
 public:
  Problem problem;

  // Shapes, dtype, device, scale. Packed if there are offsets: both or neither.
  Arguments(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
            const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
            std::optional<std::int64_t> max_seqlen_q, std::optional<std::int64_t> max_seqlen_k,
            std::optional<double> scale, double softcap, bool is_mmca);

  void set_band(bool is_causal, std::int64_t window_left, std::int64_t window_right);
  // attn_mask: boolean, or floating-point: a bias.
  void set_masks(const OptionalTensor& attn_mask, const OptionalTensor& key_mask);
  void set_modality(const at::Tensor& modality, const OptionalTensor& image_id, c10::string_view image_rows,
                    c10::string_view merge, const OptionalTensor& gate);
  void set_dropout(double dropout_p, const OptionalTensor& rng_state);

  // Allocates the results and points the problem at them. What only the backward needs is empty unless saved.
  Results allocate_results(const at::Tensor& query, bool save_for_backward);
  // The same for results that exist, with the gradients arriving at them.
  void set_results(const Results& results, const at::Tensor& grad_out, const OptionalTensor& grad_lse);
  // Allocates what the backward writes to.
  void allocate_gradients(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          bool attn_mask_gradient);
  void run(Operation operation) const { backend_.run(operation, problem, device_); }
  // A problem of linear attention made of this one's tensors.
  void run(Operation operation, const LinearProblem& linear) const { backend_.run_linear(operation, linear, device_); }
  // A copy where the kernels want rows to lie otherwise.
  at::Tensor with_aligned_rows(const at::Tensor& t) const;
  // The gradients, once the kernel has run: sums over what was broadcast are brought into the arguments' shapes.
  Gradients gradients() const;

 private:
  void check_tensors(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) const;
  void check_lengths() const;
  void set_offsets(const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                   std::optional<std::int64_t> max_seqlen_q, std::optional<std::int64_t> max_seqlen_k);
  void check_offsets(const char* side, const at::Tensor& offsets, std::int64_t tokens,
                     std::optional<std::int64_t> longest_allowed) const;
  bool looks_at_values() const;
  void set_gate(const at::Tensor& gate);
  at::Tensor token_ids(const char* name, const at::Tensor& ids) const;
  at::Tensor key_broadcast_bias_gradient() const;

  std::vector<std::int64_t> row_shape() const;     // of out without its last dimension: (B, Hq, Lq) or (T, Hq)
  std::vector<std::int64_t> result_shape() const;  // of out
  std::vector<std::int64_t> lse_shape() const;     // of all groups

  template <class Operand>
  Operand strided(const at::Tensor& t, decltype(Operand::data) data) const;
  template <class Pointer>
  RowStatistic<Pointer> statistic(const at::Tensor& t, Pointer data) const;  // of a (group, B, Hq, Lq) tensor, or less

  const char* op_;
  bool packed_;
  at::Device device_;
  const Backend& backend_;
  at::ScalarType dtype_, statistic_dtype_;
  at::Tensor query_, key_, value_, grad_out_;  // as the kernels want them to lie
  at::Tensor q_offsets_, k_offsets_, key_mask_, attn_mask_, modality_, image_id_, gate_, gate_weights_, lse_, grad_lse_;
  at::Tensor grad_query_, grad_key_, grad_value_, grad_bias_, grad_gate_;
  bool bias_gradient_ = false;
};

}  // namespace mmca
