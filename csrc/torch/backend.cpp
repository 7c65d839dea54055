#include "torch/backend.h"

#include <c10/util/Exception.h>

#include "torch/executor.h"

namespace mmca {
namespace {

template <class AnyProblem>
void run_on_cpu(Operation operation, const AnyProblem& problem, c10::Device) {
  TorchExecutor executor;
  run(operation, problem, executor);
}

const Backend cpu_backend{false, [](DType) { return false; }, &run_on_cpu<Problem>, &run_on_cpu<LinearProblem>};

}  // namespace

const Backend& backend_of(const char* op, c10::Device device) {
  if (device.is_cpu()) return cpu_backend;
  TORCH_CHECK_VALUE(device.is_cuda(), op, ": tensors must be on the CPU or a CUDA device, got ", device);
#ifdef MMCA_EXT_WITH_CUDA
  return cuda_backend;
#else
  TORCH_CHECK(false, op, ": tensors are on ", device,
              ", but this build of mmca_ext has no CUDA kernels; where it is built from source, nvcc must be found "
              "(FORCE_CUDA=1 makes it an error if it is not)");
#endif
}

}  // namespace mmca
