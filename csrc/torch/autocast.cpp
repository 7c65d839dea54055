// Under autocast the operators run in autocast's dtype, as scaled_dot_product_attention does; float64 stays.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <ATen/core/dispatch/Dispatcher.h>

#include "torch/ops.h"

namespace mmca {
namespace {

Tensor cast(const Tensor& t) {
  const auto device = t.device().type();
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
}

template <class... Rest>
FourTensors attention_autocast(const Tensor& query, const Tensor& key, const Tensor& value, Rest... rest) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mmca_ext::attention", "").typed<decltype(attention)>();
  return op.call(cast(query), cast(key), cast(value), rest...);
}

template <class... Rest>
constexpr auto autocast_of(FourTensors (*)(const Tensor&, const Tensor&, const Tensor&, Rest...)) {
  return &attention_autocast<Rest...>;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmca_ext, AutocastCPU, m) { m.impl("attention", autocast_of(&attention)); }
TORCH_LIBRARY_IMPL(mmca_ext, AutocastCUDA, m) { m.impl("attention", autocast_of(&attention)); }

}  // namespace mmca
