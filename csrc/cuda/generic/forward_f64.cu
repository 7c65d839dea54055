#include "cuda/generic/forward.cuh"

template void mmca::cuda::generic::attention_forward<double>(const Launch& launch);
