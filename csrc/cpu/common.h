// Small things every kernel body uses; included inside the namespace of an instruction set.

template <class T>
inline constexpr T infinity = std::numeric_limits<T>::infinity();

inline constexpr long double log2_e_exact = 1.44269504088896340735992L;
inline constexpr double log2_e = 1.4426950408889634074;
inline constexpr double ln_2 = 0.6931471805599453094;

constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Calls body(pointer) with `data` as what it points to.
template <class Body>
MMCA_INLINE void with_elements(DType dtype, const void* data, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(static_cast<const float*>(data));
    case DType::f64: return body(static_cast<const double*>(data));
    case DType::bf16: return body(static_cast<const BFloat16*>(data));
    case DType::f16: return body(static_cast<const Float16*>(data));
  }
}
