// Executors to hold kernels to: real threads, and workers one after the other in a shuffled order.
#pragma once

#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "core/executor.h"
#include "cpu/scratch.h"
#include "tensor.h"

namespace mmca::test {

// Fills this thread's scratch with 0xff, so that whatever a kernel reads before it writes is NaN (or index -1).
inline void poison_scratch(std::size_t bytes) {
  std::memset(cpu::worker_scratch(bytes), 0xff, bytes);
  std::memset(cpu::call_scratch(bytes), 0xff, bytes);
}

class ThreadExecutor final : public Executor {
 public:
  explicit ThreadExecutor(int threads) : threads_(threads) {}
  int concurrency() const override { return threads_; }
  void run(int workers, void (*task)(void*, int), void* context) override {
    std::vector<std::thread> threads;
    for (int worker = 0; worker < workers; ++worker)
      threads.emplace_back([=] {
        constexpr std::size_t bytes = std::size_t{2} << 20;
        std::memset(cpu::worker_scratch(bytes), 0xff, bytes);
        task(context, worker);
      });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int threads_;
};

class ShuffledExecutor final : public Executor {
 public:
  ShuffledExecutor(int workers, std::uint64_t seed) : workers_(workers), random_(seed) {}
  int concurrency() const override { return workers_; }
  void run(int workers, void (*task)(void*, int), void* context) override {
    std::vector<int> order(static_cast<std::size_t>(workers));
    std::iota(order.begin(), order.end(), 0);
    for (int i = workers - 1; i > 0; --i)
      std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(random_.integer(0, i))]);
    for (const int worker : order) task(context, worker);
  }

 private:
  int workers_;
  Random random_;
};

}  // namespace mmca::test
