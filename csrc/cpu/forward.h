// Forward kernel; included inside the namespace of an instruction set. Notation: core/problem.h.
//
// A work item is a chunk of up to a few hundred rows (cpu/rows.h) of one batch and KV head. Per group it walks the keys
// its rows see in blocks, outermost, packing each block of K and V once; the rows' running softmax (m, l, O) waits in
// scratch between blocks:
//
//     S = Q K^T;  m' = max(m, rowmax S)             unscaled; c = scale log2(e), so that exp(scale S) = exp2(c S).
//                                                   With a softcap or a bias S is the score (cpu/scores.h), c = log2(e)
//     f = exp2(c (m - m'));  P = exp2(c (S - m'));  l = f l + rowsum P;  O = f O + (P Z) V
//     at the group's end:  O_r = O / l,  lse_r = (c m + log2 l) ln 2;  at the item's end: out = merge(O_r, lse_r)
//
// Layout in scratch: Q [strip][feature][tile_rows], K [panel][feature][lanes], V [panel][key][lanes],
// S and P [row][key], O [group][row][feature]. Key blocks start at multiples of key_block of the list and strips
// at multiples of tile_rows of the rows, so neither chunking nor threads change a bit of the result. Where a head has
// few rows in all, keys and values are not packed (cpu/few_rows.h); small heads have a kernel of their own
// (cpu/small.h).

template <class T>
class Forward {
 public:
  static constexpr int row_block = 96, key_block = 256, max_chunk = 8 * row_block;

  Forward(const Problem& problem, const Plan& plan, const std::vector<ForwardItem>& items)
      : problem_(problem), plan_(plan), items_(items) {}

  void operator()(std::int64_t index) const {
    const ForwardItem& item = items_[static_cast<std::size_t>(index)];
    const Problem problem = plan_.problem_of(problem_, item.batch);
    const SequencePlan& sequence = plan_.of(item.batch);
    if (is_small(problem, sequence))
      return run_small<T>(problem, {problem, sequence, item.batch, item.kv_head}, &Small<T>::forward);
    Arena measure(nullptr);
    Item(problem, plan_, item, measure);
    Arena arena(worker_scratch(measure.used()));
    Item(problem, plan_, item, arena).run();
  }

 private:
  using S = Simd<T>;
  static constexpr int strip_rows = tile_rows<T>, width = lanes<T>;
  static constexpr int stride = key_block + 16;  // of score rows: off the powers of two
  static constexpr int block_strips = row_block / strip_rows;
  static_assert(row_block % strip_rows == 0 && key_block % width == 0 && key_block / width <= 64);
  static_assert(row_block >= small_rows);  // small heads are one item

  class Item {
   public:
    Item(const Problem& problem, const Plan& plan, const ForwardItem& item, Arena& arena)
        : problem_(problem),
          rows_{problem, plan.of(item.batch), item.batch, item.kv_head},
          natural_(problem.shapes_scores()),
          scale_(natural_ ? 1.0 : problem.scale),
          begin_(item.begin),
          count_(static_cast<int>(item.end - item.begin)),
          head_dim_(static_cast<int>(problem.head_dim)),
          padded_head_dim_(round_up(head_dim_, width)),
          padded_value_dim_(round_up(static_cast<int>(problem.value_dim), width)),
          strip_size_(round_up(head_dim_, S::width) * strip_rows + S::width) {
      const int padded = round_up(count_, strip_rows), dim = std::max(padded_head_dim_, padded_value_dim_);
      query_ = arena.take<T>(static_cast<std::size_t>(padded / strip_rows) * strip_size_ +
                             round_up(few_rows, quad_rows<T>) * padded_head_dim_);
      output_ = arena.take<T>(static_cast<std::size_t>(problem.groups()) * padded * padded_value_dim_);
      lse2_ = arena.take<double>(static_cast<std::size_t>(problem.groups()) * padded);
      maximum_ = arena.take<T>(padded);
      sum_ = arena.take<T>(static_cast<std::size_t>(padded) * S::width);
      keys_ = arena.take<T>(static_cast<std::size_t>(key_block) * padded_head_dim_);
      values_ = arena.take<T>(static_cast<std::size_t>(key_block) * padded_value_dim_);
      scores_ = arena.take<T>(static_cast<std::size_t>(row_block) * stride);
      row_max_ = arena.take<T>(static_cast<std::size_t>(row_block) * S::width);
      factor_ = arena.take<T>(row_block);
      dropout_ = arena.take<T>(key_block);
      buffer_ = arena.take<T>(static_cast<std::size_t>(std::max(width, strip_rows)) * dim);
      before_ = arena.take<T>(static_cast<std::size_t>(few_rows) * padded_value_dim_);
      output_stride_ = static_cast<std::ptrdiff_t>(padded) * padded_value_dim_;
      padded_rows_ = padded;
    }

    void run() {
      // By the shape: the same bits however rows are cut into items. Not before a backward, which packs: its scores
      // must be these to the last bit, or every weight would be off by their difference.
      direct_ = rows_.size() <= few_rows && !problem_.lse_low.data;
      bool packed = false;
      for (int group = 0; group < problem_.groups(); ++group) {
        for (int r = 0; r < count_; ++r) maximum_[r] = -infinity<T>;
        std::fill_n(sum_, static_cast<std::size_t>(count_) * S::width, T(0));
        std::fill_n(output(group, 0), static_cast<std::ptrdiff_t>(count_) * padded_value_dim_, T(0));
        const Range seen = hull(rows_, group, begin_, begin_ + count_);
        if (seen.size() && !packed) pack_query(), packed = true;
        for (std::int32_t first = seen.begin / key_block * key_block; first < seen.end; first += key_block) {
          const int keys = std::min(key_block, seen.end - first);
          if (!direct_) pack_keys(group, first, keys);
          for (int block = 0; block < count_; block += row_block) attend(group, block, first, keys);
        }
        normalise(group);
      }
      for (int r = 0; r < count_; ++r) write_row(r);
    }

   private:
    T* output(int group, int row) {
      return output_ + group * output_stride_ + static_cast<std::ptrdiff_t>(row) * padded_value_dim_;
    }

    void pack_query() {
      const T* source[strip_rows];
      for (int first = 0; direct_ && first < count_; ++first) {
        const Row row = rows_.at(begin_ + first);
        const T* from = query_reader(row).row(row.row, buffer_);
        pack_quads<T>(from, first, padded_head_dim_, scale_.query_factor, query_);
      }
      for (int first = 0; !direct_ && first < count_; first += strip_rows) {
        const int n = std::min(strip_rows, count_ - first);
        for (int r = 0; r < n; ++r) {
          const Row row = rows_.at(begin_ + first + r);
          source[r] = query_reader(row).row(row.row, buffer_ + r * padded_head_dim_);
        }
        pack_columns<T, strip_rows>(source, n, head_dim_, scale_.query_factor,
                                    query_ + static_cast<std::ptrdiff_t>(first / strip_rows) * strip_size_);
      }
    }

    // Packs a block of keys and values; values that are not finite are zero in the panels, and values_finite_ false.
    void pack_keys(int group, std::int32_t first, int keys) {
      const KeyList& list = rows_.plan.keys[group];
      const RowReader<T> key = key_reader(), value = value_reader();
      constexpr std::ptrdiff_t panel = static_cast<std::ptrdiff_t>(key_block) * width;
      const T* source[width];
      typename S::Reg finite = S::zero();
      for (int c = 0; c < keys; c += width) {
        const int n = std::min(width, keys - c);
        for (int i = 0; i < n; ++i) source[i] = key.row(list.position(first + c + i), buffer_ + i * padded_head_dim_);
        pack_columns<T, width>(source, n, head_dim_, T(1), keys_ + static_cast<std::ptrdiff_t>(c) * padded_head_dim_);
        for (int i = 0; i < n; ++i)
          finite = pack_row<T>(value.row(list.position(first + c + i), buffer_), padded_value_dim_,
                               values_ + (c + i) * width, panel, finite);
        for (int i = n; i < width; ++i) pack_zero_row<T>(padded_value_dim_, values_ + (c + i) * width, panel);
      }
      values_finite_ = is_finite(S::reduce_add(finite));
      if (!values_finite_) zero_non_finite(values_, panel * (padded_value_dim_ / width));
    }

    // Points at a panel of keys or values where they lie, or at copies in `buffer` if they lie unfit; lanes past
    // `count` repeat the last one. A panel at a time: the copies are read back from the nearest cache.
    void find_rows(const RowReader<T>& reader, const KeyList& list, std::int32_t first, int count, T* buffer) {
      if (list.identity()) reader.rows(first, count, buffer, found_);
      else
        for (int i = 0; i < count; ++i) found_[i] = reader.row(list.position(first + i), buffer + i * reader.padded);
      std::fill(found_ + count, found_ + width, found_[count - 1]);
    }

    RowReader<T> query_reader(Row row) const {
      return {problem_.query, problem_.dtype, row.head, head_dim_, padded_head_dim_};
    }
    RowReader<T> key_reader() const {
      return {problem_.key, problem_.dtype, rows_.kv_head, head_dim_, padded_head_dim_};
    }
    RowReader<T> value_reader() const {
      return {problem_.value, problem_.dtype, rows_.kv_head, static_cast<int>(problem_.value_dim), padded_value_dim_};
    }

    // One block of rows meets one block of keys.
    void attend(int group, int block, std::int32_t first, int keys) {
      const int rows = std::min(row_block, count_ - block), strips = (rows + strip_rows - 1) / strip_rows;
      std::uint64_t live[block_strips];  // bit c: panel c of the key block holds a visible key
      score(group, block, rows, first, keys, live);
      for (int s = 0; s < strips; ++s)
        if (live[s])
          softmax(group, block + s * strip_rows, std::min(strip_rows, rows - s * strip_rows), s, first, live[s]);
      if (direct_) weigh_values_directly(group, rows, first, keys, live);
      for (int d = 0; !direct_ && d < padded_value_dim_; d += width)
        for (int s = 0; s < strips; ++s)
          if (live[s])
            weigh_values(output(group, block + s * strip_rows) + d, s, std::min(strip_rows, rows - s * strip_rows),
                         values_ + static_cast<std::ptrdiff_t>(d) * key_block, keys, live[s]);
      if (!values_finite_) add_hidden_non_finite(group, block, rows, first, keys, live);
    }

    // S = Q K^T and lane-wise row maxima, in the panels where somebody looks: the live ones.
    void score(int group, int block, int rows, std::int32_t first, int keys, std::uint64_t* live) {
      const Visibility visibility(rows_, rows_.plan.keys[group], group);
      ScoreShape<T, width> shape(rows_, rows_.plan.keys[group]);
      Visibility::Pairs<strip_rows, width> visible;
      StripRange range[block_strips];
      const int strips = (rows + strip_rows - 1) / strip_rows;
      for (int s = 0; s < strips; ++s) {
        const std::int64_t entry = begin_ + block + s * strip_rows;
        range[s] = strip_range(rows_, group, entry, std::min<std::int64_t>(entry + strip_rows, begin_ + block + rows));
        live[s] = 0;
      }
      for (int i = 0; i < rows * S::width; i += S::width) S::store(row_max_ + i, S::broadcast(-infinity<T>));
      for (int c = 0; c < keys; c += width) {
        const std::int32_t key = first + c;
        bool found = !direct_;
        for (int s = 0; s < strips; ++s) {
          if (key >= range[s].any.end || key + width <= range[s].any.begin) continue;
          const int n = std::min(strip_rows, rows - s * strip_rows);
          T* scores = scores_ + s * strip_rows * stride + c;
          T* row_max = row_max_ + s * strip_rows * S::width;
          const std::int64_t entry = begin_ + block + s * strip_rows;
          const bool finite_bias = !natural_ || shape.read_bias(entry, n, key);
          const bool pairs = visibility.has_mask() || !finite_bias;
          auto tile = Visibility::all;
          if (pairs || key < range[s].all.begin || key + width > range[s].all.end)
            tile = visibility.look<width>(entry, n, key, finite_bias ? nullptr : shape.bias(), visible);
          if (tile == Visibility::none) continue;
          if (!found) find_rows(key_reader(), rows_.plan.keys[group], key, std::min(width, keys - c), keys_);
          found = true;
          live[s] |= std::uint64_t{1} << (c / width);
          const T* panel = keys_ + static_cast<std::ptrdiff_t>(c) * padded_head_dim_;
          const T* strip = query_ + static_cast<std::ptrdiff_t>(block / strip_rows + s) * strip_size_;
          if (direct_) {
            direct_score_tile<T, stride>(n, padded_head_dim_, query_ + s * strip_rows * padded_head_dim_, found_,
                                         scores);
          } else if (tile == Visibility::all && !natural_) {
            with_tile_height<T>(n, [&](auto height) {
              score_tile<T, height.value, stride, true>(head_dim_, strip, panel, scores, row_max);
            });
            continue;
          } else {
            with_tile_height<T>(
                n, [&](auto height) { score_tile<T, height.value, stride>(head_dim_, strip, panel, scores); });
          }
          if (natural_) shape.template apply<stride>(n, scores, nullptr);
          if (tile == Visibility::some)
            visibility.hide<width>(entry, n, n, key, pairs ? &visible : nullptr, scores, stride, -infinity<T>);
          for (int r = 0; r < n; ++r) {
            T *row = scores + r * stride, *best = row_max + r * S::width;
            S::store(best, S::max(S::load(best), S::max(S::load(row), S::load(row + S::width))));
          }
        }
      }
    }

    // P = exp2(c (S - m')), and the running maximum, sum and rescaling factor of each row of a strip.
    void softmax(int group, int first_row, int rows, int strip, std::int32_t first, std::uint64_t live) {
      T* factor = factor_ + strip * strip_rows;
      T maximum[strip_rows];
      for (int r = 0; r < rows; ++r) {
        const T before = maximum_[first_row + r];
        const T best = std::max(before, S::reduce_max(S::load(row_max_ + (strip * strip_rows + r) * S::width)));
        maximum_[first_row + r] = best;
        maximum[r] = best == -infinity<T> ? T(0) : best;
        factor[r] = scale_.below(before - maximum[r]);
      }
      exp2_each<T, strip_rows>(factor);
      for (int r = 0; r < rows; ++r) {
        T* scores = scores_ + (strip * strip_rows + r) * stride;
        T* sum = sum_ + static_cast<std::ptrdiff_t>(first_row + r) * S::width;
        typename S::Reg total = S::mul(S::broadcast(factor[r]), S::load(sum));
        for_each_run(live, [&](int first_panel, int end_panel) {
          const int from = first_panel * width, to = end_panel * width;
          total = S::add(total, exp2_row<T>(scores + from, to - from, scale_, maximum[r]));
          if (problem_.dropout.threshold) drop(group, first_row + r, first + from, to - from, scores + from);
        });
        S::store(sum, total);
      }
    }

    // Weights of keys first..first+count-1 of the list, for one row, times Z.
    void drop(int group, int r, std::int32_t first, int count, T* weights) {
      const Row row = rows_.at(begin_ + r);
      dropout_factors<T>(problem_.dropout, rows_.plan.keys[group], first, count,
                         static_cast<std::uint32_t>(rows_.position(row.row)),
                         static_cast<std::uint32_t>(rows_.batch * problem_.q_heads + row.head), dropout_);
      multiply_by<T>(weights, dropout_, count);
    }

    // O = f O + P V over the runs of live panels.
    void weigh_values(T* out, int strip, int rows, const T* values, int keys, std::uint64_t live) {
      const T* weights = scores_ + strip * strip_rows * stride;
      const T* factor = factor_ + strip * strip_rows;
      bool rescale = true;
      for_each_run(live, [&](int first_panel, int end_panel) {
        const int from = first_panel * width, depth = std::min(end_panel * width, keys) - from;
        const T *p = weights + from, *v = values + static_cast<std::ptrdiff_t>(from) * width;
        with_tile_height<T>(rows, [&](auto height) {
          if (rescale) rescaled_row_tile<T, height.value, stride>(depth, p, v, out, padded_value_dim_, factor);
          else row_tile<T, height.value, stride>(depth, p, v, out, padded_value_dim_);
        });
        rescale = false;
      });
    }

    // The same for the few rows of an item, from values where they lie. Nobody has looked at those values yet: only
    // when a sum is not finite are they copied without their NaNs and infinities, and the sums taken again.
    void weigh_values_directly(int group, int rows, std::int32_t first, int keys, const std::uint64_t* live) {
      T* out = output(group, 0);
      const int elements = rows * padded_value_dim_;
      std::copy_n(out, elements, before_);
      weigh_live_directly(group, rows, first, keys, live, false);
      values_finite_ = all_finite(out, elements);
      if (values_finite_) return;
      std::copy_n(before_, elements, out);
      weigh_live_directly(group, rows, first, keys, live, true);
    }

    void weigh_live_directly(int group, int rows, std::int32_t first, int keys, const std::uint64_t* live, bool clean) {
      const RowReader<T> value = value_reader();
      T ones[few_rows];
      std::fill_n(ones, few_rows, T(1));
      std::uint64_t rescaled = 0;  // bit s: of strip s
      for (int c = 0; c < keys; c += width) {
        const int count = std::min(width, keys - c);
        bool found = false;
        for (int r = 0, s = 0; r < rows; r += strip_rows, ++s) {
          if (!(live[s] >> (c / width) & 1)) continue;
          if (!found) find_rows(value, rows_.plan.keys[group], first + c, count, values_);
          if (!found && clean) copy_without_non_finite(count);
          found = true;
          direct_weigh<T, stride>(std::min(strip_rows, rows - r), count, scores_ + r * stride + c, found_,
                                  padded_value_dim_, output(group, r), rescaled >> s & 1 ? ones : factor_ + r);
          rescaled |= std::uint64_t{1} << s;
        }
      }
    }

    void copy_without_non_finite(int count) {
      for (int i = 0; i < count; ++i) {
        T* copy = values_ + i * padded_value_dim_;
        if (found_[i] != copy) std::copy_n(found_[i], padded_value_dim_, copy);
        zero_non_finite(copy, padded_value_dim_);
        found_[i] = copy;
      }
    }

    // The values that are NaN or infinite, for the rows that see them (see cpu/pack.h).
    MMCA_NOINLINE void add_hidden_non_finite(int group, int block, int rows, std::int32_t first, int keys,
                                             const std::uint64_t* live) {
      const KeyList& list = rows_.plan.keys[group];
      const Visibility visibility(rows_, list, group);
      const RowReader<T> value = value_reader();
      for (int c = 0; c < keys; ++c) {
        const T* source = value.row(list.position(first + c), buffer_);
        for (int r = 0; r < rows; ++r)
          if ((live[r / strip_rows] >> (c / width) & 1) && visibility.sees(begin_ + block + r, first + c))
            add_non_finite(source, static_cast<int>(problem_.value_dim), scores_[r * stride + c],
                           output(group, block + r));
      }
    }

    // O_r = O / l and lse_r; a row that sees itself alone takes its own value.
    void normalise(int group) {
      for (int r = 0; r < count_; ++r) {
        const Row row = rows_.at(begin_ + r);
        T* out = output(group, r);
        if (group == 1 && rows_.plan.attends_to_itself(row.row)) {
          std::copy_n(value_reader().row(rows_.position(row.row), buffer_), padded_value_dim_, out);
          T slope;
          const T score = own_score<T>(rows_, row, buffer_, &slope);
          lse2_[group * padded_rows_ + r] = store_lse<T>(problem_, group, row, score, score * log2_e, 0.0);
          continue;
        }
        const T l = S::reduce_add(S::load(sum_ + static_cast<std::ptrdiff_t>(r) * S::width));
        const typename S::Reg divisor = S::broadcast(l == T(0) ? T(1) : l);
        for (int d = 0; d < padded_value_dim_; d += S::width) S::store(out + d, S::div(S::load(out + d), divisor));
        lse2_[group * padded_rows_ + r] = store_lse<T>(problem_, group, row, maximum_[r],
                                                       l == T(0) ? 0.0 : scale_.exact(maximum_[r]), log2_of_sum(l));
      }
    }

    // out = merge(O_r, lse_r) for one row.
    void write_row(int r) {
      const Row row = rows_.at(begin_ + r);
      const int groups = problem_.groups(), value_dim = static_cast<int>(problem_.value_dim);
      const std::int64_t offset = problem_.out.offset(row.head, row.row);
      if (problem_.group_out.data)
        for (int g = 0; g < groups; ++g) std::copy_n(output(g, r), value_dim, statistic<T>(problem_.group_out, g, row));
      if (groups == 2 && problem_.merge == Merge::none) {
        for (int g = 0; g < groups; ++g)
          store_row(output(g, r), value_dim, problem_.out, problem_.dtype, offset + g * problem_.out.group);
        return;
      }
      T* merged = output(0, r);
      if (groups == 2) {
        const double lse2[max_groups] = {lse2_[r], lse2_[padded_rows_ + r]};
        T weight[max_groups];
        merge_weights(problem_, row, lse2, weight);
        const T* other = output(1, r);
        for (int d = 0; d < value_dim; ++d) merged[d] = weighted(weight[0], merged[d]) + weighted(weight[1], other[d]);
      }
      store_row(merged, value_dim, problem_.out, problem_.dtype, offset);
    }

    const Problem& problem_;
    const RowList rows_;
    const bool natural_;  // scores are more than products
    const ExponentScale<T> scale_;
    const std::int64_t begin_;  // first entry of the row list
    const int count_, head_dim_, padded_head_dim_, padded_value_dim_, strip_size_;
    int padded_rows_;
    bool direct_ = false;        // products without packing (cpu/few_rows.h)
    bool values_finite_ = true;  // of the block of keys at hand
    std::ptrdiff_t output_stride_;
    T *query_, *output_, *maximum_, *sum_, *keys_, *values_, *scores_, *row_max_, *factor_, *dropout_, *buffer_,
        *before_;
    double* lse2_;           // to base 2
    const T* found_[width];  // a panel of keys or values
  };

  const Problem& problem_;
  const Plan& plan_;
  const std::vector<ForwardItem>& items_;
};
