// What is measured. A family of operators is one *_bench.cpp file that defines family(); its binary has a test for each
// workload, dtype, direction and instruction set:
//
//   Mgqa/forward.fp32_1024_D64_causal/avx2
//
// A test runs the kernel, holds the result to the reference of tests/cpp, and only then times it.
//
// Flops: the forward's are 4 * batch * q_heads * visible pairs * head_dim, the backward's 2.5 times that. A visible
// pair is a key that a row sees after every mask; exp, dropout and what tiles compute besides count nothing. (With a
// value_dim of its own, 2 * (head_dim + value_dim) takes the place of 4 * head_dim.)
//
// Linear attention: 2 * batch * head_dim * value_dim for each key of each KV head, which is added to a state, and for
// each row of each query head, which reads it; causal, 2 * (head_dim + value_dim) for each pair of a row and a key that
// it sees in its own chunk of linear_chunk keys. The backward: three of the former for each key and two for each row,
// and three times the pairs. phi, the rest of tiles, and what a kernel does twice count nothing.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "choices.h"
#include "core/kernel_table.h"

namespace mmca::bench {

// What bounds the work: multiply-adds, or reading the keys and values.
enum class Limit { multiply_add, memory };

struct Workload {
  std::string name;
  test::Choices choices;
  std::vector<DType> dtypes = {DType::f32};
  bool backward = true;
  bool scalar = false;  // small enough for the portable kernels too
  Limit limit = Limit::multiply_add;
  bool state = false;  // linear attention: a state comes in and goes out
};

struct Family {
  std::string name;
  std::vector<Workload> workloads;
  Operation forward = Operation::attention_forward, backward = Operation::attention_backward;
};

Family family();  // each binary has one

inline const std::vector<DType> float_types = {DType::f32, DType::bf16, DType::f16};

inline test::Choices attention(std::int64_t batch, std::int64_t heads, std::int64_t kv_heads, std::int64_t q_len,
                               std::int64_t k_len, std::int64_t dim) {
  test::Choices c;
  c.batch = batch, c.kv_heads = kv_heads, c.heads_per_kv = heads / kv_heads;
  c.q_len = q_len, c.k_len = k_len, c.head_dim = c.value_dim = dim;
  c.scale = 1 / std::sqrt(static_cast<double>(dim));
  return c;
}

// The same with more said of it: with(attention(...), [](Choices& c) { c.causal = true; }).
template <class Change>
test::Choices with(test::Choices choices, const Change& change) {
  change(choices);
  return choices;
}

}  // namespace mmca::bench
