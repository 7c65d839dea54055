// Working memory of one worker thread: kept between calls, so that a training step neither allocates nor faults pages
// in again. Contents are undefined at the start of every item.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace mmca::cpu {

// At least `bytes` bytes, aligned to 64, valid until the thread's next call. Throws std::bad_alloc.
void* worker_scratch(std::size_t bytes);
// A second block, for what a whole call shares between its workers; owned by the calling thread.
void* call_scratch(std::size_t bytes);

#if defined(__SANITIZE_ADDRESS__)
inline constexpr std::size_t arena_gap = 64;
#else
inline constexpr std::size_t arena_gap = 0;
#endif

// Cuts 64-byte aligned arrays from a block; with a null block it only measures. The address sanitizer sees each array's
// end: there is a gap behind it.
class Arena {
 public:
  explicit Arena(void* block) : base_(static_cast<unsigned char*>(block)) {}

  template <class T>
  T* take(std::size_t count) {
    T* array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    if (array) ASAN_UNPOISON_MEMORY_REGION(array, bytes), ASAN_POISON_MEMORY_REGION(base_ + used_ + bytes, arena_gap);
#endif
    used_ += bytes + arena_gap;
    return array;
  }
  std::size_t used() const { return used_; }

 private:
  unsigned char* base_;
  std::size_t used_ = 0;
};

}  // namespace mmca::cpu
