// Operands are packed into the two shapes the tiles read; included inside the namespace of an instruction set.
//
// clang-format off
//     columns  [feature][width]                  `width` rows side by side, transposed     Q strips, K panels
//     rows     [feature / lanes][row][lanes]     as they are, cut into panels              V, and K, Q, dO again
// clang-format on
//
// Missing rows and features are zero. Storage types become the accumulation type here and nowhere else.

template <class T, class Storage>
MMCA_INLINE void widen_row(const Storage* source, std::int64_t step, int count, T* out) {
  int d = 0;
  if constexpr (!std::is_floating_point_v<Storage> && sizeof(T) == 4)
    if (step == 1)
      for (; d + Simd<T>::width <= count; d += Simd<T>::width) Simd<T>::storeu(out + d, Simd<T>::widen(source + d));
  if (step == 1) {
    for (; d < count; ++d) out[d] = static_cast<T>(source[d]);
  } else {
    for (; d < count; ++d) out[d] = static_cast<T>(source[d * step]);
  }
}

template <class T, class Storage>
MMCA_INLINE void narrow_row(const T* source, int count, Storage* out, std::int64_t step) {
  int d = 0;
  if constexpr (!std::is_floating_point_v<Storage>)
    if (step == 1)
      for (; d + Simd<T>::width <= count; d += Simd<T>::width) Simd<T>::narrow(out + d, Simd<T>::loadu(source + d));
  if (step == 1) {
    for (; d < count; ++d) out[d] = static_cast<Storage>(source[d]);
  } else {
    for (; d < count; ++d) out[d * step] = static_cast<Storage>(source[d]);
  }
}

// Row `index` of one head as contiguous T, padded with zeros to `padded` features. Where the tensor already is that,
// the row is used in place; otherwise it is copied to `buffer`.
template <class T>
struct RowReader {
  const char* data;
  std::int64_t row_bytes, feature_stride;
  int features, padded;
  DType dtype;
  bool in_place;

  RowReader(const Input& input, DType dtype_, std::int64_t h, int features_, int padded_)
      : data(static_cast<const char*>(input.data) + h * input.head * element_size(dtype_)),
        row_bytes(input.row * element_size(dtype_)),
        feature_stride(input.feature),
        features(features_),
        padded(padded_),
        dtype(dtype_),
        in_place(element_size(dtype_) == sizeof(T) && input.feature == 1 && features_ == padded_) {}

  MMCA_INLINE const T* row(std::int64_t index, T* buffer) const {
    const char* source = data + index * row_bytes;
    if (in_place) return reinterpret_cast<const T*>(source);
    if constexpr (sizeof(T) == 4) {
      if (dtype == DType::bf16) widen_row(reinterpret_cast<const BFloat16*>(source), feature_stride, features, buffer);
      else if (dtype == DType::f16)
        widen_row(reinterpret_cast<const Float16*>(source), feature_stride, features, buffer);
      else widen_row(reinterpret_cast<const T*>(source), feature_stride, features, buffer);
    } else {
      widen_row(reinterpret_cast<const T*>(source), feature_stride, features, buffer);
    }
    for (int d = features; d < padded; ++d) buffer[d] = T(0);
    return buffer;
  }

  // found[i] = row(first + i, buffer + i * padded): neighbours, and whether they lie fit is asked once.
  MMCA_INLINE void rows(std::int64_t first, int count, T* buffer, const T** found) const {
    const auto widen_all = [&](const auto* source) {
      const std::int64_t step = row_bytes / static_cast<std::int64_t>(sizeof *source);
      for (int i = 0; i < count; ++i, source += step, buffer += padded) {
        widen_row(source, 1, features, buffer);
        found[i] = buffer;
      }
    };
    const char* source = data + first * row_bytes;
    if (in_place) {
      for (int i = 0; i < count; ++i) found[i] = reinterpret_cast<const T*>(source + i * row_bytes);
    } else if (sizeof(T) == 4 && dtype == DType::bf16 && feature_stride == 1 && features == padded) {
      widen_all(reinterpret_cast<const BFloat16*>(source));
    } else if (sizeof(T) == 4 && dtype == DType::f16 && feature_stride == 1 && features == padded) {
      widen_all(reinterpret_cast<const Float16*>(source));
    } else {
      for (int i = 0; i < count; ++i) found[i] = row(first + i, buffer + i * padded);
    }
  }
};

template <class T>
MMCA_INLINE void store_row(const T* source, int features, const Output& output, DType dtype, std::int64_t offset) {
  if constexpr (sizeof(T) == 4) {
    if (dtype == DType::bf16)
      return narrow_row(source, features, static_cast<BFloat16*>(output.data) + offset, output.feature);
    if (dtype == DType::f16)
      return narrow_row(source, features, static_cast<Float16*>(output.data) + offset, output.feature);
  }
  narrow_row(source, features, static_cast<T*>(output.data) + offset, output.feature);
}

// out[feature][width] = scale * rows[0..count)[feature]; lanes count..width-1 are zero. Registers that overhang `width`
// spill into the next feature, which is written after: `out` needs Simd<T>::width spare elements at its end.
template <class T, int width>
MMCA_NOINLINE void pack_columns(const T* const* rows, int count, int features, T scale, T* out) {
  using S = Simd<T>;
  constexpr int registers = (width + S::width - 1) / S::width;
  const typename S::Reg factor = S::broadcast(scale);
  for (int d = 0; d < features; d += S::width) {
    typename S::Reg block[registers][S::width];
#pragma GCC unroll 4
    for (int g = 0; g < registers; ++g) {
#pragma GCC unroll 16
      for (int i = 0; i < S::width; ++i) {
        const int r = g * S::width + i;
        block[g][i] = r < width && r < count ? S::mul(factor, S::loadu(rows[r] + d)) : S::zero();
      }
      S::transpose(block[g]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < S::width; ++i)
#pragma GCC unroll 4
      for (int g = 0; g < registers; ++g) S::storeu(out + (d + i) * width + g * S::width, block[g][i]);
  }
}

// Writes one row into panels[feature / lanes][row][lanes]; returns x * 0 summed: NaN iff the row has a NaN or an
// infinity.
template <class T>
MMCA_INLINE typename Simd<T>::Reg pack_row(const T* row, int padded, T* panels, std::ptrdiff_t panel_stride,
                                           typename Simd<T>::Reg finite) {
  using S = Simd<T>;
  for (int d = 0; d < padded; d += lanes<T>) {
    const typename S::Reg x0 = S::loadu(row + d), x1 = S::loadu(row + d + S::width);
    S::store(panels, x0);
    S::store(panels + S::width, x1);
    finite = S::fma(x0, S::zero(), finite);
    finite = S::fma(x1, S::zero(), finite);
    panels += panel_stride;
  }
  return finite;
}

template <class T>
MMCA_INLINE void pack_zero_row(int padded, T* panels, std::ptrdiff_t panel_stride) {
  using S = Simd<T>;
  for (int d = 0; d < padded; d += lanes<T>) {
    S::store(panels, S::zero());
    S::store(panels + S::width, S::zero());
    panels += panel_stride;
  }
}

template <class T>
MMCA_INLINE bool is_finite(T x) {
  return x - x == T(0);
}

// Of a multiple of the width.
template <class T>
MMCA_INLINE bool all_finite(const T* numbers, int count) {
  using S = Simd<T>;
  typename S::Reg finite = S::zero();
  for (int i = 0; i < count; i += S::width) finite = S::fma(S::load(numbers + i), S::zero(), finite);
  return is_finite(S::reduce_add(finite));
}

// A weight of zero must hide what it multiplies, and 0 * NaN does not. Panels of rows are therefore kept finite: this
// zeroes their non-finite elements, and add_non_finite adds these back for the weights that really see them.
template <class T>
MMCA_NOINLINE void zero_non_finite(T* panels, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    if (!is_finite(panels[i])) panels[i] = T(0);
}

template <class T>
MMCA_NOINLINE void add_non_finite(const T* row, int features, T weight, T* out) {
  for (int d = 0; d < features; ++d)
    if (!is_finite(row[d])) out[d] += weight * row[d];
}
