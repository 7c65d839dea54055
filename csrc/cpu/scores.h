// From products to scores where a score is more than a scaled product; included inside the namespace of an instruction
// set:
//
//     t = scale <q, k>;    s = softcap tanh(t / softcap) + bias;    ds/dt = 1 - tanh^2 = 4 e / (1 + e)^2
//
// with e = exp(-2 |t| / softcap). tanh is (1 - e) / (1 + e) with the sign of t, and below 0.6, where that cancels, the
// polynomial y + y z P(z), z = y^2: minimax in relative error (Remez), 2.8e-9 for degree 4 (float), 4.1e-18 for degree
// 10 (double).

template <class T>
struct TanhConstants;

template <>
struct TanhConstants<float> {
  static constexpr int degree = 4;
  static constexpr float coefficient[degree + 1] = {-0x1.55553ep-2f, 0x1.1109aep-3f, -0x1.b898dep-5f, 0x1.54b8a0p-6f,
                                                    -0x1.825858p-8f};
};

template <>
struct TanhConstants<double> {
  static constexpr int degree = 10;
  static constexpr double coefficient[degree + 1] = {
      -0x1.5555555555530p-2,  0x1.111111110e1acp-3,  -0x1.ba1ba1b780849p-5,  0x1.664f47f011caep-6,
      -0x1.226e229272a0cp-7,  0x1.d6d0c61c7b89ep-9,  -0x1.7d79d94f4dbb7p-10, 0x1.33db167056ad6p-11,
      -0x1.e32d4ce1fb600p-13, 0x1.4caa9b4121fbfp-14, -0x1.2035df8023aa2p-16};
};

// tanh(y), and its derivative.
template <class T>
MMCA_INLINE typename Simd<T>::Reg tanh_register(typename Simd<T>::Reg y, typename Simd<T>::Reg& slope) {
  using S = Simd<T>;
  using C = TanhConstants<T>;
  const typename S::Reg one = S::broadcast(T(1)), size = S::max(S::sub(S::zero(), y), y), z = S::mul(y, y);
  typename S::Reg e[1] = {S::mul(S::broadcast(static_cast<T>(-2 * log2_e)), size)};
  exp2_in_place<T, 1>(e);
  const typename S::Reg sum = S::add(one, e[0]), large = S::div(S::sub(one, e[0]), sum);
  slope = S::div(S::mul(S::broadcast(T(4)), e[0]), S::mul(sum, sum));
  typename S::Reg p = S::broadcast(C::coefficient[C::degree]);
#pragma GCC unroll 16
  for (int d = C::degree - 1; d >= 0; --d) p = S::fma(p, z, S::broadcast(C::coefficient[d]));
  const typename S::Reg small = S::fma(S::mul(y, z), p, y);
  const typename S::Reg with_sign = S::select_less(y, S::zero(), S::sub(S::zero(), large), large);
  return S::select_less(size, S::broadcast(T(0.6)), small, with_sign);
}

template <class T>
MMCA_INLINE T softcapped(T t, T softcap, T* slope) {
  typename Simd<T>::Reg derivative;
  const typename Simd<T>::Reg capped = tanh_register<T>(Simd<T>::broadcast(t / softcap), derivative);
  alignas(64) T lanes[2][Simd<T>::width];
  Simd<T>::store(lanes[0], capped);
  Simd<T>::store(lanes[1], derivative);
  *slope = lanes[1][0];
  return softcap * lanes[0][0];
}

// The scores of one tile at a time: entries begin..begin+count-1, keys key..key+width-1 of a list.
template <class T, int tile_height, int width>
class ScoreShape {
 public:
  ScoreShape(const RowList& rows, const KeyList& keys)
      : rows_(rows),
        keys_(keys),
        scale_(static_cast<T>(rows.problem.scale)),
        softcap_(static_cast<T>(rows.problem.softcap)) {}

  // Looks up the tile's bias; false if some of it is not finite.
  MMCA_NOINLINE bool read_bias(std::int64_t begin, int count, std::int32_t key) {
    const Input& bias = rows_.problem.bias;
    if (!bias.data) return true;
    const int listed = std::clamp(keys_.size - key, 0, width);
    typename S::Reg finite = S::zero();
    with_elements(rows_.problem.bias_dtype, bias.data, [&](const auto* data) {
      auto entry = rows_.walk(begin);
      for (int r = 0; r < count; ++r, entry.next()) {
        const Row row = entry.row();
        bias_[r] = read_row(data + bias.offset(row.head, row.row), bias.feature, key, listed, buffer_ + r * width);
        for (int c = 0; c < width; c += S::width) finite = S::fma(S::loadu(bias_[r] + c), S::zero(), finite);
      }
    });
    return is_finite(S::reduce_add(finite));
  }

  // The rows that read_bias found; null without a bias.
  const T* const* bias() const { return rows_.problem.bias.data ? bias_ : nullptr; }

  // Products become scores; `slope` takes ds/dt if there is a softcap and somebody asks. What the tile hides is left to
  // Visibility.
  template <int stride>
  MMCA_NOINLINE void apply(int count, T* scores, T* slope) const {
    const typename S::Reg scale = S::broadcast(scale_), cap = S::broadcast(softcap_);
    for (int r = 0; r < count; ++r, scores += stride) {
      for (int c = 0; c < width; c += S::width) {
        typename S::Reg s = S::mul(scale, S::load(scores + c));
        if (softcap_ > T(0)) {
          typename S::Reg derivative;
          s = S::mul(cap, tanh_register<T>(S::div(s, cap), derivative));
          if (slope) S::store(slope + r * stride + c, derivative);
        }
        S::store(scores + c, bias() ? S::add(s, S::loadu(bias_[r] + c)) : s);
      }
    }
  }

 private:
  using S = Simd<T>;

  // `width` numbers of one row, in place if they lie so; 0 past the end of the list.
  template <class Element>
  MMCA_INLINE const T* read_row(const Element* row, std::int64_t step, std::int32_t key, int listed, T* buffer) const {
    if constexpr (std::is_same_v<T, Element>)
      if (keys_.identity() && step == 1 && listed == width) return row + key;
    if (keys_.identity()) {
      if constexpr (sizeof(Element) <= sizeof(T)) widen_row(row + key * step, step, listed, buffer);
      else
        for (int c = 0; c < listed; ++c) buffer[c] = static_cast<T>(row[(key + c) * step]);
    } else {
      for (int c = 0; c < listed; ++c) buffer[c] = static_cast<T>(row[keys_.position(key + c) * step]);
    }
    for (int c = listed; c < width; ++c) buffer[c] = T(0);
    return buffer;
  }

  const RowList& rows_;
  const KeyList& keys_;
  const T scale_, softcap_;
  const T* bias_[tile_height];
  alignas(64) T buffer_[tile_height * width];
};
