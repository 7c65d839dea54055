// Working memory of one worker thread: kept between calls, so that a training step neither allocates nor faults pages
// in again. Contents are undefined at the start of every item.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmca::cpu {

// At least `bytes` bytes, aligned to 64, valid until the thread's next call. Throws std::bad_alloc.
void* worker_scratch(std::size_t bytes);
// A second block, for what a whole call shares between its workers; owned by the calling thread.
void* call_scratch(std::size_t bytes);

// Cuts 64-byte aligned arrays from a block; with a null block it only measures.
class Arena {
 public:
  explicit Arena(void* block) : base_(static_cast<unsigned char*>(block)) {}

  template <class T>
  T* take(std::size_t count) {
    T* array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return array;
  }
  std::size_t used() const { return used_; }

 private:
  unsigned char* base_;
  std::size_t used_ = 0;
};

}  // namespace mmca::cpu
