#include "cuda/run.h"

#include <atomic>
#include <memory>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/linear.h"

namespace mmca::cuda {
namespace {

std::atomic<std::uint64_t>* launch_counts() {
  static const auto counts = std::make_unique<std::atomic<std::uint64_t>[]>(kernel_table().size());
  return counts.get();
}

const Kernel& select_kernel(Operation operation, DType dtype, const Device& device) {
  std::string reasons;
  for (const Kernel& kernel : kernel_table()) {
    if (kernel.operation != operation || kernel.dtype != dtype) continue;
    const std::string reason = refusal(kernel, device);
    if (reason.empty()) return kernel;
    reasons += std::string("; ") + kernel.name + ": " + reason;
  }
  throw std::runtime_error(std::string("mmca_ext: no CUDA kernel for ") + to_string(operation) + " in " +
                           to_string(dtype) + reasons);
}

// Keys that no tile owns (padding, past the last offset) have gradients of zero.
void clear_key_gradients(const Launch& launch) {
  const Problem& p = launch.problem;
  if (!launch.plan.positions && !launch.plan.k_offsets) return;
  const std::int64_t rows = (launch.plan.k_offsets ? 1 : p.batch) * p.kv_heads * p.k_len * element_size(p.dtype);
  for (const auto& [data, dim] : {std::pair{p.grad_key.data, p.head_dim}, std::pair{p.grad_value.data, p.value_dim}})
    launch.clear(data, rows * dim);
}

DeviceCall begin_call(Workspace& workspace, int device_index, void* stream) {
  const Device device = device_at(device_index);
  DeviceCall::check(prim::use_device(device_index), device);
  return {workspace, static_cast<prim::stream_t>(stream), device};
}

void count_launch(const Kernel& kernel) {
  launch_counts()[&kernel - kernel_table().data()].fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

const std::vector<Kernel>& kernel_table() {
#define MMCA_CUDA_ROW(family, operation, dtype, T, lowest_sm) \
  {"cuda." #family "." #operation "." #dtype, Operation::operation, DType::dtype, lowest_sm, &family::operation<T>}
#define MMCA_CUDA_ROWS(family, dtype, T, lowest_sm)              \
  MMCA_CUDA_ROW(family, attention_forward, dtype, T, lowest_sm), \
      MMCA_CUDA_ROW(family, attention_backward, dtype, T, lowest_sm)
#define MMCA_CUDA_LINEAR_ROW(family, operation, dtype, T, lowest_sm) \
  {"cuda." #family "." #operation "." #dtype,                        \
   Operation::operation,                                             \
   DType::dtype,                                                     \
   lowest_sm,                                                        \
   nullptr,                                                          \
   &family::operation<T>}
#define MMCA_CUDA_LINEAR_ROWS(family, dtype, T, lowest_sm)           \
  MMCA_CUDA_LINEAR_ROW(family, linear_forward, dtype, T, lowest_sm), \
      MMCA_CUDA_LINEAR_ROW(family, linear_backward, dtype, T, lowest_sm)
  static const std::vector<Kernel> table = {
      MMCA_CUDA_ROWS(sm80, bf16, BFloat16, 80),        MMCA_CUDA_ROWS(sm80, f16, Float16, 80),
      MMCA_CUDA_ROWS(generic, f32, float, 80),         MMCA_CUDA_ROWS(generic, f64, double, 80),
      MMCA_CUDA_LINEAR_ROWS(sm80, bf16, BFloat16, 80), MMCA_CUDA_LINEAR_ROWS(sm80, f16, Float16, 80),
      MMCA_CUDA_LINEAR_ROWS(generic, f32, float, 80),  MMCA_CUDA_LINEAR_ROWS(generic, f64, double, 80),
  };
  return table;
}

std::uint64_t launches(const Kernel& kernel) { return launch_counts()[&kernel - kernel_table().data()].load(); }

std::string refusal(const Kernel& kernel, const Device& device) {
  if (device.sm >= kernel.lowest_sm) return "";
  return "needs compute capability " + std::to_string(kernel.lowest_sm / 10) + "." +
         std::to_string(kernel.lowest_sm % 10) + ", this GPU has " + std::to_string(device.sm / 10) + "." +
         std::to_string(device.sm % 10);
}

Device device_at(int index) {
  prim::DeviceFacts facts;
  DeviceCall::check(prim::device_facts(index, facts), {});
  return {facts.sm, facts.multiprocessors};
}

bool needs_aligned_rows(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

void run(Operation operation, const Problem& problem, Workspace& workspace, int device_index, void* stream) {
  const DeviceCall call = begin_call(workspace, device_index, stream);
  const Kernel& kernel = select_kernel(operation, problem.dtype, call.device);
  const DevicePlan plan = make_plan(problem, call);
  const Launch launch(call, problem, plan);
  if (operation == Operation::attention_backward) clear_key_gradients(launch);
  kernel.run(launch);
  count_launch(kernel);
}

void run(Operation operation, const LinearProblem& problem, Workspace& workspace, int device_index, void* stream) {
  const DeviceCall call = begin_call(workspace, device_index, stream);
  const Kernel& kernel = select_kernel(operation, problem.dtype, call.device);
  kernel.run_linear(LinearLaunch(call, problem, make_linear_plan(problem, call)));
  count_launch(kernel);
}

}  // namespace mmca::cuda
