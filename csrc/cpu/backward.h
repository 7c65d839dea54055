// Backward kernel; included inside the namespace of an instruction set. Notation: core/problem.h.
//
// With group r's weight w in the merge (1, or exp(lse_r - LSE) for the joint softmax) and dO' = w dO:
//
//     P   = exp2(c Q K^T - lse_r log2(e))                c = scale log2(e); hidden pairs: 0
//     dP  = Z (dO' V^T)
//     dS  = P (dP - offset)      offset = rowsum(dO' out) - dlse_r   joint,   rowsum(dO' O_r) - dlse_r   otherwise,
//                                or rowsum(P dP) - dlse_r where one block holds all keys
//     dV += (P Z)^T dO';   dK += scale dS^T Q;   dQ += scale dS K;   dw_r = rowsum(dO O_r)
//
// Where scores are more than products (cpu/scores.h), P = exp2(log2(e) (S - lse_r)), dbias += dS, and dS is multiplied
// by the softcap's derivative on its way to Q and K.
//
// Small heads have a kernel of their own (cpu/small.h). Of the others, a work item owns a run of one group's keys: keys
// outermost, rows (cpu/rows.h) inside, dK and dV in scratch until all rows have passed, dQ added to the item's own
// partial. No atomics on floats and no order that depends on threads.
//
// Layout in scratch: Q, dO' strips [strip][feature][tile_rows]; K, V columns [panel][feature][lanes]; K, Q, dO' rows
// [feature panel][row][lanes]; P and dS [row][key]; dK, dV, partial dQ [row][feature].

template <class T>
class Backward {
 public:
  static constexpr int row_block = 96, key_block = 192, key_range = 2 * key_block;

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
    Item work(*this, problem, head, item, arena);
    work.run();
    if (wave_.unfinished[static_cast<std::size_t>(item.head)].fetch_sub(1, std::memory_order_acq_rel) == 1)
      work.write_query_gradient(head);
  }

 private:
  using S = Simd<T>;
  static constexpr int strip_rows = tile_rows<T>, width = lanes<T>, block_strips = row_block / strip_rows;
  static constexpr int stride = key_block + 16;
  static constexpr int key_step = std::lcm(strip_rows, width);  // packed keys are a multiple of both tile sides
  static_assert(row_block % strip_rows == 0 && key_block % key_step == 0);
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
          head_dim_(static_cast<int>(problem_.head_dim)),
          value_dim_(static_cast<int>(problem_.value_dim)),
          padded_head_dim_(round_up(head_dim_, width)),
          padded_value_dim_(round_up(value_dim_, width)),
          strip_size_(round_up(head_dim_, S::width) * strip_rows + S::width),
          value_strip_size_(round_up(value_dim_, S::width) * strip_rows + S::width),
          range_keys_(std::min(key_range, round_up(std::max(item.end - item.begin, 1), key_step))),
          entries_(rows_.size()),
          parent_(parent) {
      const auto keys = static_cast<std::size_t>(range_keys_);
      key_columns_ = arena.take<T>(keys * padded_head_dim_);
      value_columns_ = arena.take<T>(keys * padded_value_dim_);
      key_rows_ = arena.take<T>(keys * padded_head_dim_);
      grad_key_ = arena.take<T>(keys * padded_head_dim_);
      grad_value_ = arena.take<T>(keys * padded_value_dim_);
      query_strips_ = arena.take<T>(static_cast<std::size_t>(block_strips) * strip_size_);
      grad_strips_ = arena.take<T>(static_cast<std::size_t>(block_strips) * value_strip_size_);
      query_rows_ = arena.take<T>(static_cast<std::size_t>(row_block) * padded_head_dim_);
      grad_rows_ = arena.take<T>(static_cast<std::size_t>(row_block) * padded_value_dim_);
      weights_ = arena.take<T>(static_cast<std::size_t>(row_block) * stride);
      score_grads_ = arena.take<T>(static_cast<std::size_t>(row_block) * stride);
      slopes_ = problem_.softcap > 0 ? arena.take<T>(static_cast<std::size_t>(row_block) * stride) : nullptr;
      lse2_ = arena.take<SplitLse<T>>(row_block);
      offset_ = arena.take<T>(row_block);
      lse_gradient_ = arena.take<T>(row_block);
      dropout_ = arena.take<T>(key_block);
      const int dim = std::max(padded_head_dim_, padded_value_dim_);
      buffer_ = arena.take<T>(static_cast<std::size_t>(std::max(width, strip_rows)) * dim);
      grad_buffer_ = arena.take<T>(static_cast<std::size_t>(std::max(width, strip_rows)) * dim);
      row_buffer_ = arena.take<T>(dim);
      own_buffer_ = arena.take<T>(2 * static_cast<std::size_t>(padded_head_dim_));
    }

    void run() {
      for (std::int32_t first = item_.begin; first < item_.end; first += range_keys_) {
        const int keys = std::min(range_keys_, item_.end - first);
        pack_keys(first, keys);
        std::fill_n(grad_key_, static_cast<std::size_t>(round_up(keys, strip_rows)) * padded_head_dim_, T(0));
        std::fill_n(grad_value_, static_cast<std::size_t>(round_up(keys, strip_rows)) * padded_value_dim_, T(0));
        for (std::int64_t entry = 0; entry < entries_; entry += row_block) {
          const int rows = static_cast<int>(std::min<std::int64_t>(row_block, entries_ - entry));
          const Range seen = hull(rows_, item_.group, entry, entry + rows);
          if (std::max(seen.begin, first) >= std::min(seen.end, first + keys)) continue;
          pack_rows(entry, rows);
          for (int c = 0; c < keys; c += key_block) {
            const int n = std::min(key_block, keys - c);
            if (std::max(seen.begin, first + c) < std::min(seen.end, first + c + n)) meet(entry, rows, first, c, n);
          }
        }
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
          const T* partial = parent_.partial(head, part, entry, padded_head_dim_);
          if (first) std::copy_n(partial, padded_head_dim_, sum);
          else
            for (int d = 0; d < padded_head_dim_; ++d) sum[d] += partial[d];
          first = false;
        }
        if (first) std::fill_n(sum, padded_head_dim_, T(0));
        if (rows_.plan.attends_to_itself(row.row)) {
          const T gradient = own_gradient(row).score;
          add_scaled(gradient, key_reader().row(rows_.position(row.row), grad_buffer_), sum);
        }
        for (int d = 0; d < head_dim_; ++d) sum[d] *= scale;
        const Output& out = problem_.grad_query;
        store_row(sum, head_dim_, out, problem_.dtype, out.offset(row.head, row.row));
        if (problem_.grad_gate.data) write_gate_gradient(row);
      }
    }

   private:
    RowReader<T> query_reader(Row row) const {
      return {problem_.query, problem_.dtype, row.head, head_dim_, padded_head_dim_};
    }
    RowReader<T> key_reader() const {
      return {problem_.key, problem_.dtype, rows_.kv_head, head_dim_, padded_head_dim_};
    }
    RowReader<T> value_reader() const {
      return {problem_.value, problem_.dtype, rows_.kv_head, value_dim_, padded_value_dim_};
    }
    // dO: of one group where the groups' outputs stay apart.
    const T* grad_row(Row row, int group, T* buffer) const {
      return result_row({problem_.grad_out, problem_.dtype, row.head, value_dim_, padded_value_dim_},
                        problem_.grad_out.group, row, group, buffer);
    }
    const T* out_row(Row row, int group, T* buffer) const {
      const Output& out = problem_.out;
      const Input input{out.data, out.batch, out.head, out.row, out.feature, out.group};
      return result_row({input, problem_.dtype, row.head, value_dim_, padded_value_dim_}, out.group, row, group,
                        buffer);
    }
    const T* result_row(RowReader<T> reader, std::int64_t group_stride, Row row, int group, T* buffer) const {
      if (group_stride) reader.data += group * group_stride * element_size(problem_.dtype);
      return reader.row(row.row, buffer);
    }
    // O_r, kept by the forward for merges that need it.
    const T* group_out_row(Row row, int group, T* buffer) const {
      const T* kept = statistic<T>(problem_.group_out, group, row);
      std::copy_n(kept, value_dim_, buffer);
      std::fill(buffer + value_dim_, buffer + padded_value_dim_, T(0));
      return buffer;
    }

    void write_gate_gradient(Row row) {
      const T* grad = grad_row(row, 0, grad_buffer_);
      for (int g = 0; g < problem_.groups(); ++g) {
        const bool empty = *statistic<T>(problem_.lse, g, row) == -infinity<T>;  // then 0, whatever arrives
        *statistic<T>(problem_.grad_gate, g, row) =
            empty ? T(0) : dot(grad, group_out_row(row, g, row_buffer_), padded_value_dim_);
      }
    }

    void pack_keys(std::int32_t first, int keys) {
      const RowReader<T> key = key_reader(), value = value_reader();
      const std::ptrdiff_t panel = static_cast<std::ptrdiff_t>(range_keys_) * width;
      const T* source[width];
      typename S::Reg finite = S::zero();
      for (int c = 0; c < round_up(keys, width); c += width) {
        const int n = std::min(width, keys - c);
        for (int i = 0; i < n; ++i) source[i] = key.row(keys_.position(first + c + i), buffer_ + i * padded_head_dim_);
        pack_columns<T, width>(source, n, head_dim_, T(1),
                               key_columns_ + static_cast<std::ptrdiff_t>(c) * padded_head_dim_);
        for (int i = 0; i < n; ++i)
          finite = pack_row<T>(source[i], padded_head_dim_, key_rows_ + (c + i) * width, panel, finite);
        for (int i = n; i < width; ++i) pack_zero_row<T>(padded_head_dim_, key_rows_ + (c + i) * width, panel);
        for (int i = 0; i < n; ++i)
          source[i] = value.row(keys_.position(first + c + i), buffer_ + i * padded_value_dim_);
        pack_columns<T, width>(source, n, value_dim_, T(1),
                               value_columns_ + static_cast<std::ptrdiff_t>(c) * padded_value_dim_);
      }
      keys_finite_ = is_finite(S::reduce_add(finite));
      if (!keys_finite_) zero_non_finite(key_rows_, panel * (padded_head_dim_ / width));
    }

    // Everything of a block of rows that does not depend on the keys; rows past `rows` are zero and see nothing.
    void pack_rows(std::int64_t entry, int rows) {
      constexpr std::ptrdiff_t panel = static_cast<std::ptrdiff_t>(row_block) * width;
      const T *query[strip_rows], *grad[strip_rows];
      typename S::Reg query_finite = S::zero(), grad_finite = S::zero();
      for (int r0 = 0; r0 < round_up(rows, strip_rows); r0 += strip_rows) {
        const int n = std::min(strip_rows, rows - r0);
        for (int i = 0; i < n; ++i) {
          const Row row = rows_.at(entry + r0 + i);
          query[i] = query_reader(row).row(row.row, buffer_ + i * padded_head_dim_);
          const RowGradient g =
              row_gradient(row, item_.group, !is_whole(entry + r0 + i), grad_buffer_ + i * padded_value_dim_);
          grad[i] = g.grad;
          lse2_[r0 + i] = g.lse2.high == -infinity<T> ? SplitLse<T>(infinity<T>, T(0), natural_) : g.lse2;
          offset_[r0 + i] = g.offset;
          lse_gradient_[r0 + i] = g.lse_gradient;
          query_finite = pack_row<T>(query[i], padded_head_dim_, query_rows_ + (r0 + i) * width, panel, query_finite);
          grad_finite = pack_row<T>(grad[i], padded_value_dim_, grad_rows_ + (r0 + i) * width, panel, grad_finite);
        }
        for (int i = n; i < strip_rows; ++i) {
          lse2_[r0 + i] = SplitLse<T>(infinity<T>, T(0), natural_);
          offset_[r0 + i] = lse_gradient_[r0 + i] = T(0);
          pack_zero_row<T>(padded_head_dim_, query_rows_ + (r0 + i) * width, panel);
          pack_zero_row<T>(padded_value_dim_, grad_rows_ + (r0 + i) * width, panel);
        }
        pack_columns<T, strip_rows>(query, n, head_dim_, scale_.query_factor,
                                    query_strips_ + r0 / strip_rows * strip_size_);
        pack_columns<T, strip_rows>(grad, n, value_dim_, T(1), grad_strips_ + r0 / strip_rows * value_strip_size_);
      }
      queries_finite_ = is_finite(S::reduce_add(query_finite));
      grads_finite_ = is_finite(S::reduce_add(grad_finite));
      if (!queries_finite_) zero_non_finite(query_rows_, panel * (padded_head_dim_ / width));
      if (!grads_finite_) zero_non_finite(grad_rows_, panel * (padded_value_dim_ / width));
    }

    struct RowGradient {
      const T* grad;  // w dO, padded
      SplitLse<T> lse2;
      T offset, lse_gradient;
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
      const T* grad = grad_row(row, group, buffer);

      T product = T(0);  // rowsum(dO out), or rowsum(dO O_r)
      if (with_offset) {
        const T* out =
            problem_.keeps_group_out() ? group_out_row(row, group, row_buffer_) : out_row(row, group, row_buffer_);
        product = dot(grad, out, padded_value_dim_);
        if (!is_finite(product)) {  // an `out` too large for 16 bits, perhaps where no gradient arrives
          product = T(0);
          for (int d = 0; d < value_dim_; ++d) product += weighted(grad[d], out[d]);
        }
        product = weighted(w, product);
      }
      const T lse_gradient = problem_.grad_lse.data ? *statistic<const T>(problem_.grad_lse, group, row) : T(0);
      if (w != T(1)) {
        for (int d = 0; d < padded_value_dim_; ++d) buffer[d] = weighted(w, grad[d]);
        grad = buffer;
      }
      return {grad, lse2[group], product - lse_gradient, lse_gradient};
    }

    // One block of rows meets keys first + c .. first + c + n - 1, which lie at c in the packed range.
    void meet(std::int64_t entry, int rows, std::int32_t first, int c, int n) {
      const int strips = (rows + strip_rows - 1) / strip_rows, padded_keys = round_up(n, strip_rows);
      int from[block_strips], to[block_strips];  // columns of P and dS that were computed, per strip
      std::uint64_t live[block_strips];          // bit p: panel p of them holds a visible key
      for (int s = 0; s < strips; ++s) {
        const int count = std::min(strip_rows, rows - s * strip_rows);
        const StripRange range =
            strip_range(rows_, item_.group, entry + s * strip_rows, entry + s * strip_rows + count);
        from[s] = std::clamp((range.any.begin - first - c) / width * width, 0, n);
        to[s] = std::max(from[s], round_up(std::clamp(range.any.end - first - c, 0, n), width));
        live[s] = 0;
        for (int k = from[s]; k < to[s]; k += width)
          if (score(entry, s, count, range.all, first + c + k, c + k, k)) live[s] |= std::uint64_t{1} << (k / width);
        for (int r = s * strip_rows; r < s * strip_rows + count; ++r) {
          differentiate(entry + r, r, first + c, from[s], to[s]);
          for (T* row : {weights_ + r * stride, score_grads_ + r * stride}) {
            std::fill_n(row, from[s], T(0));
            if (to[s] < padded_keys) std::fill_n(row + to[s], padded_keys - to[s], T(0));
          }
        }
      }
      T* grad_query = touch(entry);
      const std::ptrdiff_t key_panel = static_cast<std::ptrdiff_t>(range_keys_) * width;
      for (int d = 0; d < padded_head_dim_; d += width)
        for (int s = 0; s < strips; ++s)
          for_each_run(live[s], [&](int first_panel, int end_panel) {
            const int begin = first_panel * width;
            row_tile<T, strip_rows, stride>(
                std::min(end_panel * width, n) - begin, score_grads_ + s * strip_rows * stride + begin,
                key_rows_ + d / width * key_panel + static_cast<std::ptrdiff_t>(c + begin) * width,
                grad_query + static_cast<std::ptrdiff_t>(s) * strip_rows * padded_head_dim_ + d, padded_head_dim_);
          });
      add_transposed(weights_, grad_rows_, padded_value_dim_, grad_value_, c, padded_keys, rows, live);
      add_transposed(score_grads_, query_rows_, padded_head_dim_, grad_key_, c, padded_keys, rows, live);
      if (!keys_finite_ || !queries_finite_ || !grads_finite_)
        add_hidden_non_finite(entry, rows, first, c, n, grad_query);
    }

    // Q K^T and dO' V^T for one tile; false if nobody looks there.
    bool score(std::int64_t entry, int s, int count, Range all, std::int32_t key, int packed, int column) {
      T* scores = weights_ + s * strip_rows * stride + column;
      T* grads = score_grads_ + s * strip_rows * stride + column;
      const std::int64_t first_entry = entry + s * strip_rows;
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
      score_tile<T, strip_rows, stride>(head_dim_, query_strips_ + s * strip_size_,
                                        key_columns_ + static_cast<std::ptrdiff_t>(packed) * padded_head_dim_, scores);
      score_tile<T, strip_rows, stride>(value_dim_, grad_strips_ + s * value_strip_size_,
                                        value_columns_ + static_cast<std::ptrdiff_t>(packed) * padded_value_dim_,
                                        grads);
      if (natural_)
        shape_.template apply<stride>(count, scores, slopes_ ? slopes_ + s * strip_rows * stride + column : nullptr);
      if (tile == Visibility::all) return true;
      // A hidden product may have overflowed, and padding rows must not meet a hidden NaN either.
      const auto* visible = pairs ? &visible_ : nullptr;
      visibility_.hide<width>(first_entry, count, strip_rows, key, visible, scores, stride, -infinity<T>);
      visibility_.hide<width>(first_entry, count, strip_rows, key, visible, grads, stride, T(0));
      return true;
    }

    // Row r of the block: scores become P Z, and dO' V^T becomes dS.
    void differentiate(std::int64_t entry, int r, std::int32_t first, int from, int to) {
      if (from >= to) return;
      T *weights = weights_ + r * stride, *grads = score_grads_ + r * stride;
      const bool dropout = problem_.dropout.threshold != 0;
      if (dropout) {
        const Row row = rows_.at(entry);
        dropout_factors<T>(problem_.dropout, keys_, first + from, to - from,
                           static_cast<std::uint32_t>(rows_.position(row.row)),
                           static_cast<std::uint32_t>(rows_.batch * problem_.q_heads + row.head), dropout_);
        multiply_by<T>(grads + from, dropout_, to - from);
      }
      bool finite;
      if (is_whole(entry)) {
        finite = whole_score_gradient_row<T>(weights + from, grads + from, to - from, scale_, lse_gradient_[r]);
      } else {
        finite = is_finite(offset_[r]) && lse2_[r].high == lse2_[r].high && is_finite(lse2_[r].low);
        (natural_ ? score_gradient_row<T, true> : score_gradient_row<T, false>)(weights + from, grads + from, to - from,
                                                                                scale_, lse2_[r], offset_[r]);
      }
      if (dropout) multiply_by<T>(weights + from, dropout_, to - from);
      if (!finite)  // 0 * NaN: hide again
        for (int k = from; k < to; ++k)
          if (!visibility_.sees(entry, first + k)) weights[k] = grads[k] = T(0);
      if (problem_.grad_bias.data) add_bias_gradient(entry, grads, first, from, to);
      if (slopes_)
        for (int k = from; k < to; ++k) grads[k] = weighted(grads[k], slopes_[r * stride + k]);
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
      T* block = parent_.partial(head_, item_.part, entry, padded_head_dim_);
      std::uint8_t* touched = parent_.touched(head_, item_.part, entry);
      const std::int64_t rows = std::min<std::int64_t>(head_.partial_rows - entry, row_block);
      if (!*touched) std::fill_n(block, rows * padded_head_dim_, T(0));
      *touched = 1;
      return block;
    }

    // gradient[key] += columns of `weights` times packed rows, over the strips that look at the keys.
    void add_transposed(const T* weights, const T* packed_rows, int dim, T* gradient, int c, int padded_keys, int rows,
                        const std::uint64_t* live) {
      std::uint64_t lookers[key_block / strip_rows];  // bit s: strip s looks at one of these tile_rows keys
      for (int k = 0; k < padded_keys; k += strip_rows) {
        const std::uint64_t panels =
            (std::uint64_t{2} << (k + strip_rows - 1) / width) - (std::uint64_t{1} << k / width);
        std::uint64_t& strips = lookers[k / strip_rows] = 0;
        for (int s = 0; s * strip_rows < rows; ++s)
          if (live[s] & panels) strips |= std::uint64_t{1} << s;
      }
      for (int d = 0; d < dim; d += width)
        for (int k = 0; k < padded_keys; k += strip_rows)
          for_each_run(lookers[k / strip_rows], [&](int first_strip, int end_strip) {
            const int b = first_strip * strip_rows, e = std::min(end_strip * strip_rows, rows);
            transposed_tile<T, stride>(e - b, weights + static_cast<std::ptrdiff_t>(b) * stride + k,
                                       packed_rows + (static_cast<std::ptrdiff_t>(d / width) * row_block + b) * width,
                                       gradient + static_cast<std::ptrdiff_t>(c + k) * dim + d, dim);
          });
    }

    // What zero_non_finite took out of the panels, for the pairs that see each other (see cpu/pack.h).
    MMCA_NOINLINE void add_hidden_non_finite(std::int64_t entry, int rows, std::int32_t first, int c, int n,
                                             T* grad_query) {
      const RowReader<T> key = key_reader();
      for (int r = 0; r < rows; ++r) {
        const Row row = rows_.at(entry + r);
        const T* query = query_reader(row).row(row.row, buffer_);
        const T* grad = row_gradient(row, item_.group, false, grad_buffer_).grad;
        T* key_buffer = buffer_ + padded_head_dim_;
        for (int k = 0; k < n; ++k) {
          if (!visibility_.sees(entry + r, first + c + k)) continue;
          const T weight = weights_[r * stride + k], score_grad = score_grads_[r * stride + k];
          if (!keys_finite_)
            add_non_finite(key.row(keys_.position(first + c + k), key_buffer), head_dim_, score_grad,
                           grad_query + r * padded_head_dim_);
          if (!queries_finite_) add_non_finite(query, head_dim_, score_grad, grad_key_ + (c + k) * padded_head_dim_);
          if (!grads_finite_) add_non_finite(grad, value_dim_, weight, grad_value_ + (c + k) * padded_value_dim_);
        }
      }
    }

    struct OwnGradient {
      const T* grad;  // w dO
      T score;        // dS of the row's one weight, P = 1, as it reaches q and k
    };

    // A row that is its own image group: O_1 = v, lse_1 = s.
    OwnGradient own_gradient(Row row) {
      const RowGradient g = row_gradient(row, 1, problem_.joint(), grad_buffer_);
      T slope = T(1);
      if (slopes_) own_score<T>(rows_, row, own_buffer_, &slope);
      if (!problem_.joint()) return {g.grad, weighted(g.lse_gradient, slope)};  // dP - rowsum(P dP) is 0
      const T* v = value_reader().row(rows_.position(row.row), grad_buffer_ + padded_value_dim_);
      return {g.grad, weighted(dot(g.grad, v, padded_value_dim_) - g.offset, slope)};
    }

    void add_self_rows(std::int32_t first, int keys) {
      for (int k = 0; k < keys; ++k) {
        const std::int64_t i = keys_.position(first + k) - problem_.row_shift();
        if (i < 0 || i >= problem_.q_len || !rows_.plan.attends_to_itself(i)) continue;
        for (std::int64_t h = 0; h < problem_.heads_per_kv(); ++h) {
          const Row row{static_cast<std::int32_t>(i),
                        static_cast<std::int32_t>(rows_.kv_head * problem_.heads_per_kv() + h)};
          const OwnGradient own = own_gradient(row);
          for (int d = 0; d < value_dim_; ++d) grad_value_[k * padded_value_dim_ + d] += own.grad[d];
          add_scaled(own.score, query_reader(row).row(row.row, buffer_), grad_key_ + k * padded_head_dim_);
        }
      }
    }

    void add_scaled(T factor, const T* row, T* sum) const {
      for (int d = 0; d < head_dim_; ++d) sum[d] += weighted(factor, row[d]);
    }

    void write_key_gradients(std::int32_t first, int keys) {
      const T scale = static_cast<T>(problem_.scale);
      for (int k = 0; k < keys; ++k) {
        T* gradient = grad_key_ + static_cast<std::ptrdiff_t>(k) * padded_head_dim_;
        for (int d = 0; d < head_dim_; ++d) gradient[d] *= scale;
        store_key(gradient, grad_value_ + static_cast<std::ptrdiff_t>(k) * padded_value_dim_,
                  keys_.position(first + k));
      }
    }

    void write_hidden_keys() {
      std::fill_n(buffer_, std::max(padded_head_dim_, padded_value_dim_), T(0));
      for (std::int32_t position : rows_.plan.hidden_keys) store_key(buffer_, buffer_, position);
    }

    void store_key(const T* key, const T* value, std::int64_t position) {
      const Output &k = problem_.grad_key, &v = problem_.grad_value;
      store_row(key, head_dim_, k, problem_.dtype, k.offset(rows_.kv_head, position));
      store_row(value, value_dim_, v, problem_.dtype, v.offset(rows_.kv_head, position));
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
    const int head_dim_, value_dim_, padded_head_dim_, padded_value_dim_, strip_size_, value_strip_size_, range_keys_;
    const std::int64_t entries_;
    const Backward& parent_;
    bool keys_finite_ = true, queries_finite_ = true, grads_finite_ = true;
    T *key_columns_, *value_columns_, *key_rows_, *grad_key_, *grad_value_;
    T *query_strips_, *grad_strips_, *query_rows_, *grad_rows_, *weights_, *score_grads_, *offset_, *lse_gradient_,
        *dropout_, *slopes_;
    T *buffer_, *grad_buffer_, *row_buffer_, *own_buffer_;
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
