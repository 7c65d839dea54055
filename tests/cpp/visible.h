// Who sees what, by a predicate on each pair of row and key, and what else the formulas of core/problem.h say of one
// pair. Rows and keys count within their sequence.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "core/half.h"
#include "core/philox.h"
#include "core/problem.h"

namespace mmca::test {

struct Sequence {
  std::int64_t number, batch;  // for dropout; of the tensors
  std::int64_t q_begin, q_len, k_begin, k_len;
  bool tail = false;  // rows past the last offset: they see nothing

  std::int64_t position(std::int64_t i) const { return i + k_len - q_len; }
};

// The sequences of a problem, each row of its tensors once.
inline std::vector<Sequence> sequences(const Problem& p) {
  std::vector<Sequence> all;
  const std::int64_t *q = p.q_offsets, *k = p.k_offsets, n = p.batch;
  for (std::int64_t b = 0; b < n; ++b)
    all.push_back(q ? Sequence{b, 0, q[b], q[b + 1] - q[b], k[b], k[b + 1] - k[b]}
                    : Sequence{b, b, 0, p.q_len, 0, p.k_len});
  if (q) all.push_back({n, 0, q[n], p.q_len - q[n], k[n], p.k_len - k[n], true});
  return all;
}

inline std::int32_t modality_of(const Problem& p, const Sequence& s, std::int64_t j) {
  return p.modality[s.batch * p.k_len + s.k_begin + j];
}

inline int group_of(const Problem& p, const Sequence& s, std::int64_t j) {
  if (!p.is_mmca) return 0;
  const std::int32_t m = modality_of(p, s, j);
  return m == 1 ? 0 : m >= 2 ? 1 : -1;
}

inline bool same_image(const Problem& p, const Sequence& s, std::int64_t i, std::int64_t j) {
  const std::int32_t* id = (p.image_id ? p.image_id : p.modality) + s.batch * p.k_len + s.k_begin;
  for (std::int64_t x = std::min(i, j); x <= std::max(i, j); ++x)
    if (modality_of(p, s, x) < 2 || id[x] != id[i]) return false;
  return true;
}

// Whether row i is its own image group, of key j = its position.
inline bool is_own_image(const Problem& p, const Sequence& s, std::int64_t i, std::int64_t j) {
  return p.is_mmca && !s.tail && j == s.position(i) && group_of(p, s, j) == 1 &&
         (p.image_rows == ImageRows::self || p.image_rows == ImageRows::self_text);
}

inline double bias_of(const Problem& p, const Sequence& s, std::int64_t h, std::int64_t i, std::int64_t j) {
  if (!p.bias.data) return 0;
  const std::int64_t at = s.batch * p.bias.batch + h * p.bias.head + (s.q_begin + i) * p.bias.row + j * p.bias.feature;
  switch (p.bias_dtype) {
    case DType::f32: return static_cast<const float*>(p.bias.data)[at];
    case DType::f64: return static_cast<const double*>(p.bias.data)[at];
    case DType::bf16: return static_cast<const BFloat16*>(p.bias.data)[at];
    default: return static_cast<const Float16*>(p.bias.data)[at];
  }
}

inline bool is_padding(const Problem& p, const Sequence& s, std::int64_t j) {
  if (s.tail || p.is_mmca) return s.tail || group_of(p, s, j) < 0;
  return p.key_mask && !p.key_mask[s.batch * p.k_len + s.k_begin + j];
}

inline bool sees(const Problem& p, const Sequence& s, std::int64_t h, std::int64_t i, std::int64_t j) {
  if (s.tail) return false;
  const std::int64_t at = s.position(i);
  if (p.is_mmca) {
    const int row = at >= 0 ? group_of(p, s, at) : -1, key = group_of(p, s, j);
    if (row < 0 || key < 0) return false;
    if (row == 0 || p.image_rows == ImageRows::causal) return j <= at;
    if (p.image_rows == ImageRows::block) return key == 1 && same_image(p, s, at, j);
    return j == at || (p.image_rows == ImageRows::self_text && key == 0 && j <= at);
  }
  if (p.causal && j > at) return false;
  if (p.window_left >= 0 && j < at - p.window_left) return false;
  if (p.window_right >= 0 && j > at + p.window_right) return false;
  if (is_padding(p, s, j)) return false;
  const auto& mask = p.attn_mask;
  if (mask.data && !mask.data[s.batch * mask.batch + h * mask.head + (s.q_begin + i) * mask.row + j * mask.feature])
    return false;
  return bias_of(p, s, h, i, j) != -std::numeric_limits<double>::infinity();
}

inline double dropout_factor(const Problem& p, const Sequence& s, std::int64_t h, std::int64_t i, std::int64_t j) {
  const std::uint32_t threshold = p.dropout.threshold;
  if (!threshold || is_own_image(p, s, i, j)) return 1;
  const std::uint32_t counter[4] = {static_cast<std::uint32_t>(j / 8), static_cast<std::uint32_t>(s.position(i)),
                                    static_cast<std::uint32_t>(s.number * p.q_heads + h), p.dropout.offset};
  std::uint32_t word[4];
  philox(p.dropout.seed, counter, word);
  const std::uint32_t lane = word[j % 8 / 2] >> (16 * (j % 2)) & 0xffff;
  return lane >= threshold ? 65536.0 / (65536.0 - threshold) : 0;
}

}  // namespace mmca::test
