// Schemas of the operators and their CPU implementations. Autograd: autograd.cpp; autocast: autocast.cpp; fake kernels:
// mmca_ext/_ops.py.
#include "torch/ops.h"

#include <torch/library.h>

#include "core/kernel_table.h"
#include "torch/executor.h"

namespace mmca {
namespace {

constexpr const char* attention_name = "mmca_ext.attention";
constexpr const char* mmca_name = "mmca_ext.mmca_attention";

void run_on_cpu(Operation operation, const Arguments& arguments) {
  TorchExecutor executor;
  run(operation, arguments.problem, executor);
}

}  // namespace

ThreeTensors attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                       const OptionalTensor& key_mask, const OptionalTensor& rng_state, std::optional<double> scale,
                       bool is_causal, std::int64_t window_left, std::int64_t window_right, double dropout_p,
                       bool save_for_backward) {
  Arguments arguments(attention_name, query, key, value, scale);
  arguments.set_band(is_causal, window_left, window_right);
  arguments.set_masks(attn_mask, key_mask);
  arguments.set_dropout(dropout_p, rng_state);
  const Results results = arguments.allocate_results(query, save_for_backward);
  run_on_cpu(Operation::attention_forward, arguments);
  return {results.out, results.lse, results.lse_low};
}

ThreeTensors attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                                const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                const Tensor& lse_low, const OptionalTensor& attn_mask, const OptionalTensor& key_mask,
                                const OptionalTensor& rng_state, std::optional<double> scale, bool is_causal,
                                std::int64_t window_left, std::int64_t window_right, double dropout_p) {
  Arguments arguments(attention_name, query, key, value, scale);
  arguments.set_band(is_causal, window_left, window_right);
  arguments.set_masks(attn_mask, key_mask);
  arguments.set_dropout(dropout_p, rng_state);
  arguments.set_results({out, lse, lse_low, Tensor()}, grad_out, grad_lse);
  auto gradients = arguments.allocate_gradients(query, key, value);
  run_on_cpu(Operation::attention_backward, arguments);
  return gradients;
}

FourTensors mmca_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& modality,
                           const OptionalTensor& image_id, const OptionalTensor& rng_state, c10::string_view image_rows,
                           c10::string_view merge, std::optional<double> scale, double dropout_p,
                           bool save_for_backward) {
  Arguments arguments(mmca_name, query, key, value, scale);
  arguments.set_modality(modality, image_id, image_rows, merge);
  arguments.set_dropout(dropout_p, rng_state);
  const Results results = arguments.allocate_results(query, save_for_backward);
  run_on_cpu(Operation::attention_forward, arguments);
  return {results.out, results.lse, results.lse_low, results.group_out};
}

ThreeTensors mmca_attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                                     const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                     const Tensor& lse_low, const Tensor& group_out, const Tensor& modality,
                                     const OptionalTensor& image_id, const OptionalTensor& rng_state,
                                     c10::string_view image_rows, c10::string_view merge, std::optional<double> scale,
                                     double dropout_p) {
  Arguments arguments(mmca_name, query, key, value, scale);
  arguments.set_modality(modality, image_id, image_rows, merge);
  arguments.set_dropout(dropout_p, rng_state);
  arguments.set_results({out, lse, lse_low, group_out}, grad_out, grad_lse);
  auto gradients = arguments.allocate_gradients(query, key, value);
  run_on_cpu(Operation::attention_backward, arguments);
  return gradients;
}

// clang-format off
TORCH_LIBRARY(mmca_ext, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_mask, Tensor? rng_state, "
      "float? scale, bool is_causal, int window_left, int window_right, float dropout_p, bool save_for_backward) "
      "-> (Tensor out, Tensor lse, Tensor lse_low)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, Tensor lse_low, Tensor? attn_mask, Tensor? key_mask, Tensor? rng_state, "
      "float? scale, bool is_causal, int window_left, int window_right, float dropout_p) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def(
      "mmca_attention(Tensor query, Tensor key, Tensor value, Tensor modality, Tensor? image_id, Tensor? rng_state, "
      "str image_rows, str merge, float? scale, float dropout_p, bool save_for_backward) "
      "-> (Tensor out, Tensor lse, Tensor lse_low, Tensor group_out)");
  m.def(
      "mmca_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, Tensor lse_low, Tensor group_out, Tensor modality, Tensor? image_id, Tensor? rng_state, "
      "str image_rows, str merge, float? scale, float dropout_p) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
// clang-format on

TORCH_LIBRARY_IMPL(mmca_ext, CPU, m) {
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
  m.impl("mmca_attention", &mmca_attention);
  m.impl("mmca_attention_backward", &mmca_attention_backward);
}

}  // namespace mmca
