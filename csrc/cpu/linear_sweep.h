// One sweep of linear attention over one head (cpu/linear_schedule.h); included inside the namespace of an instruction
// set. In chunks of writers, so that everything is a product of matrices:
//
//     A = X F^T, zero where a reader does not see a writer;  Y = X M + A G;  then M += F^T G
//
// M is a float (double) sum of three parts that never meets small terms one by one: what the segment started from, read
// as `start` from a sum kept in double; the segment's own sum `local`; and the chunk's sum, which stays in registers.
// So the error of M does not grow with the length of the sequence, and a segment's sum has the same bits whoever
// computes it.
//
// Readers come a strip of tile_rows at a time. Layout in scratch: X [reader][depth]; F rows [writer][depth] and columns
// [panel][depth][lanes]; G [panel][writer][lanes]; M, local, start [panel][depth][lanes]; A [reader][writer]; Y
// [reader][value].

inline constexpr int max_depth = 257;  // a head and one number more
template <class T>
inline constexpr int x_stride = round_up(max_depth, lanes<T>) + Simd<T>::width;  // of readers: off the powers of two

// Sums over features are cut into runs of depth_run: rounding grows with the length of a run, all the more as phi is
// never negative.

// scores[row][lanes] = x[row] * panel, for `rows` rows
template <class T, int rows, int stride>
MMCA_NOINLINE void linear_score_tile(int depth, const T* x, const T* panel, T* scores) {
  Accumulators<T, rows> c;
  clear_tile<T, rows>(c);
  multiply_add<T, rows>(std::min(depth, depth_run), x, 1, x_stride<T>, panel, c);
  store_tile<T, rows>(scores, stride, c);
  for (int done = depth_run; done < depth; done += depth_run) {
    clear_tile<T, rows>(c);
    multiply_add<T, rows>(std::min(depth - done, depth_run), x + done, 1, x_stride<T>, panel + done * lanes<T>, c);
    add_tile<T, rows>(scores, stride, c);
  }
}

// y[row][lanes] = weights[row][0..count) * values + x[row] * state, for `rows` rows
template <class T, int rows, int stride>
MMCA_NOINLINE void read_tile(int count, const T* weights, const T* values, int depth, const T* x, const T* state, T* y,
                             std::ptrdiff_t y_stride) {
  Accumulators<T, rows> c;
  clear_tile<T, rows>(c);
  multiply_add<T, rows>(count, weights, 1, stride, values, c);
  multiply_add<T, rows>(std::min(depth, depth_run), x, 1, x_stride<T>, state, c);
  store_tile<T, rows>(y, y_stride, c);
  for (int done = depth_run; done < depth; done += depth_run) {
    clear_tile<T, rows>(c);
    multiply_add<T, rows>(std::min(depth - done, depth_run), x + done, 1, x_stride<T>, state + done * lanes<T>, c);
    add_tile<T, rows>(y, y_stride, c);
  }
}

// local[feature][lanes] += sum over `count` writers of f[writer][feature] * values[writer], for `rows` features; fresh:
// nothing is in `local` yet. Then state = start + local, if it is wanted.
template <class T, int rows>
MMCA_NOINLINE void state_tile(int count, const T* f, std::ptrdiff_t f_stride, const T* values, bool fresh, T* local,
                              const T* start, T* state) {
  using S = Simd<T>;
  Accumulators<T, rows> c;
  clear_tile<T, rows>(c);
  multiply_add<T, rows>(count, f, f_stride, 1, values, c);
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const std::ptrdiff_t at = i * lanes<T> + half * S::width;
      if (!fresh) c[i][half] = S::add(S::load(local + at), c[i][half]);
      S::store(local + at, c[i][half]);
      if (state) S::store(state + at, S::add(S::load(start + at), c[i][half]));
    }
}

// A state in a problem's memory, as a sweep sees it: element (p, q) at sum[p * by_depth + q * by_value], but where
// there is a last_row, that is the last p's; and the plain sum that
// goes with SweepRoles::also, of f or g.
template <class Double>
struct StateView {
  Double* sum = nullptr;  // null: no state
  std::ptrdiff_t by_depth = 0, by_value = 0;
  Double *last_row = nullptr, *sums = nullptr;
};

// What the rows of a sweep are.
template <class T>
class SweepRoles {
 public:
  // What readers need besides y: nothing; their total weight, the sum of <x, f> over the writers they see; or the sum
  // of those writers' g.
  enum class Also { nothing, total_weight, sum_of_g };
  Also also = Also::nothing;

  // Writes f (`depth` numbers; what lies behind them is zero already) and returns g, padded with zeros to whole panels,
  // in `buffer` or elsewhere; null: adds nothing.
  virtual const T* writer(std::int64_t w, T* f, T* buffer) = 0;
  // Writes x, padded with zeros to whole panels.
  virtual void reader(std::int64_t r, T* x) = 0;
  // Makes of y what it is for, and stores it. `extra`: the total weight or the sum, or neither.
  virtual void finish(std::int64_t r, const T* extra, T* y) = 0;
  // Ask the memory for what a row will need soon: a chunk's rows all at once would have to wait for it.
  virtual void expect_writer(std::int64_t w) const = 0;
  virtual void expect_reader(std::int64_t r) const = 0;

  virtual StateView<const double> start() const { return {}; }
  virtual StateView<double> end() const { return {}; }

 protected:
  ~SweepRoles() = default;
};

template <class T>
class Sweep {
 public:
  static constexpr int strip_rows = tile_rows<T>, width = lanes<T>;
  static constexpr int chunk = linear_chunk;
  static_assert(chunk % width == 0);

  struct Sizes {
    int depth, values, sums;  // sums: 0 where there are none to keep
    int padded_depth() const { return round_up(depth, width); }
    int padded_values() const { return round_up(values, width); }
    int padded_sums() const { return round_up(sums, width); }
    int state_rows() const { return round_up(depth, strip_rows); }
    std::size_t state() const { return static_cast<std::size_t>(padded_values()) * state_rows(); }
    std::size_t carried() const { return state() + padded_sums(); }
  };

  Sweep(const SweepOrder& order, SweepRoles<T>& roles, const Sizes& sizes, Arena& arena)
      : order_(order),
        roles_(roles),
        sizes_(sizes),
        f_stride_(round_up(sizes.state_rows(), width)),
        column_size_(static_cast<std::ptrdiff_t>(round_up(sizes.depth, S::width)) * width) {
    carry_ = arena.take<double>(sizes.carried());
    start_ = arena.take<T>(sizes.state()), local_ = arena.take<T>(sizes.state());
    state_ = arena.take<T>(sizes.state());
    f_rows_ = arena.take<T>(static_cast<std::size_t>(chunk) * f_stride_);
    f_columns_ = arena.take<T>(static_cast<std::size_t>(chunk / width) * column_size_ + S::width);
    g_ = arena.take<T>(static_cast<std::size_t>(chunk) * sizes.padded_values());
    sums_ = arena.take<T>(static_cast<std::size_t>(chunk) * sizes.padded_sums());  // of g, seen from each writer on
    for (T** vector : {&sum_start_, &sum_local_, &sum_now_, &sum_chunk_})
      *vector = arena.take<T>(static_cast<std::size_t>(sizes.padded_sums()));
    x_ = arena.take<T>(static_cast<std::size_t>(strip_rows) * x_stride<T>);
    scores_ = arena.take<T>(static_cast<std::size_t>(strip_rows) * stride);
    y_ = arena.take<T>(static_cast<std::size_t>(strip_rows) * sizes.padded_values());
    buffer_ =
        arena.take<T>(static_cast<std::size_t>(strip_rows) * std::max(sizes.padded_depth(), sizes.padded_values()));
    zero_ = arena.take<T>(static_cast<std::size_t>(sizes.padded_values()));
    if (!carry_) return;  // measured alone
    std::fill_n(f_rows_, static_cast<std::size_t>(chunk) * f_stride_, T(0));
    std::fill_n(zero_, sizes.padded_values(), T(0));
  }

  void whole() {
    const StateView<const double> given = roles_.start();
    const std::int64_t segments = (order_.writers + segment - 1) / segment;
    const SweepOrder::Rows early{0, order_.early_end()}, late{order_.late_begin(), order_.readers};
    const bool end_matters = order_.needs_end || late.size(), carries = given.sum || segments > 1 || end_matters;
    if (carries) load(given, carry_);
    if (early.size()) start_from(given.sum ? carry_ : nullptr), read(early, none);
    for (std::int64_t s = 0; s < segments; ++s) {
      start_from(given.sum || s > 0 ? carry_ : nullptr);
      run_segment(s, s + 1 < segments || end_matters);
      if (carries) add(local_, sum_local_, carry_);
    }
    if (late.size()) start_from(given.sum || segments ? carry_ : nullptr), read(late, none);
    if (order_.needs_end) store(carry_, roles_.end());
  }

  // ---- the steps of a split head: see SweepStage. A slot holds a state and its sums.

  void load(const StateView<const double>& given, double* carry) const {
    std::fill_n(carry, sizes_.carried(), 0.0);
    if (!given.sum) return;
    each_element([&](int p, int q, std::size_t at) {
      carry[at] = given.last_row && p + 1 == sizes_.depth ? given.last_row[q]
                                                          : given.sum[p * given.by_depth + q * given.by_value];
    });
    if (given.sums) std::copy_n(given.sums, sizes_.sums, carry + sizes_.state());
  }
  void store(const double* carry, const StateView<double>& wanted) const {
    each_element([&](int p, int q, std::size_t at) {
      double* to = wanted.last_row && p + 1 == sizes_.depth ? wanted.last_row + q
                                                            : wanted.sum + p * wanted.by_depth + q * wanted.by_value;
      *to = carry[at];
    });
    if (wanted.sums) std::copy_n(carry + sizes_.state(), sizes_.sums, wanted.sums);
  }

  void sum_segment(std::int64_t s, T* slot) {
    start_from(nullptr);
    for (std::int64_t first = s * segment; first < std::min((s + 1) * segment, order_.writers); first += chunk) {
      pack_writers(first, /*for_readers=*/false);
      advance(/*to_read=*/false);
    }
    std::copy_n(local_, sizes_.state(), slot);
    std::copy_n(sum_local_, sizes_.padded_sums(), slot + sizes_.state());
  }
  static void scan(double* carry, const Sizes& sizes, std::int64_t sums, std::int64_t count, T* slots) {
    for (std::int64_t s = 0; s < count; ++s, slots += sizes.carried())
      for (std::size_t i = 0; i < sizes.carried(); ++i) {
        const double before = carry[i];
        if (s < sums) carry[i] += static_cast<double>(slots[i]);
        slots[i] = static_cast<T>(before);
      }
  }
  void read_segment(std::int64_t s, const T* slot) {
    const std::int64_t end = std::min((s + 1) * segment, order_.writers);
    if (!order_.readers_of(s * segment, end).size()) return;
    if (s == 0 && !roles_.start().sum) {
      start_from(nullptr);
    } else {
      std::copy_n(slot, sizes_.state(), start_);
      std::copy_n(slot + sizes_.state(), sizes_.padded_sums(), sum_start_);
      begin_segment(start_);
    }
    run_segment(s, /*to_the_end=*/false);
  }
  void read_all(SweepOrder::Rows rows, const double* carry) {
    start_from(carry);
    read(rows, none);
  }

 private:
  using S = Simd<T>;
  static constexpr int stride = chunk + 3 * S::width;  // of scores: off the powers of two
  static constexpr std::int64_t segment = std::int64_t{chunk} * segment_chunks, none = -1;

  template <class Body>
  void each_element(const Body& body) const {
    for (int panel = 0; panel < sizes_.values; panel += width)
      for (int p = 0; p < sizes_.depth; ++p)
        for (int q = panel; q < std::min(panel + width, sizes_.values); ++q)
          body(p, q, static_cast<std::size_t>(panel) * sizes_.state_rows() + p * width + q - panel);
  }

  void add(const T* state, const T* sums, double* carry) const {
    for (std::size_t i = 0; i < sizes_.state(); ++i) carry[i] += static_cast<double>(state[i]);
    for (int d = 0; d < sizes_.padded_sums(); ++d) carry[sizes_.state() + d] += static_cast<double>(sums[d]);
  }

  // Null: from nothing.
  void start_from(const double* carry) {
    for (std::size_t i = 0; carry && i < sizes_.state(); ++i) start_[i] = static_cast<T>(carry[i]);
    for (int d = 0; d < sizes_.padded_sums(); ++d)
      sum_start_[d] = carry ? static_cast<T>(carry[sizes_.state() + d]) : T(0);
    begin_segment(carry ? start_ : nullptr);
  }
  void begin_segment(const T* start) {
    starts_from_ = now_ = start;
    fresh_ = true;
    std::fill_n(sum_local_, sizes_.padded_sums(), T(0));
    std::copy_n(sum_start_, sizes_.padded_sums(), sum_now_);
  }

  void run_segment(std::int64_t s, bool to_the_end) {
    const std::int64_t end = std::min((s + 1) * segment, order_.writers);
    for (std::int64_t first = s * segment; first < end; first += chunk) {
      const SweepOrder::Rows readers = order_.readers_of(first, std::min<std::int64_t>(first + chunk, end));
      pack_writers(first, readers.size() > 0);
      if (readers.size()) read(readers, first);
      if (first + chunk < end || to_the_end) advance(/*to_read=*/true);
    }
  }

  void pack_writers(std::int64_t first, bool for_readers) {
    first_writer_ = first;
    writers_ = static_cast<int>(std::min<std::int64_t>(chunk, order_.writers - first));
    constexpr std::ptrdiff_t panel = static_cast<std::ptrdiff_t>(chunk) * width;
    const int sums = sizes_.padded_sums();
    const bool total = roles_.also == SweepRoles<T>::Also::total_weight;
    std::fill_n(sum_chunk_, sums, T(0));
    typename S::Reg finite = S::zero();
    for (int w = 0; w < writers_; ++w) {
      T* f = f_rows_ + w * f_stride_;
      const T* g = roles_.writer(first + w, f, buffer_);
      if (!g) std::fill_n(f, sizes_.depth, T(0)), g = zero_;
      finite = pack_row<T>(g, sizes_.padded_values(), g_ + w * width, panel, finite);
      for (int d = 0; !total && d < sums; d += S::width) {
        const typename S::Reg sum = S::add(S::load(sum_chunk_ + d), S::loadu(g + d));
        S::store(sum_chunk_ + d, sum);
        S::store(sums_ + w * sums + d, S::add(S::load(sum_now_ + d), sum));
      }
    }
    for (int d = 0; total && d < sums; d += S::width) {
      typename S::Reg sum = S::zero();
      for (int w = 0; w < writers_; ++w) sum = S::add(sum, S::load(f_rows_ + w * f_stride_ + d));
      S::store(sum_chunk_ + d, sum);
    }
    finite_ = is_finite(S::reduce_add(finite));
    if (!finite_) find_non_finite();
    if (!for_readers) return;
    const T* rows[width];
    for (int w = 0; w < writers_; w += width) {
      const int n = std::min(width, writers_ - w);
      for (int i = 0; i < n; ++i) rows[i] = f_rows_ + (w + i) * f_stride_;
      pack_columns<T, width>(rows, n, sizes_.depth, T(1), f_columns_ + w / width * column_size_);
    }
  }

  // A weight of zero must hide a value, which 0 * NaN does not: what is not finite leaves G, and is added apart.
  MMCA_NOINLINE void find_non_finite() {
    for (int w = 0; w < writers_; ++w) {
      bad_[w] = false;
      for (int q = 0; q < sizes_.padded_values(); ++q) {
        T& x = g_[static_cast<std::ptrdiff_t>(q / width) * chunk * width + w * width + q % width];
        if (!is_finite(x)) x = T(0), bad_[w] = true;
      }
    }
  }
  // body(w, g) for the writers of the chunk whose g is not finite.
  template <class Body>
  void each_non_finite(const Body& body) {
    for (int w = 0; w < writers_; ++w)
      if (bad_[w]) body(w, roles_.writer(first_writer_ + w, f_rows_ + w * f_stride_, buffer_));
  }

  // M += F^T G.
  void advance(bool to_read) {
    const int rows = sizes_.state_rows(), sums = sizes_.padded_sums();
    const bool apart = to_read && starts_from_;
    const std::int64_t next = first_writer_ + writers_, next_end = std::min(next + chunk, order_.writers);
    const int tiles = sizes_.padded_values() / width * ((sizes_.depth + strip_rows - 1) / strip_rows);
    const int at_a_time = (chunk + tiles - 1) / tiles;
    std::int64_t expected = next;
    for (int q = 0; q < sizes_.padded_values(); q += width) {
      const T* values = g_ + static_cast<std::ptrdiff_t>(q) * chunk;
      for (int p = 0; p < sizes_.depth; p += strip_rows) {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(q) * rows + p * width;
        for (int i = 0; i < at_a_time && expected < next_end; ++i) roles_.expect_writer(expected++);
        with_tile_height<T>(std::min(strip_rows, sizes_.depth - p), [&](auto height) {
          state_tile<T, height.value>(writers_, f_rows_ + p, f_stride_, values, fresh_, local_ + at,
                                      apart ? start_ + at : nullptr, apart ? state_ + at : nullptr);
        });
      }
    }
    if (!finite_) advance_non_finite(apart);
    for (int d = 0; d < sums; d += S::width) {
      const typename S::Reg local = S::add(S::load(sum_local_ + d), S::load(sum_chunk_ + d));
      S::store(sum_local_ + d, local);
      S::store(sum_now_ + d, S::add(S::load(sum_start_ + d), local));
    }
    fresh_ = false;
    now_ = apart ? state_ : local_;
  }
  MMCA_NOINLINE void advance_non_finite(bool apart) {
    each_non_finite([&](int w, const T* g) {
      each_element([&](int p, int q, std::size_t at) {
        if (!is_finite(g[q])) local_[at] += f_rows_[w * f_stride_ + p] * g[q];
      });
    });
    for (std::size_t i = 0; apart && i < sizes_.state(); ++i) state_[i] = start_[i] + local_[i];
  }

  // Readers of the chunk of writers that starts at `first_writer`, or (none) of the state alone.
  void read(SweepOrder::Rows rows, std::int64_t first_writer) {
    for (std::int64_t r = rows.begin; r < rows.end; r += strip_rows)
      read_strip(r, static_cast<int>(std::min<std::int64_t>(strip_rows, rows.end - r)), first_writer);
  }

  void read_strip(std::int64_t first, int count, std::int64_t first_writer) {
    using Also = typename SweepRoles<T>::Also;
    const int values = sizes_.padded_values(), sums = sizes_.padded_sums();
    int visible[strip_rows] = {};  // writers of the chunk that each reader sees: never fewer than the one before
    if (first_writer != none)
      order_.each_seen(first, count, [&](int r, std::int64_t w) { visible[r] = w - first_writer; });
    for (int r = 0; r < count; ++r) roles_.reader(first + r, x_ + r * x_stride<T>);
    for (std::int64_t r = first + count; r < std::min(first + count + strip_rows, order_.readers); ++r)
      roles_.expect_reader(r);
    const int seen = visible[count - 1];
    with_tile_height<T>(count, [&](auto height) {
      for (int c = 0; c < seen; c += width) {
        linear_score_tile<T, height.value, stride>(sizes_.depth, x_, f_columns_ + c / width * column_size_,
                                                   scores_ + c);
        for (int r = 0; r < count && visible[r] < c + width; ++r)
          for (int w = std::max(c, visible[r]); w < c + width; ++w) scores_[r * stride + w] = T(0);
      }
      for (std::ptrdiff_t q = 0; q < values; q += width)
        read_tile<T, height.value, stride>(seen, scores_, g_ + q * chunk, now_ ? sizes_.depth : 0, x_,
                                           now_ ? now_ + q * sizes_.state_rows() : nullptr, y_ + q, values);
    });
    if (seen && !finite_)
      each_non_finite([&](int w, const T* g) {
        for (int r = 0; r < count; ++r)
          if (w < visible[r]) add_non_finite(g, sizes_.values, scores_[r * stride + w], y_ + r * values);
      });
    for (int r = 0; r < count; ++r) {
      if (roles_.also == Also::total_weight) {
        const T total = total_weight(x_ + r * x_stride<T>, scores_ + r * stride, round_up(seen, width));
        roles_.finish(first + r, &total, y_ + r * values);
      } else {
        roles_.finish(first + r, visible[r] ? sums_ + (visible[r] - 1) * sums : sum_now_, y_ + r * values);
      }
    }
  }

  T total_weight(const T* x, const T* scores, int count) const {
    typename S::Reg even = S::zero(), odd = S::zero();
    for (int w = 0; w < count; w += width)
      even = S::add(even, S::load(scores + w)), odd = S::add(odd, S::load(scores + w + S::width));
    for (int d = 0; d < sizes_.padded_sums(); d += width) {
      even = S::fma(S::load(x + d), S::load(sum_now_ + d), even);
      odd = S::fma(S::load(x + d + S::width), S::load(sum_now_ + d + S::width), odd);
    }
    return S::reduce_add(S::add(even, odd));
  }

  const SweepOrder order_;
  SweepRoles<T>& roles_;
  const Sizes sizes_;
  const std::ptrdiff_t f_stride_, column_size_;
  double* carry_;
  T *start_, *local_, *state_, *f_rows_, *f_columns_, *g_, *sums_, *sum_start_, *sum_local_, *sum_now_, *sum_chunk_;
  T *x_, *scores_, *y_, *buffer_, *zero_;
  const T *starts_from_ = nullptr, *now_ = nullptr;  // null: nothing, which reads as zero
  bool fresh_ = true, finite_ = true;
  std::int64_t first_writer_ = 0;
  int writers_ = 0;
  bool bad_[chunk];
};
