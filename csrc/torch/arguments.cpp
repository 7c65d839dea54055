#include "torch/arguments.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdlib>
#include <limits>

namespace mmca {
namespace {

constexpr std::int64_t max_head_dim = 256;
constexpr std::int64_t max_length = std::numeric_limits<std::int32_t>::max() - 1024;  // list coordinates are 32-bit

// New (B, H, L, D) memory, ordered like `like`: heads inside rows where they are so there. Projections give that order
// and want it back. Packed (T, H, D) tensors are contiguous. The fake kernels (mmca_ext/_ops.py) follow the same rule.
at::Tensor empty_ordered_like(const at::Tensor& like, std::int64_t features, bool two_groups = false) {
  std::vector<std::int64_t> shape = like.sizes().vec();
  shape.back() = features;
  const bool swap = like.dim() == 4 && like.stride(1) < like.stride(2);
  if (swap) std::swap(shape[1], shape[2]);
  if (two_groups) shape.insert(shape.begin(), 2);
  const at::Tensor t = at::empty(shape, like.options());
  return swap ? t.transpose(-3, -2) : t;
}

DType dtype_of(const char* op, const char* name, at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_CHECK_TYPE(false, op, ": ", name, " must be float32, float64, bfloat16 or float16, got ", type);
  }
}

// Python's None for a tensor that has to be there arrives as one without shape, dtype and device.
const at::Tensor& given(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), op, ": ", name, " must be a tensor, got None");
  return t;
}

}  // namespace

// ---------------------------------------------------------------- shapes

Arguments::Arguments(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                     std::optional<std::int64_t> max_seqlen_q, std::optional<std::int64_t> max_seqlen_k,
                     std::optional<double> scale, double softcap, bool is_mmca)
    : op_(op),
      packed_(cu_seqlens_q || cu_seqlens_k),
      device_(given(op, "query", query).device()),
      backend_(backend_of(op, device_)),
      dtype_(query.scalar_type()),
      statistic_dtype_(dtype_ == at::kDouble ? at::kDouble : at::kFloat) {
  check_tensors(query, key, value);
  Problem& p = problem;
  p.is_mmca = is_mmca;
  p.dtype = dtype_of(op_, "query", dtype_);
  const int heads = 1, rows = packed_ ? 0 : 2;
  p.batch = packed_ ? 0 : query.size(0);
  p.q_heads = query.size(heads), p.q_len = query.size(rows), p.head_dim = query.size(-1);
  p.kv_heads = key.size(heads), p.k_len = key.size(rows), p.value_dim = value.size(-1);
  TORCH_CHECK_VALUE(packed_ || (key.size(0) == p.batch && value.size(0) == p.batch), op_,
                    ": query, key and value must share the batch size, got ", p.batch, ", ", key.size(0), " and ",
                    value.size(0));
  TORCH_CHECK_VALUE(key.size(-1) == p.head_dim, op_, ": key must have the query's head_dim ", p.head_dim, ", got ",
                    key.size(-1));
  TORCH_CHECK_VALUE(value.size(heads) == p.kv_heads && value.size(rows) == p.k_len, op_,
                    ": value must have the key's heads and length (", p.kv_heads, ", ", p.k_len, "), got (",
                    value.size(heads), ", ", value.size(rows), ")");
  check_lengths();
  if (packed_) {
    TORCH_CHECK_VALUE(cu_seqlens_q && cu_seqlens_k, op_, ": cu_seqlens_q and cu_seqlens_k go together, got only ",
                      cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k");
    set_offsets(*cu_seqlens_q, *cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  } else {
    TORCH_CHECK_VALUE(!max_seqlen_q && !max_seqlen_k, op_,
                      ": max_seqlen belongs to cu_seqlens, and there are no cu_seqlens");
  }

  p.scale = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  const bool wide = dtype_ == at::kDouble;
  TORCH_CHECK_VALUE(std::isfinite(p.scale), op_, ": scale must be finite, got ", p.scale);
  TORCH_CHECK_VALUE(wide || std::isfinite(static_cast<float>(p.scale)), op_, ": scale must be finite in float32, got ",
                    p.scale);
  const double smallest = wide ? 1e-290 : 1e-30;  // its last bits must be normal numbers too
  TORCH_CHECK_VALUE(p.scale == 0.0 || std::abs(p.scale) >= smallest, op_, ": scale must be 0 or at least ", smallest,
                    " in size, got ", p.scale);
  p.softcap = softcap;
  TORCH_CHECK_VALUE(softcap == 0.0 || (softcap >= smallest && softcap <= 1.0 / smallest), op_,
                    ": softcap must be 0 (none) or positive, from ", smallest, " to ", 1.0 / smallest, ", got ",
                    softcap);
  query_ = with_aligned_rows(query), key_ = with_aligned_rows(key), value_ = with_aligned_rows(value);
  p.query = strided<Input>(query_, query_.const_data_ptr());
  p.key = strided<Input>(key_, key_.const_data_ptr());
  p.value = strided<Input>(value_, value_.const_data_ptr());
}

void Arguments::check_tensors(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) const {
  const at::Tensor* tensors[] = {&query, &key, &value};
  const char* const names[] = {"query", "key", "value"};
  const char* const shapes[] = {"(B, Hq, Lq, D)", "(B, Hkv, Lk, D)", "(B, Hkv, Lk, Dv)"};
  const char* const packed_shapes[] = {"(Tq, Hq, D)", "(Tk, Hkv, D)", "(Tk, Hkv, Dv)"};
  for (int i = 0; i < 3; ++i) {
    const at::Tensor& t = given(op_, names[i], *tensors[i]);
    TORCH_CHECK_VALUE(packed_ || t.dim() == 4, op_, ": ", names[i], " must be 4-D ", shapes[i], ", got shape ",
                      t.sizes());
    TORCH_CHECK_VALUE(!packed_ || t.dim() == 3, op_, ": with cu_seqlens ", names[i], " must be packed, 3-D ",
                      packed_shapes[i], ", got shape ", t.sizes());
    TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), op_, ": ", names[i], " must be a floating-point tensor, got ",
                     t.scalar_type());
    TORCH_CHECK_TYPE(t.scalar_type() == dtype_, op_, ": query, key and value must share one dtype, got ", dtype_,
                     " for query and ", t.scalar_type(), " for ", names[i]);
    TORCH_CHECK_VALUE(t.device() == device_, op_, ": query, key and value must be on one device, got ", device_,
                      " for query and ", t.device(), " for ", names[i]);
  }
}

void Arguments::check_lengths() const {
  const Problem& p = problem;
  TORCH_CHECK_VALUE(p.q_heads >= 1 && p.kv_heads >= 1, op_, ": at least one head is needed, got ", p.q_heads,
                    " query heads and ", p.kv_heads, " key/value heads");
  TORCH_CHECK_VALUE(p.q_heads % p.kv_heads == 0, op_,
                    ": the number of query heads must be a multiple of the key/value heads, got ", p.q_heads, " and ",
                    p.kv_heads);
  TORCH_CHECK_VALUE(p.head_dim >= 1 && p.head_dim <= max_head_dim, op_, ": head_dim must be 1..", max_head_dim,
                    ", got ", p.head_dim);
  TORCH_CHECK_VALUE(p.value_dim >= 1 && p.value_dim <= max_head_dim, op_, ": the value's head_dim must be 1..",
                    max_head_dim, ", got ", p.value_dim);
  TORCH_CHECK_VALUE(p.q_len <= max_length && p.k_len <= max_length, op_, ": lengths must stay below 2^31, got ",
                    p.q_len, " and ", p.k_len);
}

// Whether the host may look at offsets and ids: on a GPU it would have to wait for them. There the kernels make do with
// whatever they hold, and the checks are to be asked for.
bool Arguments::looks_at_values() const {
  if (!backend_.is_cuda) return true;
  const char* asked = std::getenv("MMCA_EXT_VALIDATE");
  return asked && asked == std::string("1");
}

// t itself, or a copy with features side by side, rows at multiples of 16 bytes and zeros up to a multiple of 8.
at::Tensor Arguments::with_aligned_rows(const at::Tensor& t) const {
  constexpr std::int64_t unit = 8;
  if (!backend_.needs_aligned_rows(problem.dtype)) return t;
  const std::int64_t features = t.size(-1);
  bool aligned = features % unit == 0 && t.stride(-1) == 1 &&
                 reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % (unit * t.element_size()) == 0;
  for (std::int64_t d = 0; d < t.dim() - 1; ++d) aligned = aligned && (t.size(d) <= 1 || t.stride(d) % unit == 0);
  if (aligned) return t;
  at::Tensor distinct = t;  // an expanded tensor stays one
  for (std::int64_t d = 0; d < t.dim() - 1; ++d)
    if (t.size(d) > 1 && t.stride(d) == 0) distinct = distinct.narrow(d, 0, 1);
  std::vector<std::int64_t> shape = distinct.sizes().vec();
  shape.back() = (features + unit - 1) / unit * unit;
  const at::Tensor rows = at::zeros(shape, t.options()).narrow(-1, 0, features);
  rows.copy_(distinct);
  return rows.expand(t.sizes());
}

void Arguments::set_offsets(const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                            std::optional<std::int64_t> max_seqlen_q, std::optional<std::int64_t> max_seqlen_k) {
  // mmca_attention's callers gave one list, which is both.
  const auto read = [&](const char* side_or_both, const at::Tensor& offsets, std::int64_t tokens,
                        std::optional<std::int64_t> longest_allowed) {
    const char* side = problem.is_mmca ? "" : side_or_both;
    const at::ScalarType type = offsets.scalar_type();
    TORCH_CHECK_TYPE(type == at::kInt || type == at::kLong, op_, ": cu_seqlens", side,
                     " must be an int32 or int64 tensor, got ", type);
    TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.numel() >= 1, op_, ": cu_seqlens", side,
                      " must have shape (sequences + 1,), got ", offsets.sizes());
    TORCH_CHECK_VALUE(offsets.device() == device_, op_, ": cu_seqlens", side, " must be on the query's device ",
                      device_, ", got ", offsets.device());
    const at::Tensor wide = offsets.to(at::kLong).contiguous();
    if (looks_at_values()) check_offsets(side, wide, tokens, longest_allowed);
    return wide;
  };
  q_offsets_ = read("_q", cu_seqlens_q, problem.q_len, max_seqlen_q);
  k_offsets_ = read("_k", cu_seqlens_k, problem.k_len, max_seqlen_k);
  TORCH_CHECK_VALUE(q_offsets_.numel() == k_offsets_.numel(), op_,
                    ": cu_seqlens_q and cu_seqlens_k must list the same number of sequences, got ",
                    q_offsets_.numel() - 1, " and ", k_offsets_.numel() - 1);
  problem.batch = q_offsets_.numel() - 1;
  problem.q_offsets = q_offsets_.const_data_ptr<std::int64_t>();
  problem.k_offsets = k_offsets_.const_data_ptr<std::int64_t>();
}

void Arguments::check_offsets(const char* side, const at::Tensor& offsets, std::int64_t tokens,
                              std::optional<std::int64_t> longest_allowed) const {
  const at::Tensor host = offsets.cpu();
  const auto* value = host.const_data_ptr<std::int64_t>();
  TORCH_CHECK_VALUE(value[0] == 0, op_, ": cu_seqlens", side, " must start at 0, got ", value[0]);
  std::int64_t longest = 0;
  for (std::int64_t i = 1; i < host.numel(); ++i) {
    TORCH_CHECK_VALUE(value[i] >= value[i - 1], op_, ": cu_seqlens", side, " must not decrease, got ", value[i],
                      " after ", value[i - 1], " at ", i);
    TORCH_CHECK_VALUE(value[i] <= tokens, op_, ": cu_seqlens", side, " must end at most at the ", tokens,
                      " tokens there are, got ", value[i], " at ", i);
    longest = std::max(longest, value[i] - value[i - 1]);
  }
  TORCH_CHECK_VALUE(!longest_allowed || *longest_allowed >= longest, op_, ": max_seqlen", side,
                    " must be at least the longest sequence's ", longest, " tokens, got ", longest_allowed.value_or(0));
}

// ---------------------------------------------------------------- who sees what

void Arguments::set_band(bool is_causal, std::int64_t window_left, std::int64_t window_right) {
  TORCH_CHECK_VALUE(window_left >= -1 && window_right >= -1, op_,
                    ": window must be (left, right), each -1 (unbounded) or >= 0, got (", window_left, ", ",
                    window_right, ")");
  problem.causal = is_causal;
  problem.window_left = window_left;
  problem.window_right = window_right;
}

void Arguments::set_masks(const OptionalTensor& attn, const OptionalTensor& padding) {
  const Problem& p = problem;
  TORCH_CHECK_VALUE(!packed_ || (!attn && !padding), op_, ": packed sequences take no ",
                    attn ? "attn_mask" : "key_mask", ": leave hidden tokens out of the sequences");
  if (attn) {
    const bool is_bias = at::isFloatingType(attn->scalar_type());
    TORCH_CHECK_TYPE(is_bias || attn->scalar_type() == at::kBool, op_,
                     ": attn_mask must be boolean (True = attend) or floating-point (added to the scores), got ",
                     attn->scalar_type());
    TORCH_CHECK_VALUE(attn->device() == device_, op_, ": attn_mask must be on the query's device ", device_, ", got ",
                      attn->device());
    const std::int64_t full[] = {p.batch, p.q_heads, p.q_len, p.k_len};
    bool fits = attn->dim() <= 4;
    for (std::int64_t d = 1; fits && d <= attn->dim(); ++d) fits = attn->size(-d) == full[4 - d] || attn->size(-d) == 1;
    TORCH_CHECK_VALUE(fits, op_, ": attn_mask must broadcast to (B, Hq, Lq, Lk) = ", at::IntArrayRef(full, 4), ", got ",
                      attn->sizes());
    attn_mask_ = *attn;
    const at::Tensor pairs = attn->expand({full[0], full[1], full[2], full[3]});
    if (is_bias) {
      problem.bias_dtype = dtype_of(op_, "attn_mask", attn->scalar_type());
      problem.bias = strided<Input>(pairs, pairs.const_data_ptr());
    } else {
      problem.attn_mask = strided<Strided<const std::uint8_t*>>(
          pairs, reinterpret_cast<const std::uint8_t*>(pairs.const_data_ptr<bool>()));
    }
  }
  if (padding) {
    TORCH_CHECK_TYPE(padding->scalar_type() == at::kBool, op_, ": key_mask must be a bool tensor (True = attend), got ",
                     padding->scalar_type());
    TORCH_CHECK_VALUE(padding->dim() == 2 && padding->size(0) == p.batch && padding->size(1) == p.k_len, op_,
                      ": key_mask must have shape (B, Lk) = (", p.batch, ", ", p.k_len, "), got ", padding->sizes());
    TORCH_CHECK_VALUE(padding->device() == device_, op_, ": key_mask must be on the query's device ", device_, ", got ",
                      padding->device());
    key_mask_ = padding->contiguous();
    problem.key_mask = reinterpret_cast<const std::uint8_t*>(key_mask_.const_data_ptr<bool>());
  }
}

// (B, Lk) or (T,) integers as contiguous int32.
at::Tensor Arguments::token_ids(const char* name, const at::Tensor& ids) const {
  const at::ScalarType type = ids.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kLong || type == at::kInt || type == at::kShort || type == at::kChar || type == at::kByte, op_, ": ",
      name, " must be an integer tensor (int64, int32, int16, int8 or uint8), got ", type);
  const bool fits = packed_ ? ids.dim() == 1 && ids.size(0) == problem.k_len
                            : ids.dim() == 2 && ids.size(0) == problem.batch && ids.size(1) == problem.k_len;
  const std::vector<std::int64_t> shape =
      packed_ ? std::vector{problem.k_len} : std::vector{problem.batch, problem.k_len};
  TORCH_CHECK_VALUE(fits, op_, ": ", name, " must have shape ", packed_ ? "(T,)" : "(B, Lk)", " = ",
                    at::IntArrayRef(shape), ", got ", ids.sizes());
  TORCH_CHECK_VALUE(ids.device() == device_, op_, ": ", name, " must be on the query's device ", device_, ", got ",
                    ids.device());
  if (type == at::kLong && looks_at_values()) {
    const at::Tensor wide = ids.cpu().contiguous();
    const auto* value = wide.const_data_ptr<std::int64_t>();
    for (std::int64_t i = 0; i < wide.numel(); ++i)
      TORCH_CHECK_VALUE(
          value[i] >= std::numeric_limits<std::int32_t>::min() && value[i] <= std::numeric_limits<std::int32_t>::max(),
          op_, ": ", name, " must fit 32 bits, got ", value[i]);
  }
  return ids.to(at::kInt).contiguous();
}

void Arguments::set_modality(const at::Tensor& ids, const OptionalTensor& images, c10::string_view image_rows,
                             c10::string_view merge, const OptionalTensor& gate) {
  Problem& p = problem;
  if (packed_) {
    TORCH_CHECK_VALUE(p.q_len == p.k_len && (!looks_at_values() || at::equal(q_offsets_, k_offsets_)), op_,
                      ": packed query and key must be the same tokens, got ", p.q_len, " and ", p.k_len);
    p.k_offsets = p.q_offsets;
  }
  TORCH_CHECK_VALUE(p.q_len <= p.k_len, op_, ": queries are the last Lq of the Lk tokens, got Lq = ", p.q_len,
                    " > Lk = ", p.k_len);
  modality_ = token_ids("modality", ids);
  if (looks_at_values()) {
    const at::Tensor host = modality_.cpu();
    const auto* value = host.const_data_ptr<std::int32_t>();
    for (std::int64_t i = 0; i < host.numel(); ++i)
      TORCH_CHECK_VALUE(value[i] >= 0, op_, ": modality must be 0 (padding), 1 (text) or >= 2 (image), got ", value[i]);
  }
  p.modality = modality_.const_data_ptr<std::int32_t>();
  if (images) {
    image_id_ = token_ids("image_id", *images);
    p.image_id = image_id_.const_data_ptr<std::int32_t>();
  }

  if (image_rows == "self") p.image_rows = ImageRows::self;
  else if (image_rows == "block") p.image_rows = ImageRows::block;
  else if (image_rows == "causal") p.image_rows = ImageRows::causal;
  else if (image_rows == "self+text") p.image_rows = ImageRows::self_text;
  else
    TORCH_CHECK_VALUE(false, op_, ": image_rows must be 'self', 'block', 'causal' or 'self+text', got '", image_rows,
                      "'");

  if (merge == "sum") p.merge = Merge::sum;
  else if (merge == "lse") p.merge = Merge::lse;
  else if (merge == "gate") p.merge = Merge::gate;
  else if (merge == "none") p.merge = Merge::none;
  else TORCH_CHECK_VALUE(false, op_, ": merge must be 'sum', 'lse', 'gate' or 'none', got '", merge, "'");
  TORCH_CHECK_VALUE(gate.has_value() == (p.merge == Merge::gate), op_,
                    ": gate goes with merge 'gate' and only with it, got merge '", merge, "' and ",
                    gate ? "a gate" : "no gate");
  if (gate) set_gate(*gate);
}

void Arguments::set_gate(const at::Tensor& gate) {
  TORCH_CHECK_TYPE(at::isFloatingType(gate.scalar_type()), op_, ": gate must be a floating-point tensor, got ",
                   gate.scalar_type());
  TORCH_CHECK_VALUE(gate.device() == device_, op_, ": gate must be on the query's device ", device_, ", got ",
                    gate.device());
  std::vector<std::int64_t> full = row_shape();
  full.push_back(2);
  const auto rank = static_cast<std::int64_t>(full.size());
  bool fits = gate.dim() <= rank;
  for (std::int64_t d = 1; fits && d <= gate.dim(); ++d) fits = gate.size(-d) == full[rank - d] || gate.size(-d) == 1;
  TORCH_CHECK_VALUE(fits, op_, ": gate must broadcast to ", packed_ ? "(T, Hq, 2)" : "(B, Hq, Lq, 2)", " = ",
                    at::IntArrayRef(full), ", got ", gate.sizes());
  gate_ = gate;
  gate_weights_ = gate.to(statistic_dtype_).expand(full).movedim(-1, 0);
  if (packed_) gate_weights_ = gate_weights_.transpose(1, 2);
  problem.gate = statistic<const void*>(gate_weights_, gate_weights_.const_data_ptr());
}

void Arguments::set_dropout(double dropout_p, const OptionalTensor& rng_state) {
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p <= 1.0, op_, ": dropout_p must be in [0, 1], got ", dropout_p);
  if (dropout_p == 0.0) return;
  TORCH_CHECK_VALUE(rng_state && rng_state->scalar_type() == at::kLong && rng_state->dim() == 1 &&
                        rng_state->size(0) == 2 && rng_state->is_cpu(),
                    op_, ": dropout needs rng_state, an int64 tensor (seed, offset) on the CPU");
  const at::Tensor state = rng_state->contiguous();
  const auto* value = state.const_data_ptr<std::int64_t>();
  problem.dropout.threshold = static_cast<std::uint32_t>(std::nearbyint(65536.0 * dropout_p));
  problem.dropout.seed = static_cast<std::uint64_t>(value[0]);
  problem.dropout.offset = static_cast<std::uint32_t>(value[1]);
}

// ---------------------------------------------------------------- results and gradients

std::vector<std::int64_t> Arguments::row_shape() const {
  const Problem& p = problem;
  return packed_ ? std::vector{p.q_len, p.q_heads} : std::vector{p.batch, p.q_heads, p.q_len};
}

std::vector<std::int64_t> Arguments::result_shape() const {
  std::vector<std::int64_t> shape = row_shape();
  shape.push_back(problem.value_dim);
  if (problem.is_mmca && problem.merge == Merge::none) shape.insert(shape.begin(), 2);
  return shape;
}

std::vector<std::int64_t> Arguments::lse_shape() const {
  const Problem& p = problem;
  std::vector<std::int64_t> shape = packed_ ? std::vector{p.q_heads, p.q_len} : row_shape();
  if (p.is_mmca) shape.insert(shape.begin(), 2);
  return shape;
}

template <class Operand>
Operand Arguments::strided(const at::Tensor& t, decltype(Operand::data) data) const {
  const std::int64_t dims = packed_ ? 3 : 4, group = t.dim() > dims ? t.stride(0) : 0;
  // The stride of a single row leads nowhere and may be odd; kernels that copy 16 bytes want even addresses, also of
  // rows that they then do not read.
  const std::int64_t rows = packed_ ? -3 : -2, row = t.size(rows) == 1 ? 0 : t.stride(rows);
  if (packed_) return {data, 0, t.stride(-2), row, t.stride(-1), group};
  return {data, t.stride(-4), t.stride(-3), row, t.stride(-1), group};
}

template <class Pointer>
RowStatistic<Pointer> Arguments::statistic(const at::Tensor& t, Pointer data) const {
  const std::int64_t dims = packed_ ? 2 : 3, group = t.dim() > dims ? t.stride(0) : 0;
  return {data, group, packed_ ? 0 : t.stride(-3), t.stride(-2), t.stride(-1)};
}

Results Arguments::allocate_results(const at::Tensor& query, bool save_for_backward) {
  Problem& p = problem;
  const auto options = query.options().dtype(statistic_dtype_);
  const std::vector<std::int64_t> shape = lse_shape();
  Results results;
  results.out = empty_ordered_like(query, p.value_dim, p.is_mmca && p.merge == Merge::none);
  results.lse = at::empty(shape, options);
  results.lse_low = at::empty(save_for_backward ? shape : std::vector<std::int64_t>{0}, options);
  std::vector<std::int64_t> group_shape{0};
  if (save_for_backward && p.keeps_group_out()) group_shape = shape, group_shape.push_back(p.value_dim);
  results.group_out = at::empty(group_shape, options);
  p.out = strided<Output>(results.out, results.out.mutable_data_ptr());
  p.lse = statistic<void*>(results.lse, results.lse.mutable_data_ptr());
  if (save_for_backward) {
    p.lse_low = statistic<void*>(results.lse_low, results.lse_low.mutable_data_ptr());
    if (p.keeps_group_out())
      p.group_out = statistic<void*>(results.group_out.select(-1, 0), results.group_out.mutable_data_ptr());
  }
  return results;
}

void Arguments::set_results(const Results& results, const at::Tensor& grad_out, const OptionalTensor& grad_lse) {
  Problem& p = problem;
  const auto& [out, lse, lse_low, group_out] = results;
  const std::vector<std::int64_t> out_shape = result_shape(), statistic_shape = lse_shape();
  given(op_, "out", out), given(op_, "lse", lse), given(op_, "lse_low", lse_low);
  given(op_, "group_out", group_out), given(op_, "grad_out", grad_out);
  for (const at::Tensor& t : {out, lse, grad_out})
    TORCH_CHECK_VALUE(t.device() == device_, op_, ": results and gradients must be on the query's device ", device_,
                      ", got ", t.device());
  TORCH_CHECK_VALUE(out.sizes() == out_shape && grad_out.sizes() == out_shape, op_,
                    ": out and grad_out must have shape ", at::IntArrayRef(out_shape), ", got ", out.sizes(), " and ",
                    grad_out.sizes());
  TORCH_CHECK_TYPE(out.scalar_type() == dtype_ && grad_out.scalar_type() == dtype_, op_,
                   ": out and grad_out must have the query's dtype ", dtype_, ", got ", out.scalar_type(), " and ",
                   grad_out.scalar_type());
  const auto is_statistic = [&](const at::Tensor& t) {
    return t.scalar_type() == statistic_dtype_ && t.device() == device_ && t.sizes() == statistic_shape;
  };
  TORCH_CHECK_VALUE(is_statistic(lse) && (!grad_lse || is_statistic(*grad_lse)), op_, ": lse and its gradient must be ",
                    statistic_dtype_, " of shape ", at::IntArrayRef(statistic_shape), ", got ", lse.sizes());
  if (lse_low.numel()) {
    TORCH_CHECK_VALUE(is_statistic(lse_low), op_,
                      ": lse_low must be the forward's result, of lse's shape and dtype, or empty, got ",
                      lse_low.sizes());
    p.lse_low = statistic<void*>(lse_low, lse_low.mutable_data_ptr());
  }
  if (p.keeps_group_out()) {
    std::vector<std::int64_t> shape = statistic_shape;
    shape.push_back(p.value_dim);
    TORCH_CHECK_VALUE(group_out.sizes() == shape && group_out.is_contiguous() &&
                          group_out.scalar_type() == statistic_dtype_ && group_out.device() == device_,
                      op_, ": group_out must be the forward's contiguous result of shape ", at::IntArrayRef(shape),
                      ", got ", group_out.sizes());
    p.group_out = statistic<void*>(group_out.select(-1, 0), group_out.mutable_data_ptr());
  }
  lse_ = lse;
  p.out = strided<Output>(out, out.mutable_data_ptr());
  p.lse = statistic<void*>(lse, lse.mutable_data_ptr());
  grad_out_ = with_aligned_rows(grad_out);
  p.grad_out = strided<Input>(grad_out_, grad_out_.const_data_ptr());
  if (grad_lse) {
    grad_lse_ = *grad_lse;
    p.grad_lse = statistic<const void*>(grad_lse_, grad_lse_.const_data_ptr());
  }
}

void Arguments::allocate_gradients(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                   bool attn_mask_gradient) {
  Problem& p = problem;
  grad_query_ = empty_ordered_like(query, p.head_dim), grad_key_ = empty_ordered_like(key, p.head_dim);
  grad_value_ = empty_ordered_like(value, p.value_dim);
  p.grad_query = strided<Output>(grad_query_, grad_query_.mutable_data_ptr());
  p.grad_key = strided<Output>(grad_key_, grad_key_.mutable_data_ptr());
  p.grad_value = strided<Output>(grad_value_, grad_value_.mutable_data_ptr());
  if (gate_.defined()) {
    grad_gate_ = at::empty(lse_shape(), query.options().dtype(statistic_dtype_));
    p.grad_gate = statistic<void*>(grad_gate_, grad_gate_.mutable_data_ptr());
  }
  bias_gradient_ = attn_mask_gradient && attn_mask_.defined() && attn_mask_.is_floating_point();
  const bool same_for_all_keys = bias_gradient_ && p.k_len > 1 && (attn_mask_.dim() == 0 || attn_mask_.size(-1) == 1);
  if (bias_gradient_ && !same_for_all_keys) {
    std::vector<std::int64_t> shape(4 - attn_mask_.dim(), 1);
    shape.insert(shape.end(), attn_mask_.sizes().begin(), attn_mask_.sizes().end());
    if (p.deterministic && backend_.is_cuda) shape = {p.batch, p.q_heads, p.q_len, p.k_len};  // one addend for each
    grad_bias_ = at::zeros(shape, query.options().dtype(statistic_dtype_));
    const at::Tensor pairs = grad_bias_.expand({p.batch, p.q_heads, p.q_len, p.k_len});
    p.grad_bias = strided<Output>(pairs, pairs.mutable_data_ptr());
  }
}

// A bias that is the same for all keys moves the scores of a row together: the softmax does not notice, and its lse
// moves with it.
at::Tensor Arguments::key_broadcast_bias_gradient() const {
  const at::Tensor rows = grad_lse_.defined() ? grad_lse_.masked_fill(lse_.isneginf(), 0.0) : at::zeros_like(lse_);
  return rows.unsqueeze(-1);
}

Gradients Arguments::gradients() const {
  Gradients gradients{grad_query_, grad_key_, grad_value_, {}, {}};
  if (bias_gradient_) {
    const at::Tensor sum = grad_bias_.defined() ? grad_bias_ : key_broadcast_bias_gradient();
    gradients.attn_mask = at::sum_to(sum, attn_mask_.sizes()).to(attn_mask_.scalar_type()).contiguous();
  }
  if (gate_.defined()) {
    const at::Tensor rows = (packed_ ? grad_gate_.transpose(1, 2) : grad_gate_).movedim(0, -1);
    gradients.gate = at::sum_to(rows, gate_.sizes()).to(gate_.scalar_type()).contiguous();
  }
  return gradients;
}

}  // namespace mmca
