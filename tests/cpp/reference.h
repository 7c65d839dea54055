// The operator by plain loops in a wider type, straight from the formulas of core/problem.h: who sees what by a
// predicate on each pair of row and key, softmax over stored scores. With every result comes a bound on a kernel's
// error.
//
// Bounds are first-order running errors. u is the unit roundoff, D the head dimension, n the number of keys, and
// A = |scale| sum |q||k| of a pair, whose score therefore errs by at most (D + 4) u A: D products and sums, the folded
// scale, its product with q. Subtracting a maximum or an lse of at most M adds u (A + M), and exp2 3 u (exp2_test.cpp).
// A sum of n terms, whatever its order, errs by n u times the sum of magnitudes.
#pragma once

#include <limits>
#include <type_traits>
#include <vector>

#include "case.h"
#include "core/philox.h"

namespace mmca::test {

inline int group_of(const Problem& p, std::int64_t b, std::int64_t j) {
  if (!p.is_mmca) return 0;
  const std::int32_t m = p.modality[b * p.k_len + j];
  return m == 1 ? 0 : m >= 2 ? 1 : -1;
}

inline bool same_image(const Problem& p, std::int64_t b, std::int64_t i, std::int64_t j) {
  const std::int32_t *modality = p.modality + b * p.k_len, *id = (p.image_id ? p.image_id : p.modality) + b * p.k_len;
  for (std::int64_t x = std::min(i, j); x <= std::max(i, j); ++x)
    if (modality[x] < 2 || id[x] != id[i]) return false;
  return true;
}

// Whether row i is its own image group, of key j = its position.
inline bool is_own_image(const Problem& p, std::int64_t b, std::int64_t i, std::int64_t j) {
  return p.is_mmca && j == i + p.k_len - p.q_len && group_of(p, b, j) == 1 &&
         (p.image_rows == ImageRows::self || p.image_rows == ImageRows::self_text);
}

inline bool sees(const Problem& p, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
  const std::int64_t at = i + p.k_len - p.q_len;
  if (p.is_mmca) {
    const int row = at >= 0 ? group_of(p, b, at) : -1, key = group_of(p, b, j);
    if (row < 0 || key < 0) return false;
    if (row == 0 || p.image_rows == ImageRows::causal) return j <= at;
    if (p.image_rows == ImageRows::block) return key == 1 && same_image(p, b, at, j);
    return j == at || (p.image_rows == ImageRows::self_text && key == 0 && j <= at);
  }
  if (p.causal && j > at) return false;
  if (p.window_left >= 0 && j < at - p.window_left) return false;
  if (p.window_right >= 0 && j > at + p.window_right) return false;
  if (p.key_mask && !p.key_mask[b * p.k_len + j]) return false;
  return !p.attn_mask.data || p.attn_mask.data[p.attn_mask.offset(b, h, i) + j * p.attn_mask.feature];
}

inline double dropout_factor(const Problem& p, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
  const std::uint32_t threshold = p.dropout.threshold;
  if (!threshold || is_own_image(p, b, i, j)) return 1;
  const std::uint32_t counter[4] = {static_cast<std::uint32_t>(j / 8),
                                    static_cast<std::uint32_t>(i + p.k_len - p.q_len),
                                    static_cast<std::uint32_t>(b * p.q_heads + h), p.dropout.offset};
  std::uint32_t word[4];
  philox(p.dropout.seed, counter, word);
  const std::uint32_t lane = word[j % 8 / 2] >> (16 * (j % 2)) & 0xffff;
  return lane >= threshold ? 65536.0 / (65536.0 - threshold) : 0;
}

template <class R>
struct Bounded {  // numbers and bounds on the error of a kernel's, in the order of the dimensions
  std::vector<R> value, bound;
  explicit Bounded(std::int64_t count = 0)
      : value(static_cast<std::size_t>(count)), bound(static_cast<std::size_t>(count)) {}
};

template <class T>
class Reference {
 public:
  using R = std::conditional_t<sizeof(T) == 4, double, long double>;

  Bounded<R> out, lse, group_out, grad_query, grad_key, grad_value;

  std::vector<R> lse2_bound;  // of log2(e) lse, kept in two parts

  explicit Reference(Case<T>& c)
      : c_(c), p_(c.problem), n_(static_cast<std::size_t>(p_.k_len)), D_(p_.head_dim), V_(p_.value_dim) {}

  void forward() {
    out = Bounded<R>(c_.out.count()), lse = Bounded<R>(c_.lse.count()), group_out = Bounded<R>(c_.group_out.count());
    lse2_bound.assign(lse.value.size(), 0);
    for_each_row([&](std::int64_t b, std::int64_t h, std::int64_t i) {
      const Row row = look(b, h, i);
      const std::int64_t at = (b * p_.q_heads + h) * p_.q_len + i, per_group = p_.batch * p_.q_heads * p_.q_len;
      for (int g = 0; g < p_.groups(); ++g) {
        lse.value[at + g * per_group] = row.lse[g], lse.bound[at + g * per_group] = row.lse_bound[g];
        lse2_bound[at + g * per_group] = row.lse2_bound[g];
        for (std::int64_t d = 0; d < V_; ++d) {
          group_out.value[(at + g * per_group) * V_ + d] = row.out[g][d];
          group_out.bound[(at + g * per_group) * V_ + d] = row.out_bound[g][d];
          const R x = row.weight[g] * row.out[g][d];
          out.value[at * V_ + d] += x;
          out.bound[at * V_ + d] +=
              row.weight[g] * row.out_bound[g][d] + (weight_error(row) + 2 * u * p_.groups()) * std::abs(x);
        }
      }
    });
  }

  // Of a kernel given lse, out and group_out correctly rounded; call store_results() first.
  void backward() {
    grad_query = Bounded<R>(c_.query.count()), grad_key = Bounded<R>(c_.key.count()),
    grad_value = Bounded<R>(c_.value.count());
    const R rows = static_cast<R>(p_.q_len * p_.heads_per_kv()), scale = static_cast<R>(p_.scale);
    std::vector<R> product(n_), magnitude(n_);
    for_each_row([&](std::int64_t b, std::int64_t h, std::int64_t i) {
      const Row row = look(b, h, i);
      const std::int64_t kv = h / p_.heads_per_kv();
      R mean[2] = {}, mean_size[2] = {}, joint = 0, joint_size = 0;
      for (std::size_t j = 0; j < n_; ++j) {
        const int g = row.group[j];
        if (g < 0) continue;
        product[j] = magnitude[j] = 0;
        for (std::int64_t d = 0; d < V_; ++d) {
          const R x = static_cast<R>(c_.grad_out.at(b, h, i, d)) * static_cast<R>(c_.value.at(b, kv, j, d));
          product[j] += row.keep[j] * x, magnitude[j] += row.keep[j] * std::abs(x);
        }
        mean[g] += row.p[j] * product[j], mean_size[g] += row.p[j] * magnitude[j];
        joint += row.weight[g] * row.p[j] * product[j], joint_size += row.weight[g] * row.p[j] * magnitude[j];
      }
      for (std::size_t j = 0; j < n_; ++j) {
        const int g = row.group[j];
        if (g < 0) continue;
        const R w = row.weight[g], dlse = p_.grad_lse.data ? static_cast<R>(c_.grad_lse.at(g, b, h, i)) : 0;
        const R offset = (p_.joint() ? w * joint : mean[g]) - dlse;
        const R size = w * magnitude[j] + (p_.joint() ? w * joint_size : mean_size[g]) + std::abs(dlse);
        const bool own = is_own_image(p_, b, i, static_cast<std::int64_t>(j));
        const R p_error = own ? 0 : u * ((D_ + 5) * row.size[j] + 4 * std::abs(row.lse[g]) + 5);
        const R ds = row.p[j] * (w * product[j] - offset);
        const R ds_bound = row.p[j] * size * (p_error + weight_error(row) + u * (V_ + 10));
        for (std::int64_t d = 0; d < D_; ++d) {
          const R k = static_cast<R>(c_.key.at(b, kv, j, d)), q = static_cast<R>(c_.query.at(b, h, i, d));
          add(grad_query, c_.query, b, h, i, d, scale * ds * k,
              std::abs(scale * k) * (ds_bound + u * (n_ + 24) * row.p[j] * size));
          add(grad_key, c_.key, b, kv, j, d, scale * ds * q,
              std::abs(scale * q) * (ds_bound + u * (rows + 4) * row.p[j] * size));
        }
        for (std::int64_t d = 0; d < V_; ++d) {
          const R x = row.p[j] * row.keep[j] * w * static_cast<R>(c_.grad_out.at(b, h, i, d));
          add(grad_value, c_.value, b, kv, j, d, x, std::abs(x) * (p_error + weight_error(row) + u * (rows + 4)));
        }
      }
    });
  }

  // The forward's results, rounded, where a backward kernel reads them.
  void store_results() {
    std::size_t i = 0;
    c_.out.each([&](T& x, auto...) { x = static_cast<T>(out.value[i++]); });
    i = 0;
    c_.lse.each([&](T& x, auto...) { x = static_cast<T>(lse.value[i++]); });
    if (p_.lse_low.data)
      c_.lse.each([&](T x, std::int64_t g, std::int64_t b, std::int64_t h, std::int64_t row) {
        const T high = x * static_cast<T>(log2_e);
        const R exact = lse.value[((g * p_.batch + b) * p_.q_heads + h) * p_.q_len + row] * log2_e;
        c_.lse_low.at(g, b, h, row) = std::isinf(x) ? T(0) : static_cast<T>(exact - high);
      });
    i = 0;
    c_.group_out.each([&](T& x, auto...) { x = static_cast<T>(group_out.value[i++]); });
  }

 private:
  static constexpr R log2_e = 1.44269504088896340735992468100189214L;
  static constexpr R u = std::numeric_limits<T>::epsilon() / 2;

  struct Row {
    std::vector<int> group;        // of each key; -1: not seen
    std::vector<R> size, p, keep;  // A, exp(s - lse_r), Z of each key
    R lse[2], lse_bound[2] = {}, lse2_bound[2] = {}, weight[2] = {1, 1};
    std::vector<R> out[2], out_bound[2];
  };

  Row look(std::int64_t b, std::int64_t h, std::int64_t i) const {
    const std::int64_t kv = h / p_.heads_per_kv();
    Row row;
    row.group.assign(n_, -1), row.size.assign(n_, 0), row.p.assign(n_, 0), row.keep.assign(n_, 1);
    for (std::size_t j = 0; j < n_; ++j) {
      if (!sees(p_, b, h, i, static_cast<std::int64_t>(j))) continue;
      row.group[j] = group_of(p_, b, static_cast<std::int64_t>(j));
      row.keep[j] = static_cast<R>(dropout_factor(p_, b, h, i, static_cast<std::int64_t>(j)));
      for (std::int64_t d = 0; d < D_; ++d) {
        const R x =
            static_cast<R>(p_.scale) * static_cast<R>(c_.query.at(b, h, i, d)) * static_cast<R>(c_.key.at(b, kv, j, d));
        row.p[j] += x, row.size[j] += std::abs(x);
      }
    }
    for (int g = 0; g < p_.groups(); ++g) normalise(row, g, b, kv, i);
    if (p_.groups() == 2 && p_.merge == Merge::lse) {
      const R best = std::max(row.lse[0], row.lse[1]);
      for (int x = 0; x < 2; ++x)
        row.weight[x] = std::isinf(best)
                            ? 0
                            : std::exp(row.lse[x] - best) / (std::exp(row.lse[0] - best) + std::exp(row.lse[1] - best));
    }
    return row;
  }

  // Scores in row.p become weights; O_r and lse_r of one group.
  void normalise(Row& row, int g, std::int64_t b, std::int64_t kv, std::int64_t i) const {
    R best = -std::numeric_limits<R>::infinity(), size = 0, sum = 0, n = 0;
    bool own = false;
    for (std::size_t j = 0; j < n_; ++j)
      if (row.group[j] == g)
        best = std::max(best, row.p[j]), size = std::max(size, row.size[j]), ++n,
        own |= is_own_image(p_, b, i, static_cast<std::int64_t>(j));
    for (std::size_t j = 0; j < n_; ++j)
      if (row.group[j] == g) sum += row.p[j] = std::exp(row.p[j] - best);
    row.lse[g] = n > 0 ? best + std::log(sum) : -std::numeric_limits<R>::infinity();
    row.out[g].assign(static_cast<std::size_t>(V_), 0), row.out_bound[g].assign(static_cast<std::size_t>(V_), 0);
    if (n == 0) return;  // exactly zero

    // Each weight: its score, maximum and exp2; and, at most every 64 keys, a rescaling by another exp2 of maxima.
    const R blocks = n / 64 + 1, p_error = u * ((D_ + 4) * size + (blocks + 1) * (2 * size + 4));
    row.lse_bound[g] = own ? u * (D_ + 4) * size : p_error + u * (n + 4 * (size + std::log(n) + 1));
    // The same without the rounding of lse: to base 2, and as a double (1.45 is over log2(e)).
    row.lse2_bound[g] =
        R(1.45) * (own ? u * (D_ + 4) * size : p_error + u * (n + 2)) + R(0x1p-50) * (1 + std::abs(row.lse[g]));
    for (std::size_t j = 0; j < n_; ++j) {
      if (row.group[j] != g) continue;
      row.p[j] /= sum;
      for (std::int64_t d = 0; d < V_; ++d) {
        const R x = row.p[j] * row.keep[j] * static_cast<R>(c_.value.at(b, kv, j, d));
        row.out[g][d] += x;
        if (!own) row.out_bound[g][d] += std::abs(x) * (2 * p_error + u * (2 * n + 2 * blocks + 8)) + tiny;
      }
    }
  }

  // Relative error of the two groups' weights: both lse, rounded and subtracted, two exp, a sum and a quotient.
  R weight_error(const Row& row) const {
    if (p_.groups() == 1 || p_.merge == Merge::sum) return 0;
    R error = 8 * u;
    for (int g = 0; g < 2; ++g)
      if (!std::isinf(row.lse[g])) error += 2 * row.lse_bound[g] + 4 * u * std::abs(row.lse[g]);
    return error;
  }

  void add(Bounded<R>& sum, const Tensor<T>& like, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d, R x,
           R bound) const {
    const auto at = static_cast<std::size_t>(((b * like.size(1) + h) * like.size(2) + i) * like.size(3) + d);
    sum.value[at] += x, sum.bound[at] += bound + tiny;
  }

  template <class Body>
  void for_each_row(const Body& body) const {
    for (std::int64_t b = 0; b < p_.batch; ++b)
      for (std::int64_t h = 0; h < p_.q_heads; ++h)
        for (std::int64_t i = 0; i < p_.q_len; ++i) body(b, h, i);
  }

  // What a term may lose to underflow, operands being of order one: exp2 is 0 below the normal numbers.
  static constexpr R tiny = 64 * static_cast<R>(std::numeric_limits<T>::min());

  Case<T>& c_;
  const Problem& p_;
  const std::size_t n_;
  const std::int64_t D_, V_;
};

}  // namespace mmca::test
