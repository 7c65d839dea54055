#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace mmca::cpu {
namespace {

// More than this is returned to the system by the next, smaller request.
constexpr std::size_t kept_bytes = std::size_t{64} << 20;

struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;

  ~Block() { std::free(data); }
  void* at_least(std::size_t wanted) {
    wanted = (wanted + 4095) / 4096 * 4096;
#if defined(__SANITIZE_ADDRESS__)
    if (data) ASAN_UNPOISON_MEMORY_REGION(data, bytes);  // the last arena's gaps
#endif
    if (wanted <= bytes && !(bytes > kept_bytes && wanted <= kept_bytes)) return data;
    std::free(data);
    bytes = 0;
    data = std::aligned_alloc(4096, wanted);
    if (!data) throw std::bad_alloc();
    bytes = wanted;
    return data;
  }
};

}  // namespace

void* worker_scratch(std::size_t bytes) {
  thread_local Block block;
  return block.at_least(bytes);
}

void* call_scratch(std::size_t bytes) {
  thread_local Block block;
  return block.at_least(bytes);
}

}  // namespace mmca::cpu
