// Small things every kernel body uses; included inside the namespace of an instruction set.

template <class T>
inline constexpr T infinity = std::numeric_limits<T>::infinity();

inline constexpr long double log2_e_exact = 1.44269504088896340735992L;
inline constexpr double log2_e = 1.4426950408889634074;
inline constexpr double ln_2 = 0.6931471805599453094;

constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class T, class Storage>
MMCA_INLINE void store_row(const T* source, int features, const Output& output, std::int64_t b, std::int64_t h,
                           std::int64_t i) {
  Storage* out = static_cast<Storage*>(output.data) + output.offset(b, h, i);
  for (int d = 0; d < features; ++d) out[d * output.feature] = static_cast<Storage>(source[d]);
}
