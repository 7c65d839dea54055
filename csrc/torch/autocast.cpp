// Under autocast the operators run in float32: 16-bit kernels are not built yet, and float32 loses nothing. float64
// stays.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <ATen/core/dispatch/Dispatcher.h>

#include "torch/ops.h"

namespace mmca {
namespace {

Tensor widen(const Tensor& t) { return at::autocast::cached_cast(at::kFloat, t, t.device().type()); }

ThreeTensors attention_autocast(const Tensor& query, const Tensor& key, const Tensor& value,
                                const OptionalTensor& attn_mask, const OptionalTensor& key_mask,
                                const OptionalTensor& rng_state, std::optional<double> scale, bool is_causal,
                                std::int64_t window_left, std::int64_t window_right, double dropout_p,
                                bool save_for_backward) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mmca_ext::attention", "").typed<decltype(attention)>();
  return op.call(widen(query), widen(key), widen(value), attn_mask, key_mask, rng_state, scale, is_causal, window_left,
                 window_right, dropout_p, save_for_backward);
}

FourTensors mmca_attention_autocast(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& modality,
                                    const OptionalTensor& image_id, const OptionalTensor& rng_state,
                                    c10::string_view image_rows, c10::string_view merge, std::optional<double> scale,
                                    double dropout_p, bool save_for_backward) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mmca_ext::mmca_attention", "").typed<decltype(mmca_attention)>();
  return op.call(widen(query), widen(key), widen(value), modality, image_id, rng_state, image_rows, merge, scale,
                 dropout_p, save_for_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(mmca_ext, AutocastCPU, m) {
  m.impl("attention", &attention_autocast);
  m.impl("mmca_attention", &mmca_attention_autocast);
}
TORCH_LIBRARY_IMPL(mmca_ext, AutocastCUDA, m) {
  m.impl("attention", &attention_autocast);
  m.impl("mmca_attention", &mmca_attention_autocast);
}

}  // namespace mmca
