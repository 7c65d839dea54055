#include "cuda/generic/linear.cuh"

template void mmca::cuda::generic::linear_forward<float>(const LinearLaunch& launch);
template void mmca::cuda::generic::linear_backward<float>(const LinearLaunch& launch);
