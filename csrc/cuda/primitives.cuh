// Device primitives: the only file with PTX, intrinsics and launches. Kernels use these names and nothing below them,
// so that the same kernels run under tests/emulation, which has a file of this name with the same functions in C++.
//
// What a kernel must keep to for that: shared memory is dynamic and reached through `smem_t` addresses; global memory
// is read and written through ld_global, st_global, atomic_add and cp_async; whole warps take part in every collective;
// no waiting on memory that another block writes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/half.h"

#define PRIM __device__ __forceinline__

namespace mmca::prim {

using smem_t = std::uint32_t;  // byte offset in the block's shared memory

// ---- shared memory ---------------------------------------------------------------------------------------------

PRIM unsigned char* shared_bytes() {
  extern __shared__ __align__(1024) unsigned char mmca_shared_memory[];
  return mmca_shared_memory;
}
PRIM std::uint32_t shared_window(smem_t address) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_bytes())) + address;
}
// T: 4, 8 or 16 bytes, aligned to its size (16-bit types too).
template <class T>
PRIM T ld_shared(smem_t address) {
  return *reinterpret_cast<const T*>(shared_bytes() + address);
}
template <class T>
PRIM void st_shared(smem_t address, T value) {
  *reinterpret_cast<T*>(shared_bytes() + address) = value;
}

// ---- global memory ---------------------------------------------------------------------------------------------

template <class T>
PRIM T ld_global(const T* p) {
  return *p;
}
template <class T>
PRIM void st_global(T* p, T value) {
  *p = value;
}
PRIM uint4 ld_global_16(const void* p) { return *static_cast<const uint4*>(p); }  // 16-byte aligned
PRIM void st_global_16(void* p, uint4 value) { *static_cast<uint4*>(p) = value; }

PRIM void atomic_add(float* p, float x) { atomicAdd(p, x); }
PRIM void atomic_add(double* p, double x) { atomicAdd(p, x); }
// p[0] += x, p[1] += y; p 8-byte aligned. Two additions that may be seen apart.
PRIM void atomic_add_pair(float* p, float x, float y) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float2*>(p), make_float2(x, y));
#else
  atomicAdd(p, x);
  atomicAdd(p + 1, y);
#endif
}

// p[0..3] += x; p 16-byte aligned. Four additions that may be seen apart.
PRIM void atomic_add_quad(float* p, float4 x) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(p), x);
#else
  atomicAdd(p, x.x);
  atomicAdd(p + 1, x.y);
  atomicAdd(p + 2, x.z);
  atomicAdd(p + 3, x.w);
#endif
}

// Copies Bytes (4, 8 or 16; both ends aligned to that) without waiting; writes zeros where not valid (then `src` is not
// read). The copy is there after cp_async_wait by this thread, for others after a barrier more.
template <int Bytes>
PRIM void cp_async(smem_t dst, const void* src, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_window(dst)),
                 "l"(__cvta_generic_to_global(src)), "r"(valid ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_window(dst)),
                 "l"(__cvta_generic_to_global(src)), "n"(Bytes), "r"(valid ? Bytes : 0)
                 : "memory");
}
PRIM void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most Pending of this thread's committed groups are still on their way.
template <int Pending>
PRIM void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- 16-bit numbers (T: BFloat16 or Float16) ---------------------------------------------------------------------

template <class T>
PRIM float to_float(std::uint16_t bits);
template <>
PRIM float to_float<BFloat16>(std::uint16_t bits) {
  return __uint_as_float(std::uint32_t{bits} << 16);
}
template <>
PRIM float to_float<Float16>(std::uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
// Two floats, rounded to nearest even, `lo` in the lower half.
template <class T>
PRIM std::uint32_t pack2(float lo, float hi);
template <>
PRIM std::uint32_t pack2<BFloat16>(float lo, float hi) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
template <>
PRIM std::uint32_t pack2<Float16>(float lo, float hi) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}

// ---- tensor core -------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned).
// r[i]: of matrix i, row lane / 4, columns 2 (lane % 4) and the next; transposed: column lane / 4, those two rows.
PRIM void ldmatrix_x4(std::uint32_t (&r)[4], smem_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_window(address))
               : "memory");
}
PRIM void ldmatrix_x4_trans(std::uint32_t (&r)[4], smem_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_window(address))
               : "memory");
}
// d (16x8) += a (16x16) b (16x8), 16-bit a and b, fp32 d. With g = lane / 4 and t = lane % 4:
// a[0..3]: rows g, g + 8, g, g + 8; columns 2t, 2t, 2t + 8, 2t + 8 and the next. b0, b1: rows 2t, 2t + 8 and the next,
// column g. d[0..3]: rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1.
template <class T>
PRIM void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
template <>
PRIM void mma_m16n8k16<BFloat16>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
PRIM void mma_m16n8k16<Float16>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- synchronisation and arithmetic ------------------------------------------------------------------------------

template <class T>
PRIM T shfl_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T>
PRIM T shfl(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
inline constexpr std::uint32_t all_lanes = 0xffffffffu;
// Bit i: the condition of lane i.
PRIM std::uint32_t ballot(bool condition) { return __ballot_sync(all_lanes, condition); }
PRIM bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition); }
PRIM void syncthreads() { __syncthreads(); }
PRIM bool syncthreads_or(bool condition) { return __syncthreads_or(condition); }
PRIM void syncwarp() { __syncwarp(); }

// x, of which the compiler knows nothing: what is computed from it in a loop is not kept in registers across the loop.
PRIM std::uint32_t opaque(std::uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

PRIM int count_bits(std::uint32_t x) { return __popc(static_cast<int>(x)); }
PRIM int leading_zeros(std::uint32_t x) { return __clz(static_cast<int>(x)); }
PRIM float exp2_approx(float x) {  // 2 ulp; -inf gives 0, results below 2^-126 are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- host: device, memory, launch --------------------------------------------------------------------------------

using stream_t = cudaStream_t;

struct DeviceFacts {
  int sm = 0;  // 10 * major + minor
  int multiprocessors = 0;
};

// An error stays behind in the runtime too, where the next launch would find it.
inline int reported(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// 0 or an error for error_text, like all that follows.
inline int use_device(int device) { return reported(cudaSetDevice(device)); }
inline int device_facts(int device, DeviceFacts& facts) {  // makes no context: a process that only asks can still fork
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (!error) error = cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  facts.sm = 10 * major + minor;
  return reported(error);
}

// Empty: no error.
inline std::string error_text(int error) {
  return error ? cudaGetErrorString(static_cast<cudaError_t>(error)) : std::string();
}
inline bool is_missing_kernel(int error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
}

inline int fill_zero(void* p, std::size_t bytes, stream_t stream) {
  return bytes ? reported(cudaMemsetAsync(p, 0, bytes, stream)) : 0;
}

// Starts `kernel`.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, stream_t stream,
           const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return reported(error);
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace mmca::prim
