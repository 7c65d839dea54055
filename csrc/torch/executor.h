// torch's thread pool behind the kernels' Executor.
#pragma once

#include <ATen/Parallel.h>

#include "core/executor.h"

namespace mmca {

// at::parallel_for needs OpenMP switched on in this translation unit too, or it silently runs on one thread.
#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "compile with -fopenmp"
#endif

class TorchExecutor final : public Executor {
 public:
  int concurrency() const override { return at::in_parallel_region() ? 1 : at::get_num_threads(); }
  void run(int workers, void (*task)(void*, int), void* context) override {
    at::parallel_for(0, workers, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker) task(context, static_cast<int>(worker));
    });
  }
};

}  // namespace mmca
