#include "cuda/sm80/decode.cuh"

namespace mmca::cuda::sm80 {

template void split_forward<BFloat16>(const Launch&);

}  // namespace mmca::cuda::sm80
