// A linear attention problem with all its operands, and what is expected of it: plain loops in a wider type, straight
// from the formulas of core/linear_problem.h, with a bound on a kernel's error for every result.
//
// Bounds are first-order running errors: every result is a sum of products, and errs by at most
//
//     u (n + D + V + 16) K                u the unit roundoff, n the rows it is a sum over
//
// times the same sum of absolute values: n + D + V roundings of sums and products, whatever their order, and 16 for two
// phi (3 each, 2 for a query's scale), the state's three parts, weights that were divided, and what is stored. K is 2
// or more where the sum is divided by phi(q) . z, for that errs likewise: 1 + phi(q) . |z| / |phi(q) . z|. 16-bit
// results are rounded once more (reference.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include "core/linear_problem.h"
#include "reference.h"

namespace mmca::test {

struct LinearChoices {
  std::int64_t batch = 1, kv_heads = 1, heads_per_kv = 1, q_len = 1, k_len = 1, head_dim = 1, value_dim = 1;
  bool causal = false, state = false, final_state = false, grad_final_state = false;
  double pad = -1, size = 1.5;                     // density of hidden keys; numbers of up to this size
  std::vector<std::int64_t> q_offsets, k_offsets;  // packed sequences: batch + 1 each; empty: not packed
  Layout query_layout, key_layout, value_layout, out_layout, grad_layout;
  std::uint64_t seed = 0;

  std::string text() const {
    std::ostringstream text;
    text << "batch " << batch << " kv_heads " << kv_heads << " heads_per_kv " << heads_per_kv << " q_len " << q_len
         << " k_len " << k_len << " head_dim " << head_dim << " value_dim " << value_dim << " causal " << causal
         << " state " << state << " final_state " << final_state << " grad_final_state " << grad_final_state << " pad "
         << pad << " size " << size << " seed " << seed;
    for (const auto& offsets : {q_offsets, k_offsets}) {
      text << " {";
      for (const std::int64_t offset : offsets) text << " " << offset;
      text << " }";
    }
    return text.str();
  }
};

template <class T>
struct LinearCase {
  using A = Accumulation<T>;

  LinearChoices choices;
  LinearProblem problem;
  std::int64_t tensors;  // batch of the tensors: 1 where sequences are packed
  Tensor<T> query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  Tensor<double> S, z, final_S, final_z, grad_final_S, grad_final_z, grad_S, grad_z;
  Tensor<A> row_facts;
  std::vector<std::uint8_t> key_mask;

  explicit LinearCase(const LinearChoices& c) : choices(c), tensors(c.q_offsets.empty() ? c.batch : 1) {
    Random random(c.seed);
    LinearProblem& p = problem;
    p.dtype = dtype_of<T>, p.batch = c.batch, p.kv_heads = c.kv_heads, p.q_heads = c.kv_heads * c.heads_per_kv;
    p.q_len = c.q_len, p.k_len = c.k_len, p.head_dim = c.head_dim, p.value_dim = c.value_dim, p.causal = c.causal;
    query = Tensor<T>(tensors, p.q_heads, p.q_len, p.head_dim, c.query_layout);
    key = Tensor<T>(tensors, p.kv_heads, p.k_len, p.head_dim, c.key_layout);
    value = Tensor<T>(tensors, p.kv_heads, p.k_len, p.value_dim, c.value_layout);
    out = Tensor<T>(tensors, p.q_heads, p.q_len, p.value_dim, c.out_layout);
    grad_out = Tensor<T>(tensors, p.q_heads, p.q_len, p.value_dim, c.grad_layout);
    grad_query = Tensor<T>(tensors, p.q_heads, p.q_len, p.head_dim, c.out_layout);
    grad_key = Tensor<T>(tensors, p.kv_heads, p.k_len, p.head_dim, c.grad_layout);
    grad_value = Tensor<T>(tensors, p.kv_heads, p.k_len, p.value_dim, c.out_layout);
    for (Tensor<T>* x : {&query, &key, &value, &grad_out})
      x->each([&](T& element, auto...) { element = static_cast<T>(random.between(-c.size, c.size)); });
    row_facts = Tensor<A>(2, tensors, p.q_heads, p.q_len);
    const auto bind = [](auto& operand, auto& tensor) { operand = tensor.template strided<decltype(operand.data)>(); };
    bind(p.query, query), bind(p.key, key), bind(p.value, value), bind(p.out, out), bind(p.grad_out, grad_out);
    bind(p.grad_query, grad_query), bind(p.grad_key, grad_key), bind(p.grad_value, grad_value);
    p.row_facts = row_facts.template statistic<void*>();
    if (c.pad >= 0) {
      for (std::int64_t j = 0; j < tensors * p.k_len; ++j) key_mask.push_back(random.chance(c.pad) ? 0 : 7);
      p.key_mask = key_mask.data();
    }
    if (!c.q_offsets.empty()) {
      p.q_offsets = choices.q_offsets.data(), p.k_offsets = choices.k_offsets.data();
      for (Input* x : {&p.query, &p.key, &p.value, &p.grad_out}) x->batch = 0;
      for (Output* x : {&p.out, &p.grad_query, &p.grad_key, &p.grad_value}) x->batch = 0;
      p.row_facts.batch = 0;
    }
    const auto make_state = [&](bool wanted, Tensor<double>& sum, Tensor<double>& normal, auto& state) {
      if (!wanted) return;
      sum = Tensor<double>(p.batch, p.kv_heads, p.head_dim, p.value_dim);
      normal = Tensor<double>(p.batch, p.kv_heads, 1, p.head_dim);
      sum.each([&](double& x, auto...) { x = random.between(-3, 3); });
      normal.each([&](double& x, auto...) { x = random.between(0.2, 3); });  // a sum of phi, or its gradient
      state = {sum.data(), normal.data()};
    };
    make_state(c.state, S, z, p.state);
    make_state(c.grad_final_state, grad_final_S, grad_final_z, p.grad_final_state);
    make_state(c.final_state, final_S, final_z, p.final_state);
    make_state(c.state, grad_S, grad_z, p.grad_state);
  }
  LinearCase(const LinearCase&) = delete;  // `problem` points into the members
  LinearCase& operator=(const LinearCase&) = delete;
};

template <class T>
class LinearReference {
 public:
  using A = Accumulation<T>;
  using R = std::conditional_t<sizeof(A) == 4, double, long double>;

  Bounded<R> out, final_S, final_z, grad_query, grad_key, grad_value, grad_S, grad_z;

  explicit LinearReference(LinearCase<T>& c) : c_(c), p_(c.problem), D_(p_.head_dim), V_(p_.value_dim) {
    out = Bounded<R>(c.out.count());
    grad_query = Bounded<R>(c.grad_query.count()), grad_key = Bounded<R>(c.grad_key.count());
    grad_value = Bounded<R>(c.grad_value.count());
    final_S = Bounded<R>(c.final_S.count()), final_z = Bounded<R>(c.final_z.count());
    grad_S = Bounded<R>(c.grad_S.count()), grad_z = Bounded<R>(c.grad_z.count());
    for (std::int64_t b = 0; b < p_.batch; ++b)
      for (std::int64_t g = 0; g < p_.kv_heads; ++g) head(b, g);
    for (Bounded<R>* x : {&out, &grad_query, &grad_key, &grad_value})
      for (std::size_t i = 0; i < x->value.size(); ++i)
        if (x->value[i] != 0)
          x->bound[i] += R(StorageRounding<T>::relative) * std::abs(x->value[i]) + R(StorageRounding<T>::absolute);
  }

 private:
  using Rows = std::vector<std::vector<R>>;  // [row][feature]

  struct Sum {
    R value = 0, size = 0;  // and of absolute values
    void add(R x, R magnitude) { value += x, size += magnitude; }
    void add(R x) { add(x, std::abs(x)); }
  };
  using Sums = std::vector<Sum>;

  static R phi(R x) { return std::exp(std::min(x, R(0))) + std::max(x, R(0)); }
  static R slope(R x) { return std::exp(std::min(x, R(0))); }
  static R magnitude(R x) { return std::abs(x); }

  void set(Bounded<R>& to, std::int64_t at, const Sum& sum, R terms, R factor = 1) {
    constexpr R u = std::numeric_limits<A>::epsilon() / 2;
    to.value[at] = factor * sum.value;
    to.bound[at] = u * (terms + D_ + V_ + 16) * std::abs(factor) * sum.size;
  }
  template <class X>
  static R element(const Tensor<X>& t, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    return static_cast<R>(t.at(b, h, i, d));
  }

  // One KV head of one sequence, all results.
  void head(std::int64_t b, std::int64_t g) {
    const bool packed = p_.q_offsets;
    const std::int64_t t = packed ? 0 : b, q0 = packed ? p_.q_offsets[b] : 0, k0 = packed ? p_.k_offsets[b] : 0,
                       q_len = packed ? p_.q_offsets[b + 1] - q0 : p_.q_len,
                       k_len = packed ? p_.k_offsets[b + 1] - k0 : p_.k_len, share = p_.heads_per_kv();
    const auto hidden = [&](std::int64_t j) { return p_.key_mask && !c_.key_mask[t * p_.k_len + k0 + j]; };
    const R rows = static_cast<R>(q_len * share + k_len);
    Rows keys(k_len, std::vector<R>(D_)), values(k_len, std::vector<R>(V_));
    for (std::int64_t j = 0; j < k_len; ++j) {
      for (std::int64_t d = 0; d < D_; ++d) keys[j][d] = hidden(j) ? 0 : phi(element(c_.key, t, g, k0 + j, d));
      for (std::int64_t e = 0; e < V_; ++e) values[j][e] = hidden(j) ? 0 : element(c_.value, t, g, k0 + j, e);
    }
    const auto S0 = [&](std::int64_t d, std::int64_t e) { return p_.state.sum ? element(c_.S, b, g, d, e) : R(0); };
    const auto z0 = [&](std::int64_t d) { return p_.state.sum ? element(c_.z, b, g, 0, d) : R(0); };
    const auto dS = [&](std::int64_t d, std::int64_t e) {
      return p_.grad_final_state.sum ? element(c_.grad_final_S, b, g, d, e) : R(0);
    };
    const auto dz = [&](std::int64_t d) {
      return p_.grad_final_state.sum ? element(c_.grad_final_z, b, g, 0, d) : R(0);
    };

    std::vector<Sums> of_phi_key(k_len, Sums(D_)), of_value(k_len, Sums(V_)), of_S(D_, Sums(V_));
    Sums of_z(D_);
    for (std::int64_t d = 0; d < D_; ++d) {
      of_z[d].add(dz(d));
      for (std::int64_t e = 0; e < V_; ++e) of_S[d][e].add(dS(d, e));
      for (std::int64_t j = 0; j < k_len; ++j) {
        of_phi_key[j][d].add(dz(d));
        for (std::int64_t e = 0; e < V_; ++e) {
          of_phi_key[j][d].add(dS(d, e) * values[j][e]);
          of_value[j][e].add(dS(d, e) * keys[j][d]);
        }
      }
    }
    if (p_.final_state.sum)
      for (std::int64_t d = 0; d < D_; ++d) {
        Sum z;
        z.add(z0(d));
        for (std::int64_t j = 0; j < k_len; ++j) z.add(keys[j][d]);
        set(final_z, (b * p_.kv_heads + g) * D_ + d, z, rows);
        for (std::int64_t e = 0; e < V_; ++e) {
          Sum S;
          S.add(S0(d, e));
          for (std::int64_t j = 0; j < k_len; ++j) S.add(keys[j][d] * values[j][e]);
          set(final_S, ((b * p_.kv_heads + g) * D_ + d) * V_ + e, S, rows);
        }
      }

    for (std::int64_t h = g * share; h < (g + 1) * share; ++h)
      for (std::int64_t i = 0; i < q_len; ++i) {
        const std::int64_t seen = p_.causal ? std::clamp<std::int64_t>(i + k_len - q_len + 1, 0, k_len) : k_len;
        const auto visible = [&](std::int64_t j) { return j < seen && !hidden(j); };
        bool empty = !p_.state.sum;
        for (std::int64_t j = 0; j < seen; ++j) empty = empty && hidden(j);
        if (empty) continue;
        std::vector<R> query(D_), grad(V_), weight(k_len);
        for (std::int64_t d = 0; d < D_; ++d) query[d] = phi(element(c_.query, t, h, q0 + i, d));
        for (std::int64_t e = 0; e < V_; ++e) grad[e] = element(c_.grad_out, t, h, q0 + i, e);
        Sum total;
        Sums numerator(V_);
        for (std::int64_t j = 0; j < k_len; ++j)
          if (visible(j)) {
            for (std::int64_t d = 0; d < D_; ++d) weight[j] += query[d] * keys[j][d];
            total.add(weight[j]);
            for (std::int64_t e = 0; e < V_; ++e) numerator[e].add(weight[j] * values[j][e]);
          }
        for (std::int64_t d = 0; d < D_; ++d) {
          total.add(query[d] * z0(d));
          for (std::int64_t e = 0; e < V_; ++e) numerator[e].add(query[d] * S0(d, e));
        }
        const R inverse = 1 / total.value, K = 1 + total.size * std::abs(inverse);
        Sum product;  // <dO, out>
        const std::int64_t row = (t * p_.q_heads + h) * p_.q_len + q0 + i;
        for (std::int64_t e = 0; e < V_; ++e) {
          numerator[e].size *= K;
          set(out, row * V_ + e, numerator[e], rows, inverse);
          product.add(grad[e] * inverse * numerator[e].value, std::abs(grad[e] * inverse) * numerator[e].size);
        }
        Sums of_phi_query(D_);
        for (std::int64_t d = 0; d < D_; ++d) {
          of_phi_query[d].add(-product.value * z0(d), product.size * std::abs(z0(d)));
          of_z[d].add(-inverse * query[d] * product.value, std::abs(inverse * query[d]) * product.size * K);
          for (std::int64_t e = 0; e < V_; ++e) {
            of_phi_query[d].add(S0(d, e) * grad[e]);
            of_S[d][e].add(inverse * query[d] * grad[e], std::abs(inverse * query[d] * grad[e]) * K);
          }
        }
        for (std::int64_t j = 0; j < k_len; ++j) {
          if (!visible(j)) continue;
          Sum score;  // <dO, v> - <dO, out>
          score.add(-product.value, product.size);
          for (std::int64_t e = 0; e < V_; ++e) {
            score.add(grad[e] * values[j][e]);
            of_value[j][e].add(inverse * weight[j] * grad[e], std::abs(inverse * weight[j] * grad[e]) * K);
          }
          for (std::int64_t d = 0; d < D_; ++d) {
            of_phi_query[d].add(keys[j][d] * score.value, keys[j][d] * score.size);
            of_phi_key[j][d].add(inverse * query[d] * score.value, std::abs(inverse) * query[d] * score.size * K);
          }
        }
        for (std::int64_t d = 0; d < D_; ++d) {
          of_phi_query[d].size *= K;
          set(grad_query, row * D_ + d, of_phi_query[d], rows, inverse * slope(element(c_.query, t, h, q0 + i, d)));
        }
      }
    for (std::int64_t j = 0; j < k_len; ++j) {
      if (hidden(j)) continue;
      const std::int64_t at = (t * p_.kv_heads + g) * p_.k_len + k0 + j;
      for (std::int64_t d = 0; d < D_; ++d)
        set(grad_key, at * D_ + d, of_phi_key[j][d], rows, slope(element(c_.key, t, g, k0 + j, d)));
      for (std::int64_t e = 0; e < V_; ++e) set(grad_value, at * V_ + e, of_value[j][e], rows);
    }
    for (std::int64_t d = 0; p_.grad_state.sum && d < D_; ++d) {
      set(grad_z, (b * p_.kv_heads + g) * D_ + d, of_z[d], rows);
      for (std::int64_t e = 0; e < V_; ++e) set(grad_S, ((b * p_.kv_heads + g) * D_ + d) * V_ + e, of_S[d][e], rows);
    }
  }

  LinearCase<T>& c_;
  const LinearProblem& p_;
  const std::int64_t D_, V_;
};

}  // namespace mmca::test
