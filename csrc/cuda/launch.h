// What a kernel's host side is given, and what it shares with the others.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/plan.h"
#include "cuda/primitives.cuh"
#include "cuda/run.h"

namespace mmca::cuda {

// What any kernel's host side has: scratch memory, and the way to start kernels.
struct DeviceCall {
  Workspace& workspace;
  prim::stream_t stream;
  Device device;

  template <class T>
  T* take(std::int64_t count) const {
    return static_cast<T*>(workspace.take(count * static_cast<std::int64_t>(sizeof(T))));
  }

  // Starts a kernel over `blocks` blocks in x; 0: nothing to do.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::size_t shared_bytes,
                  const Arguments&... arguments) const {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff)
      throw std::runtime_error("mmca_ext: too large for one launch: " + std::to_string(blocks) + " blocks");
    check(prim::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared_bytes,
                       stream, arguments...),
          device);
  }

  void clear(void* p, std::int64_t bytes) const {
    check(prim::fill_zero(p, static_cast<std::size_t>(bytes), stream), device);
  }

  static void check(int error, const Device& device) {
    if (!error) return;
    if (prim::is_missing_kernel(error))
      throw std::runtime_error("mmca_ext: this build has no kernels for a GPU of compute capability " +
                               std::to_string(device.sm / 10) + "." + std::to_string(device.sm % 10) +
                               "; build with TORCH_CUDA_ARCH_LIST set for it");
    throw std::runtime_error("mmca_ext: a CUDA kernel could not be started: " + prim::error_text(error));
  }
};

// Attention's; linear attention's is in linear.h.
struct Launch : DeviceCall {
  const Problem& problem;
  const DevicePlan& plan;

  Launch(const DeviceCall& call, const Problem& problem, const DevicePlan& plan)
      : DeviceCall(call), problem(problem), plan(plan) {}
};

// plan.cu: `count` offsets in device memory that hold anything, as count + 1 that can be trusted: they ascend from 0
// within [0, tokens], and the last is `tokens`.
std::int32_t* trusted_offsets(const DeviceCall& call, const std::int64_t* given, std::int64_t count,
                              std::int64_t tokens);
DevicePlan make_plan(const Problem& problem, const DeviceCall& call);

// backward_rows.cu: RowFacts of every row and group, [group][query head][query token of the row], and grad_gate.
// T: float for all but f64 problems.
template <class T>
struct RowFacts;
template <class T>
RowFacts<T>* backward_rows(const Launch& launch);

// Any GPU from 8.0 on, fp32 (T = float) and fp64 (T = double).
namespace generic {
template <class T>
void attention_forward(const Launch& launch);
template <class T>
void attention_backward(const Launch& launch);
}  // namespace generic

// Tensor cores, T = BFloat16 or Float16.
namespace sm80 {
template <class T>
void attention_forward(const Launch& launch);
template <class T>
void attention_backward(const Launch& launch);
}  // namespace sm80

}  // namespace mmca::cuda
