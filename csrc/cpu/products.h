// The two products of a forward item, S = Q K^T and O = f O + P V; included inside the namespace of an instruction set.
//
// A forward (cpu/forward.h) walks its rows and keys the same way whatever multiplies them. PackedProducts, here, packs
// both operands for the register tiles of cpu/tiles.h; DirectProducts (cpu/few_rows.h) reads keys and values where they
// lie; MatrixProducts (cpu/amx_products.h) is for processors that multiply whole matrices. Each of them has
//
//     row_block, key_block     rows and keys that meet at a time; strip_rows: rows of a strip, a unit of both
//     pack_queries()           of the item, once
//     pack_keys(..)            a block of keys and values
//     scores(r), stride        a row of S, one for each row of a block, and from one to the next
//     score(..)                one strip meets one panel of `lanes` keys
//     exponentiate(..)         scores of a row become its weights P, however the products keep these; their lane-wise
//     sum keep(..)                 weights that the forward has changed in scores(r) are kept likewise weight(r, c) P
//     again weigh(..)                O = f O + P V values_finite()          does the block's V have no NaN or infinity?
//     Where it has, they count as 0

// Q, K and V of an item as rows of T, padded to a multiple of `multiple` features.
template <class T>
struct Operands {
  const RowList& rows;
  const int head_dim, value_dim, padded_head_dim, padded_value_dim;

  Operands(const RowList& rows_, int multiple)
      : rows(rows_),
        head_dim(static_cast<int>(rows.problem.head_dim)),
        value_dim(static_cast<int>(rows.problem.value_dim)),
        padded_head_dim(round_up(head_dim, multiple)),
        padded_value_dim(round_up(value_dim, multiple)) {}

  RowReader<T> query(Row row) const {
    return {rows.problem.query, rows.problem.dtype, row.head, head_dim, padded_head_dim};
  }
  RowReader<T> key() const { return {rows.problem.key, rows.problem.dtype, rows.kv_head, head_dim, padded_head_dim}; }
  RowReader<T> value() const {
    return {rows.problem.value, rows.problem.dtype, rows.kv_head, value_dim, padded_value_dim};
  }
  // dO, and O as the forward stored it: of one group where the groups' outputs stay apart.
  RowReader<T> grad(Row row, int group) const { return result(rows.problem.grad_out, row, group); }
  RowReader<T> out(Row row, int group) const {
    const Output& out = rows.problem.out;
    return result({out.data, out.batch, out.head, out.row, out.feature, out.group}, row, group);
  }

 private:
  RowReader<T> result(const Input& input, Row row, int group) const {
    RowReader<T> reader(input, rows.problem.dtype, row.head, value_dim, padded_value_dim);
    if (input.group) reader.data += group * input.group * element_size(rows.problem.dtype);
    return reader;
  }
};

// row_max = the lane-wise maximum of it and a tile of scores.
template <class T>
MMCA_INLINE void track_maxima(int rows, const T* scores, std::ptrdiff_t stride, T* row_max) {
  using S = Simd<T>;
  for (int r = 0; r < rows; ++r, scores += stride, row_max += S::width)
    S::store(row_max, S::max(S::load(row_max), S::max(S::load(scores), S::load(scores + S::width))));
}

// Layout: Q [strip][feature][tile_rows], K [panel][feature][lanes], V [panel][key][lanes], S and P [row][key].
template <class T>
class PackedProducts {
 public:
  static constexpr int strip_rows = tile_rows<T>, row_block = 96, key_block = 256;
  static constexpr int stride = key_block + 16;  // off the powers of two
  struct Session {};                             // what must be set up before products and taken down after

  PackedProducts(const RowList& rows, std::int64_t begin, int count, T query_factor, Arena& arena)
      : from_(rows, width),
        begin_(begin),
        count_(count),
        query_factor_(query_factor),
        strip_size_(round_up(from_.head_dim, S::width) * strip_rows + S::width) {
    const int dim = std::max(from_.padded_head_dim, from_.padded_value_dim);
    query_ = arena.take<T>(static_cast<std::size_t>(round_up(count, strip_rows) / strip_rows) * strip_size_);
    keys_ = arena.take<T>(static_cast<std::size_t>(key_block) * from_.padded_head_dim);
    values_ = arena.take<T>(static_cast<std::size_t>(key_block) * from_.padded_value_dim);
    scores_ = arena.take<T>(static_cast<std::size_t>(row_block) * stride);
    buffer_ = arena.take<T>(static_cast<std::size_t>(std::max(width, strip_rows)) * dim);
  }

  void pack_queries() {
    const T* source[strip_rows];
    for (int first = 0; first < count_; first += strip_rows) {
      const int n = std::min(strip_rows, count_ - first);
      for (int r = 0; r < n; ++r) {
        const Row row = from_.rows.at(begin_ + first + r);
        source[r] = from_.query(row).row(row.row, buffer_ + r * from_.padded_head_dim);
      }
      pack_columns<T, strip_rows>(source, n, from_.head_dim, query_factor_,
                                  query_ + static_cast<std::ptrdiff_t>(first / strip_rows) * strip_size_);
    }
  }

  void pack_keys(const KeyList& list, std::int32_t first, int keys) {
    const RowReader<T> key = from_.key(), value = from_.value();
    constexpr std::ptrdiff_t panel = static_cast<std::ptrdiff_t>(key_block) * width;
    const T* source[width];
    typename S::Reg finite = S::zero();
    for (int c = 0; c < keys; c += width) {
      const int n = std::min(width, keys - c);
      for (int i = 0; i < n; ++i) source[i] = key.row(list.position(first + c + i), buffer_ + i * key.padded);
      pack_columns<T, width>(source, n, from_.head_dim, T(1), keys_ + static_cast<std::ptrdiff_t>(c) * key.padded);
      for (int i = 0; i < n; ++i)
        finite = pack_row<T>(value.row(list.position(first + c + i), buffer_), value.padded, values_ + (c + i) * width,
                             panel, finite);
      for (int i = n; i < width; ++i) pack_zero_row<T>(value.padded, values_ + (c + i) * width, panel);
    }
    keys_in_block_ = keys;
    values_finite_ = is_finite(S::reduce_add(finite));
    if (!values_finite_) zero_non_finite(values_, panel * (value.padded / width));
  }

  T* scores(int row) { return scores_ + row * stride; }

  // Row `first` of the item and the strip's others meet keys c .. c + width - 1 of the block: scores from `out` on,
  // and, unless null, their maxima.
  MMCA_INLINE void score(int first, int rows, int c, T* out, T* row_max) const {
    const T* panel = keys_ + static_cast<std::ptrdiff_t>(c) * from_.padded_head_dim;
    const T* strip = query_ + static_cast<std::ptrdiff_t>(first / strip_rows) * strip_size_;
    with_tile_height<T>(rows, [&](auto height) {
      if (row_max) score_tile<T, height.value, stride, true>(from_.head_dim, strip, panel, out, row_max);
      else score_tile<T, height.value, stride>(from_.head_dim, strip, panel, out);
    });
  }

  MMCA_INLINE typename Simd<T>::Reg exponentiate(int row, int from, int count, const ExponentScale<T>& scale, T maximum,
                                                 bool) {
    return exp2_row<T>(scores(row) + from, count, scale, maximum);
  }
  void keep(int, int, int) {}
  T weight(int row, int c) const { return scores_[row * stride + c]; }

  // Of a block of rows with the live panels of each strip; sums over the others are skipped.
  void weigh(T* out, int rows, const std::uint64_t* live, const T* factor) {
    for (int d = 0; d < from_.padded_value_dim; d += width)
      for (int r = 0, s = 0; r < rows; r += strip_rows, ++s)
        if (live[s])
          weigh_strip(out + static_cast<std::ptrdiff_t>(r) * from_.padded_value_dim + d, r,
                      std::min(strip_rows, rows - r), values_ + static_cast<std::ptrdiff_t>(d) * key_block, live[s],
                      factor + r);
  }

  bool values_finite() const { return values_finite_; }

 private:
  using S = Simd<T>;
  static constexpr int width = lanes<T>;
  static_assert(row_block % strip_rows == 0 && key_block % width == 0 && key_block / width <= 64);

  void weigh_strip(T* out, int row, int rows, const T* values, std::uint64_t live, const T* factor) {
    bool rescale = true;
    for_each_run(live, [&](int first_panel, int end_panel) {
      const int from = first_panel * width, depth = std::min(end_panel * width, keys_in_block_) - from;
      const T *p = scores(row) + from, *v = values + static_cast<std::ptrdiff_t>(from) * width;
      with_tile_height<T>(rows, [&](auto height) {
        if (rescale) rescaled_row_tile<T, height.value, stride>(depth, p, v, out, from_.padded_value_dim, factor);
        else row_tile<T, height.value, stride>(depth, p, v, out, from_.padded_value_dim);
      });
      rescale = false;
    });
  }

  const Operands<T> from_;
  const std::int64_t begin_;
  const int count_;
  const T query_factor_;
  const int strip_size_;
  int keys_in_block_ = 0;
  bool values_finite_ = true;
  T *query_, *keys_, *values_, *scores_, *buffer_;
};
