#include "cuda/generic/forward.cuh"

template void mmca::cuda::generic::attention_forward<float>(const Launch& launch);
