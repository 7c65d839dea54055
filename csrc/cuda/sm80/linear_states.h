// Between the kernels of linear attention's sweeps.
#pragma once

#include "cuda/sm80/linear_pieces.cuh"

namespace mmca::cuda::sm80 {

// Sums of all pieces become, in their slabs of P x Q numbers of M and P of the vector, what each piece starts from; in
// double, from the given state to the wanted one.
void start_linear_states(const LinearLaunch& launch, const LinearSweep& sweep, int P, int Q);

// facts.product = the sum of its parts.
void add_linear_products(const LinearLaunch& launch, const LinearRowFacts& facts, int parts);

}  // namespace mmca::cuda::sm80
