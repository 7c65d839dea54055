#include "cuda/generic/backward.cuh"

template void mmca::cuda::generic::attention_backward<double>(const Launch& launch);
