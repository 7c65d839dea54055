#include "torch/arguments.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

namespace mmca {
namespace {

constexpr std::int64_t max_head_dim = 256;
constexpr std::int64_t max_length = std::numeric_limits<std::int32_t>::max() - 1024;  // list coordinates are 32-bit

template <class Operand>
Operand strided(const at::Tensor& t, decltype(Operand::data) data) {
  return {data, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
Input input(const at::Tensor& t) { return strided<Input>(t, t.const_data_ptr()); }
Output output(const at::Tensor& t) { return strided<Output>(t, t.mutable_data_ptr()); }

template <class Pointer>
RowStatistic<Pointer> statistic(const at::Tensor& t, Pointer data) {  // (B, H, L) or (2, B, H, L)
  const bool grouped = t.dim() == 4;
  return {data, grouped ? t.stride(0) : 0, t.stride(grouped), t.stride(grouped + 1), t.stride(grouped + 2)};
}

// New (B, H, L, D) memory, ordered like `like`: heads inside rows where they are so there. Projections give that order
// and want it back. functional's fake kernels follow the same rule.
at::Tensor empty_ordered_like(const at::Tensor& like, std::int64_t b, std::int64_t h, std::int64_t l, std::int64_t d) {
  if (like.stride(1) < like.stride(2)) return at::empty({b, l, h, d}, like.options()).transpose(1, 2);
  return at::empty({b, h, l, d}, like.options());
}

at::Tensor empty_ordered_like(const at::Tensor& like) {
  return empty_ordered_like(like, like.size(0), like.size(1), like.size(2), like.size(3));
}

// (batch, k_len) integers as contiguous int32.
at::Tensor token_ids(const char* op, const char* name, const at::Tensor& ids, const Problem& problem,
                     at::Device device) {
  const at::ScalarType type = ids.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kLong || type == at::kInt || type == at::kShort || type == at::kChar || type == at::kByte, op, ": ",
      name, " must be an integer tensor (int64, int32, int16, int8 or uint8), got ", type);
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == problem.batch && ids.size(1) == problem.k_len, op, ": ", name,
                    " must have shape (B, Lk) = (", problem.batch, ", ", problem.k_len, "), got ", ids.sizes());
  TORCH_CHECK_VALUE(ids.device() == device, op, ": ", name, " must be on the query's device ", device, ", got ",
                    ids.device());
  if (ids.scalar_type() == at::kLong) {
    const at::Tensor wide = ids.contiguous();
    const auto* value = wide.const_data_ptr<std::int64_t>();
    for (std::int64_t i = 0; i < wide.numel(); ++i)
      TORCH_CHECK_VALUE(
          value[i] >= std::numeric_limits<std::int32_t>::min() && value[i] <= std::numeric_limits<std::int32_t>::max(),
          op, ": ", name, " must fit 32 bits, got ", value[i]);
  }
  return ids.to(at::kInt).contiguous();
}

}  // namespace

Arguments::Arguments(const char* op_, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     std::optional<double> scale)
    : op(op_), device(query.device()), dtype_(query.scalar_type()) {
  const at::Tensor* tensors[] = {&query, &key, &value};
  const char* const names[] = {"query", "key", "value"};
  const char* const shapes[] = {"(B, Hq, Lq, D)", "(B, Hkv, Lk, D)", "(B, Hkv, Lk, Dv)"};
  for (int i = 0; i < 3; ++i) {
    const at::Tensor& t = *tensors[i];
    TORCH_CHECK_VALUE(t.dim() == 4, op, ": ", names[i], " must be 4-D ", shapes[i], ", got shape ", t.sizes());
    TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), op, ": ", names[i], " must be a floating-point tensor, got ",
                     t.scalar_type());
    TORCH_CHECK_TYPE(t.scalar_type() == dtype_, op, ": query, key and value must share one dtype, got ", dtype_,
                     " for query and ", t.scalar_type(), " for ", names[i]);
    TORCH_CHECK_VALUE(t.device() == query.device(), op, ": query, key and value must be on one device, got ",
                      query.device(), " for query and ", t.device(), " for ", names[i]);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(dtype_ == at::kFloat || dtype_ == at::kDouble, op,
                              ": the kernels are built for float32 and float64, got ", dtype_,
                              "; other dtypes are not built yet (mmca_ext.reference takes them)");

  TORCH_CHECK_VALUE(device.is_cpu(), op, ": tensors must be on the CPU, got ", device);

  Problem& p = problem;
  p.dtype = dtype_ == at::kFloat ? DType::f32 : DType::f64;
  p.batch = query.size(0), p.q_heads = query.size(1), p.q_len = query.size(2), p.head_dim = query.size(3);
  p.kv_heads = key.size(1), p.k_len = key.size(2), p.value_dim = value.size(3);
  TORCH_CHECK_VALUE(key.size(0) == p.batch && value.size(0) == p.batch, op,
                    ": query, key and value must share the batch size, got ", p.batch, ", ", key.size(0), " and ",
                    value.size(0));
  TORCH_CHECK_VALUE(key.size(3) == p.head_dim, op, ": key must have the query's head_dim ", p.head_dim, ", got ",
                    key.size(3));
  TORCH_CHECK_VALUE(value.size(1) == p.kv_heads && value.size(2) == p.k_len, op,
                    ": value must have the key's heads and length (", p.kv_heads, ", ", p.k_len, "), got (",
                    value.size(1), ", ", value.size(2), ")");
  TORCH_CHECK_VALUE(p.q_heads >= 1 && p.kv_heads >= 1, op, ": at least one head is needed, got ", p.q_heads,
                    " query heads and ", p.kv_heads, " key/value heads");
  TORCH_CHECK_VALUE(p.q_heads % p.kv_heads == 0, op,
                    ": the number of query heads must be a multiple of the key/value heads, got ", p.q_heads, " and ",
                    p.kv_heads);
  TORCH_CHECK_VALUE(p.head_dim >= 1 && p.head_dim <= max_head_dim, op, ": head_dim must be 1..", max_head_dim, ", got ",
                    p.head_dim);
  TORCH_CHECK_VALUE(p.value_dim >= 1 && p.value_dim <= max_head_dim, op, ": the value's head_dim must be 1..",
                    max_head_dim, ", got ", p.value_dim);
  TORCH_CHECK_VALUE(p.q_len <= max_length && p.k_len <= max_length, op, ": lengths must stay below 2^31, got ", p.q_len,
                    " and ", p.k_len);
  p.scale = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  TORCH_CHECK_VALUE(std::isfinite(p.scale), op, ": scale must be finite, got ", p.scale);
  TORCH_CHECK_VALUE(dtype_ == at::kDouble || std::isfinite(static_cast<float>(p.scale)), op,
                    ": scale must be finite in float32, got ", p.scale);
  const double smallest = dtype_ == at::kDouble ? 1e-290 : 1e-30;  // its last bits must be normal numbers too
  TORCH_CHECK_VALUE(p.scale == 0.0 || std::abs(p.scale) >= smallest, op, ": scale must be 0 or at least ", smallest,
                    " in size, got ", p.scale);
  p.query = input(query), p.key = input(key), p.value = input(value);
}

void Arguments::set_band(bool is_causal, std::int64_t window_left, std::int64_t window_right) {
  TORCH_CHECK_VALUE(window_left >= -1 && window_right >= -1, op,
                    ": window must be (left, right), each -1 (unbounded) or >= 0, got (", window_left, ", ",
                    window_right, ")");
  problem.causal = is_causal;
  problem.window_left = window_left;
  problem.window_right = window_right;
}

void Arguments::set_masks(const OptionalTensor& attn, const OptionalTensor& padding) {
  const Problem& p = problem;
  if (attn) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::isFloatingType(attn->scalar_type()), op,
                                ": a float attn_mask (additive bias) is not built yet, got ", attn->scalar_type(),
                                "; accepted: a bool tensor, True = attend (mmca_ext.reference takes a bias)");
    TORCH_CHECK_TYPE(attn->scalar_type() == at::kBool, op, ": attn_mask must be a bool tensor (True = attend), got ",
                     attn->scalar_type());
    TORCH_CHECK_VALUE(attn->device() == device, op, ": attn_mask must be on the query's device ", device, ", got ",
                      attn->device());
    const std::int64_t full[] = {p.batch, p.q_heads, p.q_len, p.k_len};
    bool fits = attn->dim() <= 4;
    for (std::int64_t d = 1; fits && d <= attn->dim(); ++d) fits = attn->size(-d) == full[4 - d] || attn->size(-d) == 1;
    TORCH_CHECK_VALUE(fits, op, ": attn_mask must broadcast to (B, Hq, Lq, Lk) = ", at::IntArrayRef(full, 4), ", got ",
                      attn->sizes());
    attn_mask = attn->expand({full[0], full[1], full[2], full[3]});
    problem.attn_mask = strided<Strided<const std::uint8_t*>>(
        attn_mask, reinterpret_cast<const std::uint8_t*>(attn_mask.const_data_ptr<bool>()));
  }
  if (padding) {
    TORCH_CHECK_TYPE(padding->scalar_type() == at::kBool, op, ": key_mask must be a bool tensor (True = attend), got ",
                     padding->scalar_type());
    TORCH_CHECK_VALUE(padding->dim() == 2 && padding->size(0) == p.batch && padding->size(1) == p.k_len, op,
                      ": key_mask must have shape (B, Lk) = (", p.batch, ", ", p.k_len, "), got ", padding->sizes());
    TORCH_CHECK_VALUE(padding->device() == device, op, ": key_mask must be on the query's device ", device, ", got ",
                      padding->device());
    key_mask = padding->contiguous();
    problem.key_mask = reinterpret_cast<const std::uint8_t*>(key_mask.const_data_ptr<bool>());
  }
}

void Arguments::set_modality(const at::Tensor& ids, const OptionalTensor& images, c10::string_view image_rows,
                             c10::string_view merge) {
  Problem& p = problem;
  TORCH_CHECK_VALUE(p.q_len <= p.k_len, op, ": queries are the last Lq of the Lk tokens, got Lq = ", p.q_len,
                    " > Lk = ", p.k_len);
  modality = token_ids(op, "modality", ids, p, device);
  const auto* value = modality.const_data_ptr<std::int32_t>();
  for (std::int64_t i = 0; i < modality.numel(); ++i)
    TORCH_CHECK_VALUE(value[i] >= 0, op, ": modality must be 0 (padding), 1 (text) or >= 2 (image), got ", value[i]);
  p.is_mmca = true;
  p.modality = value;
  if (images) {
    image_id = token_ids(op, "image_id", *images, p, device);
    p.image_id = image_id.const_data_ptr<std::int32_t>();
  }

  if (image_rows == "self") p.image_rows = ImageRows::self;
  else if (image_rows == "block") p.image_rows = ImageRows::block;
  else if (image_rows == "causal") p.image_rows = ImageRows::causal;
  else if (image_rows == "self+text") p.image_rows = ImageRows::self_text;
  else
    TORCH_CHECK_VALUE(false, op, ": image_rows must be 'self', 'block', 'causal' or 'self+text', got '", image_rows,
                      "'");

  TORCH_CHECK_NOT_IMPLEMENTED(merge != "gate" && merge != "none", op, ": merge '", merge,
                              "' is not built yet; accepted: 'sum', 'lse' (mmca_ext.reference takes it)");
  if (merge == "sum") p.merge = Merge::sum;
  else if (merge == "lse") p.merge = Merge::lse;
  else TORCH_CHECK_VALUE(false, op, ": merge must be 'sum', 'lse', 'gate' or 'none', got '", merge, "'");
}

void Arguments::set_dropout(double dropout_p, const OptionalTensor& rng_state) {
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p must be in [0, 1], got ", dropout_p);
  if (dropout_p == 0.0) return;
  TORCH_CHECK_VALUE(rng_state && rng_state->scalar_type() == at::kLong && rng_state->dim() == 1 &&
                        rng_state->size(0) == 2 && rng_state->is_cpu(),
                    op, ": dropout needs rng_state, an int64 tensor (seed, offset) on the CPU");
  const at::Tensor state = rng_state->contiguous();
  const auto* value = state.const_data_ptr<std::int64_t>();
  problem.dropout.threshold = static_cast<std::uint32_t>(std::nearbyint(65536.0 * dropout_p));
  problem.dropout.seed = static_cast<std::uint64_t>(value[0]);
  problem.dropout.offset = static_cast<std::uint32_t>(value[1]);
}

Results Arguments::allocate_results(const at::Tensor& query, bool save_for_backward) {
  Problem& p = problem;
  const auto options = query.options();
  const auto per_row = [&] {
    return p.is_mmca ? at::empty({2, p.batch, p.q_heads, p.q_len}, options)
                     : at::empty({p.batch, p.q_heads, p.q_len}, options);
  };
  Results results;
  results.out = empty_ordered_like(query, p.batch, p.q_heads, p.q_len, p.value_dim);
  results.lse = per_row();
  results.lse_low = save_for_backward ? per_row() : at::empty({0}, options);
  results.group_out = save_for_backward && !p.joint()
                          ? at::empty({2, p.batch, p.q_heads, p.q_len, p.value_dim}, options)
                          : at::empty({0}, options);
  p.out = output(results.out);
  p.lse = statistic<void*>(results.lse, results.lse.mutable_data_ptr());
  if (save_for_backward) {
    p.lse_low = statistic<void*>(results.lse_low, results.lse_low.mutable_data_ptr());
    if (!p.joint()) p.group_out = results.group_out.mutable_data_ptr();
  }
  return results;
}

void Arguments::set_results(const Results& results, const at::Tensor& grad_out, const OptionalTensor& grad_lse_) {
  Problem& p = problem;
  const auto& [out, lse, lse_low, group_out] = results;
  const std::int64_t shape[] = {p.batch, p.q_heads, p.q_len, p.value_dim};
  const at::IntArrayRef out_shape(shape, 4), lse_shape(shape, 3);
  for (const at::Tensor& t : {out, lse, grad_out})
    TORCH_CHECK_VALUE(t.device() == device, op, ": results and gradients must be on the query's device ", device,
                      ", got ", t.device());
  TORCH_CHECK_VALUE(out.sizes() == out_shape && grad_out.sizes() == out_shape, op,
                    ": out and grad_out must have shape ", out_shape, ", got ", out.sizes(), " and ", grad_out.sizes());
  TORCH_CHECK_TYPE(out.scalar_type() == dtype_ && grad_out.scalar_type() == dtype_, op,
                   ": out and grad_out must have the query's dtype ", dtype_, ", got ", out.scalar_type(), " and ",
                   grad_out.scalar_type());
  const auto is_statistic = [&](const at::Tensor& t) {
    return t.scalar_type() == dtype_ && t.device() == device &&
           (p.is_mmca ? t.dim() == 4 && t.size(0) == 2 && t.sizes().slice(1) == lse_shape : t.sizes() == lse_shape);
  };
  TORCH_CHECK_VALUE(is_statistic(lse) && (!grad_lse_ || is_statistic(*grad_lse_)), op,
                    ": lse and its gradient must be ", dtype_, " of shape ",
                    p.is_mmca ? "(2, B, Hq, Lq)" : "(B, Hq, Lq)", ", got ", lse.sizes());
  if (lse_low.numel()) {
    TORCH_CHECK_VALUE(is_statistic(lse_low), op,
                      ": lse_low must be the forward's result, of lse's shape and dtype, or empty, got ",
                      lse_low.sizes());
    p.lse_low = statistic<void*>(lse_low, lse_low.mutable_data_ptr());
  }
  if (!p.joint()) {
    TORCH_CHECK_VALUE(
        group_out.dim() == 5 && group_out.size(0) == 2 && group_out.sizes().slice(1) == out_shape &&
            group_out.is_contiguous() && group_out.scalar_type() == dtype_ && group_out.device() == device,
        op, ": group_out must be the forward's contiguous (2, B, Hq, Lq, Dv) result, got ", group_out.sizes());
    p.group_out = group_out.mutable_data_ptr();
  }
  p.out = output(out);
  p.lse = statistic<void*>(lse, lse.mutable_data_ptr());
  p.grad_out = input(grad_out);
  if (grad_lse_) {
    grad_lse = *grad_lse_;
    p.grad_lse = statistic<const void*>(grad_lse, grad_lse.const_data_ptr());
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> Arguments::allocate_gradients(const at::Tensor& query,
                                                                             const at::Tensor& key,
                                                                             const at::Tensor& value) {
  const at::Tensor grad_query = empty_ordered_like(query), grad_key = empty_ordered_like(key),
                   grad_value = empty_ordered_like(value);
  problem.grad_query = output(grad_query), problem.grad_key = output(grad_key), problem.grad_value = output(grad_value);
  return {grad_query, grad_key, grad_value};
}

}  // namespace mmca
