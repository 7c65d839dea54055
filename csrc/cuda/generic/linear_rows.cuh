// What the rows of linear attention's sweeps are, T = float or double. A key j and a query row i have two sides each,
// with D = phi(q) . z, d = 1 / D and e = d^2 <dO, y of the forward> = d <dO, out>:
//
//                     phi side       value side, of value_dim + 1 numbers
//     key             phi(k)         (v, 1)
//     query row       phi(q)         (d dO, -e)
//
// Some rows write f, g to the state, others read it with x (cpu/linear_sweep.h):
//
//     sweep           writers, from     f        g       readers   x           what becomes of y = x M
//     out, facts      keys, first       phi(k)   v       rows      phi(q)      out = d y;  d and d <dO, y>
//     query           keys, first       (v, 1)   phi(k)  rows      (d dO, -e)  dphi(q), dq = phi'(q) dphi(q)
//     value           rows, last        phi(q)   d dO    keys      phi(k)      dv
//     key             rows, last        (d dO,-e) phi(q) keys      (v, 1)      dphi(k), dk = phi'(k) dphi(k)
//
// The scale of phi(q) cancels between D and every product with phi(q).
#pragma once

#include "cuda/exp2.cuh"
#include "cuda/feature_map.cuh"
#include "cuda/linear_sequences.cuh"

namespace mmca::cuda::generic {

using namespace prim;

enum class SweepOf { out, facts, query, value, key };
constexpr bool keys_read(SweepOf what) { return what == SweepOf::value || what == SweepOf::key; }
constexpr bool by_value(SweepOf what) { return what == SweepOf::query || what == SweepOf::key; }   // x, f: value sides
constexpr bool has_total(SweepOf what) { return what == SweepOf::out || what == SweepOf::facts; }  // D is wanted

template <class T>
struct LinearRow {
  const T* data;
  std::int64_t feature;

  PRIM T operator[](int d) const { return ld_global(data + d * feature); }
};

// The largest of a row's features, which `lanes` neighbouring lanes look for together. Whole warps only.
template <int lanes, class T>
PRIM T largest_feature(bool active, const LinearRow<T>& row, int dim) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  T largest = active ? row[0] : T(0);
  for (int d = lane; active && d < dim; d += lanes) {
    const T x = row[d];
    largest = largest > x ? largest : x;
  }
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) {
    const T other = shfl_xor(largest, step);
    largest = largest > other ? largest : other;
  }
  return largest;
}

// Rows of one head of a sequence. A row that does not count is read as zeros, whatever lies there.
template <class T, SweepOf what>
class LinearRows {
 public:
  PRIM LinearRows(const LinearProblem& problem, const LinearSequence& sequence, std::int64_t kv_head)
      : problem_(problem),
        sequence_(sequence),
        kv_head_(kv_head),
        heads_(static_cast<std::int32_t>(problem.heads_per_kv())),
        value_dim_(static_cast<int>(problem.value_dim)) {}

  PRIM SweepOrder order() const {
    return keys_read(what) ? order_of_keys(problem_, sequence_) : order_of_rows(problem_, sequence_);
  }

  struct KeyRow {
    LinearRow<T> key, value;
    int value_dim;
    bool counts;

    PRIM T phi_side(int d) const { return phi(key[d]); }
    PRIM T value_side(int e) const {
      const T x = value[e < value_dim ? e : 0];
      return e < value_dim ? x : T(1);
    }
  };
  struct QueryRow {
    LinearRow<T> query, grad_out;
    QueryScale<T> scale;
    T inverse, product;  // d, e
    int value_dim;
    bool counts;

    PRIM T phi_side(int d) const { return scale.phi_of(query[d]); }
    PRIM T value_side(int e) const {
      const T x = grad_out[e < value_dim ? e : 0];
      return e < value_dim ? inverse * x : -product;
    }
  };

  // Writer and reader rows by their number in the order of time; by a whole warp. wants_phi: phi_side will be asked
  // for.
  PRIM auto writer(std::int64_t w, bool wants_phi) const {
    if constexpr (keys_read(what)) {
      QueryRow row = query_row<32>(true, std::int64_t{sequence_.q_len} * heads_ - 1 - w, wants_phi);
      row.counts = row.inverse != T(0);
      return row;
    } else {
      const auto j = static_cast<std::int32_t>(w);
      return key_row(j, !sequence_.hides_key(problem_, j));
    }
  }
  PRIM auto reader(std::int64_t r) const {
    if constexpr (keys_read(what)) {
      const std::int32_t j = reader_key(r);
      return key_row(j, !unseen(j));
    } else {
      QueryRow row = query_row<32>(true, r, !by_value(what));
      row.counts = !sequence_.hides_all_from(problem_, query_token(r));
      return row;
    }
  }
  template <class Row>
  PRIM static T first_side(const Row& row, int d) {  // of f and x
    if constexpr (by_value(what)) return row.value_side(d);
    else return row.phi_side(d);
  }
  template <class Row>
  PRIM static T second_side(const Row& row, int d) {  // of g
    if constexpr (by_value(what)) return row.phi_side(d);
    else return row.value_side(d);
  }

  // Makes of columns first .. first + count - 1 of y what they are for, and stores it. `lanes` neighbouring lanes have
  // a row together; whole warps, some of whose rows may not be active. Partials: <dO, y> of these columns, by row fact.
  template <int lanes, int count>
  PRIM void finish(bool active, std::int64_t r, int first, int values, const T (&y)[count], T total,
                   T* partials) const {
    if constexpr (keys_read(what)) {
      if (active) finish_key(reader_key(r), first, values, y);
    } else {
      finish_row<lanes>(active, r, first, values, y, total, partials);
    }
  }

 private:
  PRIM std::int32_t query_token(std::int64_t entry) const { return static_cast<std::int32_t>(entry / heads_); }
  PRIM std::int64_t query_head(std::int64_t entry) const { return kv_head_ * heads_ + entry % heads_; }
  PRIM std::int32_t reader_key(std::int64_t r) const { return static_cast<std::int32_t>(sequence_.k_len - 1 - r); }
  // Nobody sees the key: its gradients are 0, whatever it is.
  PRIM bool unseen(std::int32_t j) const {
    return sequence_.hides_key(problem_, j) || (!sequence_.q_len && !problem_.grad_final_state.sum);
  }

  template <class Tensor>
  PRIM LinearRow<T> row_at(const Tensor& x, std::int64_t begin, std::int64_t head, std::int64_t row) const {
    return {static_cast<const T*>(x.data) + row_offset(x, sequence_, begin, head, row), x.feature};
  }
  PRIM KeyRow key_row(std::int32_t j, bool counts) const {
    return {row_at(problem_.key, sequence_.k_begin, kv_head_, j),
            row_at(problem_.value, sequence_.k_begin, kv_head_, j), value_dim_, counts};
  }
  PRIM T* facts(std::int64_t entry) const {
    return static_cast<T*>(problem_.row_facts.data) +
           row_offset(problem_.row_facts, sequence_, sequence_.q_begin, query_head(entry), query_token(entry));
  }
  template <int lanes>
  PRIM QueryRow query_row(bool active, std::int64_t entry, bool wants_phi) const {
    const LinearRow<T> query = row_at(problem_.query, sequence_.q_begin, query_head(entry), query_token(entry));
    const T largest = wants_phi ? largest_feature<lanes>(active, query, static_cast<int>(problem_.head_dim)) : T(0);
    QueryRow row{query, {}, QueryScale<T>(largest), T(0), T(0), value_dim_, true};
    if constexpr (!has_total(what)) {
      row.grad_out = row_at(problem_.grad_out, sequence_.q_begin, query_head(entry), query_token(entry));
      if (active) {
        row.inverse = ld_global(facts(entry));
        row.product = ld_global(facts(entry) + problem_.row_facts.group);
      }
    }
    return row;
  }

  template <int count>
  PRIM void store(const Output& x, std::int64_t at, int first, int values, const T (&y)[count]) const {
    T* to = static_cast<T*>(x.data) + at;
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (first + i < values) st_global(to + (first + i) * x.feature, y[i]);
  }

  template <int count>
  PRIM void finish_key(std::int32_t j, int first, int values, const T (&y)[count]) const {
    const KeyRow row = key_row(j, !unseen(j));
    T gradient[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      gradient[i] = row.counts ? y[i] : T(0);
      if constexpr (what == SweepOf::key)
        if (row.counts && first + i < values) {
          const T value = row.phi_side(first + i);
          gradient[i] *= value > T(1) ? T(1) : value;  // NaN stays
        }
    }
    const Output& to = what == SweepOf::key ? problem_.grad_key : problem_.grad_value;
    store(to, row_offset(to, sequence_, sequence_.k_begin, kv_head_, j), first, values, gradient);
  }

  template <int lanes, int count>
  PRIM void finish_row(bool active, std::int64_t entry, int first, int values, const T (&y)[count], T total,
                       T* partials) const {
    if (!active) entry = 0;
    const std::int32_t token = query_token(entry);
    const std::int64_t head = query_head(entry);
    const bool counts = active && !sequence_.hides_all_from(problem_, token);
    const T inverse = counts ? inverse_weight(total) : T(0);
    if constexpr (what == SweepOf::facts) {
      const LinearRow<T> grad = row_at(problem_.grad_out, sequence_.q_begin, head, token);
      T product = T(0);
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (counts && first + i < values) product = multiply_add(grad[first + i], inverse * y[i], product);
#pragma unroll
      for (int step = 1; step < lanes; step *= 2) product += shfl_xor(product, step);
      if (!active || static_cast<int>(threadIdx.x) % lanes) return;
      T* at = facts(entry);
      if (first == 0) st_global(at, inverse);  // first is 0 in one lane of one block alone
      st_global(partials + (at - static_cast<T*>(problem_.row_facts.data)), inverse * product);
    } else {
      T result[count];
      QueryRow row = query_row<lanes>(active, entry, what == SweepOf::query);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        result[i] = T(0);
        if (!counts || first + i >= values) continue;
        if constexpr (what == SweepOf::query) {
          const T value = row.phi_side(first + i);
          result[i] = y[i] * (value > row.scale.factor ? row.scale.factor : value);
        } else {
          result[i] = inverse * y[i];
        }
      }
      const Output& to = what == SweepOf::query ? problem_.grad_query : problem_.out;
      if (active) store(to, row_offset(to, sequence_, sequence_.q_begin, head, token), first, values, result);
    }
  }

  const LinearProblem& problem_;
  const LinearSequence sequence_;  // by value: an object that refers to itself would not be kept in registers
  const std::int64_t kv_head_;
  const std::int32_t heads_;
  const int value_dim_;
};

}  // namespace mmca::cuda::generic
