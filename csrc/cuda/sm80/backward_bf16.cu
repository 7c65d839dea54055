#include "cuda/sm80/backward.cuh"

namespace mmca::cuda::sm80 {
template void attention_backward<BFloat16>(const Launch& launch);
}
