#include "cuda/sm80/linear.cuh"

namespace mmca::cuda::sm80 {

template void linear_forward<BFloat16>(const LinearLaunch&);
template void linear_backward<BFloat16>(const LinearLaunch&);

}  // namespace mmca::cuda::sm80
