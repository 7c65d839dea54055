// The operator by plain loops in a wider type, straight from the formulas of core/problem.h, with a bound on a kernel's
// error for every result.
//
// Bounds are first-order running errors. u is the unit roundoff of the arithmetic, n the number of keys a row sees of a
// group, D and V the head dimensions, and sums of n terms, whatever their order, err by n u times their magnitudes.
//
// A product t = scale <q, k> errs by (D + 4) u A, A = |scale| sum |q||k|: D products and sums, scale and its rounding.
// A softcap c makes that s = c tanh(t / c). Its argument y errs by 2 u |y| more (c, quotient), which tanh passes on
// with its slope 1 - tanh^2; tanh itself errs by tanh_error u (scores_test.cpp), c and the product by 2 u: in all
//     slope (error(t) + 2 u |t|) + (tanh_error + 2) u |s|.
// The slope's own relative error is 2 |tanh| error(y) <= 2 error(t) / c + 4 u |y|, and (4 |y| + 7) u of its evaluation.
// A bias b adds u |b| where it is converted, and u |s + b|.
//
// A weight is exp2 of differences of scores that add up to at most the spread of the row's scores: 3 u of it (the
// difference, two products), and 3 u for each exp2 (exp2_test.cpp), of which there is one more for each block of keys.
//
// Storage of 16 bits rounds the results: e |x| of a normal number, e = 2^-8 (bf16: 8 significant bits) or 2^-11 (f16:
// 11), and half of the smallest subnormal number of others. Where a backward reads `out`, its rowsum(dO out) inherits
// e sum |dO||out|.
#pragma once

#include <limits>
#include <type_traits>
#include <vector>

#include "case.h"
#include "visible.h"

namespace mmca::test {

template <class R>
struct Bounded {  // numbers and bounds on the error of a kernel's, in the order of the dimensions
  std::vector<R> value, bound;
  explicit Bounded(std::int64_t count = 0, R first = 0)
      : value(static_cast<std::size_t>(count), first), bound(static_cast<std::size_t>(count)) {}
};

// What rounding to the storage type takes: relative to a normal number, and of a subnormal one. 0: nothing is rounded.
template <class T>
struct StorageRounding {
  static constexpr double relative = 0, absolute = 0;
};
template <>
struct StorageRounding<BFloat16> {
  static constexpr double relative = 0x1p-8, absolute = 0x1p-134;
};
template <>
struct StorageRounding<Float16> {
  static constexpr double relative = 0x1p-11, absolute = 0x1p-25;
};

inline constexpr int tanh_error = 7;  // in u, relative

// Which results are worked out: all, or a sample of a large problem's. The choice never looks at the batch, so that a
// gradient that batches share is complete where it is worked out.
struct Sample {
  static constexpr std::int64_t all = -1, none = -2;

  std::int64_t row_step = 1;   // results of rows: of one row in so many, another one in each head
  std::int64_t kv_head = all;  // results of keys: of this KV head's
  std::int64_t key_step = 1;   // and there of one key in so many

  bool row(std::int64_t h, std::int64_t i) const { return (h + i) % row_step == 0; }
  bool head(std::int64_t g) const { return kv_head == all || kv_head == g; }
  bool key(std::int64_t g, std::int64_t j) const { return head(g) && j % key_step == 0; }
};

// No kernel reads `out` in the backward where a softmax has at most so many keys, all of one group.
inline constexpr std::int64_t whole_keys = 192;

template <class T>
class Reference {
 public:
  using A = Accumulation<T>;
  using R = std::conditional_t<sizeof(A) == 4, double, long double>;

  static constexpr R log2_e = 1.44269504088896340735992468100189214L;

  Bounded<R> out, lse, group_out, grad_query, grad_key, grad_value, grad_bias, grad_gate;
  std::vector<R> lse2_bound;  // of log2(e) lse, kept in two parts

  explicit Reference(Case<T>& c, const Sample& sample = {})
      : c_(c),
        p_(c.problem),
        sample_(sample),
        D_(p_.head_dim),
        V_(p_.value_dim),
        query_(dense(c.query)),
        key_(dense(c.key)),
        value_(dense(c.value)) {}

  void forward() {
    constexpr R infinity = std::numeric_limits<R>::infinity();
    const std::int64_t rows = c_.batch * p_.q_heads * p_.q_len;
    out = Bounded<R>(c_.out.count()), lse = Bounded<R>(p_.groups() * rows, -infinity);
    group_out = Bounded<R>(p_.groups() * rows * V_);
    lse2_bound.assign(lse.value.size(), 0);
    for_each_row([&](const Sequence& s, std::int64_t h, std::int64_t i) {
      const Row row = look(s, h, i);
      const std::int64_t at = query_row(s, h, i);
      for (int g = 0; g < p_.groups(); ++g) {
        const std::int64_t in_group = at + g * rows, merged = apart() ? in_group : at;
        lse.value[in_group] = row.lse[g], lse.bound[in_group] = row.lse_bound[g];
        lse2_bound[in_group] = row.lse2_bound[g];
        const R w = row.weight[g];
        for (std::int64_t d = 0; d < V_; ++d) {
          group_out.value[in_group * V_ + d] = row.out[g][d], group_out.bound[in_group * V_ + d] = row.out_bound[g][d];
          out.value[merged * V_ + d] += w * row.out[g][d];
          out.bound[merged * V_ + d] += std::abs(w) * row.out_bound[g][d] +
                                        (weight_error(row) + 2 * u * p_.groups()) * std::abs(w * row.out[g][d]);
        }
      }
    });
    store(out);
  }

  // Of a kernel given lse, out and group_out correctly rounded; call store_results() first.
  //
  // dS = P (w dP - offset). P errs by its score's error and, normalised by a given lse, by its roundings (u |s|, 3 u
  // |lse|) and the exponent's (3 u |s - lse|, 3 u); normalised by a sum of its own, by that sum's: the largest score
  // error, 3 u of the mean distance to the maximum, which is at most log n, and n u. `offset` is a sum over V, or over
  // n of P dP.
  void backward() {
    grad_out_ = dense(c_.grad_out);
    grad_query = Bounded<R>(c_.query.count()), grad_key = Bounded<R>(c_.key.count()),
    grad_value = Bounded<R>(c_.value.count()), grad_bias = Bounded<R>(c_.grad_bias.count());
    grad_gate = Bounded<R>(c_.grad_gate.count());
    for_each_row([&](const Sequence& s, std::int64_t h, std::int64_t i) { add_row_gradients(s, h, i); });
    for (Bounded<R>* x : {&grad_query, &grad_key, &grad_value}) store(*x);
  }

  // The forward's results, rounded, where a backward kernel reads them. Rows outside the sample keep theirs.
  void store_results() {
    const auto store_rows = [&](auto& tensor, const Bounded<R>& exact) {
      std::size_t at = 0;
      tensor.each([&](auto& x, std::int64_t, std::int64_t h, std::int64_t i, std::int64_t) {
        const R value = exact.value[at++];
        if (looked_at(h, i)) x = static_cast<std::decay_t<decltype(x)>>(value);
      });
    };
    store_rows(c_.out, out), store_rows(c_.group_out, group_out);
    std::size_t at = 0;
    c_.lse.each([&](A& x, std::int64_t g, std::int64_t b, std::int64_t h, std::int64_t i) {
      const R exact = lse.value[at++];
      if (!looked_at(h, i)) return;
      x = static_cast<A>(exact);
      if (!p_.lse_low.data) return;
      c_.lse_low.at(g, b, h, i) = std::isinf(x) ? A(0) : static_cast<A>(exact * log2_e - lse_high(x));
    });
  }

  // What lse_low is added to, to base 2: lse itself where scores are more than products.
  R lse_high(A x) const { return p_.shapes_scores() ? log2_e * x : static_cast<R>(x * static_cast<A>(log2_e)); }

 private:
  static constexpr R u = std::numeric_limits<A>::epsilon() / 2;
  static constexpr R e = StorageRounding<T>::relative, smallest = StorageRounding<T>::absolute;

  struct Row {
    std::vector<int> group;                                    // of each key; -1: not seen
    std::vector<R> score, error, slope, slope_error, p, keep;  // s and its bound, ds/dt and relative, exp(s - lse_r), Z
    R lse[2], lse_bound[2] = {}, lse2_bound[2] = {}, weight[2] = {1, 1};
    R seen[2] = {}, worst[2] = {};  // keys, and the largest of their scores' bounds
    std::vector<R> out[2], out_bound[2];
  };

  // Rows of the sample, and those that its keys' gradients sum over.
  bool looked_at(std::int64_t h, std::int64_t i) const {
    return sample_.row(h, i) || sample_.head(h / p_.heads_per_kv());
  }
  bool apart() const { return p_.is_mmca && p_.merge == Merge::none; }
  std::int64_t query_row(const Sequence& s, std::int64_t h, std::int64_t i) const {
    return (s.batch * p_.q_heads + h) * p_.q_len + s.q_begin + i;
  }
  std::int64_t key_row(const Sequence& s, std::int64_t h, std::int64_t j) const {
    return (s.batch * p_.kv_heads + h / p_.heads_per_kv()) * p_.k_len + s.k_begin + j;
  }

  Row look(const Sequence& s, std::int64_t h, std::int64_t i) const {
    const auto n = static_cast<std::size_t>(s.k_len);
    Row row;
    row.group.assign(n, -1);
    for (std::vector<R>* x : {&row.score, &row.error, &row.slope, &row.slope_error, &row.p, &row.keep}) x->assign(n, 0);
    for (std::size_t j = 0; j < n; ++j) {
      const auto at = static_cast<std::int64_t>(j);
      if (!sees(p_, s, h, i, at)) continue;
      row.group[j] = group_of(p_, s, at);
      row.keep[j] = static_cast<R>(dropout_factor(p_, s, h, i, at));
      score(row, j, &query_[query_row(s, h, i) * D_], &key_[key_row(s, h, at) * D_]);
      if (!p_.bias.data) continue;
      const R bias = static_cast<R>(bias_of(p_, s, h, i, at));
      row.score[j] += bias;
      row.error[j] += u * (std::abs(bias) + std::abs(row.score[j]));
    }
    for (int g = 0; g < p_.groups(); ++g) normalise(row, g, s, h, i);
    for (int g = 0; g < p_.groups(); ++g) row.weight[g] = merge_weight(row, g, s, h, i);
    return row;
  }

  void score(Row& row, std::size_t j, const R* q, const R* k) const {
    const R scale = static_cast<R>(p_.scale), cap = static_cast<R>(p_.softcap);
    R t = 0, size = 0;
    for (std::int64_t d = 0; d < D_; ++d) t += q[d] * k[d], size += std::abs(q[d] * k[d]);
    t *= scale;
    row.score[j] = t, row.error[j] = u * static_cast<R>(D_ + 4) * std::abs(scale) * size, row.slope[j] = 1;
    if (!(cap > 0)) return;
    const R y = t / cap, cosh = std::cosh(y);
    row.score[j] = cap * std::tanh(y), row.slope[j] = 1 / (cosh * cosh);
    row.slope_error[j] = 2 * row.error[j] / cap + u * (8 * std::abs(y) + 7);
    row.error[j] = row.slope[j] * (row.error[j] + 2 * u * std::abs(t)) + (tanh_error + 2) * u * std::abs(row.score[j]);
  }

  // Scores become weights; O_r and lse_r of one group.
  void normalise(Row& row, int g, const Sequence& s, std::int64_t h, std::int64_t i) const {
    R best = -std::numeric_limits<R>::infinity(), least = -best, sum = 0;
    const std::size_t count = row.group.size();
    bool own = false;
    for (std::size_t j = 0; j < count; ++j)
      if (row.group[j] == g)
        best = std::max(best, row.score[j]), least = std::min(least, row.score[j]), ++row.seen[g],
        row.worst[g] = std::max(row.worst[g], row.error[j]),
        own |= is_own_image(p_, s, i, static_cast<std::int64_t>(j));
    for (std::size_t j = 0; j < count; ++j)
      if (row.group[j] == g) sum += row.p[j] = std::exp(row.score[j] - best);
    const R n = row.seen[g];
    row.lse[g] = n > 0 ? best + std::log(sum) : -std::numeric_limits<R>::infinity();
    row.out[g].assign(static_cast<std::size_t>(V_), 0), row.out_bound[g].assign(static_cast<std::size_t>(V_), 0);
    if (n == 0) return;  // exactly zero

    // A block has at least 64 keys. Sums are rescaled with each.
    const R blocks = static_cast<R>(s.k_len / 64 + 1);
    const R p_error = own ? row.worst[g] : row.worst[g] + u * (3 * (best - least) + 3 * (blocks + 1));
    // l and its logarithm; then, in the arithmetic or better, the maximum's share, their sum and ln 2.
    row.lse_bound[g] =
        p_error + u * ((own ? 0 : n + blocks + 2) + 2 * std::abs(best) + 3 * std::abs(row.lse[g]) + std::log(n) + 1);
    // The same without the rounding of lse: to base 2, and as a double (1.45 is over log2(e)).
    row.lse2_bound[g] = R(1.45) * (own ? p_error : p_error + u * (n + blocks + 2)) +
                        R(0x1p-50) * (1 + std::abs(row.lse[g]) + std::log(n));
    for (std::size_t j = 0; j < count; ++j) {
      if (row.group[j] != g) continue;
      row.p[j] /= sum;
      const R* value = &value_[key_row(s, h, static_cast<std::int64_t>(j)) * V_];
      for (std::int64_t d = 0; d < V_; ++d) {
        const R x = row.p[j] * row.keep[j] * value[d];
        row.out[g][d] += x;
        if (!own) row.out_bound[g][d] += std::abs(x) * (2 * p_error + u * (2 * n + 2 * blocks + 8)) + tiny;
      }
    }
  }

  R merge_weight(const Row& row, int g, const Sequence& s, std::int64_t h, std::int64_t i) const {
    if (!p_.is_mmca || p_.merge == Merge::sum || p_.merge == Merge::none) return 1;
    if (p_.merge == Merge::gate) return static_cast<R>(c_.gate.broadcast_at(g, s.batch, h, s.q_begin + i));
    const R best = std::max(row.lse[0], row.lse[1]);
    if (std::isinf(best)) return 0;
    return std::exp(row.lse[g] - best) / (std::exp(row.lse[0] - best) + std::exp(row.lse[1] - best));
  }

  // Relative error of the joint softmax's weights: both lse, rounded and subtracted, two exp, a sum and a quotient.
  R weight_error(const Row& row) const {
    if (!p_.is_mmca || p_.merge != Merge::lse) return 0;
    R error = 8 * u;
    for (int g = 0; g < 2; ++g)
      if (!std::isinf(row.lse[g])) error += 2 * row.lse_bound[g] + 4 * u * std::abs(row.lse[g]);
    return error;
  }

  // Of the weight of key j in the backward, relative.
  R weight_error(const Row& row, std::size_t j, bool own) const {
    if (own) return 0;
    const int g = row.group[j];
    const R n = row.seen[g], distance = std::abs(row.score[j] - row.lse[g]);
    R error = row.error[j] + u * (std::abs(row.score[j]) + 3 * std::abs(row.lse[g]) + 3 * distance + 5);
    if (may_be_whole(row, g)) error += row.worst[g] + u * (6 * std::log(n) + n + 8);
    return error;
  }
  bool may_be_whole(const Row& row, int g) const { return row.seen[g] <= whole_keys; }

  void add_row_gradients(const Sequence& s, std::int64_t h, std::int64_t i) {
    const Row row = look(s, h, i);
    const std::size_t count = row.group.size();
    const std::int64_t at = query_row(s, h, i), rows = c_.batch * p_.q_heads * p_.q_len;
    const R *grad[2], scale = static_cast<R>(p_.scale), merged = weight_error(row);
    for (int g = 0; g < 2; ++g) grad[g] = &grad_out_[(apart() ? at + g * rows : at) * V_];

    // Z dO v of each key, and its mean over each softmax: value, size, and error where it is taken from weights.
    std::vector<R> product(count), magnitude(count), p_error(count);
    R mean[2] = {}, mean_size[2] = {}, mean_error[2] = {}, out_error[2] = {};
    for (std::size_t j = 0; j < count; ++j) {
      const int g = row.group[j];
      if (g < 0) continue;
      const R* value = &value_[key_row(s, h, static_cast<std::int64_t>(j)) * V_];
      for (std::int64_t d = 0; d < V_; ++d)
        product[j] += grad[g][d] * value[d], magnitude[j] += std::abs(grad[g][d] * value[d]);
      product[j] *= row.keep[j], magnitude[j] *= row.keep[j];
      p_error[j] = weight_error(row, j, is_own_image(p_, s, i, static_cast<std::int64_t>(j)));
      mean[g] += row.p[j] * product[j], mean_size[g] += row.p[j] * magnitude[j];
      if (may_be_whole(row, g)) mean_error[g] += row.p[j] * magnitude[j] * p_error[j];
    }
    if (p_.joint()) {
      mean[0] = mean[1] = row.weight[0] * mean[0] + row.weight[1] * mean[1];
      mean_size[0] = mean_size[1] = row.weight[0] * mean_size[0] + row.weight[1] * mean_size[1];
    }
    if (!p_.keeps_group_out() && (s.k_len > whole_keys || (p_.joint() && p_.is_mmca)))
      for (int g = 0; g < p_.groups(); ++g)
        for (std::int64_t d = 0; d < V_; ++d) {
          const R x =
              p_.joint() && p_.is_mmca ? row.weight[0] * row.out[0][d] + row.weight[1] * row.out[1][d] : row.out[g][d];
          out_error[g] += std::abs(grad[g][d]) * (e * std::abs(x) + smallest);
        }

    const R n = static_cast<R>(count), addends = static_cast<R>(p_.q_len * p_.heads_per_kv() + 6);
    const bool row_wanted = sample_.row(h, s.q_begin + i);
    for (std::size_t j = 0; j < count; ++j) {
      const int g = row.group[j];
      if (g < 0) continue;
      if (!row_wanted && !sample_.key(h / p_.heads_per_kv(), s.k_begin + static_cast<std::int64_t>(j))) continue;
      const R w = row.weight[g], size_of_w = std::abs(w), p = row.p[j];
      const R dlse = p_.grad_lse.data ? static_cast<R>(c_.grad_lse.at(g, s.batch, h, s.q_begin + i)) : 0;
      const bool own = is_own_image(p_, s, i, static_cast<std::int64_t>(j)), own_softmax = own && !p_.joint();
      const R size = own_softmax ? std::abs(dlse) : size_of_w * (magnitude[j] + mean_size[g]) + std::abs(dlse);
      const R ds = p * (w * product[j] - (w * mean[g] - dlse));
      const R whole = may_be_whole(row, g) ? row.seen[g] : 0;
      const R ds_bound = own_softmax ? 0  // dP - rowsum(P dP) is not even calculated
                                     : p * (size * (p_error[j] + merged + u * (static_cast<R>(V_) + whole + 12)) +
                                            size_of_w * (mean_error[g] + out_error[g]));
      const R dt = row.slope[j] * ds, dt_size = row.slope[j] * p * size;
      const R dt_bound = row.slope[j] * (ds_bound + row.slope_error[j] * std::abs(ds));
      const std::int64_t key = key_row(s, h, static_cast<std::int64_t>(j));
      for (std::int64_t d = 0; d < D_; ++d) {
        const R k = scale * key_[key * D_ + d], q = scale * query_[at * D_ + d];
        add(grad_query, at * D_ + d, dt * k, std::abs(k) * (dt_bound + u * (n + 24) * dt_size));
        add(grad_key, key * D_ + d, dt * q, std::abs(q) * (dt_bound + u * addends * dt_size));
      }
      for (std::int64_t d = 0; d < V_; ++d) {
        const R x = p * row.keep[j] * w * grad[g][d];
        add(grad_value, key * V_ + d, x, std::abs(x) * (p_error[j] + merged + u * addends));
      }
      if (p_.grad_bias.data) add_bias_gradient(s, h, i, static_cast<std::int64_t>(j), ds, ds_bound, p * size);
    }
    if (!p_.grad_gate.data) return;
    for (int g = 0; g < 2; ++g)
      for (std::int64_t d = 0; d < V_; ++d) {
        const R x = grad[g][d] * row.out[g][d];
        add(grad_gate, at + g * rows, x, u * static_cast<R>(V_ + 4) * std::abs(x));
      }
  }

  // Every pair that shares the element adds to it, one after the other.
  void add_bias_gradient(const Sequence& s, std::int64_t h, std::int64_t i, std::int64_t j, R ds, R bound, R size) {
    const Tensor<A>& like = c_.grad_bias;
    const std::int64_t index[4] = {s.batch, h, i, j};
    std::int64_t at = 0;
    for (int d = 0; d < 4; ++d) at = at * like.size(d) + (like.size(d) == 1 ? 0 : index[d]);
    const R addends = static_cast<R>(c_.batch * p_.q_heads * p_.q_len * p_.k_len / like.count());
    add(grad_bias, at, ds, bound + u * addends * size);
  }

  static void add(Bounded<R>& sum, std::int64_t at, R x, R bound) {
    sum.value[static_cast<std::size_t>(at)] += x, sum.bound[static_cast<std::size_t>(at)] += bound + tiny;
  }

  static void store(Bounded<R>& x) {
    for (std::size_t i = 0; e > 0 && i < x.value.size(); ++i)
      x.bound[i] += e * (std::abs(x.value[i]) + x.bound[i]) + smallest;
  }

  template <class X>
  static std::vector<R> dense(Tensor<X>& x) {
    std::vector<R> all;
    all.reserve(static_cast<std::size_t>(x.count()));
    x.each([&](X element, auto...) { all.push_back(static_cast<R>(element)); });
    return all;
  }

  template <class Body>
  void for_each_row(const Body& body) const {
    for (const Sequence& s : sequences(p_))
      for (std::int64_t h = 0; h < p_.q_heads; ++h)
        for (std::int64_t i = 0; i < s.q_len; ++i)
          if (looked_at(h, s.q_begin + i)) body(s, h, i);
  }

  // What a term may lose to underflow, operands being of order one: exp2 is 0 below the normal numbers.
  static constexpr R tiny = 4096 * static_cast<R>(std::numeric_limits<A>::min());

  Case<T>& c_;
  const Problem& p_;
  const Sample sample_;
  const std::int64_t D_, V_;
  const std::vector<R> query_, key_, value_;
  std::vector<R> grad_out_;
};

}  // namespace mmca::test
