#include "cuda/sm80/forward.cuh"

namespace mmca::cuda::sm80 {

template void tiled_forward<Float16>(const Launch&);

}  // namespace mmca::cuda::sm80
