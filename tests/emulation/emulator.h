// Runs CUDA kernels on the CPU: every CUDA thread is a fiber, one block at a time, all in the calling OS thread.
//
// What it holds a kernel to, each breach being an error that names file and line:
//   collectives   whole warps and whole blocks, at one call site; threads that wait for ever are listed
//   memory        bounds, alignment, initialisation; shared memory is NaN at first, global memory only what is
//   registered order         two accesses of which one writes need a syncthreads, or within a warp a syncwarp, in
//   between; between
//                 the blocks of a launch nothing orders, only atomic additions may meet
//   cp.async      the destination is NaN from the copy's start until its thread waits for it, and nobody may touch it
// Warps, lanes and blocks can be run in other orders (emulation_order): results may not depend on it.
//
// This header is what the emulated primitives are written against; kernels see include/cuda/primitives.cuh only. Tests
// use the C functions at the end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace mmca::emulation {

using Location = std::source_location;

inline constexpr int warp_size = 32, max_threads = 1024, max_warps = max_threads / warp_size;
inline constexpr std::uint32_t all_lanes = 0xffffffffu;

enum class Wait : std::uint8_t { nothing, warp, block, exited };

struct Copy {  // a cp.async
  std::uint32_t destination, bytes;
  const unsigned char* source;  // null: zeros
};

struct Thread {
  void* stack_pointer;
  uint3 index;
  int number, warp, lane;
  Wait wait;
  Location at;                           // its latest primitive
  std::vector<Copy> copies;              // under way, oldest first
  std::vector<std::size_t> copy_groups;  // copies.size() at each commit
};

struct Warp {
  std::uint32_t ready, alive;  // masks of lanes
  int arrived;                 // lanes in the present collective
  Location at;                 // the collective's call
  void* arguments[warp_size];
  std::uint32_t since;  // when its lanes last met in syncwarp or syncthreads
};

extern Thread* current;
extern Warp warps[max_warps];

// Ends the launch with this error; `thread`: the one at fault.
[[noreturn]] void fail(int thread, Location at, const char* format, ...) __attribute__((format(printf, 3, 4)));

// ---- collectives -----------------------------------------------------------------------------------------------

std::string site(Location at);  // "file:line"

void wait_for_warp();  // until the last lane has run the present collective's body
[[noreturn]] void fail_apart(Location there, Location here, const char* whose);

inline bool same_site(Location a, Location b) { return a.line() == b.line() && a.column() == b.column(); }

// All lanes call this, each with its own arguments; the last one runs `body` for the warp.
template <class Arguments, class Body>
void warp_collective(Arguments& arguments, Location at, Body body) {
  Warp& warp = warps[current->warp];
  current->at = at;
  if (warp.arrived == 0) warp.at = at;
  else if (!same_site(warp.at, at)) fail_apart(warp.at, at, "warp");
  warp.arguments[current->lane] = &arguments;
  if (++warp.arrived < warp_size) return wait_for_warp();
  warp.arrived = 0;
  body(reinterpret_cast<Arguments**>(warp.arguments));
  warp.ready = all_lanes;
}

void begin_warp_interval();                       // what the present warp did lies before what it does now
bool block_barrier(bool condition, Location at);  // true if any thread's condition is

// ---- memory ----------------------------------------------------------------------------------------------------

// The host's address of `Bytes` (2, 4, 8 or 16) of shared memory, after all checks. `whole_warp`: lane `thread` % 32
// gives the address, but what is there goes to every lane.
template <int Bytes>
const unsigned char* shared_read(std::uint32_t address, int thread, bool whole_warp, Location at);
template <int Bytes>
unsigned char* shared_write(std::uint32_t address, Location at);

enum class Use : std::uint8_t { read, write, add };  // add: atomically
unsigned char* global_access(const void* p, std::size_t bytes, std::size_t alignment, Use use, Location at);

void cp_async(std::uint32_t destination, const void* source, bool valid, int bytes, Location at);
void cp_async_commit(Location at);
void cp_async_wait(unsigned pending_groups, Location at);

// ---- tensor core -----------------------------------------------------------------------------------------------

void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address, bool transposed, Location at);
enum class Half : std::uint8_t { bf16, f16 };
void mma_m16n8k16(Half type, float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  Location at);

// ---- host ------------------------------------------------------------------------------------------------------

inline constexpr int missing_kernel = 2;  // run_grid's error on a device older than sm_80: no code is built for it
int run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, void (*entry)(void*), void* kernel);
int fill_zero(void* p, std::size_t bytes);
const std::string& last_error();  // of this OS thread
int device_sm();
int device_multiprocessors();

struct Statistics {
  std::uint64_t launches, blocks, switches, mma;
  std::uint64_t ldmatrix_phases, ldmatrix_conflicts;  // 8x8 matrices read; reads of them beyond one each
};
extern Statistics statistics;

}  // namespace mmca::emulation

// ---- for tests -------------------------------------------------------------------------------------------------

extern "C" {
// Global memory that kernels may touch. access: 0 read only; 1 read and write; 2 the same, but not initialised: to read
// what no kernel wrote is an error. A range may be registered again (the widest access counts), but not overlap another
// in part. Returns an address that only the primitives can use (a plain `*p` ends the launch with an error), or null
// and emulation_last_error(). The primitives take this address and the host's alike.
void* emulation_register(void* host, std::size_t bytes, int access, const char* name);
int emulation_unregister(void* host);  // non-zero: it was not registered
void emulation_unregister_all();
// 0: warps, lanes and blocks in ascending order; 1: descending; 2: random, by `seed`.
void emulation_order(int mode, std::uint32_t seed);
// 0: bounds and alignment; 1: initialisation and copies under way too; 2, the default: races too.
void emulation_check_level(int level);
void emulation_device(int sm, int multiprocessors);  // 90 and 4 by default
const char* emulation_last_error();                  // of the calling OS thread's last launch or registration; "": none
void emulation_statistics(std::uint64_t* out);       // the numbers of Statistics, which then start from 0 again
}
