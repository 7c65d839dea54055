// Whose kernels solve a problem, and what they want of its tensors.
#pragma once

#include <c10/core/Device.h>

#include "core/kernel_table.h"

namespace mmca {

struct Backend {
  bool is_cuda;  // what tensors hold is not looked at: that would mean to wait. grad_bias is added to in any order
  bool (*needs_aligned_rows)(DType dtype);  // see cuda/run.h
  void (*run)(Operation operation, const Problem& problem, c10::Device device);
  void (*run_linear)(Operation operation, const LinearProblem& problem, c10::Device device);
};

// That of tensors on `device`. Throws where this build has none.
const Backend& backend_of(const char* op, c10::Device device);

#ifdef MMCA_EXT_WITH_CUDA
extern const Backend cuda_backend;  // cuda.cpp
#endif

}  // namespace mmca
