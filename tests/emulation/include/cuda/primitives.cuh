// The device primitives of csrc/cuda/primitives.cuh, emulated: the same names and signatures, described there. Found
// instead of it where tests/emulation/include comes first on the include path.
//
// Device functions take the place of their call as one more argument, for error messages.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>

#include "../../emulator.h"
#include "core/half.h"

#define PRIM inline
#define MMCA_HERE emulation::Location at = emulation::Location::current()

namespace mmca::prim {

using smem_t = std::uint32_t;

// ---- shared memory ---------------------------------------------------------------------------------------------

template <class T>
T ld_shared(smem_t address, MMCA_HERE) {
  T value;
  std::memcpy(&value, emulation::shared_read<sizeof(T)>(address, emulation::current->number, false, at), sizeof(T));
  return value;
}
template <class T>
void st_shared(smem_t address, T value, MMCA_HERE) {
  std::memcpy(emulation::shared_write<sizeof(T)>(address, at), &value, sizeof(T));
}

// ---- global memory ---------------------------------------------------------------------------------------------

template <class T>
T ld_global(const T* p, MMCA_HERE) {
  T value;
  std::memcpy(&value, emulation::global_access(p, sizeof(T), alignof(T), emulation::Use::read, at), sizeof(T));
  return value;
}
template <class T>
void st_global(T* p, T value, MMCA_HERE) {
  std::memcpy(emulation::global_access(p, sizeof(T), alignof(T), emulation::Use::write, at), &value, sizeof(T));
}
PRIM uint4 ld_global_16(const void* p, MMCA_HERE) { return ld_global(static_cast<const uint4*>(p), at); }
PRIM void st_global_16(void* p, uint4 value, MMCA_HERE) { st_global(static_cast<uint4*>(p), value, at); }

template <class T>
void atomic_add_to(T* p, std::size_t alignment, T x, emulation::Location at) {
  unsigned char* host = emulation::global_access(p, sizeof(T), alignment, emulation::Use::add, at);
  T sum;
  std::memcpy(&sum, host, sizeof(T));
  sum += x;
  std::memcpy(host, &sum, sizeof(T));
}
PRIM void atomic_add(float* p, float x, MMCA_HERE) { atomic_add_to(p, 4, x, at); }
PRIM void atomic_add(double* p, double x, MMCA_HERE) { atomic_add_to(p, 8, x, at); }
PRIM void atomic_add_pair(float* p, float x, float y, MMCA_HERE) {
  atomic_add_to(p, 8, x, at);
  atomic_add_to(p + 1, 4, y, at);
}
PRIM void atomic_add_quad(float* p, float4 x, MMCA_HERE) {
  atomic_add_to(p, 16, x.x, at);
  atomic_add_to(p + 1, 4, x.y, at);
  atomic_add_to(p + 2, 4, x.z, at);
  atomic_add_to(p + 3, 4, x.w, at);
}

template <int Bytes>
void cp_async(smem_t dst, const void* src, bool valid, MMCA_HERE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulation::cp_async(dst, src, valid, Bytes, at);
}
PRIM void cp_async_commit(MMCA_HERE) { emulation::cp_async_commit(at); }
template <int Pending>
void cp_async_wait(MMCA_HERE) {
  emulation::cp_async_wait(Pending, at);
}

// ---- 16-bit numbers ----------------------------------------------------------------------------------------------

template <class T>
float to_float(std::uint16_t bits) {
  T x;
  x.bits = bits;
  return static_cast<float>(x);
}
template <class T>
std::uint32_t pack2(float lo, float hi) {
  const auto bits = [](float x) { return x == x ? T(x).bits : std::uint16_t{0x7fff}; };
  return bits(lo) | std::uint32_t{bits(hi)} << 16;
}

// ---- tensor core -------------------------------------------------------------------------------------------------

PRIM void ldmatrix_x4(std::uint32_t (&r)[4], smem_t address, MMCA_HERE) {
  emulation::ldmatrix_x4(r, address, false, at);
}
PRIM void ldmatrix_x4_trans(std::uint32_t (&r)[4], smem_t address, MMCA_HERE) {
  emulation::ldmatrix_x4(r, address, true, at);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, MMCA_HERE);
template <>
PRIM void mma_m16n8k16<BFloat16>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                                 emulation::Location at) {
  emulation::mma_m16n8k16(emulation::Half::bf16, d, a, b0, b1, at);
}
template <>
PRIM void mma_m16n8k16<Float16>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                                emulation::Location at) {
  emulation::mma_m16n8k16(emulation::Half::f16, d, a, b0, b1, at);
}

// ---- synchronisation and arithmetic ------------------------------------------------------------------------------

template <class T>
struct Shuffle {
  T given, taken;
  int from;
};
template <class T>
T shfl_any(T x, int from, emulation::Location at) {
  Shuffle<T> mine{x, x, from};
  emulation::warp_collective(mine, at, [](Shuffle<T>** lanes) {
    for (int i = 0; i < emulation::warp_size; ++i) lanes[i]->taken = lanes[lanes[i]->from]->given;
  });
  return mine.taken;
}
template <class T>
T shfl_xor(T x, int mask, MMCA_HERE) {
  const int lane = emulation::current->lane;
  if (mask < 0 || mask > 31) emulation::fail(emulation::current->number, at, "shfl_xor with mask %d", mask);
  return shfl_any(x, lane ^ mask, at);
}
template <class T>
T shfl(T x, int lane, MMCA_HERE) {
  return shfl_any(x, lane & 31, at);
}
inline constexpr std::uint32_t all_lanes = emulation::all_lanes;
PRIM std::uint32_t ballot(bool condition, MMCA_HERE) {
  struct Vote {
    bool condition;
    std::uint32_t all;
  } mine{condition, 0};
  emulation::warp_collective(mine, at, [](Vote** lanes) {
    std::uint32_t all = 0;
    for (int i = 0; i < emulation::warp_size; ++i) all |= std::uint32_t{lanes[i]->condition} << i;
    for (int i = 0; i < emulation::warp_size; ++i) lanes[i]->all = all;
  });
  return mine.all;
}
PRIM bool any_lane(bool condition, MMCA_HERE) {
  emulation::warp_collective(condition, at, [](bool** lanes) {
    bool any = false;
    for (int i = 0; i < emulation::warp_size; ++i) any = any || *lanes[i];
    for (int i = 0; i < emulation::warp_size; ++i) *lanes[i] = any;
  });
  return condition;
}
PRIM void syncthreads(MMCA_HERE) { emulation::block_barrier(false, at); }
PRIM bool syncthreads_or(bool condition, MMCA_HERE) { return emulation::block_barrier(condition, at); }
PRIM void syncwarp(MMCA_HERE) {
  int nothing = 0;
  emulation::warp_collective(nothing, at, [](int**) { emulation::begin_warp_interval(); });
}

PRIM std::uint32_t opaque(std::uint32_t x) { return x; }

PRIM int count_bits(std::uint32_t x) { return __builtin_popcount(x); }
PRIM int leading_zeros(std::uint32_t x) { return x ? __builtin_clz(x) : 32; }
PRIM float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

// ---- host: device, memory, launch --------------------------------------------------------------------------------

using stream_t = void*;

struct DeviceFacts {
  int sm = 0;
  int multiprocessors = 0;
};
inline int use_device(int) { return 0; }
inline int device_facts(int, DeviceFacts& facts) {
  facts = {emulation::device_sm(), emulation::device_multiprocessors()};
  return 0;
}

inline std::string error_text(int error) { return error ? emulation::last_error() : std::string(); }
inline bool is_missing_kernel(int error) { return error == emulation::missing_kernel; }

inline int fill_zero(void* p, std::size_t bytes, stream_t) { return emulation::fill_zero(p, bytes); }

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, stream_t,
           const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {arguments...}};
  const auto entry = [](void* data) {
    const auto* c = static_cast<const Call*>(data);
    std::apply(c->kernel, c->parameters);
  };
  return emulation::run_grid(grid, block, shared_bytes, entry, &call);
}

}  // namespace mmca::prim

#undef MMCA_HERE
