// Backward kernel; included inside the namespace of an instruction set. Notation: core/problem.h.
//
// With group r's weight w in the merge (1, or exp(lse_r - LSE) for the joint softmax):
//
//     P   = exp2(c Q K^T - lse_r log2(e))                c = scale log2(e); hidden pairs: 0
//     dP  = w Z (dO V^T)
//     dS  = P (dP - offset)      offset = w rowsum(dO out) - dlse_r   joint,   w rowsum(dO O_r) - dlse_r   otherwise,
//                                or rowsum(P dP) - dlse_r where one block holds all keys
//     dV += (w P Z)^T dO;   dK += scale dS^T Q;   dQ += scale dS K;   dw_r = rowsum(dO O_r)
//
// Where scores are more than products (cpu/scores.h), P = exp2(log2(e) (S - lse_r)), dbias += dS, and dS is multiplied
// by the softcap's derivative on its way to Q and K.
//
// Small heads have a kernel of their own (cpu/small.h). Of the others, a work item owns a run of one group's keys: keys
// outermost, rows (cpu/rows.h) inside, dK and dV in scratch until all rows have passed, dQ added to the item's own
// partial, [row][feature]. No atomics on floats and no order that depends on threads. The products are made, and their
// operands laid out, as cpu/gradients.h says.

template <class T, template <class> class Products>
class Backward {
 public:
  static constexpr int row_block = Products<T>::row_block, key_block = Products<T>::key_block,
                       key_range = 2 * key_block, strip_rows = Products<T>::strip_rows;

  static std::int64_t partial_row_bytes(const Problem& problem) {
    return static_cast<std::int64_t>(sizeof(T)) * round_up(static_cast<int>(problem.head_dim), width);
  }

  // `partials`: rows of partial_row_bytes as the wave counts them; `touched`: a zeroed byte for each row block.
  Backward(const Problem& problem, const Plan& plan, BackwardWave& wave, T* partials, std::uint8_t* touched)
      : problem_(problem), plan_(plan), wave_(wave), partials_(partials), touched_(touched) {}

  void operator()(std::int64_t index) const {
    const BackwardItem& item = wave_.items[static_cast<std::size_t>(index)];
    const BackwardHead& head = wave_.heads[static_cast<std::size_t>(item.head)];
    const Problem problem = plan_.problem_of(problem_, head.batch);
    const SequencePlan& sequence = plan_.of(head.batch);
    if (is_small(problem, sequence))
      return run_small<T>(problem, {problem, sequence, head.batch, head.kv_head}, &Small<T>::backward);
    Arena measure(nullptr);
    Item(*this, problem, head, item, measure);
    Arena arena(worker_scratch(measure.used()));
    [[maybe_unused]] const typename Products<T>::Session session;
    Item work(*this, problem, head, item, arena);
    work.run();
    if (wave_.unfinished[static_cast<std::size_t>(item.head)].fetch_sub(1, std::memory_order_acq_rel) == 1)
      work.write_query_gradient(head);
  }

 private:
  using S = Simd<T>;
  static constexpr int width = lanes<T>, block_strips = row_block / strip_rows, key_step = Products<T>::key_step;
  static constexpr int stride = Products<T>::stride;
  static_assert(key_range >= small_keys);  // small heads are one item

  class Item {
   public:
    Item(const Backward& parent, const Problem& problem, const BackwardHead& head, const BackwardItem& item,
         Arena& arena)
        : problem_(problem),
          rows_{problem_, parent.plan_.of(head.batch), head.batch, head.kv_head},
          natural_(problem_.shapes_scores()),
          scale_(natural_ ? 1.0 : problem_.scale),
          keys_(rows_.plan.keys[item.group]),
          visibility_(rows_, keys_, item.group),
          shape_(rows_, keys_),
          head_(head),
          item_(item),
          from_(rows_, width),
          range_keys_(std::min(key_range, round_up(std::max(item.end - item.begin, 1), key_step))),
          entries_(rows_.size()),
          parent_(parent),
          products_(rows_, range_keys_, scale_.query_factor, arena) {
      slopes_ = problem_.softcap > 0 ? arena.take<T>(static_cast<std::size_t>(row_block) * stride) : nullptr;
      lse2_ = arena.take<SplitLse<T>>(row_block);
      offset_ = arena.take<T>(row_block);
      lse_gradient_ = arena.take<T>(row_block);
      weight_ = arena.take<T>(row_block);
      dropout_ = arena.take<T>(key_block);
      const auto dim = static_cast<std::size_t>(std::max(from_.padded_head_dim, from_.padded_value_dim));
      buffer_ = arena.take<T>(2 * dim);
      grad_buffer_ = arena.take<T>(2 * dim);
      row_buffer_ = arena.take<T>(dim);
      own_buffer_ = arena.take<T>(2 * dim);
    }

    void run() {
      for (std::int32_t first = item_.begin; first < item_.end; first += range_keys_) {
        const int keys = std::min(range_keys_, item_.end - first);
        products_.pack_keys(keys_, first, keys);
        for (std::int64_t entry = 0; entry < entries_; entry += row_block) {
          const int rows = static_cast<int>(std::min<std::int64_t>(row_block, entries_ - entry));
          const Range seen = hull(rows_, item_.group, entry, entry + rows);
          if (std::max(seen.begin, first) >= std::min(seen.end, first + keys)) continue;
          look_at_rows(entry, rows);
          products_.pack_rows(entry, rows, item_.group, weight_);
          for (int c = 0; c < keys; c += key_block) {
            const int n = std::min(key_block, keys - c);
            if (std::max(seen.begin, first + c) < std::min(seen.end, first + c + n)) meet(entry, rows, first, c, n);
          }
        }
        products_.finish_keys(keys);
        if (item_.group == 1 && !rows_.plan.self_rows.empty()) add_self_rows(first, keys);
        write_key_gradients(first, keys);
      }
      if (item_.part == 0) write_hidden_keys();
    }

    // dQ of every row of the head: the partials in the order of their slots, and what a row gave itself.
    void write_query_gradient(const BackwardHead& head) {
      const T scale = static_cast<T>(problem_.scale);
      T* sum = buffer_;
      for (std::int64_t entry = 0; entry < entries_; ++entry) {
        const Row row = rows_.at(entry);
        bool first = true;
        for (int part = 0; part < head.parts; ++part) {
          if (!*parent_.touched(head, part, entry)) continue;
          const T* partial = parent_.partial(head, part, entry, from_.padded_head_dim);
          if (first) std::copy_n(partial, from_.padded_head_dim, sum);
          else
            for (int d = 0; d < from_.padded_head_dim; ++d) sum[d] += partial[d];
          first = false;
        }
        if (first) std::fill_n(sum, from_.padded_head_dim, T(0));
        if (rows_.plan.attends_to_itself(row.row)) {
          const T gradient = own_gradient(row).score;
          add_scaled(gradient, from_.key().row(rows_.position(row.row), grad_buffer_), sum);
        }
        for (int d = 0; d < from_.head_dim; ++d) sum[d] *= scale;
        const Output& out = problem_.grad_query;
        store_row(sum, from_.head_dim, out, problem_.dtype, out.offset(row.head, row.row));
        if (problem_.grad_gate.data) write_gate_gradient(row);
      }
    }

   private:
    // O_r, kept by the forward for merges that need it.
    const T* group_out_row(Row row, int group, T* buffer) const {
      const T* kept = statistic<T>(problem_.group_out, group, row);
      std::copy_n(kept, from_.value_dim, buffer);
      std::fill(buffer + from_.value_dim, buffer + from_.padded_value_dim, T(0));
      return buffer;
    }

    void write_gate_gradient(Row row) {
      const T* grad = from_.grad(row, 0).row(row.row, grad_buffer_);
      for (int g = 0; g < problem_.groups(); ++g) {
        const bool empty = *statistic<T>(problem_.lse, g, row) == -infinity<T>;  // then 0, whatever arrives
        *statistic<T>(problem_.grad_gate, g, row) =
            empty ? T(0) : dot(grad, group_out_row(row, g, row_buffer_), from_.padded_value_dim);
      }
    }

    // Everything of a block of rows that does not depend on the keys; rows past `rows` see nothing.
    void look_at_rows(std::int64_t entry, int rows) {
      for (int r = 0; r < round_up(rows, strip_rows); ++r) {
        lse2_[r] = SplitLse<T>(infinity<T>, T(0), natural_);
        offset_[r] = lse_gradient_[r] = weight_[r] = T(0);
        if (r >= rows) continue;
        const RowGradient g = row_gradient(rows_.at(entry + r), item_.group, !is_whole(entry + r), grad_buffer_);
        if (g.lse2.high != -infinity<T>) lse2_[r] = g.lse2;
        offset_[r] = g.offset, lse_gradient_[r] = g.lse_gradient, weight_[r] = g.weight;
      }
    }

    struct RowGradient {
      const T* grad;  // dO, padded
      SplitLse<T> lse2;
      T offset, lse_gradient, weight;
    };

    RowGradient row_gradient(Row row, int group, bool with_offset, T* buffer) const {
      SplitLse<T> lse2[max_groups];
      double exact[max_groups];
      T weight[max_groups] = {T(1), T(1)};
      for (int g = 0; g < problem_.groups(); ++g) {
        const T low = problem_.lse_low.data ? *statistic<T>(problem_.lse_low, g, row) : T(0);
        lse2[g] = SplitLse<T>(*statistic<T>(problem_.lse, g, row), low, natural_);
        exact[g] = lse2[g].exact(natural_);
      }
      if (problem_.groups() == 2) merge_weights(problem_, row, exact, weight);
      const T w = weight[group];
      const T* grad = from_.grad(row, group).row(row.row, buffer);

      T product = T(0);  // rowsum(dO out), or rowsum(dO O_r)
      if (with_offset) {
        const T* out = problem_.keeps_group_out() ? group_out_row(row, group, row_buffer_)
                                                  : from_.out(row, group).row(row.row, row_buffer_);
        product = dot(grad, out, from_.padded_value_dim);
        if (!is_finite(product)) {  // an `out` too large for 16 bits, perhaps where no gradient arrives
          product = T(0);
          for (int d = 0; d < from_.value_dim; ++d) product += weighted(grad[d], out[d]);
        }
        product = weighted(w, product);
      }
      const T lse_gradient = problem_.grad_lse.data ? *statistic<const T>(problem_.grad_lse, group, row) : T(0);
      return {grad, lse2[group], product - lse_gradient, lse_gradient, w};
    }

    // One block of rows meets keys first + c .. first + c + n - 1, which lie at c in the packed range.
    void meet(std::int64_t entry, int rows, std::int32_t first, int c, int n) {
      std::uint64_t live[block_strips];  // bit p: panel p of the keys holds a visible one
      for (int r0 = 0, s = 0; r0 < rows; r0 += strip_rows, ++s) {
        const int count = std::min(strip_rows, rows - r0);
        const StripRange range = strip_range(rows_, item_.group, entry + r0, entry + r0 + count);
        const int from = std::clamp((range.any.begin - first - c) / width * width, 0, n);
        const int to = std::max(from, round_up(std::clamp(range.any.end - first - c, 0, n), width));
        live[s] = 0;
        for (int k = from; k < to; k += width)
          if (score(entry, r0, count, range.all, first + c + k, c + k, k)) live[s] |= std::uint64_t{1} << (k / width);
        for (int r = r0; r < r0 + count; ++r) differentiate(entry + r, r, first + c, from, to);
        products_.keep(r0, count, from, to, n, live[s]);
      }
      T* grad_query = touch(entry);
      products_.add_query_gradient(grad_query, rows, c, n, live);
      products_.add_key_gradients(rows, c, n, live);
      if (!products_.keys_finite() || !products_.queries_finite() || !products_.grads_finite())
        add_hidden_non_finite(entry, rows, first, c, n, grad_query);
    }

    // Q K^T and dO V^T for one tile, of the strip at row r0 of the block; false if nobody looks there.
    bool score(std::int64_t entry, int r0, int count, Range all, std::int32_t key, int packed, int column) {
      T *scores = products_.scores(r0) + column, *grads = products_.grads(r0) + column;
      const std::int64_t first_entry = entry + r0;
      const bool finite_bias = !natural_ || shape_.read_bias(first_entry, count, key);
      const bool pairs = visibility_.has_mask() || !finite_bias;
      auto tile = Visibility::all;
      if (pairs || key < all.begin || key + width > all.end)
        tile = visibility_.look<width>(first_entry, count, key, finite_bias ? nullptr : shape_.bias(), visible_);
      if (tile == Visibility::none) {
        for (int r = 0; r < strip_rows; ++r) {
          std::fill_n(scores + r * stride, width, -infinity<T>);
          std::fill_n(grads + r * stride, width, T(0));
        }
        return false;
      }
      products_.score(r0, packed, column);
      if (natural_) shape_.template apply<stride>(count, scores, slopes_ ? slopes_ + r0 * stride + column : nullptr);
      if (tile == Visibility::all) return true;
      // A hidden product may have overflowed, and padding rows must not meet a hidden NaN either.
      const auto* visible = pairs ? &visible_ : nullptr;
      visibility_.hide<width>(first_entry, count, strip_rows, key, visible, scores, stride, -infinity<T>);
      visibility_.hide<width>(first_entry, count, strip_rows, key, visible, grads, stride, T(0));
      return true;
    }

    // Row r of the block: scores become w P Z, and dO V^T becomes dS.
    void differentiate(std::int64_t entry, int r, std::int32_t first, int from, int to) {
      if (from >= to) return;
      T *weights = products_.scores(r), *grads = products_.grads(r);
      const T w = weight_[r];
      const bool dropout = problem_.dropout.threshold != 0;
      if (dropout) {
        const Row row = rows_.at(entry);
        dropout_factors<T>(problem_.dropout, keys_, first + from, to - from,
                           static_cast<std::uint32_t>(rows_.position(row.row)),
                           static_cast<std::uint32_t>(rows_.batch * problem_.q_heads + row.head), dropout_);
        multiply_by<T>(grads + from, dropout_, to - from);
      }
      if (w != T(1)) multiply_row(w, grads, from, to);
      bool finite;
      if (is_whole(entry)) {
        finite = whole_score_gradient_row<T>(weights + from, grads + from, to - from, scale_, lse_gradient_[r]);
      } else {
        finite = is_finite(offset_[r]) && lse2_[r].high == lse2_[r].high && is_finite(lse2_[r].low);
        (natural_ ? score_gradient_row<T, true> : score_gradient_row<T, false>)(weights + from, grads + from, to - from,
                                                                                scale_, lse2_[r], offset_[r]);
      }
      if (dropout) multiply_by<T>(weights + from, dropout_, to - from);
      if (w != T(1)) multiply_row(w, weights, from, to), finite = finite && is_finite(w);
      if (!finite)  // 0 * NaN: hide again
        for (int k = from; k < to; ++k)
          if (!visibility_.sees(entry, first + k)) weights[k] = grads[k] = T(0);
      if (problem_.grad_bias.data) add_bias_gradient(entry, grads, first, from, to);
      if (slopes_)
        for (int k = from; k < to; ++k) grads[k] = weighted(grads[k], slopes_[r * stride + k]);
    }

    static void multiply_row(T factor, T* row, int from, int to) {
      for (int k = from; k < to; ++k) row[k] = weighted(factor, row[k]);
    }

    // dbias += dS. Elements that several rows share are added in the order of the rows; items that share any are not in
    // one wave.
    void add_bias_gradient(std::int64_t entry, const T* grads, std::int32_t first, int from, int to) {
      const Row row = rows_.at(entry);
      const Range range = rows_.range(item_.group, entry);
      const Output& out = problem_.grad_bias;
      T* sum = static_cast<T*>(out.data) + out.offset(row.head, row.row);
      const int begin = std::max(from, range.begin - first), end = std::min(to, range.end - first);
      if (keys_.identity() && out.feature == 1) {
        sum += first;
        for (int k = begin; k < end; ++k) sum[k] += grads[k];
      } else {
        for (int k = begin; k < end; ++k) sum[keys_.position(first + k) * out.feature] += grads[k];
      }
    }

    // Does one block of keys hold everything that the entry's softmax sums over?
    bool is_whole(std::int64_t entry) const {
      if (keys_.size > key_block) return false;
      if (problem_.groups() == 1 || !problem_.joint()) return true;
      return rows_.range(1 - item_.group, entry).size() == 0 && !rows_.plan.attends_to_itself(rows_.at(entry).row);
    }

    // The partial's block of rows at `entry`, zeroed on first use.
    T* touch(std::int64_t entry) {
      T* block = parent_.partial(head_, item_.part, entry, from_.padded_head_dim);
      std::uint8_t* touched = parent_.touched(head_, item_.part, entry);
      const std::int64_t rows = std::min<std::int64_t>(head_.partial_rows - entry, row_block);
      if (!*touched) std::fill_n(block, rows * from_.padded_head_dim, T(0));
      *touched = 1;
      return block;
    }

    // What counted as 0 in the products, for the pairs that see each other (see cpu/pack.h).
    MMCA_NOINLINE void add_hidden_non_finite(std::int64_t entry, int rows, std::int32_t first, int c, int n,
                                             T* grad_query) {
      for (int r = 0; r < rows; ++r) {
        const Row row = rows_.at(entry + r);
        const T* query = from_.query(row).row(row.row, buffer_);
        const T* grad = from_.grad(row, item_.group).row(row.row, grad_buffer_);
        T* key_buffer = buffer_ + from_.padded_head_dim;
        for (int k = 0; k < n; ++k) {
          if (!visibility_.sees(entry + r, first + c + k)) continue;
          const T weight = products_.scores(r)[k], score_grad = products_.grads(r)[k];
          if (!products_.keys_finite())
            add_non_finite(from_.key().row(keys_.position(first + c + k), key_buffer), from_.head_dim, score_grad,
                           grad_query + r * from_.padded_head_dim);
          if (!products_.queries_finite()) add_non_finite(query, from_.head_dim, score_grad, products_.grad_key(c + k));
          if (!products_.grads_finite() && weight_[r] != T(0))
            add_non_finite(grad, from_.value_dim, weight, products_.grad_value(c + k));
        }
      }
    }

    struct OwnGradient {
      const T* grad;  // dO
      T weight;       // w
      T score;        // dS of the row's one weight, P = 1, as it reaches q and k
    };

    // A row that is its own image group: O_1 = v, lse_1 = s.
    OwnGradient own_gradient(Row row) {
      const RowGradient g = row_gradient(row, 1, problem_.joint(), grad_buffer_);
      T slope = T(1);
      if (slopes_) own_score<T>(rows_, row, own_buffer_, &slope);
      if (!problem_.joint()) return {g.grad, g.weight, weighted(g.lse_gradient, slope)};  // dP - rowsum(P dP) is 0
      const T* v = from_.value().row(rows_.position(row.row), grad_buffer_ + from_.padded_value_dim);
      const T product = weighted(g.weight, dot(g.grad, v, from_.padded_value_dim));
      return {g.grad, g.weight, weighted(product - g.offset, slope)};
    }

    void add_self_rows(std::int32_t first, int keys) {
      for (int k = 0; k < keys; ++k) {
        const std::int64_t i = keys_.position(first + k) - problem_.row_shift();
        if (i < 0 || i >= problem_.q_len || !rows_.plan.attends_to_itself(i)) continue;
        for (std::int64_t h = 0; h < problem_.heads_per_kv(); ++h) {
          const Row row{static_cast<std::int32_t>(i),
                        static_cast<std::int32_t>(rows_.kv_head * problem_.heads_per_kv() + h)};
          const OwnGradient own = own_gradient(row);
          T* grad_value = products_.grad_value(k);
          for (int d = 0; d < from_.value_dim; ++d) grad_value[d] += weighted(own.weight, own.grad[d]);
          add_scaled(own.score, from_.query(row).row(row.row, buffer_), products_.grad_key(k));
        }
      }
    }

    void add_scaled(T factor, const T* row, T* sum) const {
      for (int d = 0; d < from_.head_dim; ++d) sum[d] += weighted(factor, row[d]);
    }

    void write_key_gradients(std::int32_t first, int keys) {
      const T scale = static_cast<T>(problem_.scale);
      for (int k = 0; k < keys; ++k) {
        T* gradient = products_.grad_key(k);
        for (int d = 0; d < from_.head_dim; ++d) gradient[d] *= scale;
        store_key(gradient, products_.grad_value(k), keys_.position(first + k));
      }
    }

    void write_hidden_keys() {
      std::fill_n(buffer_, std::max(from_.head_dim, from_.value_dim), T(0));
      for (std::int32_t position : rows_.plan.hidden_keys) store_key(buffer_, buffer_, position);
    }

    void store_key(const T* key, const T* value, std::int64_t position) {
      const Output &k = problem_.grad_key, &v = problem_.grad_value;
      store_row(key, from_.head_dim, k, problem_.dtype, k.offset(rows_.kv_head, position));
      store_row(value, from_.value_dim, v, problem_.dtype, v.offset(rows_.kv_head, position));
    }

    const Problem& problem_;
    const RowList rows_;
    const bool natural_;  // scores are more than products
    const ExponentScale<T> scale_;
    const KeyList& keys_;
    const Visibility visibility_;
    ScoreShape<T, strip_rows, width> shape_;
    Visibility::Pairs<strip_rows, width> visible_;  // of the tile at hand
    const BackwardHead& head_;
    const BackwardItem& item_;
    const Operands<T> from_;
    const int range_keys_;
    const std::int64_t entries_;
    const Backward& parent_;
    Products<T> products_;
    T *offset_, *lse_gradient_, *weight_, *dropout_, *slopes_, *buffer_, *grad_buffer_, *row_buffer_, *own_buffer_;
    SplitLse<T>* lse2_;
  };

  T* partial(const BackwardHead& head, int part, std::int64_t entry, int padded_head_dim) const {
    return partials_ + (head.first_row + part * head.partial_rows + entry) * padded_head_dim;
  }
  std::uint8_t* touched(const BackwardHead& head, int part, std::int64_t entry) const {
    return touched_ + head.first_block + part * head.partial_blocks + entry / row_block;
  }

  const Problem& problem_;
  const Plan& plan_;
  BackwardWave& wave_;
  T* partials_;
  std::uint8_t* touched_;
};
