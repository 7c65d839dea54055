// What is asked of a linear attention kernel, forward and backward: one plain struct, like core/problem.h's, whose
// conventions and tensors it shares. For batch b, query head h, KV head g = h / (q_heads / kv_heads), row i at position
// p = i + (k_len - q_len), and key j:
//
//     phi(x) = elu(x) + 1 = exp(min(x, 0)) + max(x, 0)                       of each feature
//     S[i]   = S0 + sum phi(key[b,g,j]) value[b,g,j]^T                       over the keys j that row i sees
//     z[i]   = z0 + sum phi(key[b,g,j])
//     out[i] = phi(query[b,h,i]) . S[i] / (phi(query[b,h,i]) . z[i])         0 if row i sees neither key nor state
//
// Row i sees the keys that key_mask leaves, causal: those with j <= p. (S0, z0) stands for earlier keys, and the state
// after all keys of the call can be had. States are double whatever the tensors are: a sum over 100,000 tokens, carried
// from call to call, must not be rounded to float each time.
#pragma once

#include "core/problem.h"

namespace mmca {

// (batch, kv_heads, head_dim, value_dim) and (batch, kv_heads, head_dim), contiguous; packed: of each sequence.
template <class Double>
struct LinearStateOf {
  Double* sum = nullptr;     // S
  Double* normal = nullptr;  // z
};

struct LinearProblem {
  DType dtype = DType::f32;
  std::int64_t batch = 0, q_heads = 1, kv_heads = 1;  // q_heads is a multiple of kv_heads
  std::int64_t q_len = 0, k_len = 0;
  std::int64_t head_dim = 1, value_dim = 1;  // 1..256 each
  bool causal = false;                       // j <= p: bottom-right aligned

  // Packed sequences, as in Problem. Rows past the last offset see nothing.
  const std::int64_t* q_offsets = nullptr;  // (batch + 1); null: not packed
  const std::int64_t* k_offsets = nullptr;
  const std::uint8_t* key_mask = nullptr;  // (batch, k_len) contiguous, packed (k_len), non-zero: attend; null: none

  Input query, key, value;
  Output out;
  LinearStateOf<const double> state;  // before the first key; null: none
  LinearStateOf<double> final_state;  // after the last one; null: not wanted

  // The backward's further inputs and its results. Every element of the gradients is written.
  Input grad_out;
  LinearStateOf<const double> grad_final_state;  // null: no gradient arrives there
  Output grad_query, grad_key, grad_value;
  LinearStateOf<double> grad_state;  // null: not wanted
  // The backward's memory: (2, batch, q_heads, q_len) in the accumulation type, contiguous, for each row first
  // 1 / (phi(q) . z), then <grad_out, out>, or that times the first, as the kernel likes.
  RowStatistic<void*> row_facts;

  constexpr std::int64_t heads_per_kv() const { return q_heads / kv_heads; }
};

}  // namespace mmca
