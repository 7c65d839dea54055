// Autograd of the operators: forward, backward and the backward's backward are dispatcher operators all, so that
// compilers see them. `Numbers` is the list of plain arguments at the end of every schema (torch/ops.h).
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <type_traits>
#include <utility>

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

bool needs_grad(const Tensor& tensor) { return tensor.requires_grad(); }
bool needs_grad(const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); }
template <class... Tensors>
bool any_needs_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (... || needs_grad(tensors));
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor or_undefined(const OptionalTensor& t) { return t ? *t : Tensor(); }
Tensor defined_if(bool wanted, const Tensor& t) { return wanted ? t : Tensor(); }

// A gradient that never arrived is zero.
Tensor materialise(const Tensor& grad, const Tensor& out) {
  return grad.defined() ? grad : at::zeros_symint(out.sym_sizes(), out.options());
}

// What `Numbers` become while they wait for the backward.
template <class T>
using Saved = std::conditional_t<std::is_same_v<std::decay_t<T>, c10::string_view>, std::string, std::decay_t<T>>;

template <class... Numbers>
void save_numbers(AutogradContext* ctx, const Numbers&... numbers) {
  ctx->saved_data["numbers"] = c10::ivalue::Tuple::create(std::vector<c10::IValue>{Saved<Numbers>(numbers)...});
}

// Calls body(numbers...).
template <class... Numbers, class Body>
auto with_numbers(AutogradContext* ctx, const Body& body) {
  const std::vector<c10::IValue> saved = ctx->saved_data["numbers"].toTuple()->elements().vec();
  return [&]<std::size_t... i>(std::index_sequence<i...>) {
    return body(saved[i].template to<Saved<Numbers>>()...);
  }(std::index_sequence_for<Numbers...>{});
}

template <class... Numbers>
struct AttentionFunction : torch::autograd::Function<AttentionFunction<Numbers...>> {
  static constexpr std::size_t tensors = 11;

  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& attn_mask, const OptionalTensor& gate,
                               const OptionalTensor& key_mask, const OptionalTensor& modality,
                               const OptionalTensor& image_id, const OptionalTensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng_state,
                               Numbers... numbers) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse, lse_low, group_out] =
        attention_op().call(query, key, value, attn_mask, gate, key_mask, modality, image_id, cu_seqlens_q,
                            cu_seqlens_k, rng_state, /*save_for_backward=*/true, numbers...);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({lse_low, group_out});
    ctx->save_for_backward({query, key, value, out, lse, lse_low, group_out, or_undefined(attn_mask),
                            or_undefined(gate), or_undefined(key_mask), or_undefined(modality), or_undefined(image_id),
                            or_undefined(cu_seqlens_q), or_undefined(cu_seqlens_k), or_undefined(rng_state)});
    ctx->saved_data["wanted"] = std::vector<bool>{query.requires_grad(), key.requires_grad(), value.requires_grad(),
                                                  needs_grad(attn_mask), needs_grad(gate)};
    save_numbers(ctx, numbers...);
    return {out, lse, lse_low, group_out};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(tensors + sizeof...(Numbers));
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const c10::List<bool> wanted = ctx->saved_data["wanted"].toBoolList();
    const auto [query, key, value, attn_mask, gate] = with_numbers<Numbers...>(ctx, [&](const auto&... numbers) {
      return attention_backward_op().call(
          materialise(grads[0], saved[3]), optional(grads[1]), saved[0], saved[1], saved[2], saved[3], saved[4],
          saved[5], saved[6], optional(saved[7]), optional(saved[8]), optional(saved[9]), optional(saved[10]),
          optional(saved[11]), optional(saved[12]), optional(saved[13]), optional(saved[14]), wanted[3], numbers...);
    });
    const Tensor* gradients[] = {&query, &key, &value, &attn_mask, &gate};
    for (std::size_t i = 0; i < 5; ++i) result[i] = defined_if(wanted[i], *gradients[i]);
    return result;
  }
};

bool has_tangent(const Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }

// Forward-mode AD would lose its tangents in silence.
template <class... Tensors>
void refuse_forward_mode(const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(... || has_tangent(tensors)),
      "mmca_ext: forward-mode differentiation (jvp) of attention and mmca_attention is not built yet; "
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
                                "mmca_ext: torch.func's grad, vjp and their like do not reach through attention and "
                                "mmca_attention; torch.autograd.grad does, and mmca_ext.reference serves torch.func");
  }
}

template <class... Numbers>
FourTensors attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& attn_mask, const OptionalTensor& gate,
                               const OptionalTensor& key_mask, const OptionalTensor& modality,
                               const OptionalTensor& image_id, const OptionalTensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng_state,
                               bool save_for_backward, Numbers... numbers) {
  refuse_forward_mode(query, key, value, attn_mask, gate);
  if (!any_needs_grad(query, key, value, attn_mask, gate)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return attention_op().call(query, key, value, attn_mask, gate, key_mask, modality, image_id, cu_seqlens_q,
                               cu_seqlens_k, rng_state, save_for_backward, numbers...);
  }
  refuse_functorch();
  const variable_list result =
      AttentionFunction<Numbers...>::apply(query, key, value, attn_mask, gate, key_mask, modality, image_id,
                                           cu_seqlens_q, cu_seqlens_k, rng_state, numbers...);
  return {result[0], result[1], result[2], result[3]};
}

// ---------------------------------------------------------------- the backward's own gradient

template <class... Numbers>
using DoubleBackward = std::vector<Tensor>(const c10::List<OptionalTensor>& grads, const Tensor& grad_out,
                                           const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
                                           const Tensor& value, const OptionalTensor& attn_mask,
                                           const OptionalTensor& gate, const OptionalTensor& key_mask,
                                           const OptionalTensor& modality, const OptionalTensor& image_id,
                                           const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                           const OptionalTensor& rng_state, Numbers... numbers);

// Hands on what attention_backward computed, with a gradient that mmca_ext/_ops.py takes through the reference: out,
// lse and what else the forward kept are functions of the inputs there. The tensors are separate arguments because only
// those become inputs of the graph's node.
template <class... Numbers>
struct BackwardFunction : torch::autograd::Function<BackwardFunction<Numbers...>> {
  static constexpr std::size_t tensors = 13;  // without `computed`

  static variable_list forward(AutogradContext* ctx, const Tensor& grad_out, const OptionalTensor& grad_lse,
                               const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& attn_mask, const OptionalTensor& gate,
                               const OptionalTensor& key_mask, const OptionalTensor& modality,
                               const OptionalTensor& image_id, const OptionalTensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng_state,
                               const FiveTensors& computed, Numbers... numbers) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({grad_out, or_undefined(grad_lse), query, key, value, or_undefined(attn_mask),
                            or_undefined(gate), or_undefined(key_mask), or_undefined(modality), or_undefined(image_id),
                            or_undefined(cu_seqlens_q), or_undefined(cu_seqlens_k), or_undefined(rng_state)});
    ctx->saved_data["wanted"] =
        std::vector<bool>{grad_out.requires_grad(), needs_grad(grad_lse),  query.requires_grad(), key.requires_grad(),
                          value.requires_grad(),    needs_grad(attn_mask), needs_grad(gate)};
    save_numbers(ctx, numbers...);
    const auto& [grad_query, grad_key, grad_value, grad_attn_mask, grad_gate] = computed;
    return {grad_query, grad_key, grad_value, grad_attn_mask, grad_gate};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<DoubleBackward<Numbers...>>("mmca_ext::attention_double_backward");
    variable_list result(tensors + 1 + sizeof...(Numbers));
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); })) return result;
    const variable_list saved = ctx->get_saved_variables();
    const c10::List<bool> wanted = ctx->saved_data["wanted"].toBoolList();
    c10::List<OptionalTensor> arriving;
    for (const Tensor& grad : grads) arriving.push_back(optional(grad));
    const std::vector<Tensor> gradients = with_numbers<Numbers...>(ctx, [&](const auto&... numbers) {
      return op.call(arriving, saved[0], optional(saved[1]), saved[2], saved[3], saved[4], optional(saved[5]),
                     optional(saved[6]), optional(saved[7]), optional(saved[8]), optional(saved[9]),
                     optional(saved[10]), optional(saved[11]), optional(saved[12]), numbers...);
    });
    for (std::size_t i = 0; i < gradients.size(); ++i) result[i] = defined_if(wanted[i], gradients[i]);
    return result;
  }
};

template <class... Numbers>
FiveTensors attention_backward_autograd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                                        const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                        const Tensor& lse_low, const Tensor& group_out, const OptionalTensor& attn_mask,
                                        const OptionalTensor& gate, const OptionalTensor& key_mask,
                                        const OptionalTensor& modality, const OptionalTensor& image_id,
                                        const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                        const OptionalTensor& rng_state, bool attn_mask_gradient, Numbers... numbers) {
  refuse_forward_mode(grad_out, grad_lse, query, key, value, attn_mask, gate);
  const FiveTensors gradients = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return attention_backward_op().call(grad_out, grad_lse, query, key, value, out, lse, lse_low, group_out, attn_mask,
                                        gate, key_mask, modality, image_id, cu_seqlens_q, cu_seqlens_k, rng_state,
                                        attn_mask_gradient, numbers...);
  }();
  if (!any_needs_grad(grad_out, grad_lse, query, key, value, attn_mask, gate)) return gradients;
  const variable_list result =
      BackwardFunction<Numbers...>::apply(grad_out, grad_lse, query, key, value, attn_mask, gate, key_mask, modality,
                                          image_id, cu_seqlens_q, cu_seqlens_k, rng_state, gradients, numbers...);
  return {result[0], result[1], result[2], result[3], result[4]};
}

template <class... Numbers>
void register_with(torch::Library& m,
                   FourTensors (*)(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, bool, Numbers...)) {
  m.impl("attention", &attention_autograd<Numbers...>);
  m.impl("attention_backward", &attention_backward_autograd<Numbers...>);
}

}  // namespace

TORCH_LIBRARY_IMPL(mmca_ext, Autograd, m) { register_with(m, &attention); }

}  // namespace mmca
