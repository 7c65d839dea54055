// Threads that stay alive between calls, as a framework's do: to start them anew would be most of a small case.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "core/executor.h"

namespace mmca::bench {

class Pool final : public Executor {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int index = 1; index < threads; ++index) helpers_.emplace_back([this, index] { serve(index); });
  }
  ~Pool() override {
    start(nullptr, 0, nullptr);
    for (std::thread& helper : helpers_) helper.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int concurrency() const override { return threads_; }

  // The calling thread is one of them.
  void run(int workers, void (*task)(void*, int), void* context) override {
    start(task, workers, context);
    work(0);
    while (busy_.load(std::memory_order_acquire) > 0) std::this_thread::yield();
  }

  // body(worker) on every thread.
  template <class Body>
  void on_each(const Body& body) {
    run(
        threads_, [](void* context, int worker) { (*static_cast<const Body*>(context))(worker); },
        const_cast<Body*>(&body));
  }

 private:
  static constexpr int turns_before_sleep = 200;  // some 50 us: the next call usually comes sooner

  void start(void (*task)(void*, int), int workers, void* context) {
    const std::lock_guard<std::mutex> lock(mutex_);
    task_ = task, workers_ = workers, context_ = context;
    busy_.store(threads_ - 1, std::memory_order_relaxed);
    call_.fetch_add(1, std::memory_order_release);
    wake_.notify_all();
  }

  void work(int index) {
    for (int worker = index; worker < workers_; worker += threads_) task_(context_, worker);
  }

  void serve(int index) {
    for (std::uint64_t seen = 0;;) {
      const auto called = [&] { return call_.load(std::memory_order_acquire) != seen; };
      for (int turn = 0; turn < turns_before_sleep && !called(); ++turn) std::this_thread::yield();
      if (!called()) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, called);
      }
      ++seen;
      if (!task_) return;
      work(index);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> call_{0};  // counts them
  std::atomic<int> busy_{0};
  void (*task_)(void*, int) = nullptr;
  int workers_ = 0;
  void* context_ = nullptr;
  std::vector<std::thread> helpers_;
};

}  // namespace mmca::bench
