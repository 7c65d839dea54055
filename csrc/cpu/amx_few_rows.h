// The products (cpu/products.h) of an item of few rows (decoding) by matrix instructions; included inside the namespace
// of AMX. There is a key for a few products only, so keys are not packed but read where they lie:
//
//     S^T (16 keys x rows) = K (16 keys x 32 features) Q^T (32 features x rows)
//
// Values are, as row pairs: a product over keys reads them from both sides of a pair.

// out[row][0..16) = column `row` of 16 x 16 floats, for `rows` rows and up to 3 more
MMCA_INLINE void transpose_columns(const float* square, int rows, float* out, std::ptrdiff_t stride) {
  for (int r = 0; r < rows; r += 4) {
    __m512 of_keys[4];  // lane l: key 4 l + j, rows r to r + 3
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto row = [&](int l) { return _mm_load_ps(square + 16 * (4 * l + j) + r); };
      const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(row(0)), row(1), 1);
      const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(row(2)), row(3), 1);
      of_keys[j] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
    const __m512 a = _mm512_unpacklo_ps(of_keys[0], of_keys[1]), b = _mm512_unpackhi_ps(of_keys[0], of_keys[1]);
    const __m512 c = _mm512_unpacklo_ps(of_keys[2], of_keys[3]), d = _mm512_unpackhi_ps(of_keys[2], of_keys[3]);
    _mm512_store_ps(out + r * stride, _mm512_shuffle_ps(a, c, 0x44));
    _mm512_store_ps(out + (r + 1) * stride, _mm512_shuffle_ps(a, c, 0xee));
    _mm512_store_ps(out + (r + 2) * stride, _mm512_shuffle_ps(b, d, 0x44));
    _mm512_store_ps(out + (r + 3) * stride, _mm512_shuffle_ps(b, d, 0xee));
  }
}

template <class T>
class FewMatrixProducts : public MatrixProducts<T> {
 public:
  using MatrixProducts<T>::MatrixProducts;
  static_assert(few_rows <= 16 && few_rows % 4 == 0);  // one tile

  void pack_queries() {
    const BFloat16* source[few_rows];
    for (int r = 0; r < count_; ++r) {
      const Row row = from_.rows.at(begin_ + r);
      BFloat16* copy = buffer_ + r * from_.padded_head_dim;
      source[r] = from_.query(row).row(row.row, copy);
      if (query_factor_ == 1.0f) continue;
      for (int d = 0; d < from_.padded_head_dim; ++d)  // a factor of 0 hides what is not finite
        copy[d] = query_factor_ == 0.0f ? BFloat16(0.0f) : BFloat16(-static_cast<float>(source[r][d]));
      source[r] = copy;
    }
    pack_feature_pairs(source, count_, from_.padded_head_dim, query_);
  }

  void pack_keys(const KeyList& list, std::int32_t first, int keys) {
    list_ = &list, first_ = first, keys_in_block_ = keys;
    this->pack_values(list, first, keys);
  }

  void score(int, int rows, int c, float* out, float* row_max) {
    const RowReader<BFloat16> key = from_.key();
    const int count = std::min(width, keys_in_block_ - c);
    const char* source = key.data + (first_ + c) * key.row_bytes;
    std::ptrdiff_t row_bytes = key.row_bytes;
    if (!key.in_place || !list_->identity() || count < width) {
      source = reinterpret_cast<const char*>(keys_), row_bytes = key.padded * static_cast<int>(sizeof(BFloat16));
      for (int i = 0; i < count; ++i) {
        BFloat16* copy = keys_ + i * key.padded;
        const BFloat16* found = key.row(list_->position(first_ + c + i), copy);
        if (found != copy) std::copy_n(found, key.padded, copy);
      }
      std::fill_n(keys_ + count * key.padded, (width - count) * key.padded, BFloat16(0.0f));
    }
    alignas(64) float square[2][16 * 16];
    Tiles::zero<0>(), Tiles::zero<1>();
    for (int d = 0; d < key.padded; d += 32) {
      const char* features = source + d * sizeof(BFloat16);
      Tiles::load<6>(query_ + d / 32 * Tiles::elements);
      Tiles::load<4>(features, row_bytes), Tiles::load<5>(features + 16 * row_bytes, row_bytes);
      Tiles::multiply_add<0, 4, 6>(), Tiles::multiply_add<1, 5, 6>();
    }
    Tiles::store<0>(square[0], 64), Tiles::store<1>(square[1], 64);
    for (int half = 0; half < 2; ++half) transpose_columns(square[half], rows, out + 16 * half, this->stride);
    if (row_max) track_maxima<float>(rows, out, this->stride, row_max);
  }

 private:
  using Base = MatrixProducts<T>;
  using Base::from_, Base::begin_, Base::count_, Base::query_factor_, Base::query_, Base::keys_, Base::buffer_,
      Base::width;

  const KeyList* list_ = nullptr;
  std::int32_t first_ = 0;
  int keys_in_block_ = 0;
};
