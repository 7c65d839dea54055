// Autograd of the operators: forward and backward are dispatcher operators both, so that compilers see them.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include "torch/ops.h"

namespace mmca {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
const auto& attention_op() {
  static const auto op = find<decltype(attention)>("mmca_ext::attention");
  return op;
}
const auto& attention_backward_op() {
  static const auto op = find<decltype(attention_backward)>("mmca_ext::attention_backward");
  return op;
}
const auto& mmca_attention_op() {
  static const auto op = find<decltype(mmca_attention)>("mmca_ext::mmca_attention");
  return op;
}
const auto& mmca_attention_backward_op() {
  static const auto op = find<decltype(mmca_attention_backward)>("mmca_ext::mmca_attention_backward");
  return op;
}

template <class... Tensors>
bool needs_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (... || tensors.requires_grad());
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor or_undefined(const OptionalTensor& t) { return t ? *t : Tensor(); }

// A gradient that never arrived is zero.
Tensor materialise(const Tensor& grad, const Tensor& out) {
  return grad.defined() ? grad : at::zeros_symint(out.sym_sizes(), out.options());
}

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& attn_mask, const OptionalTensor& key_mask,
                               const OptionalTensor& rng_state, std::optional<double> scale, bool is_causal,
                               std::int64_t window_left, std::int64_t window_right, double dropout_p) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse, lse_low] = attention_op().call(query, key, value, attn_mask, key_mask, rng_state, scale, is_causal,
                                                   window_left, window_right, dropout_p, /*save_for_backward=*/true);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({lse_low});
    ctx->save_for_backward({query, key, value, out, lse, lse_low, or_undefined(attn_mask), or_undefined(key_mask),
                            or_undefined(rng_state)});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["window_left"] = window_left;
    ctx->saved_data["window_right"] = window_right;
    ctx->saved_data["dropout_p"] = dropout_p;
    return {out, lse, lse_low};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(11);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    std::tie(result[0], result[1], result[2]) = attention_backward_op().call(
        materialise(grads[0], saved[3]), optional(grads[1]), saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
        optional(saved[6]), optional(saved[7]), optional(saved[8]), data["scale"].toOptional<double>(),
        data["is_causal"].toBool(), data["window_left"].toInt(), data["window_right"].toInt(),
        data["dropout_p"].toDouble());
    for (int i = 0; i < 3; ++i)
      if (!ctx->needs_input_grad(i)) result[i] = Tensor();
    return result;
  }
};

struct MmcaAttentionFunction : torch::autograd::Function<MmcaAttentionFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                               const Tensor& modality, const OptionalTensor& image_id, const OptionalTensor& rng_state,
                               c10::string_view image_rows, c10::string_view merge, std::optional<double> scale,
                               double dropout_p) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse, lse_low, group_out] =
        mmca_attention_op().call(query, key, value, modality, image_id, rng_state, image_rows, merge, scale, dropout_p,
                                 /*save_for_backward=*/true);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({lse_low, group_out});
    ctx->save_for_backward(
        {query, key, value, out, lse, lse_low, group_out, modality, or_undefined(image_id), or_undefined(rng_state)});
    ctx->saved_data["image_rows"] = std::string(image_rows);
    ctx->saved_data["merge"] = std::string(merge);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout_p"] = dropout_p;
    return {out, lse, lse_low, group_out};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(10);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    std::tie(result[0], result[1], result[2]) = mmca_attention_backward_op().call(
        materialise(grads[0], saved[3]), optional(grads[1]), saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
        saved[6], saved[7], optional(saved[8]), optional(saved[9]), data["image_rows"].toStringRef(),
        data["merge"].toStringRef(), data["scale"].toOptional<double>(), data["dropout_p"].toDouble());
    for (int i = 0; i < 3; ++i)
      if (!ctx->needs_input_grad(i)) result[i] = Tensor();
    return result;
  }
};

// Forward-mode AD would lose its tangents in silence.
template <class... Tensors>
void refuse_forward_mode(const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(... || tensors._fw_grad(/*level=*/0).defined()),
      "mmca_ext: forward-mode differentiation (jvp) of attention and mmca_attention is not built yet; "
      "mmca_ext.reference has it");
}

// The backward operators are not differentiable yet: asking them for a gradient is an error, not a silent zero. The
// tensors are separate arguments because only those become inputs of the graph's node.
struct NotTwiceDifferentiable : torch::autograd::Function<NotTwiceDifferentiable> {
  static variable_list forward(AutogradContext*, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                               const OptionalTensor&, const ThreeTensors& gradients) {
    return {std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "mmca_ext: double backward of attention and mmca_attention is not built yet; "
                                "mmca_ext.reference is twice differentiable");
  }
};

ThreeTensors not_twice_differentiable(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                                      const Tensor& key, const Tensor& value, const ThreeTensors& gradients) {
  if (!needs_grad(grad_out, query, key, value) && !(grad_lse && needs_grad(*grad_lse))) return gradients;
  const variable_list result = NotTwiceDifferentiable::apply(grad_out, query, key, value, grad_lse, gradients);
  return {result[0], result[1], result[2]};
}

ThreeTensors attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                const OptionalTensor& attn_mask, const OptionalTensor& key_mask,
                                const OptionalTensor& rng_state, std::optional<double> scale, bool is_causal,
                                std::int64_t window_left, std::int64_t window_right, double dropout_p,
                                bool save_for_backward) {
  refuse_forward_mode(query, key, value);
  if (!needs_grad(query, key, value)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return attention_op().call(query, key, value, attn_mask, key_mask, rng_state, scale, is_causal, window_left,
                               window_right, dropout_p, save_for_backward);
  }
  const variable_list result = AttentionFunction::apply(query, key, value, attn_mask, key_mask, rng_state, scale,
                                                        is_causal, window_left, window_right, dropout_p);
  return {result[0], result[1], result[2]};
}

ThreeTensors attention_backward_autograd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                                         const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                         const Tensor& lse_low, const OptionalTensor& attn_mask,
                                         const OptionalTensor& key_mask, const OptionalTensor& rng_state,
                                         std::optional<double> scale, bool is_causal, std::int64_t window_left,
                                         std::int64_t window_right, double dropout_p) {
  const ThreeTensors gradients = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return attention_backward_op().call(grad_out, grad_lse, query, key, value, out, lse, lse_low, attn_mask, key_mask,
                                        rng_state, scale, is_causal, window_left, window_right, dropout_p);
  }();
  return not_twice_differentiable(grad_out, grad_lse, query, key, value, gradients);
}

FourTensors mmca_attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& modality,
                                    const OptionalTensor& image_id, const OptionalTensor& rng_state,
                                    c10::string_view image_rows, c10::string_view merge, std::optional<double> scale,
                                    double dropout_p, bool save_for_backward) {
  refuse_forward_mode(query, key, value);
  if (!needs_grad(query, key, value)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return mmca_attention_op().call(query, key, value, modality, image_id, rng_state, image_rows, merge, scale,
                                    dropout_p, save_for_backward);
  }
  const variable_list result = MmcaAttentionFunction::apply(query, key, value, modality, image_id, rng_state,
                                                            image_rows, merge, scale, dropout_p);
  return {result[0], result[1], result[2], result[3]};
}

ThreeTensors mmca_attention_backward_autograd(const Tensor& grad_out, const OptionalTensor& grad_lse,
                                              const Tensor& query, const Tensor& key, const Tensor& value,
                                              const Tensor& out, const Tensor& lse, const Tensor& lse_low,
                                              const Tensor& group_out, const Tensor& modality,
                                              const OptionalTensor& image_id, const OptionalTensor& rng_state,
                                              c10::string_view image_rows, c10::string_view merge,
                                              std::optional<double> scale, double dropout_p) {
  const ThreeTensors gradients = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return mmca_attention_backward_op().call(grad_out, grad_lse, query, key, value, out, lse, lse_low, group_out,
                                             modality, image_id, rng_state, image_rows, merge, scale, dropout_p);
  }();
  return not_twice_differentiable(grad_out, grad_lse, query, key, value, gradients);
}

}  // namespace

TORCH_LIBRARY_IMPL(mmca_ext, Autograd, m) {
  m.impl("attention", &attention_autograd);
  m.impl("attention_backward", &attention_backward_autograd);
  m.impl("mmca_attention", &mmca_attention_autograd);
  m.impl("mmca_attention_backward", &mmca_attention_backward_autograd);
}

}  // namespace mmca
