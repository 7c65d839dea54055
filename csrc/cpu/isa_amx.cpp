// Kernels for AMX with bfloat16 matrices: Sapphire Rapids and later.
#include "cpu/isa.h"

#if defined(__x86_64__)
// As in isa_avx512.cpp: gcc's own headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")  // tiles are spoken to in assembly

namespace mmca::cpu::amx {
#include "cpu/simd_avx512.h"
#include "cpu/simd_amx.h"
#include "cpu/bodies.h"
#include "cpu/amx_tiles.h"
#include "cpu/amx_products.h"
#include "cpu/amx_few_rows.h"
#include "cpu/amx_gradients.h"

struct Matrices {
  template <class T>
  using Forward = MatrixProducts<T>;
  template <class T>
  using FewRows = FewMatrixProducts<T>;
  template <class T>
  using Backward = MatrixGradients<T>;
};

void attention_forward_bf16(const Problem& problem, const Plan& plan, Executor& executor) {
  attention_forward<float, Matrices>(problem, plan, executor);
}
void attention_backward_bf16(const Problem& problem, const Plan& plan, Executor& executor) {
  attention_backward<float, Matrices>(problem, plan, executor);
}
}  // namespace mmca::cpu::amx
#endif
