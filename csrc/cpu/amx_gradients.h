// The products of a backward item (cpu/gradients.h) by matrix instructions; included inside the namespace of AMX.
//
//     S = Q K^T,  dP = dO V^T,  dQ += dS K,  dV^T += dO^T P,  dK^T += Q^T dS
//
// All of Q, K, V and dO is exact; P and dS, floats, go into the tiles in parts (cpu/amx_tiles.h).
//
// Layout: Q and dO in strips, and transposed, [strip][16 features][feature][pair of rows][2]; K and V in feature pairs,
// K also in row pairs. S and dP, then P and dS, [row][key]; then, for live panels, P and dS in row pairs,
// [panel][strip][16 keys][part][pair of rows][key][2], and dS in rows, [strip][panel][16 rows][part][row][pair of
// keys][2]. dK^T and dV^T [feature][key] until the last row has passed, then dK and dV [key][feature].
template <class T>
class MatrixGradients {
 public:
  static_assert(std::is_same_v<T, float>);
  static constexpr int strip_rows = 32, row_block = 96, key_block = 192, key_step = lanes<float>;
  static constexpr int stride = key_block + 16;
  using Session = Tiles::Session;

  MatrixGradients(const RowList& rows, int range_keys, float query_factor, Arena& arena)
      : from_(rows, width), range_keys_(range_keys), key_stride_(range_keys + 16), query_factor_(query_factor) {
    const auto keys = static_cast<std::size_t>(range_keys), block = static_cast<std::size_t>(row_block);
    const auto key_stride = static_cast<std::size_t>(key_stride_);
    const int head_dim = from_.padded_head_dim, value_dim = from_.padded_value_dim;
    constexpr auto tiles = static_cast<std::size_t>(2 * block_panels * block_strips * 3 * Tiles::elements);
    for (BFloat16** x : {&key_columns_, &key_pairs_}) *x = arena.take<BFloat16>(keys * head_dim);
    value_columns_ = arena.take<BFloat16>(keys * value_dim);
    for (BFloat16** x : {&query_, &query_columns_}) *x = arena.take<BFloat16>(block * head_dim);
    for (BFloat16** x : {&grad_, &grad_columns_}) *x = arena.take<BFloat16>(block * value_dim);
    for (BFloat16** x : {&weight_pairs_, &grad_pairs_, &grad_tiles_}) *x = arena.take<BFloat16>(tiles);
    for (float** x : {&scores_, &grads_}) *x = arena.take<float>(block * stride);
    grad_key_ = arena.take<float>(keys * head_dim);
    grad_value_ = arena.take<float>(keys * value_dim);
    grad_key_columns_ = arena.take<float>(key_stride * head_dim);
    grad_value_columns_ = arena.take<float>(key_stride * value_dim);
    buffer_ = arena.take<BFloat16>(static_cast<std::size_t>(width) * std::max(head_dim, value_dim));
  }

  void pack_keys(const KeyList& list, std::int32_t first, int keys) {
    const RowReader<BFloat16> key = from_.key(), value = from_.value();
    const BFloat16* source[width];
    parts_ = list.size < two_parts_from || from_.rows.size() < two_parts_from ? 3 : 2;
    keys_finite_ = true;
    for (int c = 0; c < keys; c += width) {
      const int n = std::min(width, keys - c);
      for (int i = 0; i < n; ++i) source[i] = key.row(list.position(first + c + i), buffer_ + i * key.padded);
      pack_feature_pairs(source, n, key.padded, key_columns_ + static_cast<std::ptrdiff_t>(c) * key.padded);
      keys_finite_ &= pack_row_pairs(source, n, key.padded, key_pairs_ + static_cast<std::ptrdiff_t>(c) * key.padded);
      for (int i = 0; i < n; ++i) source[i] = value.row(list.position(first + c + i), buffer_ + i * value.padded);
      pack_feature_pairs(source, n, value.padded, value_columns_ + static_cast<std::ptrdiff_t>(c) * value.padded);
    }
    const std::ptrdiff_t head_dim = from_.padded_head_dim, value_dim = from_.padded_value_dim;
    std::fill_n(grad_key_, keys * head_dim, 0.0f), std::fill_n(grad_key_columns_, key_stride_ * head_dim, 0.0f);
    std::fill_n(grad_value_, keys * value_dim, 0.0f), std::fill_n(grad_value_columns_, key_stride_ * value_dim, 0.0f);
  }

  void pack_rows(std::int64_t entry, int rows, int group, const float* weight) {
    queries_finite_ = grads_finite_ = true;
    for (int first = 0; first < rows; first += strip_rows) {
      const int n = std::min(strip_rows, rows - first);
      const auto pack = [&](int padded, float factor, BFloat16* strips, BFloat16* columns, const auto& find) {
        const BFloat16* source[strip_rows] = {};
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(first) * padded;
        for (int i = 0; i < strip_rows; ++i) {
          if (i < n) source[i] = find(first + i, from_.rows.at(entry + first + i), buffer_ + i * padded);
          pack_strip_row(source[i], padded, factor, strips + at + i * 32);
        }
        return pack_transposed(source, n, padded, columns + at);
      };
      queries_finite_ &= pack(from_.padded_head_dim, query_factor_, query_, query_columns_,
                              [&](int, Row row, BFloat16* buffer) { return from_.query(row).row(row.row, buffer); });
      grads_finite_ &= pack(from_.padded_value_dim, 1.0f, grad_, grad_columns_, [&](int r, Row row, BFloat16* buffer) {
        if (weight[r] != 0.0f) return from_.grad(row, group).row(row.row, buffer);
        std::fill_n(buffer, from_.padded_value_dim, BFloat16(0.0f));
        return static_cast<const BFloat16*>(buffer);
      });
    }
  }

  float* scores(int row) { return scores_ + row * stride; }
  float* grads(int row) { return grads_ + row * stride; }

  void score(int first, int packed, int column) {
    const auto multiply = [&](const BFloat16* strips, const BFloat16* columns, int padded, float* out) {
      const BFloat16 *strip = strips + first * padded, *panel = columns + static_cast<std::ptrdiff_t>(packed) * padded;
      for (int half = 0; half < width; half += 16, panel += 16 * padded)
        multiply_strip<true, stride>(strip, panel, padded, out + half);
    };
    multiply(query_, key_columns_, from_.padded_head_dim, scores(first) + column);
    multiply(grad_, value_columns_, from_.padded_value_dim, grads(first) + column);
  }

  void keep(int first, int count, int, int, int, std::uint64_t live) {
    for (; live; live &= live - 1) {
      const int p = __builtin_ctzll(live);
      if (parts_ == 2) keep_panel<2>(first, count, p);
      else keep_panel<3>(first, count, p);
    }
  }

  void add_query_gradient(float* grad_query, int rows, int packed, int, const std::uint64_t* live) {
    for (int s = 0; s * strip_rows < rows; ++s)
      if (live[s])
        for (int d = 0; d < from_.padded_head_dim; d += 32) {
          float* out = grad_query + static_cast<std::ptrdiff_t>(s) * strip_rows * from_.padded_head_dim + d;
          const BFloat16* keys =
              key_pairs_ + static_cast<std::ptrdiff_t>(packed) * from_.padded_head_dim + d / 32 * (2 * Tiles::elements);
          if (parts_ == 2) add_query_columns<2>(out, s, keys, live[s]);
          else add_query_columns<3>(out, s, keys, live[s]);
        }
  }

  void add_key_gradients(int rows, int packed, int keys, const std::uint64_t* live) {
    for (int p = 0; p * width < keys; ++p) {
      std::uint64_t strips = 0;
      for (int s = 0; s * strip_rows < rows; ++s) strips |= (live[s] >> p & 1) << s;
      if (!strips) continue;
      const int key = packed + p * width;
      const auto add = parts_ == 2 ? &MatrixGradients::add_transposed<2> : &MatrixGradients::add_transposed<3>;
      (this->*add)(weight_pairs_, grad_columns_, from_.padded_value_dim, grad_value_columns_ + key, p, strips);
      (this->*add)(grad_pairs_, query_columns_, from_.padded_head_dim, grad_key_columns_ + key, p, strips);
    }
  }

  void finish_keys(int keys) {
    add_columns(grad_key_columns_, keys, from_.padded_head_dim, grad_key_);
    add_columns(grad_value_columns_, keys, from_.padded_value_dim, grad_value_);
  }
  float* grad_key(int k) { return grad_key_ + static_cast<std::ptrdiff_t>(k) * from_.padded_head_dim; }
  float* grad_value(int k) { return grad_value_ + static_cast<std::ptrdiff_t>(k) * from_.padded_value_dim; }

  bool keys_finite() const { return keys_finite_; }
  bool queries_finite() const { return queries_finite_; }
  bool grads_finite() const { return grads_finite_; }

 private:
  static constexpr int width = lanes<float>, block_strips = row_block / strip_rows, block_panels = key_block / width;

  // The strip's P and dS of one panel, in parts; rows from `count` on are zero.
  template <int parts>
  void keep_panel(int first, int count, int p) {
    const int s = first / strip_rows;
    BFloat16 *weights = weight_pairs_ + pair_tile<parts>(p, s), *grads_in_pairs = grad_pairs_ + pair_tile<parts>(p, s),
             *grads_in_rows = grad_tiles_ + row_tile<parts>(s, p);
    for (int j = 0; j < 16; ++j) {
      __m512i weight[2][2][parts], grad[2][2][parts];  // of row j and j + 16; the panel's halves
      for (int i = 0; i < 2; ++i)
        for (int half = 0; half < 2; ++half) {
          const int r = j + 16 * i, at = p * width + 16 * half;
          const bool here = r < count;
          split(here ? _mm512_load_ps(scores(first + r) + at) : _mm512_setzero_ps(), weight[i][half]);
          split(here ? _mm512_load_ps(grads(first + r) + at) : _mm512_setzero_ps(), grad[i][half]);
        }
#pragma GCC unroll 3
      for (int q = 0; q < parts; ++q)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int at = (i * parts + q) * Tiles::elements + 32 * j;
          _mm512_store_si512(weights + at, pair_upper_halves(weight[0][i][q], weight[1][i][q]));
          _mm512_store_si512(grads_in_pairs + at, pair_upper_halves(grad[0][i][q], grad[1][i][q]));
          _mm512_store_si512(grads_in_rows + at, pair_upper_halves(grad[i][0][q], grad[i][1][q]));
        }
    }
  }
  template <int parts>
  static std::ptrdiff_t pair_tile(int panel, int strip) {
    return static_cast<std::ptrdiff_t>(panel * block_strips + strip) * (2 * parts * Tiles::elements);
  }
  template <int parts>
  static std::ptrdiff_t row_tile(int strip, int panel) {
    return static_cast<std::ptrdiff_t>(strip * block_panels + panel) * (2 * parts * Tiles::elements);
  }

  // dQ += dS K of a strip and 32 features.
  template <int parts>
  void add_query_columns(float* out, int s, const BFloat16* keys, std::uint64_t live) const {
    load_square(out, from_.padded_head_dim);
    for (; live; live &= live - 1) {
      const int p = __builtin_ctzll(live);
      const BFloat16* tiles = keys + static_cast<std::ptrdiff_t>(p) * width * from_.padded_head_dim;
      Tiles::load<6>(tiles);
      Tiles::load<7>(tiles + Tiles::elements);
      const BFloat16* grads = grad_tiles_ + row_tile<parts>(s, p);
#pragma GCC unroll 3
      for (int q = 0; q < parts; ++q) {
        Tiles::load<4>(grads + q * Tiles::elements);
        Tiles::multiply_add<0, 4, 6>();
        Tiles::multiply_add<1, 4, 7>();
        Tiles::load<5>(grads + (parts + q) * Tiles::elements);
        Tiles::multiply_add<2, 5, 6>();
        Tiles::multiply_add<3, 5, 7>();
      }
    }
    store_square(out, from_.padded_head_dim);
  }

  // out[feature][key] += columns^T P, or dS, of a panel and the strips that look at it.
  template <int parts>
  void add_transposed(const BFloat16* pairs, const BFloat16* columns, int dim, float* out, int p,
                      std::uint64_t strips) const {
    for (int d = 0; d < dim; d += 32, out += 32 * key_stride_, columns += 2 * Tiles::elements) {
      load_square(out, key_stride_);
      for (std::uint64_t rest = strips; rest; rest &= rest - 1) {
        const int s = __builtin_ctzll(rest);
        const BFloat16 *left = columns + s * strip_rows * dim, *right = pairs + pair_tile<parts>(p, s);
        Tiles::load<4>(left);
        Tiles::load<5>(left + Tiles::elements);
#pragma GCC unroll 3
        for (int q = 0; q < parts; ++q) {
          Tiles::load<6>(right + q * Tiles::elements);
          Tiles::multiply_add<0, 4, 6>();
          Tiles::multiply_add<2, 5, 6>();
          Tiles::load<7>(right + (parts + q) * Tiles::elements);
          Tiles::multiply_add<1, 4, 7>();
          Tiles::multiply_add<3, 5, 7>();
        }
      }
      store_square(out, key_stride_);
    }
  }

  // rows[key][feature] += columns[feature][key]
  void add_columns(const float* columns, int keys, int dim, float* rows) const {
    for (int k = 0; k < keys; k += 16)
      for (int d = 0; d < dim; d += 16) {
        __m512 block[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) block[i] = _mm512_load_ps(columns + (d + i) * key_stride_ + k);
        Simd<float>::transpose(block);
        for (int i = 0; i < 16 && k + i < keys; ++i) {
          float* row = rows + static_cast<std::ptrdiff_t>(k + i) * dim + d;
          _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), block[i]));
        }
      }
  }

  const Operands<BFloat16> from_;
  const int range_keys_, key_stride_;
  const float query_factor_;
  int parts_ = 3;
  bool keys_finite_ = true, queries_finite_ = true, grads_finite_ = true;
  BFloat16 *key_columns_, *value_columns_, *key_pairs_, *query_, *grad_, *query_columns_, *grad_columns_;
  BFloat16 *weight_pairs_, *grad_pairs_, *grad_tiles_, *buffer_;
  float *scores_, *grads_, *grad_key_, *grad_value_, *grad_key_columns_, *grad_value_columns_;
};
