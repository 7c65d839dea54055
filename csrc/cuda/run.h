// The door to the CUDA kernels: a Problem in device memory, a stream, a source of scratch memory. No CUDA header.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/kernel_table.h"
#include "core/linear_problem.h"
#include "core/problem.h"

namespace mmca::cuda {

// Device memory for the length of one call, from whoever owns the allocator; 256-byte aligned, not initialised.
class Workspace {
 public:
  virtual void* take(std::int64_t bytes) = 0;

 protected:
  ~Workspace() = default;
};

struct Device {
  int sm = 0;  // compute capability, 10 * major + minor
  int multiprocessors = 0;
};
Device device_at(int index);  // throws std::runtime_error where CUDA does

struct Launch;
struct LinearLaunch;

struct Kernel {
  const char* name;  // "cuda.sm80.attention_forward.bf16"
  Operation operation;
  DType dtype;
  int lowest_sm;
  void (*run)(const Launch&);                         // null for linear attention,
  void (*run_linear)(const LinearLaunch&) = nullptr;  // which has problems of its own; null for all others
};

// All CUDA kernels, the best first.
const std::vector<Kernel>& kernel_table();
std::uint64_t launches(const Kernel& kernel);
std::string refusal(const Kernel& kernel, const Device& device);  // empty: it serves

// How 16-bit tensors must lie: feature stride 1, rows of a multiple of 8 numbers at multiples of 16 bytes. Problem's
// query, key, value and grad_out are copied by the caller where they do not.
bool needs_aligned_rows(DType dtype);

// Plans the problem and starts its kernels on `stream` of the device, without waiting for them. Problem's
// offsets are device memory and need no checking: whatever they hold, nothing outside the tensors is touched. Throws
// std::runtime_error where no kernel serves the device or a launch fails.
void run(Operation operation, const Problem& problem, Workspace& workspace, int device, void* stream);
void run(Operation operation, const LinearProblem& problem, Workspace& workspace, int device, void* stream);

}  // namespace mmca::cuda
