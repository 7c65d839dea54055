// Parallelism as an interface: the kernels know no thread library, the binding and the tests bring one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mmca {

class Executor {
 public:
  virtual ~Executor() = default;
  virtual int concurrency() const = 0;
  // Calls task(context, worker) once for each worker in 0..workers-1, in any order, at the same time where possible.
  virtual void run(int workers, void (*task)(void* context, int worker), void* context) = 0;
};

class SerialExecutor final : public Executor {
 public:
  int concurrency() const override { return 1; }
  void run(int workers, void (*task)(void*, int), void* context) override {
    for (int worker = 0; worker < workers; ++worker) task(context, worker);
  }
};

// Waking a worker costs microseconds: it must find at least this many multiply-adds to do.
inline constexpr double worth_a_worker = 1e5;

// Hands items 0..count-1 to workers one at a time, in order: put the heaviest first. Which worker takes which item must
// not matter to the result. `work`: multiply-adds of all items together.
template <class Body>
void for_each_item(Executor& executor, std::int64_t count, double work, const Body& body) {
  if (count <= 0) return;
  struct Queue {
    std::atomic<std::int64_t> next{0};
    std::int64_t count;
    const Body* body;
  } queue;
  queue.count = count;
  queue.body = &body;
  const auto drain = [](void* context, int) {
    Queue& queue = *static_cast<Queue*>(context);
    for (std::int64_t item; (item = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.count;)
      (*queue.body)(item);
  };
  const auto workers = static_cast<int>(
      std::min({static_cast<double>(executor.concurrency()), static_cast<double>(count), work / worth_a_worker}));
  if (workers <= 1) {
    drain(&queue, 0);
  } else {
    executor.run(workers, drain, &queue);
  }
}

}  // namespace mmca
