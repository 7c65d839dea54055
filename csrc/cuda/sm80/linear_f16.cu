#include "cuda/sm80/linear.cuh"

namespace mmca::cuda::sm80 {

template void linear_forward<Float16>(const LinearLaunch&);
template void linear_backward<Float16>(const LinearLaunch&);

}  // namespace mmca::cuda::sm80
