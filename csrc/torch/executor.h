// torch's thread pool behind the kernels' Executor.
#pragma once

#include <ATen/Parallel.h>
#include <pthread.h>

#include <atomic>

#include "core/executor.h"

namespace mmca {

// OpenMP's threads do not survive fork(), and a child that asks for them waits for ever.
inline std::atomic<bool> is_forked_child{false};
inline const int registered_at_load = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

// at::parallel_for needs OpenMP switched on in this translation unit too, or it silently runs on one thread.
#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "compile with -fopenmp"
#endif

class TorchExecutor final : public Executor {
 public:
  int concurrency() const override { return at::in_parallel_region() || is_forked_child ? 1 : at::get_num_threads(); }
  void run(int workers, void (*task)(void*, int), void* context) override {
    at::parallel_for(0, workers, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker) task(context, static_cast<int>(worker));
    });
  }
};

}  // namespace mmca
