// The three register tiles every blocked product is made of; included inside the namespace of an instruction set.
//
//     C (rows x lanes) (+)= A (rows x depth) * B (depth x lanes)        lanes = 2 registers
//
// B is always a packed panel [depth][lanes]. A is read by broadcasts, and the tiles differ in where A's elements lie:
//     score tile       a packed strip [depth][tile_rows]    S = Q K^T, dP = dO V^T
//     row tile         rows of a score block, [row][key]    O += P V,  dQ += dS K
//     transposed tile  its columns, no transpose needed     dV += P^T dO, dK += dS^T Q

template <class T>
inline constexpr int lanes = 2 * Simd<T>::width;
template <class T>
inline constexpr int tile_rows = Simd<T>::tile_rows;

template <class T, int rows>
using Accumulators = typename Simd<T>::Reg[rows][2];

template <class T, int rows>
MMCA_INLINE void multiply_add(int depth, const T* a, std::ptrdiff_t depth_stride, std::ptrdiff_t row_stride, const T* b,
                              Accumulators<T, rows>& c) {
  using S = Simd<T>;
#pragma GCC unroll 4
  for (int k = 0; k < depth; ++k) {
    const typename S::Reg b0 = S::load(b), b1 = S::load(b + S::width);
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const typename S::Reg x = S::broadcast(a[i * row_stride]);
      c[i][0] = S::fma(x, b0, c[i][0]);
      c[i][1] = S::fma(x, b1, c[i][1]);
    }
    a += depth_stride;
    b += lanes<T>;
  }
}

template <class T, int rows>
MMCA_INLINE void clear_tile(Accumulators<T, rows>& r) {
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) r[i][0] = r[i][1] = Simd<T>::zero();
}

template <class T, int rows>
MMCA_INLINE void add_tile(T* c, std::ptrdiff_t stride, const Accumulators<T, rows>& r) {
  using S = Simd<T>;
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    T* out = c + i * stride;
    S::store(out, S::add(S::load(out), r[i][0]));
    S::store(out + S::width, S::add(S::load(out + S::width), r[i][1]));
  }
}

template <class T, int rows>
MMCA_INLINE void store_tile(T* c, std::ptrdiff_t stride, const Accumulators<T, rows>& r) {
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    Simd<T>::store(c + i * stride, r[i][0]);
    Simd<T>::store(c + i * stride + Simd<T>::width, r[i][1]);
  }
}

// One run of features: scores[row][key] (+)= strip * panel, and with `row_max` (one register a row) the lane-wise
// maximum of that and the scores. `stride` is constant so that row addresses become displacements.
template <class T, int rows, int stride, bool add, bool track_max>
MMCA_NOINLINE void score_run(int depth, const T* strip, const T* panel, T* scores, T* row_max) {
  using S = Simd<T>;
  Accumulators<T, rows> c;
  clear_tile<T, rows>(c);
  multiply_add<T, rows>(depth, strip, tile_rows<T>, 1, panel, c);
  if constexpr (add) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      c[i][0] = S::add(c[i][0], S::load(scores + i * stride));
      c[i][1] = S::add(c[i][1], S::load(scores + i * stride + S::width));
    }
  }
  store_tile<T, rows>(scores, stride, c);
  if constexpr (track_max) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i)
      S::store(row_max + i * S::width, S::max(S::load(row_max + i * S::width), S::max(c[i][0], c[i][1])));
  }
}

// Features are summed in runs of this many: rounding grows with the length of a run, and a score's error is an
// exponent's.
inline constexpr int depth_run = 64;

// scores[row][key] = strip * panel, and the running maxima if there are any to keep.
template <class T, int rows, int stride, bool track_max = false>
MMCA_INLINE void score_tile(int depth, const T* strip, const T* panel, T* scores, T* row_max = nullptr) {
  if (depth <= depth_run) return score_run<T, rows, stride, false, track_max>(depth, strip, panel, scores, row_max);
  score_run<T, rows, stride, false, false>(depth_run, strip, panel, scores, nullptr);
  for (int done = depth_run; done < depth; done += depth_run) {
    const T *a = strip + done * tile_rows<T>, *b = panel + done * lanes<T>;
    if (depth - done > depth_run) score_run<T, rows, stride, true, false>(depth_run, a, b, scores, nullptr);
    else score_run<T, rows, stride, true, track_max>(depth - done, a, b, scores, row_max);
  }
}

// c[row][feature] = factor[row] * c + weights[row][0..depth) * panel. Here and below sums start from zero and join c at
// the end: c may stand for thousands of terms, and adding them to it one by one would round each time.
template <class T, int rows, int stride>
MMCA_NOINLINE void rescaled_row_tile(int depth, const T* weights, const T* panel, T* c, std::ptrdiff_t c_stride,
                                     const T* factor) {
  using S = Simd<T>;
  Accumulators<T, rows> r;
  clear_tile<T, rows>(r);
  multiply_add<T, rows>(depth, weights, 1, stride, panel, r);
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    const typename S::Reg f = S::broadcast(factor[i]);
    T* out = c + i * c_stride;
    S::store(out, S::fma(f, S::load(out), r[i][0]));
    S::store(out + S::width, S::fma(f, S::load(out + S::width), r[i][1]));
  }
}

// Gradients are summed in runs of Simd<T>::gradient_run terms. They may all have one sign, as weights do, and
// neighbours may be equal, and then rounding errors do not cancel but grow with the length of a run. The rows of all
// heads that share a key meet in one sum, too, where the standard implementation sums head by head.

// c[row][feature] += weights[row][0..depth) * panel
template <class T, int rows, int stride>
MMCA_NOINLINE void row_tile(int depth, const T* weights, const T* panel, T* c, std::ptrdiff_t c_stride) {
  constexpr int run = Simd<T>::gradient_run;
  for (; depth > 0; depth -= run, weights += run, panel += run * lanes<T>) {
    Accumulators<T, rows> r;
    clear_tile<T, rows>(r);
    multiply_add<T, rows>(std::min(depth, run), weights, 1, stride, panel, r);
    add_tile<T, rows>(c, c_stride, r);
  }
}

// c[key][feature] += sum over depth rows of weights[row][key] * panel[row], for tile_rows neighbouring keys
template <class T, int stride>
MMCA_NOINLINE void transposed_tile(int depth, const T* weights, const T* panel, T* c, std::ptrdiff_t c_stride) {
  constexpr int run = Simd<T>::gradient_run;
  for (; depth > 0; depth -= run, weights += run * stride, panel += run * lanes<T>) {
    Accumulators<T, tile_rows<T>> r;
    clear_tile<T, tile_rows<T>>(r);
    multiply_add<T, tile_rows<T>>(std::min(depth, run), weights, stride, 1, panel, r);
    add_tile<T, tile_rows<T>>(c, c_stride, r);
  }
}

// Calls body(std::integral_constant<int, height>) with the smallest height of a short list that covers `rows`: strips
// are zero-padded to tile_rows, and few heights keep the code small.
template <class T, class Body>
MMCA_INLINE void with_tile_height(int rows, const Body& body) {
  constexpr int full = tile_rows<T>;
  if (rows > 8 || (full <= 8 && rows > 4)) body(std::integral_constant<int, full>{});
  else if (rows > 4) body(std::integral_constant<int, full <= 8 ? full : 8>{});
  else if (rows > 2) body(std::integral_constant<int, 4>{});
  else if (rows > 1) body(std::integral_constant<int, 2>{});
  else body(std::integral_constant<int, 1>{});
}
