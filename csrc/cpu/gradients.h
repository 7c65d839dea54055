// The products of a backward item: S = Q K^T, dP = dO V^T, dQ += dS K, dV += P^T dO and dK += dS^T Q; included inside
// the namespace of an instruction set.
//
// As in the forward (cpu/products.h), the walk over rows and keys (cpu/backward.h) is the same whatever multiplies.
// PackedGradients, here, are register tiles of packed operands; MatrixGradients (cpu/amx_gradients.h) are for
// processors that multiply whole matrices. Each of them has
//
//     row_block, key_block            rows and keys that meet at a time; strip_rows, key_step: rows and keys are padded
//                                     to multiples of these
//     pack_keys(..)                   a range of keys and values, dK = dV = 0
//     pack_rows(..)                   a block of rows of Q and dO; padding rows, and a dO of weight 0, are zero
//     scores(r), grads(r), stride     S and dP of a row of the block, and from one row to the next; then P and dS
//     score(..)                       one strip meets one panel of `lanes` keys
//     keep(..)                        a strip's P and dS are done
//     add_query_gradient(..)          dQ += dS K, in the panels that are live
//     add_key_gradients(..)           dV += P^T dO and dK += dS^T Q, likewise
//     finish_keys(..)                 after the last row: grad_key(k) and grad_value(k) hold dK and dV of a key
//     keys_finite(), queries_finite(), grads_finite()
//                                     have K, Q, dO no NaN or infinity? Where they have, these count as 0 in dQ, dK, dV

// Layout: Q and dO strips [strip][feature][tile_rows]; K and V columns [panel][feature][lanes]; K, Q and dO rows
// [feature panel][row][lanes]; P and dS [row][key]; dK and dV [key][feature].
template <class T>
class PackedGradients {
 public:
  static constexpr int strip_rows = tile_rows<T>, row_block = 96, key_block = 192;
  static constexpr int key_step = std::lcm(strip_rows, lanes<T>);
  static constexpr int stride = key_block + 16;
  struct Session {};

  PackedGradients(const RowList& rows, int range_keys, T query_factor, Arena& arena)
      : from_(rows, width),
        range_keys_(range_keys),
        query_factor_(query_factor),
        strip_size_(round_up(from_.head_dim, S::width) * strip_rows + S::width),
        value_strip_size_(round_up(from_.value_dim, S::width) * strip_rows + S::width) {
    const auto keys = static_cast<std::size_t>(range_keys), block = static_cast<std::size_t>(row_block);
    const int head_dim = from_.padded_head_dim, value_dim = from_.padded_value_dim;
    key_columns_ = arena.take<T>(keys * head_dim);
    value_columns_ = arena.take<T>(keys * value_dim);
    key_rows_ = arena.take<T>(keys * head_dim);
    grad_key_ = arena.take<T>(keys * head_dim);
    grad_value_ = arena.take<T>(keys * value_dim);
    query_strips_ = arena.take<T>(static_cast<std::size_t>(block_strips) * strip_size_);
    grad_strips_ = arena.take<T>(static_cast<std::size_t>(block_strips) * value_strip_size_);
    query_rows_ = arena.take<T>(block * head_dim);
    grad_rows_ = arena.take<T>(block * value_dim);
    scores_ = arena.take<T>(block * stride);
    grads_ = arena.take<T>(block * stride);
    const auto buffer = static_cast<std::size_t>(std::max(width, strip_rows));
    buffer_ = arena.take<T>(buffer * std::max(head_dim, value_dim));
    grad_buffer_ = arena.take<T>(buffer * value_dim);
  }

  void pack_keys(const KeyList& list, std::int32_t first, int keys) {
    const RowReader<T> key = from_.key(), value = from_.value();
    const std::ptrdiff_t panel = static_cast<std::ptrdiff_t>(range_keys_) * width;
    const T* source[width];
    typename S::Reg finite = S::zero();
    for (int c = 0; c < round_up(keys, width); c += width) {
      const int n = std::min(width, keys - c);
      for (int i = 0; i < n; ++i) source[i] = key.row(list.position(first + c + i), buffer_ + i * key.padded);
      pack_columns<T, width>(source, n, from_.head_dim, T(1),
                             key_columns_ + static_cast<std::ptrdiff_t>(c) * key.padded);
      for (int i = 0; i < n; ++i)
        finite = pack_row<T>(source[i], key.padded, key_rows_ + (c + i) * width, panel, finite);
      for (int i = n; i < width; ++i) pack_zero_row<T>(key.padded, key_rows_ + (c + i) * width, panel);
      for (int i = 0; i < n; ++i) source[i] = value.row(list.position(first + c + i), buffer_ + i * value.padded);
      pack_columns<T, width>(source, n, from_.value_dim, T(1),
                             value_columns_ + static_cast<std::ptrdiff_t>(c) * value.padded);
    }
    keys_finite_ = is_finite(S::reduce_add(finite));
    if (!keys_finite_) zero_non_finite(key_rows_, panel * (key.padded / width));
    std::fill_n(grad_key_, static_cast<std::size_t>(round_up(keys, strip_rows)) * from_.padded_head_dim, T(0));
    std::fill_n(grad_value_, static_cast<std::size_t>(round_up(keys, strip_rows)) * from_.padded_value_dim, T(0));
  }

  void pack_rows(std::int64_t entry, int rows, int group, const T* weight) {
    constexpr std::ptrdiff_t panel = static_cast<std::ptrdiff_t>(row_block) * width;
    const int head_dim = from_.padded_head_dim, value_dim = from_.padded_value_dim;
    const T *query[strip_rows], *grad[strip_rows];
    typename S::Reg query_finite = S::zero(), grad_finite = S::zero();
    for (int r0 = 0; r0 < round_up(rows, strip_rows); r0 += strip_rows) {
      const int n = std::min(strip_rows, rows - r0);
      for (int i = 0; i < n; ++i) {
        const Row row = from_.rows.at(entry + r0 + i);
        query[i] = from_.query(row).row(row.row, buffer_ + i * head_dim);
        T* buffer = grad_buffer_ + i * value_dim;
        grad[i] = from_.grad(row, group).row(row.row, buffer);
        if (weight[r0 + i] == T(0)) std::fill_n(buffer, value_dim, T(0)), grad[i] = buffer;
        query_finite = pack_row<T>(query[i], head_dim, query_rows_ + (r0 + i) * width, panel, query_finite);
        grad_finite = pack_row<T>(grad[i], value_dim, grad_rows_ + (r0 + i) * width, panel, grad_finite);
      }
      for (int i = n; i < strip_rows; ++i) {
        pack_zero_row<T>(head_dim, query_rows_ + (r0 + i) * width, panel);
        pack_zero_row<T>(value_dim, grad_rows_ + (r0 + i) * width, panel);
      }
      pack_columns<T, strip_rows>(query, n, from_.head_dim, query_factor_,
                                  query_strips_ + r0 / strip_rows * strip_size_);
      pack_columns<T, strip_rows>(grad, n, from_.value_dim, T(1), grad_strips_ + r0 / strip_rows * value_strip_size_);
    }
    queries_finite_ = is_finite(S::reduce_add(query_finite));
    grads_finite_ = is_finite(S::reduce_add(grad_finite));
    if (!queries_finite_) zero_non_finite(query_rows_, panel * (head_dim / width));
    if (!grads_finite_) zero_non_finite(grad_rows_, panel * (value_dim / width));
  }

  T* scores(int row) { return scores_ + row * stride; }
  T* grads(int row) { return grads_ + row * stride; }

  // The strip at row `first` of the block meets the keys from `packed` on of the range, which are columns of the block
  // from `column` on.
  void score(int first, int packed, int column) {
    const int s = first / strip_rows;
    const std::ptrdiff_t key = packed;
    score_tile<T, strip_rows, stride>(from_.head_dim, query_strips_ + s * strip_size_,
                                      key_columns_ + key * from_.padded_head_dim, scores(first) + column);
    score_tile<T, strip_rows, stride>(from_.value_dim, grad_strips_ + s * value_strip_size_,
                                      value_columns_ + key * from_.padded_value_dim, grads(first) + column);
  }

  // Rows first .. first + count - 1 have P and dS in columns from .. to - 1; of the block's `keys` others are zero.
  void keep(int first, int count, int from, int to, int keys, std::uint64_t) {
    const int end = round_up(keys, strip_rows);
    for (int r = first; r < first + count; ++r)
      for (T* row : {scores(r), grads(r)}) {
        std::fill_n(row, from, T(0));
        if (to < end) std::fill_n(row + to, end - to, T(0));
      }
  }

  // Of the block's `rows`, which meet keys packed .. packed + keys - 1 of the range.
  void add_query_gradient(T* grad_query, int rows, int packed, int keys, const std::uint64_t* live) {
    const std::ptrdiff_t key_panel = static_cast<std::ptrdiff_t>(range_keys_) * width;
    const int head_dim = from_.padded_head_dim;
    for (int d = 0; d < head_dim; d += width)
      for (int r = 0, s = 0; r < rows; r += strip_rows, ++s)
        for_each_run(live[s], [&](int first_panel, int end_panel) {
          const int begin = first_panel * width;
          row_tile<T, strip_rows, stride>(
              std::min(end_panel * width, keys) - begin, grads(r) + begin,
              key_rows_ + d / width * key_panel + static_cast<std::ptrdiff_t>(packed + begin) * width,
              grad_query + static_cast<std::ptrdiff_t>(r) * head_dim + d, head_dim);
        });
  }

  void add_key_gradients(int rows, int packed, int keys, const std::uint64_t* live) {
    const int padded_keys = round_up(keys, strip_rows);
    add_transposed(scores_, grad_rows_, from_.padded_value_dim, grad_value(packed), padded_keys, rows, live);
    add_transposed(grads_, query_rows_, from_.padded_head_dim, grad_key(packed), padded_keys, rows, live);
  }

  void finish_keys(int) {}
  T* grad_key(int k) { return grad_key_ + static_cast<std::ptrdiff_t>(k) * from_.padded_head_dim; }
  T* grad_value(int k) { return grad_value_ + static_cast<std::ptrdiff_t>(k) * from_.padded_value_dim; }

  bool keys_finite() const { return keys_finite_; }
  bool queries_finite() const { return queries_finite_; }
  bool grads_finite() const { return grads_finite_; }

 private:
  using S = Simd<T>;
  static constexpr int width = lanes<T>, block_strips = row_block / strip_rows;
  static_assert(row_block % strip_rows == 0 && key_block % key_step == 0);

  // gradient[key] += columns of `weights` times packed rows, over the strips that look at the keys.
  void add_transposed(const T* weights, const T* packed_rows, int dim, T* gradient, int padded_keys, int rows,
                      const std::uint64_t* live) {
    std::uint64_t lookers[key_block / strip_rows];  // bit s: strip s looks at one of these tile_rows keys
    for (int k = 0; k < padded_keys; k += strip_rows) {
      const std::uint64_t panels = (std::uint64_t{2} << (k + strip_rows - 1) / width) - (std::uint64_t{1} << k / width);
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
                                     gradient + static_cast<std::ptrdiff_t>(k) * dim + d, dim);
        });
  }

  const Operands<T> from_;
  const int range_keys_;
  const T query_factor_;
  const int strip_size_, value_strip_size_;
  bool keys_finite_ = true, queries_finite_ = true, grads_finite_ = true;
  T *key_columns_, *value_columns_, *key_rows_, *grad_key_, *grad_value_;
  T *query_strips_, *grad_strips_, *query_rows_, *grad_rows_, *scores_, *grads_;
  T *buffer_, *grad_buffer_;
};
