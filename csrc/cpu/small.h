// Plain attention of heads so small that packing and blocking would cost more than the arithmetic; included inside the
// namespace of an instruction set. Notation: core/problem.h.
//
// All of a head's scores are here at once, so the softmax is the plain one. Rows (cpu/rows.h) are the lanes: sums over
// keys and features need nothing from other lanes, and keys and values are not transposed but broadcast:
//
//     S^T = K Q^T;   P^T = softmax over keys;   O^T = V^T P^T
//     dP^T = V dO^T;   dS^T = P^T (dP^T - rowsum(P dP) + dlse);   dQ^T = scale K^T dS^T;   dV = P^T dO;
//     dK = scale dS^T Q
//
// Layout in scratch: K, V copies [key][copy_stride]; per panel of rows Q, dO, O, dQ [feature][panel], S, P, dP, dS
// [key][panel]; Q and dO again as they are, dK and dV, [feature / lanes][row or key][lanes].
//
// A weight of zero must hide what it multiplies, and 0 * NaN does not: products are taken of copies without what is not
// finite, and that is added for the pairs that see each other (cpu/pack.h).

template <class T>
class Small {
 public:
  static constexpr int max_rows = small_rows, max_keys = small_keys;

  Small(const Problem& problem, const RowList& rows, Arena& arena)
      : problem_(problem),
        rows_(rows),
        list_(rows.plan.keys[0]),
        scale_(problem.scale),
        count_(static_cast<int>(rows.size())),
        key_count_(list_.size),
        head_dim_(static_cast<int>(problem.head_dim)),
        value_dim_(static_cast<int>(problem.value_dim)),
        padded_head_dim_(round_up(head_dim_, lanes<T>)),
        padded_value_dim_(round_up(value_dim_, lanes<T>)),
        registers_(count_ > S::width ? 2 : 1),
        panel_(registers_ * S::width) {
    const int dim = std::max(padded_head_dim_, padded_value_dim_);
    for (T** copies : {&keys_as_they_are_, &values_as_they_are_, &finite_keys_, &finite_values_})
      *copies = arena.take<T>(static_cast<std::size_t>(max_keys + tile_rows<T>) * copy_stride);
    columns_ = arena.take<T>(static_cast<std::size_t>(dim) * lanes<T>);
    weights_ = arena.take<T>(static_cast<std::size_t>(round_up(count_, panel_)) * padded_keys);
    result_ = arena.take<T>(static_cast<std::size_t>(dim + tile_rows<T>) * lanes<T>);
    row_ = arena.take<T>(static_cast<std::size_t>(lanes<T>) * dim);
    maximum_ = arena.take<T>(lanes<T>);
    sum_ = arena.take<T>(lanes<T>);
    begin_ = arena.take<T>(lanes<T>);
    end_ = arena.take<T>(lanes<T>);
    if (!problem.grad_out.data) return;
    score_grads_ = arena.take<T>(static_cast<std::size_t>(round_up(count_, panel_)) * padded_keys);
    query_rows_ = arena.take<T>(static_cast<std::size_t>(max_rows) * padded_head_dim_);
    grad_rows_ = arena.take<T>(static_cast<std::size_t>(max_rows) * padded_value_dim_);
    grad_keys_ = arena.take<T>(static_cast<std::size_t>(padded_keys) * dim);
  }

  void forward() {
    copy_keys();
    for (int first = 0; first < count_; first += panel_) registers_ == 1 ? attend<1>(first) : attend<2>(first);
  }

  void backward() {
    copy_keys();
    for (int first = 0; first < count_; first += panel_)
      registers_ == 1 ? differentiate<1>(first) : differentiate<2>(first);
    write_key_gradients(score_grads_, query_rows_, head_dim_, problem_.grad_key, problem_.scale,
                        [&](Row row) { return query(row, row_); });
    write_key_gradients(weights_, grad_rows_, value_dim_, problem_.grad_value, 1.0,
                        [&](Row row) { return grad(row, row_); });
  }

 private:
  using S = Simd<T>;
  using Reg = typename S::Reg;
  static constexpr int copy_stride = 256 + 16;  // of the copies: the largest head_dim, off the powers of two
  static constexpr int padded_keys = max_keys + tile_rows<T>;

  // ---------------------------------------------------------------- what is read

  const T* query(Row row, T* buffer) const {
    return RowReader<T>(problem_.query, problem_.dtype, row.head, head_dim_, padded_head_dim_).row(row.row, buffer);
  }
  const T* grad(Row row, T* buffer) const {
    return RowReader<T>(problem_.grad_out, problem_.dtype, row.head, value_dim_, padded_value_dim_)
        .row(row.row, buffer);
  }

  void copy_keys() {
    key_ = copy_rows(problem_.key, head_dim_, padded_head_dim_, keys_as_they_are_, finite_keys_);
    value_ = copy_rows(problem_.value, value_dim_, padded_value_dim_, values_as_they_are_, finite_values_);
  }

  // Copies keys or values to a constant stride, so that tiles address them by displacements; returns what to sum with
  // weights, which is finite.
  const T* copy_rows(const Input& input, int features, int padded, T* as_they_are, T* finite) const {
    const RowReader<T> reader(input, problem_.dtype, rows_.kv_head, features, padded);
    bool all = true;
    for (int c = 0; c < key_count_; ++c) {
      T* out = as_they_are + c * copy_stride;
      const T* row = reader.row(list_.position(c), out);
      if (row != out)
        for (int d = 0; d < padded; d += S::width) S::store(out + d, S::loadu(row + d));
      all &= all_finite(out, padded);
    }
    if (all) return as_they_are;
    for (int c = 0; c < key_count_; ++c) {
      std::copy_n(as_they_are + c * copy_stride, padded, finite + c * copy_stride);
      zero_non_finite(finite + c * copy_stride, padded);
    }
    return finite;
  }

  bool sees(int r, int c) const {
    const Range range = rows_.range(0, r);
    return c >= range.begin && c < range.end;
  }

  // ---------------------------------------------------------------- one panel of rows

  template <int registers>
  void attend(int first) {
    const int n = std::min(panel_, count_ - first);
    softmax<registers>(first, n, weights_);
    columns_times_panel<registers>(padded_value_dim_, key_count_, value_, weights_, result_);
    unpack_rows(n, padded_value_dim_);
    if (value_ != values_as_they_are_) add_non_finite_keys(first, n, weights_, values_as_they_are_, padded_value_dim_);
    auto entry = rows_.walk(first);
    for (int r = 0; r < n; ++r, entry.next()) {
      const Row row = entry.row();
      const Output& out = problem_.out;
      store_row(row_ + r * padded_value_dim_, value_dim_, out, problem_.dtype, out.offset(row.head, row.row));
      const T l = sum_[r];
      store_lse<T>(problem_, 0, row, maximum_[r], l == T(0) ? 0.0 : scale_.exact(maximum_[r]), log2_of_sum(l));
    }
  }

  // P^T and dS^T of a panel of rows, and their dQ.
  template <int registers>
  void differentiate(int first) {
    constexpr int size = registers * S::width;
    const int n = std::min(panel_, count_ - first);
    T *weights = weights_ + first * padded_keys, *grads = score_grads_ + first * padded_keys;
    softmax<registers>(first, n, weights);
    keep_rows(first, n, padded_head_dim_, query_rows_);
    pack_panel(first, n, value_dim_, T(1), [&](Row row, T* buffer) { return grad(row, buffer); });
    keep_rows(first, n, padded_value_dim_, grad_rows_);
    rows_times_panel<registers>(key_count_, value_dim_, values_as_they_are_, columns_, grads);
    hide<registers>(grads, T(0));

    Reg offset[registers];
    T* lse_gradient = sum_;  // done with
    std::fill_n(lse_gradient, size, T(0));
    if (problem_.grad_lse.data) {
      auto entry = rows_.walk(first);
      for (int r = 0; r < n; ++r, entry.next())
        lse_gradient[r] = *statistic<const T>(problem_.grad_lse, 0, entry.row());
    }
#pragma GCC unroll 2
    for (int x = 0; x < registers; ++x) offset[x] = S::zero();
    for (int i = 0; i < key_count_ * size; i += size)
#pragma GCC unroll 2
      for (int x = 0; x < registers; ++x)
        offset[x] = S::fma(S::load(weights + i + x * S::width), S::load(grads + i + x * S::width), offset[x]);
#pragma GCC unroll 2
    for (int x = 0; x < registers; ++x) offset[x] = S::sub(offset[x], S::load(lse_gradient + x * S::width));
    for (int i = 0; i < key_count_ * size; i += size)
#pragma GCC unroll 2
      for (int x = 0; x < registers; ++x) {
        T* g = grads + i + x * S::width;
        S::store(g, S::mul(S::load(weights + i + x * S::width), S::sub(S::load(g), offset[x])));
      }
    hide<registers>(weights, T(0)), hide<registers>(grads, T(0));  // again: a row's NaN is everywhere in its lane

    columns_times_panel<registers>(padded_head_dim_, key_count_, key_, grads, result_);
    unpack_rows(n, padded_head_dim_);
    if (key_ != keys_as_they_are_) add_non_finite_keys(first, n, grads, keys_as_they_are_, padded_head_dim_);
    auto entry = rows_.walk(first);
    for (int r = 0; r < n; ++r, entry.next()) {
      const Row row = entry.row();
      const Output& out = problem_.grad_query;
      T* gradient = row_ + r * padded_head_dim_;
      multiply(gradient, padded_head_dim_, static_cast<T>(problem_.scale));
      store_row(gradient, head_dim_, out, problem_.dtype, out.offset(row.head, row.row));
    }
  }

  // To row_, what the finite copies lack of keys or values.
  void add_non_finite_keys(int first, int n, const T* weights, const T* as_they_are, int padded) const {
    for (int r = 0; r < n; ++r)
      for (int c = 0; c < key_count_; ++c)
        if (sees(first + r, c))
          add_non_finite(as_they_are + c * copy_stride, padded, weights[c * panel_ + r], row_ + r * padded);
  }

  // dK or dV = factor * (dS^T or P^T) times rows packed by keep_rows; `find` reads one as it is.
  template <class Find>
  void write_key_gradients(const T* weights, T* packed_rows, int features, const Output& out, double factor,
                           const Find& find) {
    const int padded = round_up(features, lanes<T>);
    constexpr int feature_panel = max_rows * lanes<T>;
    bool finite = true;
    for (int d = 0; d < padded; d += lanes<T>) {
      T *panel = packed_rows + d * max_rows, *gradient = grad_keys_ + d * padded_keys;
      if (!all_finite(panel, count_ * lanes<T>)) finite = false, zero_non_finite(panel, feature_panel);
      for (int c = 0; c < key_count_; c += tile_rows<T>)
        with_tile_height<T>(std::min(tile_rows<T>, key_count_ - c), [&](auto height) {
          for (int first = 0; first < count_; first += panel_) {
            const int n = std::min(panel_, count_ - first);
            const T *a = weights + first * padded_keys + c * panel_, *b = panel + first * lanes<T>;
            if (first) tile<2, height.value, true>(n, a, 1, panel_, b, gradient + c * lanes<T>);
            else tile<2, height.value, false>(n, a, 1, panel_, b, gradient + c * lanes<T>);
          }
        });
    }
    T* sum = columns_;
    for (int c = 0; c < key_count_; ++c) {
      for (int d = 0; d < padded; d += S::width)
        S::store(sum + d, S::load(grad_keys_ + d / lanes<T> * lanes<T> * padded_keys + c * lanes<T> + d % lanes<T>));
      for (int r = 0; !finite && r < count_; ++r)
        if (sees(r, c))
          add_non_finite(find(rows_.at(r)), padded,
                         weights[r / panel_ * panel_ * padded_keys + c * panel_ + r % panel_], sum);
      multiply(sum, padded, static_cast<T>(factor));
      store_row(sum, features, out, problem_.dtype, out.offset(rows_.kv_head, list_.position(c)));
    }
    std::fill_n(sum, padded, T(0));
    for (const std::int32_t position : rows_.plan.hidden_keys)
      store_row(sum, features, out, problem_.dtype, out.offset(rows_.kv_head, position));
  }

  // ---------------------------------------------------------------- the products

  // out[row][panel] (+)= a * b over `depth`, for `height` rows (the last tile's may be past what there is: then they
  // are made of undefined numbers, and nobody looks at them): a's rows and depth lie as the strides say, b is a panel.
  template <int registers, int height, bool add>
  MMCA_INLINE static void tile(int depth, const T* a, std::ptrdiff_t depth_stride, std::ptrdiff_t row_stride,
                               const T* b, T* out) {
    Reg sum[height][registers];
#pragma GCC unroll 12
    for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
      for (int x = 0; x < registers; ++x) sum[i][x] = S::zero();
#pragma GCC unroll 2
    for (int k = 0; k < depth; ++k, a += depth_stride, b += registers * S::width) {
      Reg panel[registers];
#pragma GCC unroll 2
      for (int x = 0; x < registers; ++x) panel[x] = S::load(b + x * S::width);
#pragma GCC unroll 12
      for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
        for (int x = 0; x < registers; ++x) sum[i][x] = S::fma(S::broadcast(a[i * row_stride]), panel[x], sum[i][x]);
    }
#pragma GCC unroll 12
    for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
      for (int x = 0; x < registers; ++x) {
        T* c = out + (i * registers + x) * S::width;
        S::store(c, add ? S::add(sum[i][x], S::load(c)) : sum[i][x]);
      }
  }

  // out[0..count)[panel] = rows of a times a panel, features summed in runs (cpu/tiles.h).
  template <int registers>
  MMCA_NOINLINE static void rows_times_panel(int count, int depth, const T* a, const T* panel, T* out) {
    constexpr int size = registers * S::width;
    for (int i = 0; i < count; i += tile_rows<T>)
      with_tile_height<T>(std::min(tile_rows<T>, count - i), [&](auto height) {
        tile<registers, height.value, false>(std::min(depth, depth_run), a + i * copy_stride, 1, copy_stride, panel,
                                             out + i * size);
        for (int done = depth_run; done < depth; done += depth_run)
          tile<registers, height.value, true>(std::min(depth - done, depth_run), a + i * copy_stride + done, 1,
                                              copy_stride, panel + done * size, out + i * size);
      });
  }

  // out[0..count)[panel] = columns of a, over the keys, times a panel.
  template <int registers>
  MMCA_NOINLINE static void columns_times_panel(int count, int keys, const T* a, const T* panel, T* out) {
    for (int i = 0; i < count; i += tile_rows<T>)
      with_tile_height<T>(std::min(tile_rows<T>, count - i), [&](auto height) {
        tile<registers, height.value, false>(keys, a + i, copy_stride, 1, panel, out + i * registers * S::width);
      });
  }

  // columns_ = a panel of rows first..first+n-1, transposed; source_[r] is where row(row, buffer) found one.
  template <class Find>
  void pack_panel(int first, int n, int features, T factor, const Find& row) {
    const int padded = round_up(features, lanes<T>);
    auto entry = rows_.walk(first);
    for (int r = 0; r < n; ++r, entry.next()) source_[r] = row(entry.row(), row_ + r * padded);
    if (registers_ == 1) pack_columns<T, S::width>(source_, n, features, factor, columns_);
    else pack_columns<T, lanes<T>>(source_, n, features, factor, columns_);
  }

  // The rows that pack_panel found, as they are.
  void keep_rows(int first, int n, int padded, T* out) const {
    for (int r = 0; r < n; ++r)
      pack_row<T>(source_[r], padded, out + (first + r) * lanes<T>, std::ptrdiff_t{max_rows} * lanes<T>, S::zero());
  }

  // ---------------------------------------------------------------- the softmax

  // weights = P^T of a panel of rows, with maximum_ and sum_ of its scores.
  template <int registers>
  void softmax(int first, int n, T* weights) {
    pack_panel(first, n, head_dim_, scale_.query_factor, [&](Row row, T* buffer) { return query(row, buffer); });
    rows_times_panel<registers>(key_count_, head_dim_, keys_as_they_are_, columns_, weights);
    find_ranges(first, n);
    hide<registers>(weights, -infinity<T>);
    constexpr int size = registers * S::width, group = 4 / registers;
    const Reg high = S::broadcast(scale_.high), low = S::broadcast(scale_.low);
    Reg best[registers], m[registers], l[registers], divisor[registers];
#pragma GCC unroll 2
    for (int x = 0; x < registers; ++x) best[x] = S::broadcast(-infinity<T>), l[x] = S::zero();
    for (int c = 0; c < key_count_; ++c)
#pragma GCC unroll 2
      for (int x = 0; x < registers; ++x) best[x] = S::max(best[x], S::load(weights + c * size + x * S::width));
#pragma GCC unroll 2
    for (int x = 0; x < registers; ++x) {
      m[x] = S::select_less(S::broadcast(-infinity<T>), best[x], best[x], S::zero());
      S::store(maximum_ + x * S::width, best[x]);
    }
    int c = 0;
    const auto exponentiate = [&](auto count) {  // registers of scores
      T* at = weights + c * size;
      Reg p[count.value];
#pragma GCC unroll 4
      for (int u = 0; u < count.value; ++u)
        p[u] = exponent_below<T>(S::load(at + u * S::width), m[u % registers], high, low);
      exp2_in_place<T, count.value>(p);
#pragma GCC unroll 4
      for (int u = 0; u < count.value; ++u) {
        S::store(at + u * S::width, p[u]);
        l[u % registers] = S::add(l[u % registers], p[u]);
      }
    };
    for (; c + group <= key_count_; c += group) exponentiate(std::integral_constant<int, 4>{});
    for (; c < key_count_; ++c) exponentiate(std::integral_constant<int, registers>{});
#pragma GCC unroll 2
    for (int x = 0; x < registers; ++x) {
      S::store(sum_ + x * S::width, l[x]);
      // l is 0, at least 1 (the maximum's weight), or NaN, which stays.
      divisor[x] = S::select_less(l[x], S::broadcast(T(0.5)), S::broadcast(T(1)), l[x]);
    }
    for (c = 0; c < key_count_; ++c)
#pragma GCC unroll 2
      for (int x = 0; x < registers; ++x) {
        T* p = weights + c * size + x * S::width;
        S::store(p, S::div(S::load(p), divisor[x]));
      }
  }

  void find_ranges(int first, int n) {
    all_visible_ = true;
    auto entry = rows_.walk(first);
    for (int r = 0; r < n; ++r, entry.next()) {
      const Range range = entry.range(0);
      all_visible_ &= range.begin <= 0 && range.end >= key_count_;
      begin_[r] = static_cast<T>(range.begin), end_[r] = static_cast<T>(range.end);
    }
    for (int r = n; r < panel_; ++r) begin_[r] = end_[r] = T(0);
  }

  // Pairs outside the ranges of the panel's rows become `replacement`.
  template <int registers>
  void hide(T* pairs, T replacement) const {
    if (all_visible_) return;
    const Reg hidden = S::broadcast(replacement);
    for (int c = 0; c < key_count_; ++c)
      for (int x = 0; x < registers; ++x) {
        T* pair = pairs + (c * registers + x) * S::width;
        const Reg key = S::broadcast(static_cast<T>(c));
        const Reg ended = S::select_less(key, S::load(end_ + x * S::width), S::load(pair), hidden);
        S::store(pair, S::select_less(key, S::load(begin_ + x * S::width), hidden, ended));
      }
  }

  // row_ = the first `padded` features of result_, transposed back.
  void unpack_rows(int n, int padded) {
    for (int g = 0; g * S::width < n; ++g)
      for (int d = 0; d < padded; d += S::width) {
        Reg block[S::width];
#pragma GCC unroll 16
        for (int i = 0; i < S::width; ++i) block[i] = S::load(result_ + (d + i) * panel_ + g * S::width);
        S::transpose(block);
        for (int r = 0; r < S::width && g * S::width + r < n; ++r)
          S::store(row_ + (g * S::width + r) * padded + d, block[r]);
      }
  }

  static void multiply(T* numbers, int count, T factor) {  // a multiple of the width
    const Reg f = S::broadcast(factor);
    for (int i = 0; i < count; i += S::width) S::store(numbers + i, S::mul(S::load(numbers + i), f));
  }

  const Problem& problem_;
  const RowList& rows_;
  const KeyList& list_;
  const ExponentScale<T> scale_;
  const int count_, key_count_, head_dim_, value_dim_, padded_head_dim_, padded_value_dim_;
  const int registers_, panel_;  // of a panel of rows
  bool all_visible_ = true;      // in the panel at hand
  T *keys_as_they_are_, *values_as_they_are_, *finite_keys_, *finite_values_;
  const T *key_ = nullptr, *value_ = nullptr;  // finite
  T *columns_, *weights_, *result_, *row_, *maximum_, *sum_, *begin_, *end_;
  T *score_grads_, *query_rows_, *grad_rows_, *grad_keys_;  // in the backward
  const T* source_[lanes<T>];
};

template <class T>
void run_small(const Problem& problem, const RowList& rows, void (Small<T>::*direction)()) {
  Arena measure(nullptr);
  Small<T>(problem, rows, measure);
  Arena arena(worker_scratch(measure.used()));
  Small<T> head(problem, rows, arena);
  (head.*direction)();
}
