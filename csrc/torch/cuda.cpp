// CUDA tensors: their kernels (cuda/run.h) on torch's current stream, with scratch memory from torch's allocator.
//
// Devices and streams come from c10's generic interface, so this needs no CUDA header and one binary serves CPU and
// CUDA builds of torch. Nothing here waits for the device, so a call can be recorded into a CUDA graph.
#ifdef MMCA_EXT_WITH_CUDA

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <vector>

#include "cuda/run.h"
#include "torch/backend.h"

namespace mmca {
namespace {

// The allocator hands a block that was freed here on only to work of the same stream, or waits.
class TorchWorkspace final : public cuda::Workspace {
 public:
  explicit TorchWorkspace(c10::Device device) : options_(at::TensorOptions(device).dtype(at::kByte)) {}

  void* take(std::int64_t bytes) override {
    blocks_.push_back(at::empty({bytes}, options_));
    return blocks_.back().mutable_data_ptr();
  }

 private:
  at::TensorOptions options_;
  std::vector<at::Tensor> blocks_;
};

template <class AnyProblem>
void run_on_cuda(Operation operation, const AnyProblem& problem, c10::Device device) {
  const c10::DeviceGuard guard(device);
  const c10::impl::VirtualGuardImpl streams(device.type());
  TorchWorkspace workspace(device);
  cuda::run(operation, problem, workspace, device.index(), streams.getStream(device).native_handle());
}

}  // namespace

const Backend cuda_backend{true, &cuda::needs_aligned_rows, &run_on_cuda<Problem>, &run_on_cuda<LinearProblem>};

}  // namespace mmca

#endif
