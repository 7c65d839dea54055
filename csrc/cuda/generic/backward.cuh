// Backward on any GPU, T = float or double. Notation: cpu/backward.h and RowFacts, tiles: generic/tile.cuh.
//
//     P = exp2(c Q K^T - lse);  dP = Z (w dO V^T);  dS = P (dP - offset)
//     dQ = scale dS K;          dV = (w P Z)^T dO;  dK = scale dS^T Q
//
// Two kernels, each computing P and dS for itself: one owns rows and lets keys pass (dQ), the other owns keys and lets
// the rows of all heads of its KV head pass (dK, dV). Neither adds to what another block holds, so every sum has one
// order; only the bias' gradient is added up in memory, by the first. It runs first, and what it learns of a row
// (offset) more exactly than backward_rows it leaves to the second.
#pragma once

#include "cuda/generic/tile.cuh"

namespace mmca::cuda::generic {

// As large as most_shared_bytes allow.
template <class T, int width>
struct BackwardShape;
template <>
struct BackwardShape<float, 64> : Shape<float, 64, 4, 8, 2> {};
template <>
struct BackwardShape<float, 128> : Shape<float, 128, 2, 4, 3> {};
template <>
struct BackwardShape<float, 256> : Shape<float, 256, 1, 2, 3> {};
template <>
struct BackwardShape<double, 64> : Shape<double, 64, 2, 4, 2> {};
template <>
struct BackwardShape<double, 128> : Shape<double, 128, 1, 2, 3> {};
template <>
struct BackwardShape<double, 256> : Shape<double, 256, 1, 1, 1> {};

template <class T>
struct BackwardArguments {
  Problem problem;
  DevicePlan plan;
  ExponentScale<T> scale;
  RowFacts<T>* facts;
};

// A tile's rows in shared memory: facts beside what they see.
template <class T, int rows>
struct RowViews {
  static constexpr int chunks = sizeof(RowFacts<T>) / 16;
  static constexpr smem_t pitch = sizeof(RowView) + sizeof(RowFacts<T>), bytes = rows * pitch;

  PRIM static RowView view(smem_t views, int r) { return ld_shared<RowView>(views + r * pitch); }
  PRIM static RowFacts<T> facts(smem_t views, int r) {
    Chunk<T> chunk[chunks];
#pragma unroll
    for (int c = 0; c < chunks; ++c) chunk[c] = ld_shared<Chunk<T>>(views + r * pitch + sizeof(RowView) + c * 16);
    RowFacts<T> facts;
    memcpy(&facts, chunk, sizeof facts);
    return facts;
  }
  PRIM static void set(smem_t views, int r, const RowView& view, const RowFacts<T>& facts) {
    Chunk<T> chunk[chunks];
    memcpy(chunk, &facts, sizeof facts);
    st_shared(views + r * pitch, view);
#pragma unroll
    for (int c = 0; c < chunks; ++c) st_shared(views + r * pitch + sizeof(RowView) + c * 16, chunk[c]);
  }
  PRIM static smem_t offset(smem_t views, int r) {
    return views + r * pitch + sizeof(RowView) + offsetof(RowFacts<T>, offset);
  }
};

// dS past the softcap, in shared memory, from the products once more.
template <class S, class T>
PRIM void pass_softcap(const BackwardArguments<T>& a, smem_t weights, smem_t own, smem_t passing) {
  const Place place;
  T s[S::own_steps][S::passing_steps];
  products<S>(own, passing, static_cast<int>(a.problem.head_dim), s);
#pragma unroll
  for (int i = 0; i < S::own_steps; ++i)
#pragma unroll
    for (int j = 0; j < S::passing_steps; ++j) {
      const smem_t at = weights + place.own_row<S>(i) * S::weight_pitch + place.passing_row(j) * sizeof(T);
      const T gradient = ld_shared<T>(at), slope = PairScores<T>::slope(a.problem, s[i][j]);
      st_shared(at, is_hidden(gradient) ? gradient : gradient * slope + T(0));
    }
}

template <class T>
PRIM T grad_lse_of(const Problem& problem, const Sequence& sequence, int group, std::int64_t head, std::int32_t row) {
  return problem.grad_lse.data ? ld_global(statistic<T>(problem.grad_lse, sequence, group, head, row)) : T(0);
}

// P of a pair, from pair_score's result. P <= 1, also where scores are so large that rounding them could say otherwise.
template <class T>
PRIM T pair_weight(const BackwardArguments<T>& a, T score, T lse, T low) {
  const T weight =
      a.problem.shapes_scores() ? a.scale.exp2_below(score - lse, low) : a.scale.exp2_minus(score, lse, low);
  return weight > T(1) ? T(1) : weight;  // NaN stays
}

// ---- dQ ------------------------------------------------------------------------------------------------------------

template <class T, int width>
class QueryGradient {
 public:
  using S = BackwardShape<T, width>;
  using Bits = KeptBits<S::own, S::passing>;
  using Views = RowViews<T, S::own>;

  static constexpr smem_t queries = 0, grads = queries + S::own_bytes, keys = grads + S::own_bytes,
                          values = keys + S::passing_bytes, weights = values + S::passing_bytes,
                          views = weights + S::weight_bytes, bits = views + Views::bytes,
                          shared_bytes = bits + Bits::bytes;

  // Rows that see this many keys of a group at most, and with them all of their softmax, take their sums from them in a
  // pass of their own: rowsum(P dP) is more exact than rowsum(dO O) where few keys share the weight.
  static constexpr std::int32_t few_keys = 256;

  PRIM explicit QueryGradient(const BackwardArguments<T>& a) : a_(a), block_(a.problem, a.plan) {}

  PRIM void run() {
    if (block_.count <= 0) return;
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i)
#pragma unroll
      for (int d = 0; d < S::columns; ++d) gradient_[i][d] = T(0);
    const Problem& p = a_.problem;
    const Sequence sequence = block_.sequence();
    load_tile<S, S::own>(queries, RowSource<T>(p.query, sequence, sequence.q_begin, block_.query_head(), p.head_dim),
                         [&](int r) { return block_.row_at(r); });
    for (int group = 0; group < p.groups(); ++group) run_group(group);
    wait_for_copies();  // of rows that saw nothing
    write();
  }

 private:
  PRIM RowView view(int r) const { return Views::view(views, r); }
  PRIM RowFacts<T>* global_facts(int group, std::int32_t row) const {
    return a_.facts + facts_index(a_.problem, block_.sequence(), group, block_.query_head(), row);
  }

  PRIM void run_group(int group) {
    const Place place;
    const Problem& p = a_.problem;
    const Sequence sequence = block_.sequence();
    const Interval seen = entries_hull(p, a_.plan, sequence, block_.first, block_.count, group);
    if (seen.begin >= seen.end) return;
    if (place.thread < S::own) look(group, place.thread);
    syncthreads();
    // A weight of zero hides even a NaN.
    load_tile<S, S::own>(grads,
                         RowSource<T>(p.grad_out, sequence, sequence.q_begin, block_.query_head(), p.value_dim, group),
                         [&](int r) {
                           const std::int32_t row = Views::view(views, r).row;
                           return Views::facts(views, r).weight == T(0) ? -1 : row;
                         });
    const bool few = seen.end - seen.begin <= few_keys;
    if (few) {
#pragma unroll
      for (int i = 0; i < S::own_steps; ++i) maximum_[i] = -infinity<T>(), sum_[i] = product_[i] = T(0);
      pass(group, seen, true, few);
      take_sums(group);
    }
    pass(group, seen, false, few);
  }

  PRIM void look(int group, int r) const {
    const RowView view = block_.view_of_row(group, r);
    RowFacts<T> facts{infinity<T>(), T(0), T(0), T(0)};
    if (view.row >= 0) facts = ld_global(global_facts(group, view.row));
    if (view.alone) {  // P = 1, and dP - rowsum(P dP) is 0, exactly
      facts.weight = T(0);
      facts.offset = -grad_lse_of<T>(a_.problem, block_.sequence(), group, block_.query_head(), view.row);
      st_global(&global_facts(group, view.row)->offset, facts.offset);
    }
    Views::set(views, r, view, facts);
  }

  // All keys once: either for the rows' sums or for their gradients.
  PRIM void pass(int group, Interval seen, bool sums, bool few) {
    const Problem& p = a_.problem;
    const std::int32_t* positions = list_positions(a_.plan, block_.sequence(), group);
    for (std::int32_t first = seen.begin / S::passing * S::passing; first < seen.end; first += S::passing) {
      const auto key_at = [&](int r) {
        const std::int32_t c = first + r;
        return c < seen.end ? position_at(positions, c) : -1;
      };
      load(keys, p.key, p.head_dim, key_at);
      load(values, p.value, p.value_dim, key_at);
      if (p.dropout.threshold)
        Bits::draw(
            bits, PairDropout(p, block_.sequence(), block_.query_head()),
            [&](int r) { return Views::view(views, r).row; }, key_at);
      wait_for_copies();
      const bool finite = !syncthreads_or(loaded_non_finite<S, S::passing, T>(keys));
      if (any_lane(meets(first))) {
        T s[S::own_steps][S::passing_steps], dp[S::own_steps][S::passing_steps];
        score(first, key_at, s);
        products<S>(grads, values, static_cast<int>(p.value_dim), dp);
        if (sums) {
          add_sums(s, dp);
        } else {
          differentiate(few, s, dp);
          store_weights<S>(weights, dp);
          if (p.grad_bias.data) add_bias_gradient(key_at);
          if (p.softcap > 0) pass_softcap<S>(a_, weights, queries, keys);
          syncwarp();
          weigh<S>(weights, keys, finite, gradient_);
        }
      }
      syncthreads();
    }
  }

  template <class KeyAt>
  PRIM void load(smem_t tile, const Input& x, std::int64_t dim, KeyAt key_at) const {
    const Sequence sequence = block_.sequence();
    load_tile<S, S::passing>(tile, RowSource<T>(x, sequence, sequence.k_begin, block_.kv_head(), dim), key_at);
  }

  PRIM bool meets(std::int32_t first) const {
    const Place place;
    bool any = false;
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) any |= view(place.own_row<S>(i)).meets(first, first + S::passing);
    return any;
  }

  // What exponents are taken of; -inf where a row does not see the key.
  template <class KeyAt>
  PRIM void score(std::int32_t first, KeyAt key_at, T (&s)[S::own_steps][S::passing_steps]) {
    const Place place;
    products<S>(queries, keys, static_cast<int>(a_.problem.head_dim), s);
    if (shapes_pairs(a_.problem)) {
      store_weights<S>(weights, s);
      shape_pairs<S>(
          weights, a_.problem, block_.sequence(), block_.query_head(), a_.scale.factor,
          [&](int own, int passing) {
            const RowView v = Views::view(views, own);
            return v.sees(first + passing) ? v.row : -1;
          },
          [&](int, int passing) { return key_at(passing); });
      load_weights<S>(weights, s);
      return;
    }
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const RowView v = view(place.own_row<S>(i));
#pragma unroll
      for (int j = 0; j < S::passing_steps; ++j)
        s[i][j] = v.sees(first + place.passing_row(j)) ? s[i][j] * a_.scale.factor : -infinity<T>();
    }
  }

  // w Z, by which dO V^T becomes dP.
  PRIM T kept(int own, int passing, const RowView& v, T weight, T factor) const {
    if (!a_.problem.dropout.threshold || v.self_group) return weight;
    return Bits::kept(bits, own, passing) ? weight * factor : T(0);
  }

  // Running maximum m, sum and rowsum(P dP) of P = exp2(c (S - m)).
  PRIM void add_sums(const T (&s)[S::own_steps][S::passing_steps], const T (&dp)[S::own_steps][S::passing_steps]) {
    const Place place;
    const T factor = kept_factor<T>(a_.problem);
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const RowView v = view(place.own_row<S>(i));
      const T w = Views::facts(views, place.own_row<S>(i)).weight;
      T best = s[i][0];
#pragma unroll
      for (int j = 1; j < S::passing_steps; ++j) best = maximum(best, s[i][j]);
      const T before = maximum_[i];
      maximum_[i] = maximum(before, maximum_of_row(best));
      const T base = maximum_[i] == -infinity<T>() ? T(0) : maximum_[i];
      const T rescale = a_.scale.exp2_below(before - base);
      T sum = T(0), product = T(0);
#pragma unroll
      for (int j = 0; j < S::passing_steps; ++j) {
        const T p = a_.scale.exp2_below(s[i][j] - base);
        sum += p;
        if (s[i][j] != -infinity<T>())
          product = multiply_add(p, weighted(kept(place.own_row<S>(i), place.passing_row(j), v, w, factor), dp[i][j]),
                                 product);
      }
      sum_[i] = multiply_add(sum_[i], rescale, sum);
      product_[i] = multiply_add(product_[i], rescale, product);
    }
  }

  // The sums of all lanes, fit to divide by; offset = rowsum(P dP) - dlse, here and for the other kernel.
  PRIM void take_sums(int group) {
    const Place place;
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const RowView v = view(place.own_row<S>(i));
      const T sum = sum_of_row(sum_[i]), product = sum_of_row(product_[i]);
      sum_[i] = sum == T(0) ? T(1) : sum;
      if (maximum_[i] == -infinity<T>()) maximum_[i] = T(0);
      if (place.x != 0 || v.range.begin >= v.range.end || !is_whole(i, group)) continue;
      const T offset =
          product / sum_[i] - grad_lse_of<T>(a_.problem, block_.sequence(), group, block_.query_head(), v.row);
      st_shared(Views::offset(views, place.own_row<S>(i)), offset);  // read after the next tile's barrier
      st_global(&global_facts(group, v.row)->offset, offset);
    }
  }

  // Does the group hold everything that the row's softmax sums over?
  PRIM bool is_whole(int i, int group) const {
    const Place place;
    if (a_.problem.groups() == 1 || !a_.problem.joint()) return true;
    const Interval other =
        entry_range(a_.problem, a_.plan, block_.sequence(), block_.first + place.own_row<S>(i), 1 - group);
    return other.begin >= other.end;
  }

  // dO V^T becomes dS, before the softcap.
  PRIM void differentiate(bool few, const T (&s)[S::own_steps][S::passing_steps],
                          T (&dp)[S::own_steps][S::passing_steps]) {
    const Place place;
    const T factor = kept_factor<T>(a_.problem);
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const RowView v = view(place.own_row<S>(i));
      const RowFacts<T> f = Views::facts(views, place.own_row<S>(i));
#pragma unroll
      for (int j = 0; j < S::passing_steps; ++j) {
        const T weight =
            few ? a_.scale.exp2_below(s[i][j] - maximum_[i]) / sum_[i] : pair_weight(a_, s[i][j], f.lse, f.low);
        const T gradient =
            weight *
            (weighted(kept(place.own_row<S>(i), place.passing_row(j), v, f.weight, factor), dp[i][j]) - f.offset);
        dp[i][j] = s[i][j] == -infinity<T>() ? hidden<T>() : gradient + T(0);
      }
    }
  }

  template <class KeyAt>
  PRIM void add_bias_gradient(KeyAt key_at) const {
    const Place place;
    const Output& bias = a_.problem.grad_bias;
    const Sequence sequence = block_.sequence();
    T* data = static_cast<T*>(bias.data) + row_offset(bias, sequence, sequence.q_begin, block_.query_head(), 0);
#pragma unroll 1
    for (int u = 0; u < S::own_steps * S::passing_steps; ++u) {
      const int own = place.own_row<S>(u / S::passing_steps), passing = place.passing_row(u % S::passing_steps);
      const T gradient = ld_shared<T>(weights + own * S::weight_pitch + passing * sizeof(T));
      if (!is_hidden(gradient))
        atomic_add(data + Views::view(views, own).row * bias.row + key_at(passing) * bias.feature, gradient);
    }
  }

  PRIM void write() {
    const Place place;
    const Output& out = a_.problem.grad_query;
    const Sequence sequence = block_.sequence();
    const std::int32_t head = block_.query_head();
    const T scale = static_cast<T>(a_.problem.scale);
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const std::int32_t row = block_.row_at(place.own_row<S>(i));
      if (row < 0) continue;
#pragma unroll
      for (int d = 0; d < S::columns; ++d) gradient_[i][d] *= scale;
      store_row<S>(static_cast<T*>(out.data) + row_offset(out, sequence, sequence.q_begin, head, row), out.feature,
                   static_cast<int>(a_.problem.head_dim), gradient_[i]);
    }
  }

  const BackwardArguments<T>& a_;
  const RowBlock<S::own> block_;
  T maximum_[S::own_steps], sum_[S::own_steps], product_[S::own_steps];  // the sums: at first this thread's parts
  T gradient_[S::own_steps][S::columns];
};

// ---- dK, dV --------------------------------------------------------------------------------------------------------

template <class T, int width>
class KeyGradient {
 public:
  using S = BackwardShape<T, width>;
  using Bits = KeptBits<S::passing, S::own>;
  using Views = RowViews<T, S::passing>;

  static constexpr smem_t keys = 0, values = keys + S::own_bytes, queries = values + S::own_bytes,
                          grads = queries + S::passing_bytes, weights = grads + S::passing_bytes,
                          views = weights + S::weight_bytes, bits = views + Views::bytes,
                          shared_bytes = bits + Bits::bytes;

  // Blocks, slowest first: KV head; tile of keys; group.
  PRIM explicit KeyGradient(const BackwardArguments<T>& a) : a_(a) {
    group_ = static_cast<int>(blockIdx.x % a.problem.groups());
    const Tile tile = tile_of(a.problem, a.plan, blockIdx.x / a.problem.groups() % tiles(), S::own, true);
    index_ = tile.sequence.index, first_ = tile.first;
    const std::int32_t left = list_size(a.plan, tile.sequence, group_) - first_;  // a tile of the list
    count_ = left < S::own ? left : S::own;
    positions_ = list_positions(a.plan, tile.sequence, group_);
  }

  PRIM void run() {
    if (count_ <= 0) return;
    const Problem& p = a_.problem;
    const Sequence sequence = this->sequence();
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i)
#pragma unroll
      for (int d = 0; d < S::columns; ++d) grad_key_[i][d] = grad_value_[i][d] = T(0);
    const auto key_at = [&](int r) { return this->key_at(r); };
    const std::int32_t kv_head = this->kv_head();
    load_tile<S, S::own>(keys, RowSource<T>(p.key, sequence, sequence.k_begin, kv_head, p.head_dim), key_at);
    load_tile<S, S::own>(values, RowSource<T>(p.value, sequence, sequence.k_begin, kv_head, p.value_dim), key_at);
    const std::int32_t share = static_cast<std::int32_t>(p.heads_per_kv()), q_len = sequence.q_len;
    for (std::int32_t head = kv_head * share; head < (kv_head + 1) * share; ++head)
      for (std::int32_t first = 0; first < q_len; first += S::passing) {
        const std::int32_t count = q_len - first < S::passing ? q_len - first : S::passing;
        const Interval seen = entries_hull(p, a_.plan, this->sequence(), first, count, group_);
        if (seen.begin < seen.end && seen.begin < first_ + count_ && seen.end > first_)
          meet(opaque(head), first, count);
      }
    wait_for_copies();  // of keys that nobody saw
    write();
  }

 private:
  // Made anew where they are used: they would fill the registers of loops that do without.
  PRIM Sequence sequence() const { return sequence_at(a_.problem, a_.plan, opaque(index_)); }
  PRIM std::int64_t tiles() const { return gridDim.x / (a_.problem.groups() * a_.problem.kv_heads); }
  PRIM std::int32_t kv_head() const {
    return opaque(blockIdx.x) / static_cast<std::uint32_t>(a_.problem.groups()) / static_cast<std::uint32_t>(tiles());
  }
  PRIM std::int32_t key_at(int r) const { return r < count_ ? position_at(positions_, first_ + r) : std::int32_t{-1}; }

  // One tile of rows of one head.
  PRIM void meet(std::int32_t head, std::int32_t first, std::int32_t count) {
    const Place place;
    const Problem& p = a_.problem;
    const Sequence sequence = this->sequence();
    if (place.thread < S::passing) look(sequence, head, first, count, place.thread);
    syncthreads();
    // Rows that see nothing of the group, or count for nothing in the result, take no part, whatever they hold.
    load_tile<S, S::passing>(queries, RowSource<T>(p.query, sequence, sequence.q_begin, head, p.head_dim), [&](int r) {
      const std::int32_t row = Views::view(views, r).row;
      return Views::facts(views, r).lse == infinity<T>() ? -1 : row;
    });
    load_tile<S, S::passing>(grads, RowSource<T>(p.grad_out, sequence, sequence.q_begin, head, p.value_dim, group_),
                             [&](int r) {
                               const std::int32_t row = Views::view(views, r).row;
                               return Views::facts(views, r).weight == T(0) ? -1 : row;
                             });
    if (p.dropout.threshold)
      Bits::draw(
          bits, PairDropout(p, sequence, head), [&](int r) { return Views::view(views, r).row; },
          [&](int r) { return key_at(r); });
    wait_for_copies();
    const bool queries_finite = !syncthreads_or(loaded_non_finite<S, S::passing, T>(queries));
    const bool grads_finite = !syncthreads_or(loaded_non_finite<S, S::passing, T>(grads));
    if (any_lane(meets())) {
      T s[S::own_steps][S::passing_steps], dp[S::own_steps][S::passing_steps];
      score(sequence, head, s);
      products<S>(values, grads, static_cast<int>(p.value_dim), dp);
      differentiate(s, dp);
      store_weights<S>(weights, s);
      syncwarp();
      weigh<S>(weights, grads, grads_finite, grad_value_);
      syncwarp();
      store_weights<S>(weights, dp);
      if (p.softcap > 0) pass_softcap<S>(a_, weights, keys, queries);
      syncwarp();
      weigh<S>(weights, queries, queries_finite, grad_key_);
    }
    syncthreads();
  }

  PRIM void look(const Sequence& sequence, std::int32_t head, std::int32_t first, std::int32_t count, int r) const {
    const RowView view = view_of(a_.problem, a_.plan, sequence, group_, first, count, r);
    RowFacts<T> facts{infinity<T>(), T(0), T(0), T(0)};
    if (view.row >= 0) facts = ld_global(a_.facts + facts_index(a_.problem, sequence, group_, head, view.row));
    Views::set(views, r, view, facts);
  }

  // Does any of this thread's rows see any of its warp's keys?
  PRIM bool meets() const {
    const Place place;
    const std::int32_t begin = first_ + place.warp * lanes_y * S::own_steps;
    bool any = false;
#pragma unroll
    for (int j = 0; j < S::passing_steps; ++j)
      any |= Views::view(views, place.passing_row(j)).meets(begin, begin + lanes_y * S::own_steps);
    return any;
  }

  // What exponents are taken of; -inf where a row does not see the key.
  PRIM void score(const Sequence& sequence, std::int32_t head, T (&s)[S::own_steps][S::passing_steps]) {
    const Place place;
    products<S>(keys, queries, static_cast<int>(a_.problem.head_dim), s);
    if (shapes_pairs(a_.problem)) {
      store_weights<S>(weights, s);
      shape_pairs<S>(
          weights, a_.problem, sequence, head, a_.scale.factor,
          [&](int own, int passing) {
            const RowView v = Views::view(views, passing);
            return v.sees(first_ + own) ? v.row : -1;
          },
          [&](int own, int) { return key_at(own); });
      load_weights<S>(weights, s);
      return;
    }
#pragma unroll
    for (int j = 0; j < S::passing_steps; ++j) {
      const RowView v = Views::view(views, place.passing_row(j));
#pragma unroll
      for (int i = 0; i < S::own_steps; ++i)
        s[i][j] = v.sees(first_ + place.own_row<S>(i)) ? s[i][j] * a_.scale.factor : -infinity<T>();
    }
  }

  // s becomes w P Z, and dO V^T dS, before the softcap.
  PRIM void differentiate(T (&s)[S::own_steps][S::passing_steps], T (&dp)[S::own_steps][S::passing_steps]) const {
    const Place place;
    const bool drops = a_.problem.dropout.threshold != 0;
    const T factor = kept_factor<T>(a_.problem);
#pragma unroll
    for (int j = 0; j < S::passing_steps; ++j) {
      const int r = place.passing_row(j);
      const RowFacts<T> f = Views::facts(views, r);
      const RowView v = Views::view(views, r);
#pragma unroll
      for (int i = 0; i < S::own_steps; ++i) {
        const bool sees = s[i][j] != -infinity<T>();
        const T weight = pair_weight(a_, s[i][j], f.lse, f.low);
        T kept = f.weight;
        if (drops && !v.self_group) kept = Bits::kept(bits, r, place.own_row<S>(i)) ? kept * factor : T(0);
        const T arrives = v.alone ? T(0) : weighted(kept, dp[i][j]);
        s[i][j] = sees ? weight * kept + T(0) : hidden<T>();
        dp[i][j] = sees ? weight * (arrives - f.offset) + T(0) : hidden<T>();
      }
    }
  }

  PRIM void write() {
    const Place place;
    const Problem& p = a_.problem;
    const Sequence sequence = this->sequence();
    const std::int32_t head = kv_head();
    const T scale = static_cast<T>(p.scale);
#pragma unroll
    for (int i = 0; i < S::own_steps; ++i) {
      const std::int32_t key = key_at(place.own_row<S>(i));
      if (key < 0) continue;
#pragma unroll
      for (int d = 0; d < S::columns; ++d) grad_key_[i][d] *= scale;
      const auto store = [&](const Output& out, std::int64_t dim, const T(&x)[S::columns]) {
        T* row = static_cast<T*>(out.data) + row_offset(out, sequence, sequence.k_begin, head, key);
        store_row<S>(row, out.feature, static_cast<int>(dim), x);
      };
      store(p.grad_key, p.head_dim, grad_key_[i]);
      store(p.grad_value, p.value_dim, grad_value_[i]);
    }
  }

  const BackwardArguments<T>& a_;
  int group_;
  std::int32_t index_, first_, count_;  // sequence; its tile of the group's list
  const std::int32_t* positions_;
  T grad_key_[S::own_steps][S::columns], grad_value_[S::own_steps][S::columns];
};

// ---- launch --------------------------------------------------------------------------------------------------------

template <class T, int width>
__global__ void __launch_bounds__(threads, BackwardShape<T, width>::blocks)
    query_gradient_kernel(const __grid_constant__ BackwardArguments<T> arguments) {
  QueryGradient<T, width>(arguments).run();
}
template <class T, int width>
__global__ void __launch_bounds__(threads, BackwardShape<T, width>::blocks)
    key_gradient_kernel(const __grid_constant__ BackwardArguments<T> arguments) {
  KeyGradient<T, width>(arguments).run();
}

template <class T>
void attention_backward(const Launch& launch) {
  const Problem& problem = launch.problem;
  const BackwardArguments<T> arguments{
      problem, launch.plan, ExponentScale<T>(problem.shapes_scores() ? 1.0 : problem.scale), backward_rows<T>(launch)};
  with_width(problem, [&](auto width) {
    using Rows = QueryGradient<T, width.value>;
    launch(&query_gradient_kernel<T, width.value>,
           tile_count(problem, launch.plan, Rows::S::own, false) * problem.q_heads, threads, Rows::shared_bytes,
           arguments);
    using Keys = KeyGradient<T, width.value>;
    static_assert(Rows::shared_bytes <= most_shared_bytes && Keys::shared_bytes <= most_shared_bytes);
    launch(&key_gradient_kernel<T, width.value>,
           tile_count(problem, launch.plan, Keys::S::own, true) * problem.kv_heads * problem.groups(), threads,
           Keys::shared_bytes, arguments);
  });
}

}  // namespace mmca::cuda::generic
