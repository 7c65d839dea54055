// Products for items of few rows (decoding), where packing a key would cost more than using it; included inside the
// namespace of an instruction set. Keys and values are read where they lie, one pointer a row.

inline constexpr int few_rows = 8;

// A register holds `quad` features of several rows. Where it has no more lanes than that, this is one row.
template <class T>
constexpr int quad_size() {
  if constexpr (Simd<T>::width > 4) return Simd<T>::quad;
  else return Simd<T>::width;
}
template <class T>
inline constexpr int quad = quad_size<T>();
template <class T>
inline constexpr int quad_rows = Simd<T>::width / quad<T>;
static_assert(tile_rows<float> % quad_rows<float> == 0 && tile_rows<double> % quad_rows<double> == 0);  // whole strips

template <class T>
MMCA_INLINE typename Simd<T>::Reg broadcast_quad(const T* features) {
  if constexpr (Simd<T>::width > 4) return Simd<T>::broadcast_quad(features);
  else return Simd<T>::loadu(features);
}

// Each quad of the result: the sums of that quad of sum[0], sum[1], ...
template <class T>
MMCA_INLINE typename Simd<T>::Reg reduce_quads(typename Simd<T>::Reg (&sum)[quad<T>]) {
  using S = Simd<T>;
  if constexpr (S::width > 4) {
    return S::reduce_quads(sum);
  } else {
    S::transpose(sum);
#pragma GCC unroll 2
    for (int half = quad<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 2
      for (int i = 0; i < half; ++i) sum[i] = S::add(sum[i], sum[i + half]);
    return sum[0];
  }
}

// Rows as direct_score_tile reads them: [quad_rows rows][quad of features][row][feature].
template <class T>
void pack_quads(const T* row, int r, int padded, T factor, T* out) {
  out += r / quad_rows<T> * quad_rows<T> * padded + r % quad_rows<T> * quad<T>;
  for (int d = 0; d < padded; ++d) out[d / quad<T> * Simd<T>::width + d % quad<T>] = factor * row[d];
}

// scores[row][c] = <query[row], keys[c]> for c in 0..lanes-1: a quad of a key's features meets all rows of a register
// at once, and the sums of a quad of keys need no more than its own lanes. `padded`: features, a multiple of lanes.
template <class T, int stride>
MMCA_NOINLINE void direct_score_tile(int rows, int padded, const T* query, const T* const* keys, T* scores) {
  using S = Simd<T>;
  constexpr int group = std::min(8, lanes<T>);  // keys at once
  for (int first = 0; first < rows; first += quad_rows<T>, query += quad_rows<T> * padded)
    for (int c = 0; c < lanes<T>; c += group) {
      typename S::Reg sum[group];
#pragma GCC unroll 8
      for (int i = 0; i < group; ++i) sum[i] = S::zero();
      for (int d = 0; d < padded; d += quad<T>) {
        const typename S::Reg q = S::load(query + d * quad_rows<T>);
#pragma GCC unroll 8
        for (int i = 0; i < group; ++i) sum[i] = S::fma(q, broadcast_quad(keys[c + i] + d), sum[i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < group; i += quad<T>) {
        typename S::Reg of_quad[quad<T>];
#pragma GCC unroll 4
        for (int j = 0; j < quad<T>; ++j) of_quad[j] = sum[i + j];
        alignas(64) T result[quad_rows<T>][quad<T>];
        S::store(result[0], reduce_quads<T>(of_quad));
        for (int r = 0; r < quad_rows<T> && first + r < rows; ++r)
          std::memcpy(scores + (first + r) * stride + c + i, result[r], sizeof result[r]);
      }
    }
}

// out[row][0..registers * width) = factor[row] * out + weights[row][0..depth) * values, for `rows` rows
template <class T, int rows, int registers, int stride>
MMCA_INLINE void direct_row_tile(int depth, const T* weights, const T* const* values, int d, T* out,
                                 std::ptrdiff_t out_stride, const T* factor) {
  using S = Simd<T>;
  typename S::Reg sum[rows][registers];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int x = 0; x < registers; ++x) sum[r][x] = S::zero();
  for (int c = 0; c < depth; ++c) {
    const T* value = values[c] + d;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const typename S::Reg w = S::broadcast(weights[r * stride + c]);
#pragma GCC unroll 8
      for (int x = 0; x < registers; ++x) sum[r][x] = S::fma(w, S::loadu(value + x * S::width), sum[r][x]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int x = 0; x < registers; ++x) {
      T* c = out + r * out_stride + d + x * S::width;
      S::store(c, S::fma(S::broadcast(factor[r]), S::load(c), sum[r][x]));
    }
}

template <class T, int rows, int stride>
MMCA_NOINLINE void direct_rows(int depth, const T* weights, const T* const* values, int padded, T* out,
                               const T* factor) {
  constexpr int registers = 8 / rows, step = registers * Simd<T>::width;
  int d = 0;
  for (; d + step <= padded; d += step)
    direct_row_tile<T, rows, registers, stride>(depth, weights, values, d, out, padded, factor);
  for (; d < padded; d += lanes<T>) direct_row_tile<T, rows, 2, stride>(depth, weights, values, d, out, padded, factor);
}

template <class T, int stride>
void direct_weigh(int rows, int depth, const T* weights, const T* const* values, int padded, T* out, const T* factor) {
  int r = 0;
  const auto advance = [&](auto count) {
    constexpr int n = count.value;
    for (; r + n <= rows; r += n)
      direct_rows<T, n, stride>(depth, weights + r * stride, values, padded,
                                out + static_cast<std::ptrdiff_t>(r) * padded, factor + r);
  };
  advance(std::integral_constant<int, 4>{});
  advance(std::integral_constant<int, 2>{});
  advance(std::integral_constant<int, 1>{});
}

// The products (cpu/products.h) of an item of few rows. Layout: Q as pack_quads makes it, S and P [row][key].
template <class T>
class DirectProducts {
 public:
  static constexpr int strip_rows = tile_rows<T>, row_block = round_up(few_rows, strip_rows), key_block = 256;
  static constexpr int stride = key_block + 16;
  struct Session {};

  DirectProducts(const RowList& rows, std::int64_t begin, int count, T query_factor, Arena& arena)
      : from_(rows, width), begin_(begin), count_(count), query_factor_(query_factor) {
    query_ = arena.take<T>(static_cast<std::size_t>(round_up(few_rows, quad_rows<T>)) * from_.padded_head_dim);
    keys_ = arena.take<T>(static_cast<std::size_t>(width) * from_.padded_head_dim);
    values_ = arena.take<T>(static_cast<std::size_t>(width) * from_.padded_value_dim);
    scores_ = arena.take<T>(static_cast<std::size_t>(row_block) * stride);
    before_ = arena.take<T>(static_cast<std::size_t>(few_rows) * from_.padded_value_dim);
    buffer_ = arena.take<T>(from_.padded_head_dim);
  }

  void pack_queries() {
    for (int r = 0; r < count_; ++r) {
      const Row row = from_.rows.at(begin_ + r);
      pack_quads<T>(from_.query(row).row(row.row, buffer_), r, from_.padded_head_dim, query_factor_, query_);
    }
  }
  void pack_keys(const KeyList& list, std::int32_t first, int keys) {
    list_ = &list, first_ = first, keys_in_block_ = keys, panel_ = -1;
  }

  T* scores(int row) { return scores_ + row * stride; }

  void score(int first, int rows, int c, T* out, T* row_max) {
    if (panel_ != c) find_rows(from_.key(), c, keys_), panel_ = c;
    direct_score_tile<T, stride>(rows, from_.padded_head_dim, query_ + first * from_.padded_head_dim, found_, out);
    if (row_max) track_maxima<T>(rows, out, stride, row_max);
  }

  MMCA_INLINE typename Simd<T>::Reg exponentiate(int row, int from, int count, const ExponentScale<T>& scale, T maximum,
                                                 bool) {
    return exp2_row<T>(scores(row) + from, count, scale, maximum);
  }
  void keep(int, int, int) {}
  T weight(int row, int c) const { return scores_[row * stride + c]; }

  // Nobody has looked at the values yet: only when a sum is not finite are they copied without their NaNs and
  // infinities, and the sums taken again.
  void weigh(T* out, int rows, const std::uint64_t* live, const T* factor) {
    const int elements = rows * from_.padded_value_dim;
    std::copy_n(out, elements, before_);
    weigh_live(out, rows, live, factor, false);
    values_finite_ = all_finite(out, elements);
    if (values_finite_) return;
    std::copy_n(before_, elements, out);
    weigh_live(out, rows, live, factor, true);
  }

  bool values_finite() const { return values_finite_; }

 private:
  using S = Simd<T>;
  static constexpr int width = lanes<T>;

  // Points at a panel of keys or values where they lie, or at copies in `copies` if they lie unfit; lanes past the end
  // repeat the last one. A panel at a time: the copies are read back from the nearest cache.
  void find_rows(const RowReader<T>& reader, int c, T* copies) {
    const int count = std::min(width, keys_in_block_ - c);
    if (list_->identity()) reader.rows(first_ + c, count, copies, found_);
    else
      for (int i = 0; i < count; ++i)
        found_[i] = reader.row(list_->position(first_ + c + i), copies + i * reader.padded);
    std::fill(found_ + count, found_ + width, found_[count - 1]);
  }

  void weigh_live(T* out, int rows, const std::uint64_t* live, const T* factor, bool clean) {
    const RowReader<T> value = from_.value();
    T ones[few_rows];
    std::fill_n(ones, few_rows, T(1));
    std::uint64_t rescaled = 0;  // bit s: of strip s
    for (int c = 0; c < keys_in_block_; c += width) {
      const int count = std::min(width, keys_in_block_ - c);
      bool found = false;
      for (int r = 0, s = 0; r < rows; r += strip_rows, ++s) {
        if (!(live[s] >> (c / width) & 1)) continue;
        if (!found) find_rows(value, c, values_);
        if (!found && clean) copy_without_non_finite(count);
        found = true;
        direct_weigh<T, stride>(std::min(strip_rows, rows - r), count, scores(r) + c, found_, value.padded,
                                out + r * value.padded, rescaled >> s & 1 ? ones : factor + r);
        rescaled |= std::uint64_t{1} << s;
      }
    }
  }

  void copy_without_non_finite(int count) {
    const int padded = from_.padded_value_dim;
    for (int i = 0; i < count; ++i) {
      T* copy = values_ + i * padded;
      if (found_[i] != copy) std::copy_n(found_[i], padded, copy);
      zero_non_finite(copy, padded);
      found_[i] = copy;
    }
  }

  const Operands<T> from_;
  const std::int64_t begin_;
  const int count_;
  const T query_factor_;
  const KeyList* list_ = nullptr;
  std::int32_t first_ = 0;
  int keys_in_block_ = 0, panel_ = -1;
  bool values_finite_ = true;
  T *query_, *keys_, *values_, *scores_, *before_, *buffer_;
  const T* found_[width];  // a panel of keys or values
};
