// The CUDA language as far as the kernels use it, for g++: found instead of the toolkit's header of this name.
//
// `__shared__` is absent: accesses to such variables could not be checked, and kernels have none.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

#define MMCA_VECTOR_TYPES(name, T)                                                   \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
MMCA_VECTOR_TYPES(int, int)
MMCA_VECTOR_TYPES(uint, unsigned)
MMCA_VECTOR_TYPES(float, float)
MMCA_VECTOR_TYPES(double, double)
MMCA_VECTOR_TYPES(short, short)
MMCA_VECTOR_TYPES(ushort, unsigned short)
#undef MMCA_VECTOR_TYPES

#define MMCA_MIN_MAX(T)                            \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
MMCA_MIN_MAX(int)
MMCA_MIN_MAX(unsigned)
MMCA_MIN_MAX(long)
MMCA_MIN_MAX(unsigned long)
MMCA_MIN_MAX(long long)
MMCA_MIN_MAX(unsigned long long)
#undef MMCA_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

using std::isfinite;
using std::isinf;
using std::isnan;
