#include "cuda/sm80/forward_kernels.h"

namespace mmca::cuda::sm80 {

template <class T>
void attention_forward(const Launch& launch) {
  if (has_few_rows(launch.problem)) split_forward<T>(launch);
  else tiled_forward<T>(launch);
}

template void attention_forward<BFloat16>(const Launch&);
template void attention_forward<Float16>(const Launch&);

}  // namespace mmca::cuda::sm80
