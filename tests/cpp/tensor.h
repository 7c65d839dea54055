// Tensors that own their memory and know which of it a kernel may touch.
//
// Everything outside the addressed elements (guard zones at both ends, gaps between strides) holds a sentinel: a NaN
// with a payload that arithmetic does not make. An input's sentinel turns reads out of bounds into NaN results; an
// output is all sentinel before the call, so afterwards an element is sentinel exactly where nothing was to be written.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "core/half.h"
#include "core/problem.h"

namespace mmca::test {

// What kernels calculate in where numbers are stored as T.
template <class T>
using Accumulation = std::conditional_t<std::is_floating_point_v<T>, T, float>;

template <class T>
inline constexpr DType dtype_of = std::is_same_v<T, float>      ? DType::f32
                                  : std::is_same_v<T, double>   ? DType::f64
                                  : std::is_same_v<T, BFloat16> ? DType::bf16
                                                                : DType::f16;

template <class T>
T sentinel();
template <>
inline float sentinel<float>() {
  const std::uint32_t bits = 0x7fe5a5a5;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <>
inline double sentinel<double>() {
  const std::uint64_t bits = 0x7ffda5a5a5a5a5a5;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <>
inline BFloat16 sentinel<BFloat16>() {
  BFloat16 x;
  x.bits = 0x7fe5;
  return x;
}
template <>
inline Float16 sentinel<Float16>() {
  Float16 x;
  x.bits = 0x7fa5;
  return x;
}
template <>
inline std::uint8_t sentinel<std::uint8_t>() {
  return 0xa5;
}

template <class T>
bool same_bits(const T& a, const T& b) {
  std::uint64_t x = 0, y = 0;
  std::memcpy(&x, &a, sizeof(T)), std::memcpy(&y, &b, sizeof(T));
  return x == y;
}

struct Layout {
  bool heads_inside_rows = false;             // (batch, row, head, feature) in memory
  int feature_step = 1, gap = 0, skip = 0;    // elements: between features, after each innermost vector, at the start
  bool same_batch = false, same_all = false;  // strides of 0: of the batch; of every dimension
  bool on_cache_line = false;                 // the first element is at a multiple of 64 bytes, as torch's are
};

template <class T>
class Tensor {
 public:
  Tensor() = default;
  Tensor(std::int64_t batch, std::int64_t heads, std::int64_t rows, std::int64_t features, const Layout& layout = {})
      : size_{batch, heads, rows, features} {
    const std::int64_t vector = features * layout.feature_step + layout.gap;
    stride_[3] = layout.feature_step;
    stride_[2] = layout.heads_inside_rows ? heads * vector : vector;
    stride_[1] = layout.heads_inside_rows ? vector : rows * vector;
    stride_[0] = layout.same_batch ? 0 : heads * rows * vector;
    if (layout.same_all) stride_[0] = stride_[1] = stride_[2] = stride_[3] = 0;
    start_ = guard + layout.skip;
    const std::int64_t line = layout.on_cache_line ? 64 / static_cast<std::int64_t>(sizeof(T)) : 0;
    memory_.assign(static_cast<std::size_t>(start_ + batch * heads * rows * vector + guard + line), sentinel<T>());
    for (; line && reinterpret_cast<std::uintptr_t>(data()) % 64;) ++start_;
  }

  std::int64_t size(int d) const { return size_[d]; }
  std::int64_t stride(int d) const { return stride_[d]; }
  std::int64_t count() const { return size_[0] * size_[1] * size_[2] * size_[3]; }
  T& at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) { return memory_[index(b, h, i, d)]; }
  const T& at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) const {
    return memory_[index(b, h, i, d)];
  }

  // The same of a tensor broadcast along its dimensions of size 1.
  T& broadcast_at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    return at(size_[0] == 1 ? 0 : b, size_[1] == 1 ? 0 : h, size_[2] == 1 ? 0 : i, size_[3] == 1 ? 0 : d);
  }

  // body(element, b, h, i, d) for every element, in the order of the dimensions.
  template <class Body>
  void each(const Body& body) {
    for (std::int64_t b = 0; b < size_[0]; ++b)
      for (std::int64_t h = 0; h < size_[1]; ++h)
        for (std::int64_t i = 0; i < size_[2]; ++i)
          for (std::int64_t d = 0; d < size_[3]; ++d) body(at(b, h, i, d), b, h, i, d);
  }

  std::vector<T> values() {
    std::vector<T> all;
    all.reserve(static_cast<std::size_t>(count()));
    each([&](T x, auto...) { all.push_back(x); });
    return all;
  }

  void reset() { memory_.assign(memory_.size(), sentinel<T>()); }

  // What is wrong with an output after the call; empty: every element was written, and nothing else.
  std::string written_exactly() {
    std::vector<bool> inside(memory_.size(), false);
    each([&](T& x, auto...) { inside[static_cast<std::size_t>(&x - memory_.data())] = true; });
    std::string faults;
    for (std::size_t i = 0; i < memory_.size() && faults.size() < 300; ++i)
      if (inside[i] == same_bits(memory_[i], sentinel<T>()))
        faults += (inside[i] ? " not written: " : " written out of bounds: ") +
                  std::to_string(static_cast<std::int64_t>(i) - start_);
    return faults;
  }

  template <class Pointer>
  Strided<Pointer> strided() {
    return {data(), stride_[0], stride_[1], stride_[2], stride_[3]};
  }
  template <class Pointer>
  Strided<Pointer> broadcast() {  // with strides of 0 along dimensions of size 1
    return {data(), broadcast_stride(0), broadcast_stride(1), broadcast_stride(2), broadcast_stride(3)};
  }
  template <class Pointer>
  RowStatistic<Pointer> statistic() {  // of a (group, batch, head, row) tensor
    return {data(), stride_[0], stride_[1], stride_[2], stride_[3]};
  }
  template <class Pointer>
  RowStatistic<Pointer> broadcast_statistic() {
    return {data(), broadcast_stride(0), broadcast_stride(1), broadcast_stride(2), broadcast_stride(3)};
  }
  T* data() { return memory_.data() + start_; }

 private:
  static constexpr std::int64_t guard = 64;

  std::int64_t broadcast_stride(int d) const { return size_[d] == 1 ? 0 : stride_[d]; }

  std::size_t index(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) const {
    return static_cast<std::size_t>(start_ + b * stride_[0] + h * stride_[1] + i * stride_[2] + d * stride_[3]);
  }

  std::int64_t size_[4] = {}, stride_[4] = {}, start_ = 0;
  std::vector<T> memory_;
};

// Random numbers that are the same everywhere (the standard's distributions are not).
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::uint64_t bits() { return engine_(); }
  double unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }  // [0, 1)
  double between(double low, double high) { return low + (high - low) * unit(); }
  int integer(int low, int high) {
    return low + static_cast<int>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool chance(double p) { return unit() < p; }
  template <class T, std::size_t n>
  T pick(const T (&choices)[n]) {
    return choices[engine_() % n];
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace mmca::test
