// What makes a score more than a scaled product, pair by pair: softcap, bias, boolean mask; and the dropout factor.
//
//     s = softcap tanh(y) + bias, y = scale t / softcap;   -inf where the mask hides
//     ds/dt = scale (1 - tanh^2 y) = scale 4 e / (1 + e)^2, e = exp(-2 |y|), which does not cancel
#pragma once

#include <limits>

#include "core/philox.h"
#include "cuda/rows.cuh"

namespace mmca::cuda {

template <class T>
PRIM constexpr T infinity() {
  return std::numeric_limits<T>::infinity();
}

// The scores of one head of one sequence; T is the arithmetic's type.
template <class T>
class PairScores {
 public:
  PRIM PairScores(const Problem& problem, const Sequence& sequence, std::int64_t head)
      : mask_(problem.attn_mask.data),
        bias_(problem.bias.data),
        bias_dtype_(problem.bias_dtype),
        scale_(static_cast<T>(problem.scale)),
        softcap_(static_cast<T>(problem.softcap)) {
    mask_row_ = problem.attn_mask.row, mask_key_ = problem.attn_mask.feature;
    bias_row_ = problem.bias.row, bias_key_ = problem.bias.feature;
    if (mask_) mask_ += row_offset(problem.attn_mask, sequence, sequence.q_begin, head, 0);
    bias_first_ = row_offset(problem.bias, sequence, sequence.q_begin, head, 0);
  }

  PRIM bool visible(std::int64_t row, std::int64_t key) const {
    return !mask_ || ld_global(mask_ + row * mask_row_ + key * mask_key_);
  }

  // The natural score of product t before bias and mask; `slope`: 1 - tanh^2, or 1 without a softcap.
  PRIM T capped(T t, T& slope) const {
    T s = scale_ * t;
    slope = T(1);
    if (softcap_ > T(0)) {
      const T y = s / softcap_;
      s = softcap_ * tanh_of(y), slope = slope_at(y);
    }
    return s;
  }
  PRIM static T slope(const Problem& problem, T t) {
    return slope_at(static_cast<T>(problem.scale) * t / static_cast<T>(problem.softcap));
  }
  PRIM T score(T t, std::int64_t row, std::int64_t key, T& slope) const {
    if (!visible(row, key)) return -infinity<T>();
    const T s = capped(t, slope), b = bias_ ? bias(row, key) : T(0);
    return b == -infinity<T>() ? b : s + b;  // hides even a NaN
  }

  // f(bias), where bias(row, key) reads one number, if there is a bias: the question of its dtype outside of f's loops.
  template <class F>
  PRIM void with_bias(F&& f) const {
    if (!bias_) return;
    switch (bias_dtype_) {
      case DType::f32: return f([this](auto row, auto key) { return number_of<T, float>(bias_, bias_at(row, key)); });
      case DType::f64: return f([this](auto row, auto key) { return number_of<T, double>(bias_, bias_at(row, key)); });
      case DType::bf16:
        return f([this](auto row, auto key) { return number_of<T, BFloat16>(bias_, bias_at(row, key)); });
      case DType::f16: return f([this](auto row, auto key) { return number_of<T, Float16>(bias_, bias_at(row, key)); });
    }
  }

 private:
  PRIM static float tanh_of(float x) { return tanhf(x); }
  PRIM static double tanh_of(double x) { return tanh(x); }
  PRIM static T slope_at(T y) {
    const T e = exp_of(y > T(0) ? T(-2) * y : T(2) * y);
    return T(4) * e / ((T(1) + e) * (T(1) + e));
  }
  PRIM static float exp_of(float x) { return expf(x); }
  PRIM static double exp_of(double x) { return exp(x); }

  PRIM T bias(std::int64_t row, std::int64_t key) const { return number_at<T>(bias_, bias_dtype_, bias_at(row, key)); }
  PRIM std::int64_t bias_at(std::int64_t row, std::int64_t key) const {
    return bias_first_ + row * bias_row_ + key * bias_key_;
  }

  const std::uint8_t* mask_;
  const void* bias_;
  DType bias_dtype_;
  T scale_, softcap_;
  std::int64_t mask_row_, mask_key_, bias_row_, bias_key_, bias_first_;
};

// The dropout factors of one head of one sequence (core/philox.h).
class PairDropout {
 public:
  PRIM PairDropout(const Problem& problem, const Sequence& sequence, std::int64_t head)
      : threshold_(problem.dropout.threshold),
        seed_(problem.dropout.seed),
        offset_(problem.dropout.offset),
        head_(static_cast<std::uint32_t>(sequence.index * problem.q_heads + head)),
        shift_(static_cast<std::uint32_t>(sequence.k_len - sequence.q_len)),
        kept_(threshold_ < 65536u ? 65536.0f / static_cast<float>(65536u - threshold_) : 0.0f) {}

  PRIM bool any() const { return threshold_ > 0; }
  PRIM float kept() const { return kept_; }  // the factor of a weight that is kept

  // The four words for keys 8 * block .. 8 * block + 7 of a row.
  PRIM void words(std::int32_t row, std::int32_t block, std::uint32_t (&word)[4]) const {
    const std::uint32_t counter[4] = {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(row) + shift_,
                                      head_, offset_};
    philox(seed_, counter, word);
  }
  // Of one of the two keys whose lanes share `word`.
  PRIM float factor(std::uint32_t word, std::int32_t key) const {
    return (word >> 16 * (key & 1) & 0xffffu) >= threshold_ ? kept_ : 0.0f;
  }
  PRIM float factor_of(std::int32_t row, std::int32_t key) const {
    std::uint32_t word[4];
    words(row, key / 8, word);
    const int w = key % 8 / 2;
    return factor(w == 0 ? word[0] : w == 1 ? word[1] : w == 2 ? word[2] : word[3], key);
  }

 private:
  std::uint32_t threshold_;
  std::uint64_t seed_;
  std::uint32_t offset_, head_, shift_;
  float kept_;
};

}  // namespace mmca::cuda
