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
// The products are made, and Q, K, V, S and P laid out, as cpu/products.h says; O is [group][row][feature]. Key blocks
// start at multiples of key_block of the list and strips at multiples of strip_rows of the rows, so neither chunking
// nor threads change a bit of the result. Small heads have a kernel of their own (cpu/small.h).

template <class T, class Products>
class Forward {
 public:
  static constexpr int row_block = 96,
                       max_chunk = 8 * row_block;  // rows of an item: a multiple of one, at most the other

  Forward(const Problem& problem, const Plan& plan, const std::vector<ForwardItem>& items)
      : problem_(problem), plan_(plan), items_(items) {}

  void operator()(std::int64_t index) const {
    const ForwardItem& item = items_[static_cast<std::size_t>(index)];
    const Problem problem = plan_.problem_of(problem_, item.batch);
    const SequencePlan& sequence = plan_.of(item.batch);
    const RowList rows{problem, sequence, item.batch, item.kv_head};
    if (is_small(problem, sequence)) return run_small<T>(problem, rows, &Small<T>::forward);
    // By the shape: the same bits however rows are cut into items. Not before a backward, which packs: its scores must
    // be these to the last bit, or every weight would be off by their difference.
    if (rows.size() <= few_rows && !problem.lse_low.data)
      return run<typename Products::template FewRows<T>>(rows, item);
    run<typename Products::template Forward<T>>(rows, item);
  }

 private:
  using S = Simd<T>;
  static constexpr int width = lanes<T>;
  static_assert(row_block >= small_rows);  // small heads are one item

  template <class P>
  static void run(const RowList& rows, const ForwardItem& item) {
    static_assert(row_block % P::row_block == 0 || P::row_block >= few_rows);
    Arena measure(nullptr);
    Item<P>(rows, item, measure);
    Arena arena(worker_scratch(measure.used()));
    [[maybe_unused]] const typename P::Session session;
    Item<P>(rows, item, arena).run();
  }

  template <class P>
  class Item {
   public:
    Item(const RowList& rows, const ForwardItem& item, Arena& arena)
        : problem_(rows.problem),
          rows_(rows),
          natural_(problem_.shapes_scores()),
          scale_(natural_ ? 1.0 : problem_.scale),
          begin_(item.begin),
          count_(static_cast<int>(item.end - item.begin)),
          padded_rows_(round_up(count_, strip_rows)),
          from_(rows, width),
          products_(rows, item.begin, count_, scale_.query_factor, arena) {
      const auto padded = static_cast<std::size_t>(padded_rows_), groups = static_cast<std::size_t>(problem_.groups());
      output_ = arena.take<T>(groups * padded * from_.padded_value_dim);
      lse2_ = arena.take<double>(groups * padded);
      maximum_ = arena.take<T>(padded);
      sum_ = arena.take<T>(padded * S::width);
      row_max_ = arena.take<T>(static_cast<std::size_t>(P::row_block) * S::width);
      factor_ = arena.take<T>(P::row_block);
      dropout_ = arena.take<T>(P::key_block);
      buffer_ = arena.take<T>(2 * static_cast<std::size_t>(std::max(from_.padded_head_dim, from_.padded_value_dim)));
    }

    void run() {
      bool packed = false;
      for (int group = 0; group < problem_.groups(); ++group) {
        for (int r = 0; r < count_; ++r) maximum_[r] = -infinity<T>;
        std::fill_n(sum_, static_cast<std::size_t>(count_) * S::width, T(0));
        std::fill_n(output(group, 0), static_cast<std::ptrdiff_t>(count_) * from_.padded_value_dim, T(0));
        const Range seen = hull(rows_, group, begin_, begin_ + count_);
        if (seen.size() && !packed) products_.pack_queries(), packed = true;
        for (std::int32_t first = seen.begin / P::key_block * P::key_block; first < seen.end; first += P::key_block) {
          const int keys = std::min(P::key_block, seen.end - first);
          products_.pack_keys(rows_.plan.keys[group], first, keys);
          for (int block = 0; block < count_; block += P::row_block) attend(group, block, first, keys);
        }
        normalise(group);
      }
      for (int r = 0; r < count_; ++r) write_row(r);
    }

   private:
    static constexpr int strip_rows = P::strip_rows, block_strips = (P::row_block + strip_rows - 1) / strip_rows;

    T* output(int group, int row) {
      return output_ + (static_cast<std::ptrdiff_t>(group) * padded_rows_ + row) * from_.padded_value_dim;
    }

    // One block of rows meets one block of keys.
    void attend(int group, int block, std::int32_t first, int keys) {
      const int rows = std::min(P::row_block, count_ - block);
      std::uint64_t live[block_strips];  // bit c: panel c of the key block holds a visible key
      score(group, block, rows, first, keys, live);
      for (int r = 0, s = 0; r < rows; r += strip_rows, ++s)
        if (live[s]) softmax(group, block, r, std::min(strip_rows, rows - r), first, live[s]);
      products_.weigh(output(group, block), rows, live, factor_);
      if (!products_.values_finite()) add_hidden_non_finite(group, block, rows, first, keys, live);
    }

    // S = Q K^T and lane-wise row maxima, in the panels where somebody looks: the live ones.
    void score(int group, int block, int rows, std::int32_t first, int keys, std::uint64_t* live) {
      const Visibility visibility(rows_, rows_.plan.keys[group], group);
      ScoreShape<T, strip_rows, width> shape(rows_, rows_.plan.keys[group]);
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
        for (int s = 0; s < strips; ++s) {
          if (key >= range[s].any.end || key + width <= range[s].any.begin) continue;
          const int n = std::min(strip_rows, rows - s * strip_rows);
          const std::int64_t entry = begin_ + block + s * strip_rows;
          const bool finite_bias = !natural_ || shape.read_bias(entry, n, key);
          const bool pairs = visibility.has_mask() || !finite_bias;
          auto tile = Visibility::all;
          if (pairs || key < range[s].all.begin || key + width > range[s].all.end)
            tile = visibility.look<width>(entry, n, key, finite_bias ? nullptr : shape.bias(), visible);
          if (tile == Visibility::none) continue;
          live[s] |= std::uint64_t{1} << (c / width);
          T *scores = products_.scores(s * strip_rows) + c, *row_max = row_max_ + s * strip_rows * S::width;
          const bool done = tile == Visibility::all && !natural_;
          products_.score(block + s * strip_rows, n, c, scores, done ? row_max : nullptr);
          if (done) continue;
          if (natural_) shape.template apply<P::stride>(n, scores, nullptr);
          if (tile == Visibility::some)
            visibility.hide<width>(entry, n, n, key, pairs ? &visible : nullptr, scores, P::stride, -infinity<T>);
          track_maxima<T>(n, scores, P::stride, row_max);
        }
      }
    }

    // P = exp2(c (S - m')), and the running maximum, sum and rescaling factor of each row of a strip, which starts at
    // row `strip` of the block.
    void softmax(int group, int block, int strip, int rows, std::int32_t first, std::uint64_t live) {
      const bool dropout = problem_.dropout.threshold != 0;
      T* factor = factor_ + strip;
      T maximum[strip_rows];
      for (int r = 0; r < rows; ++r) {
        const T before = maximum_[block + strip + r];
        const T best = std::max(before, S::reduce_max(S::load(row_max_ + (strip + r) * S::width)));
        maximum_[block + strip + r] = best;
        maximum[r] = best == -infinity<T> ? T(0) : best;
        factor[r] = scale_.below(before - maximum[r]);
      }
      exp2_each<T, strip_rows>(factor);
      for (int r = 0; r < rows; ++r) {
        T* sum = sum_ + static_cast<std::ptrdiff_t>(block + strip + r) * S::width;
        typename S::Reg total = S::mul(S::broadcast(factor[r]), S::load(sum));
        for_each_run(live, [&](int first_panel, int end_panel) {
          const int from = first_panel * width, count = end_panel * width - from;
          total = S::add(total, products_.exponentiate(strip + r, from, count, scale_, maximum[r], !dropout));
          if (!dropout) return;
          drop(group, block + strip + r, first + from, count, products_.scores(strip + r) + from);
          products_.keep(strip + r, from, count);
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

    // The values that are NaN or infinite, for the rows that see them (see cpu/pack.h).
    MMCA_NOINLINE void add_hidden_non_finite(int group, int block, int rows, std::int32_t first, int keys,
                                             const std::uint64_t* live) {
      const KeyList& list = rows_.plan.keys[group];
      const Visibility visibility(rows_, list, group);
      const RowReader<T> value = from_.value();
      for (int c = 0; c < keys; ++c) {
        const T* source = value.row(list.position(first + c), buffer_);
        for (int r = 0; r < rows; ++r)
          if ((live[r / strip_rows] >> (c / width) & 1) && visibility.sees(begin_ + block + r, first + c))
            add_non_finite(source, from_.value_dim, products_.weight(r, c), output(group, block + r));
      }
    }

    // O_r = O / l and lse_r; a row that sees itself alone takes its own value.
    void normalise(int group) {
      for (int r = 0; r < count_; ++r) {
        const Row row = rows_.at(begin_ + r);
        T* out = output(group, r);
        if (group == 1 && rows_.plan.attends_to_itself(row.row)) {
          std::copy_n(from_.value().row(rows_.position(row.row), buffer_), from_.padded_value_dim, out);
          T slope;
          const T score = own_score<T>(rows_, row, buffer_, &slope);
          lse2_[group * padded_rows_ + r] = store_lse<T>(problem_, group, row, score, score * log2_e, 0.0);
          continue;
        }
        const T l = S::reduce_add(S::load(sum_ + static_cast<std::ptrdiff_t>(r) * S::width));
        const typename S::Reg divisor = S::broadcast(l == T(0) ? T(1) : l);
        for (int d = 0; d < from_.padded_value_dim; d += S::width) S::store(out + d, S::div(S::load(out + d), divisor));
        lse2_[group * padded_rows_ + r] = store_lse<T>(problem_, group, row, maximum_[r],
                                                       l == T(0) ? 0.0 : scale_.exact(maximum_[r]), log2_of_sum(l));
      }
    }

    // out = merge(O_r, lse_r) for one row.
    void write_row(int r) {
      const Row row = rows_.at(begin_ + r);
      const int groups = problem_.groups(), value_dim = from_.value_dim;
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
    const int count_, padded_rows_;
    const Operands<T> from_;
    P products_;
    T *output_, *maximum_, *sum_, *row_max_, *factor_, *dropout_, *buffer_;
    double* lse2_;  // to base 2
  };

  const Problem& problem_;
  const Plan& plan_;
  const std::vector<ForwardItem>& items_;
};
