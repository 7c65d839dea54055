#include "cuda/generic/linear.cuh"

template void mmca::cuda::generic::linear_forward<double>(const LinearLaunch& launch);
template void mmca::cuda::generic::linear_backward<double>(const LinearLaunch& launch);
