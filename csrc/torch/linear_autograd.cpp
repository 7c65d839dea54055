// Autograd and autocast of linear attention: forward, backward and the backward's backward are dispatcher operators
// all.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <ATen/FuncTorchTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "torch/linear_ops.h"

namespace mmca {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
const auto& forward_op() {
  static const auto op = find<decltype(linear_attention)>("mmca_ext::linear_attention");
  return op;
}
const auto& backward_op() {
  static const auto op = find<decltype(linear_attention_backward)>("mmca_ext::linear_attention_backward");
  return op;
}

bool needs_grad(const Tensor& tensor) { return tensor.requires_grad(); }
bool needs_grad(const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); }
template <class... Tensors>
bool any_needs_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (... || needs_grad(tensors));
}
OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor or_undefined(const OptionalTensor& t) { return t ? *t : Tensor(); }

bool has_tangent(const Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }

// Forward-mode AD would lose its tangents in silence.
template <class... Tensors>
void refuse_forward_mode(const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(... || has_tangent(tensors)),
                              "mmca_ext: forward-mode differentiation (jvp) of linear_attention is not built yet; "
                              "mmca_ext.reference has it");
}

// PyTorch refuses these itself, without a word about whose function it was.
void refuse_functorch() {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "mmca_ext: torch.func's grad, vjp and their like do not reach through "
                                "linear_attention; torch.autograd.grad does, and mmca_ext.reference serves torch.func");
  }
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& state_S, const OptionalTensor& state_z,
                               const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, bool return_state, bool is_causal) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, S, z] = forward_op().call(query, key, value, state_S, state_z, key_mask, cu_seqlens_q, cu_seqlens_k,
                                         return_state, is_causal);
    ctx->set_materialize_grads(false);
    if (!return_state) ctx->mark_non_differentiable({S, z});
    ctx->save_for_backward({query, key, value, or_undefined(state_S), or_undefined(state_z), or_undefined(key_mask),
                            or_undefined(cu_seqlens_q), or_undefined(cu_seqlens_k)});
    ctx->saved_data["wanted"] = std::vector<bool>{query.requires_grad(), key.requires_grad(), value.requires_grad(),
                                                  needs_grad(state_S), needs_grad(state_z)};
    ctx->saved_data["is_causal"] = is_causal;
    return {out, S, z};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(10);
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); })) return result;
    const variable_list saved = ctx->get_saved_variables();
    const c10::List<bool> wanted = ctx->saved_data["wanted"].toBoolList();
    const Tensor &query = saved[0], &key = saved[1], &value = saved[2];
    // A gradient that never arrived is zero.
    Tensor grad_out = grads[0], grad_S = grads[1], grad_z = grads[2];
    if (!grad_out.defined()) {
      c10::SymDimVector shape(query.sym_sizes());
      shape.back() = value.sym_size(-1);
      grad_out = at::zeros_symint(shape, query.options());
    }
    if (grad_S.defined() != grad_z.defined()) {
      const Tensor& given = grad_S.defined() ? grad_S : grad_z;
      const c10::SymInt batch = given.sym_size(0), heads = given.sym_size(1), dim = query.sym_size(-1);
      if (!grad_S.defined()) grad_S = at::zeros_symint({batch, heads, dim, value.sym_size(-1)}, given.options());
      else grad_z = at::zeros_symint({batch, heads, dim}, given.options());
    }
    const auto [q, k, v, S, z] = backward_op().call(
        grad_out, optional(grad_S), optional(grad_z), query, key, value, optional(saved[3]), optional(saved[4]),
        optional(saved[5]), optional(saved[6]), optional(saved[7]), ctx->saved_data["is_causal"].toBool());
    const Tensor* gradients[] = {&q, &k, &v, &S, &z};
    for (std::size_t i = 0; i < 5; ++i)
      if (wanted[i]) result[i] = *gradients[i];
    return result;
  }
};

ThreeTensors linear_autograd(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& state_S,
                             const OptionalTensor& state_z, const OptionalTensor& key_mask,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool return_state,
                             bool is_causal) {
  refuse_forward_mode(query, key, value, state_S, state_z);
  if (!any_needs_grad(query, key, value, state_S, state_z)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().call(query, key, value, state_S, state_z, key_mask, cu_seqlens_q, cu_seqlens_k, return_state,
                             is_causal);
  }
  refuse_functorch();
  const variable_list result = LinearFunction::apply(query, key, value, state_S, state_z, key_mask, cu_seqlens_q,
                                                     cu_seqlens_k, return_state, is_causal);
  return {result[0], result[1], result[2]};
}

// ---------------------------------------------------------------- the backward's own gradient

using DoubleBackward = std::vector<Tensor>(const c10::List<OptionalTensor>& grads, const Tensor& grad_out,
                                           const OptionalTensor& grad_S, const OptionalTensor& grad_z,
                                           const Tensor& query, const Tensor& key, const Tensor& value,
                                           const OptionalTensor& state_S, const OptionalTensor& state_z,
                                           const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens_q,
                                           const OptionalTensor& cu_seqlens_k, bool is_causal);

// Hands on what the backward computed, with a gradient that mmca_ext/_linear_ops.py takes through the reference.
struct LinearBackwardFunction : torch::autograd::Function<LinearBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_out, const OptionalTensor& grad_S,
                               const OptionalTensor& grad_z, const Tensor& query, const Tensor& key,
                               const Tensor& value, const OptionalTensor& state_S, const OptionalTensor& state_z,
                               const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, const FiveTensors& computed, bool is_causal) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({grad_out, or_undefined(grad_S), or_undefined(grad_z), query, key, value,
                            or_undefined(state_S), or_undefined(state_z), or_undefined(key_mask),
                            or_undefined(cu_seqlens_q), or_undefined(cu_seqlens_k)});
    ctx->saved_data["wanted"] =
        std::vector<bool>{grad_out.requires_grad(), needs_grad(grad_S),    needs_grad(grad_z),  query.requires_grad(),
                          key.requires_grad(),      value.requires_grad(), needs_grad(state_S), needs_grad(state_z)};
    ctx->saved_data["is_causal"] = is_causal;
    const auto& [q, k, v, S, z] = computed;
    return {q, k, v, S, z};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<DoubleBackward>("mmca_ext::linear_attention_double_backward");
    variable_list result(13);
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); })) return result;
    const variable_list saved = ctx->get_saved_variables();
    const c10::List<bool> wanted = ctx->saved_data["wanted"].toBoolList();
    c10::List<OptionalTensor> arriving;
    for (const Tensor& grad : grads) arriving.push_back(optional(grad));
    const std::vector<Tensor> gradients =
        op.call(arriving, saved[0], optional(saved[1]), optional(saved[2]), saved[3], saved[4], saved[5],
                optional(saved[6]), optional(saved[7]), optional(saved[8]), optional(saved[9]), optional(saved[10]),
                ctx->saved_data["is_causal"].toBool());
    for (std::size_t i = 0; i < gradients.size(); ++i)
      if (wanted[i]) result[i] = gradients[i];
    return result;
  }
};

FiveTensors linear_backward_autograd(const Tensor& grad_out, const OptionalTensor& grad_S, const OptionalTensor& grad_z,
                                     const Tensor& query, const Tensor& key, const Tensor& value,
                                     const OptionalTensor& state_S, const OptionalTensor& state_z,
                                     const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens_q,
                                     const OptionalTensor& cu_seqlens_k, bool is_causal) {
  refuse_forward_mode(grad_out, grad_S, grad_z, query, key, value, state_S, state_z);
  const FiveTensors gradients = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return backward_op().call(grad_out, grad_S, grad_z, query, key, value, state_S, state_z, key_mask, cu_seqlens_q,
                              cu_seqlens_k, is_causal);
  }();
  if (!any_needs_grad(grad_out, grad_S, grad_z, query, key, value, state_S, state_z)) return gradients;
  const variable_list result =
      LinearBackwardFunction::apply(grad_out, grad_S, grad_z, query, key, value, state_S, state_z, key_mask,
                                    cu_seqlens_q, cu_seqlens_k, gradients, is_causal);
  return {result[0], result[1], result[2], result[3], result[4]};
}

// ---------------------------------------------------------------- autocast

Tensor cast(const Tensor& t) {
  const auto device = t.device().type();
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
}

// As in attention: autocast's dtype, but for float64. States keep theirs.
ThreeTensors linear_autocast(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& state_S,
                             const OptionalTensor& state_z, const OptionalTensor& key_mask,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool return_state,
                             bool is_causal) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return forward_op().call(cast(query), cast(key), cast(value), state_S, state_z, key_mask, cu_seqlens_q, cu_seqlens_k,
                           return_state, is_causal);
}

}  // namespace

TORCH_LIBRARY_IMPL(mmca_ext, Autograd, m) {
  m.impl("linear_attention", &linear_autograd);
  m.impl("linear_attention_backward", &linear_backward_autograd);
}
TORCH_LIBRARY_IMPL(mmca_ext, AutocastCPU, m) { m.impl("linear_attention", &linear_autocast); }
TORCH_LIBRARY_IMPL(mmca_ext, AutocastCUDA, m) { m.impl("linear_attention", &linear_autocast); }

}  // namespace mmca
