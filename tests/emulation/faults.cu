// Small kernels with one fault each and, as <false>, without it: what the emulation must find and what it must let
// pass. A line with "BREAKS name" is the one that the error of that kernel names.
#include <cstring>

#include "cuda/primitives.cuh"

namespace mmca {
namespace {

using namespace prim;

constexpr int blocks = 3, threads = 128, shared_size = threads * 16;

// `in` can only be read; `out`, one number a thread, and `scratch`, four a thread, begin without contents; `total` is
// 0.
struct Buffers {
  const float* in;
  float *out, *scratch, *total;
};

PRIM int self() { return static_cast<int>(threadIdx.x); }
PRIM int lane() { return self() % 32; }
PRIM int everywhere() { return static_cast<int>(blockIdx.x) * threads + self(); }
PRIM smem_t own(int bytes = 4) { return static_cast<smem_t>(self() * bytes); }
PRIM smem_t other(int distance, int bytes = 4) { return static_cast<smem_t>((self() ^ distance) * bytes); }
PRIM void finish(const Buffers& b, float value) { st_global(b.out + everywhere(), value); }

// ---- order within a block --------------------------------------------------------------------------------------

template <bool broken>
__global__ void no_syncthreads(Buffers b) {
  st_shared(own(), 0.0f);
  syncthreads();
  st_shared(own(), 1.0f);  // BREAKS no_syncthreads
  if (!broken) syncthreads();
  finish(b, ld_shared<float>(other(64)));  // BREAKS no_syncthreads
}

template <bool broken>
__global__ void no_syncwarp(Buffers b) {
  st_shared(own(), 0.0f);
  syncthreads();
  st_shared(own(), 1.0f);  // BREAKS no_syncwarp
  if (!broken) syncwarp();
  finish(b, ld_shared<float>(other(1)));  // BREAKS no_syncwarp
}

template <bool broken>
__global__ void shuffle_instead_of_syncwarp(Buffers b) {
  st_shared(own(), 0.0f);
  syncthreads();
  st_shared(own(), 1.0f);  // BREAKS shuffle_instead_of_syncwarp
  if (broken) shfl(1, 0);
  else syncwarp();
  finish(b, ld_shared<float>(other(1)));  // BREAKS shuffle_instead_of_syncwarp
}

template <bool broken>
__global__ void overwrites_what_another_warp_reads(Buffers b) {
  st_shared(own(), 1.0f);
  syncthreads();
  const float x = ld_shared<float>(other(64));  // BREAKS overwrites_what_another_warp_reads
  if (!broken) syncthreads();
  st_shared(own(), x);  // BREAKS overwrites_what_another_warp_reads
  finish(b, x);
}

template <bool broken>
__global__ void overwrites_what_its_warp_reads(Buffers b) {
  st_shared(own(), 1.0f);
  syncwarp();
  const float x = ld_shared<float>(other(1));  // BREAKS overwrites_what_its_warp_reads
  if (!broken) syncwarp();
  st_shared(own(), x);  // BREAKS overwrites_what_its_warp_reads
  finish(b, x);
}

template <bool broken>
__global__ void two_warps_write(Buffers b) {
  if (self() < 32) st_shared(own(), 1.0f);  // BREAKS two_warps_write
  if (!broken) syncthreads();
  if (self() >= 96) st_shared(own() - 96 * 4, 2.0f);  // BREAKS two_warps_write
  finish(b, 0.0f);
}

template <bool broken>
__global__ void two_lanes_write(Buffers b) {
  if (broken || lane() == 0) st_global(b.scratch + everywhere() / 32, 1.0f);  // BREAKS two_lanes_write
  finish(b, 0.0f);
}

template <bool broken>
__global__ void global_memory_without_syncthreads(Buffers b) {
  st_global(b.scratch + everywhere(), 1.0f);
  if (!broken) syncthreads();
  finish(b, ld_global(b.scratch + (everywhere() ^ 64)));  // BREAKS global_memory_without_syncthreads
}

// That halves of a 4-byte word belong to two lanes is no fault.
template <bool broken>
__global__ void half_words(Buffers b) {
  st_shared(own(2), static_cast<std::uint16_t>(self()));
  if (!broken) syncwarp();
  finish(b, static_cast<float>(ld_shared<std::uint16_t>(other(1, 2))));  // BREAKS half_words
}

template <bool broken>
__global__ void ldmatrix_of_unordered_rows(Buffers b) {
  st_shared(own(16), uint4{1, 2, 3, 4});
  if (!broken) syncwarp();
  std::uint32_t r[4];
  ldmatrix_x4(r, own(16));  // BREAKS ldmatrix_of_unordered_rows
  finish(b, static_cast<float>(r[0]));
}

// ---- collectives -----------------------------------------------------------------------------------------------

template <bool broken>
__global__ void barriers_apart(Buffers b) {
  if (!broken || self() < 64) syncthreads();  // BREAKS barriers_apart
  else syncthreads();                         // BREAKS barriers_apart
  finish(b, 0.0f);
}

template <bool broken>
__global__ void barrier_of_some(Buffers b) {
  if (!broken || self() < 64) syncthreads();  // BREAKS barrier_of_some
  finish(b, 0.0f);
}

template <bool broken>
__global__ void returns_before_barrier(Buffers b) {
  finish(b, 0.0f);
  if (broken && self() == 5) return;
  syncthreads();  // BREAKS returns_before_barrier
}

template <bool broken>
__global__ void half_a_warp(Buffers b) {
  if (!broken || lane() < 16) syncwarp();  // BREAKS half_a_warp
  finish(b, 0.0f);
}

template <bool broken>
__global__ void collectives_apart(Buffers b) {
  float x = 1.0f;
  if (!broken || lane() < 16) x = shfl_xor(x, 1);  // BREAKS collectives_apart
  else x = any_lane(x > 0);                        // BREAKS collectives_apart
  finish(b, x);
}

template <bool broken>
__global__ void one_lane_does_not_multiply(Buffers b) {
  float d[4] = {};
  const std::uint32_t a[4] = {};
  if (!broken || lane() != 31) mma_m16n8k16<BFloat16>(d, a, 0, 0);  // BREAKS one_lane_does_not_multiply
  finish(b, d[0]);
}

template <bool broken>
__global__ void warp_waits_while_block_waits(Buffers b) {
  if (broken && self() < 3) syncwarp();  // BREAKS warp_waits_while_block_waits
  syncthreads();
  finish(b, 0.0f);
}

template <bool broken>
__global__ void mask_beyond_the_warp(Buffers b) {
  finish(b, shfl_xor(1.0f, broken ? 32 : 16));  // BREAKS mask_beyond_the_warp
}

// ---- bounds, alignment, contents -------------------------------------------------------------------------------

template <bool broken>
__global__ void beyond_shared(Buffers b) {
  st_shared(own(16) + (broken ? 16 : 0), uint4{});  // BREAKS beyond_shared
  finish(b, 0.0f);
}

template <bool broken>
__global__ void before_shared(Buffers b) {
  st_shared(own() - (broken ? 4 : 0), 0.0f);  // BREAKS before_shared
  finish(b, 0.0f);
}

template <bool broken>
__global__ void misaligned_shared(Buffers b) {
  st_shared(own(8) + (broken ? 4 : 0), double{});  // BREAKS misaligned_shared
  finish(b, 0.0f);
}

template <bool broken>
__global__ void ldmatrix_misaligned(Buffers b) {
  st_shared(own(16), uint4{});
  syncthreads();
  std::uint32_t r[4];
  ldmatrix_x4(r, static_cast<smem_t>(lane() * 16 + (broken && lane() == 9 ? 8 : 0)));  // BREAKS ldmatrix_misaligned
  finish(b, static_cast<float>(r[0]));
}

template <bool broken>
__global__ void uninitialised_shared(Buffers b) {
  if (!broken || self() != 77) st_shared(own(), 0.0f);
  syncthreads();
  finish(b, ld_shared<float>(other(3)));  // BREAKS uninitialised_shared
}

// What an earlier block left there.
template <bool broken>
__global__ void contents_of_another_block(Buffers b) {
  finish(b, broken && blockIdx.x == 1 ? ld_shared<float>(own()) : 0.0f);  // BREAKS contents_of_another_block
  st_shared(own(), 0.0f);
}

template <bool broken>
__global__ void beyond_global(Buffers b) {
  finish(b, ld_global(b.in + everywhere() + (broken ? 1 : 0)));  // BREAKS beyond_global
}

template <bool broken>
__global__ void before_global(Buffers b) {
  st_global(b.out + everywhere() - (broken ? 1 : 0), 0.0f);  // BREAKS before_global
}

template <bool broken>
__global__ void partly_beyond_global(Buffers b) {
  const int i = self() == 0 ? blocks * threads * 4 - 4 : 0;
  if (self() == 0 && blockIdx.x == 0)
    st_global_16(b.scratch + i + (broken ? 4 : 0), uint4{});  // BREAKS partly_beyond_global
  finish(b, 0.0f);
}

template <bool broken>
__global__ void unregistered(Buffers b) {
  const float* p = broken ? reinterpret_cast<const float*>(0x7000) : b.in;
  finish(b, ld_global(p));  // BREAKS unregistered
}

template <bool broken>
__global__ void misaligned_global(Buffers b) {
  const uint4 x = ld_global_16(b.in + (broken ? 2 : 4));  // BREAKS misaligned_global
  finish(b, static_cast<float>(x.x));
}

template <bool broken>
__global__ void misaligned_pair(Buffers b) {
  atomic_add_pair(b.total + (broken ? 1 : 2), 1.0f, 1.0f);  // BREAKS misaligned_pair
  finish(b, 0.0f);
}

template <bool broken>
__global__ void uninitialised_global(Buffers b) {
  if (!broken) st_global(b.scratch + everywhere(), 0.0f);
  finish(b, ld_global(b.scratch + everywhere()));  // BREAKS uninitialised_global
}

template <bool broken>
__global__ void adds_to_nothing(Buffers b) {
  atomic_add(broken ? b.scratch : b.total, 1.0f);  // BREAKS adds_to_nothing
  finish(b, 0.0f);
}

template <bool broken>
__global__ void writes_to_read_only(Buffers b) {
  float* to = broken ? const_cast<float*>(b.in) : b.out;
  st_global(to + everywhere(), 0.0f);  // BREAKS writes_to_read_only
}

template <bool broken>
__global__ void adds_to_read_only(Buffers b) {
  atomic_add(broken ? const_cast<float*>(b.in) : b.total, 1.0f);  // BREAKS adds_to_read_only
}

// ---- cp.async --------------------------------------------------------------------------------------------------

PRIM const float* source(const Buffers& b) { return b.in + self() / 4 * 4; }

template <bool broken>
__global__ void reads_before_copy_is_there(Buffers b) {
  cp_async<16>(own(16), source(b), true);
  cp_async_commit();
  if (!broken) cp_async_wait<0>();
  finish(b, ld_shared<float>(own(16)));  // BREAKS reads_before_copy_is_there
  cp_async_wait<0>();
}

template <bool broken>
__global__ void waits_for_its_own_copy_only(Buffers b) {
  cp_async<4>(own(), source(b), lane() != 3);
  cp_async_commit();
  cp_async_wait<0>();
  if (!broken) syncthreads();
  finish(b, ld_shared<float>(other(1)));  // BREAKS waits_for_its_own_copy_only
}

template <bool broken>
__global__ void barrier_without_waiting(Buffers b) {
  cp_async<8>(own(8), source(b), true);
  cp_async_commit();
  if (!broken) cp_async_wait<0>();
  syncthreads();
  finish(b, ld_shared<float>(other(65, 8)));  // BREAKS barrier_without_waiting
  cp_async_wait<0>();
}

template <bool broken>
__global__ void waits_for_the_wrong_group(Buffers b) {
  cp_async<4>(own(), source(b), true);
  cp_async_commit();
  cp_async<4>(own() + 512, source(b), true);
  cp_async_commit();
  cp_async_wait<1>();
  finish(b, ld_shared<float>(own() + (broken ? 512 : 0)));  // BREAKS waits_for_the_wrong_group
  cp_async_wait<0>();
}

template <bool broken>
__global__ void does_not_commit(Buffers b) {
  cp_async<4>(own(), source(b), true);
  if (!broken) cp_async_commit();
  cp_async_wait<0>();
  finish(b, ld_shared<float>(own()));  // BREAKS does_not_commit
}

template <bool broken>
__global__ void writes_where_a_copy_goes(Buffers b) {
  cp_async<4>(own(), source(b), true);
  cp_async_commit();
  if (!broken) cp_async_wait<0>();
  st_shared(own(), 0.0f);  // BREAKS writes_where_a_copy_goes
  cp_async_wait<0>();
  finish(b, 0.0f);
}

template <bool broken>
__global__ void copies_over_what_is_read(Buffers b) {
  st_shared(own(), 0.0f);
  syncthreads();
  const float x = ld_shared<float>(other(65));  // BREAKS copies_over_what_is_read
  if (!broken) syncthreads();
  cp_async<4>(own(), source(b), true);  // BREAKS copies_over_what_is_read
  cp_async_commit();
  cp_async_wait<0>();
  finish(b, x);
}

template <bool broken>
__global__ void returns_while_copying(Buffers b) {
  finish(b, 0.0f);
  cp_async<4>(own(), source(b), true);  // BREAKS returns_while_copying
  if (broken) return;
  cp_async_commit();
  cp_async_wait<0>();
}

template <bool broken>
__global__ void copies_from_misaligned(Buffers b) {
  cp_async<16>(own(16), b.in + (broken ? 1 : 0), false);  // BREAKS copies_from_misaligned
  cp_async_commit();
  cp_async_wait<0>();
  finish(b, ld_shared<float>(own(16)));
}

template <bool broken>
__global__ void copies_from_beyond(Buffers b) {
  const float* end = b.in + blocks * threads;
  cp_async<16>(own(16), end, broken);  // BREAKS copies_from_beyond
  cp_async_commit();
  cp_async_wait<0>();
  finish(b, ld_shared<float>(own(16)));
}

// ---- order between blocks --------------------------------------------------------------------------------------

template <bool broken>
__global__ void two_blocks_write(Buffers b) {
  st_global(b.out + (broken ? self() : everywhere()), 0.0f);  // BREAKS two_blocks_write
}

// The neighbour on either side, so that no order of the blocks hides it.
template <bool broken>
__global__ void reads_what_another_block_writes(Buffers b) {
  st_global(b.scratch + everywhere(), 0.0f);  // BREAKS reads_what_another_block_writes
  const int apart = broken ? threads : 0, last = blocks * threads;
  float x = ld_global(b.scratch + (everywhere() + apart) % last);    // BREAKS reads_what_another_block_writes
  x += ld_global(b.scratch + (everywhere() + last - apart) % last);  // BREAKS reads_what_another_block_writes
  finish(b, x);
}

template <bool broken>
__global__ void writes_what_all_blocks_read(Buffers b) {
  finish(b, ld_global(b.total));  // BREAKS writes_what_all_blocks_read
  syncthreads();
  if (broken && self() == 0 && blockIdx.x == 1) st_global(b.total, 1.0f);  // BREAKS writes_what_all_blocks_read
}

template <bool broken>
__global__ void reads_a_sum_of_all_blocks(Buffers b) {
  atomic_add(b.total, 1.0f);  // BREAKS reads_a_sum_of_all_blocks
  syncthreads();
  finish(b, broken ? ld_global(b.total) : 0.0f);  // BREAKS reads_a_sum_of_all_blocks
}

template <bool broken>
__global__ void adds_where_another_writes(Buffers b) {
  if (broken && self() == 0 && blockIdx.x == 1) st_global(b.total, 1.0f);  // BREAKS adds_where_another_writes
  else if (self() == 0) atomic_add(b.total, 1.0f);                         // BREAKS adds_where_another_writes
  finish(b, 0.0f);
}

// ---- what only a signal tells of -------------------------------------------------------------------------------

template <bool broken>
__global__ void plain_pointer(Buffers b) {
  const float x = broken ? b.in[self()] : ld_global(b.in + self());  // BREAKS plain_pointer
  finish(b, x);
}

template <bool broken>
__global__ void null_pointer(Buffers b) {
  volatile float* null = nullptr;
  if (broken && self() == 70) *null = 1.0f;  // BREAKS null_pointer
  finish(b, 0.0f);
}

template <bool broken>
__global__ void division_by_zero(Buffers b) {
  const int divisor = broken ? static_cast<int>(ld_global(b.total)) : 1;
  finish(b, static_cast<float>(self() / divisor));  // BREAKS division_by_zero
}

template <bool broken>
__global__ void beyond_a_local_array(Buffers b) {
  float x[4] = {1, 2, 3, 4};
  const int i = static_cast<int>(ld_global(b.total)) + (broken ? 4 : 3);
  const float y = x[i];  // BREAKS beyond_a_local_array
  finish(b, y);
}

template <bool broken>
__global__ void shift_too_wide(Buffers b) {
  const int by = static_cast<int>(ld_global(b.total)) + (broken ? 32 : 31);
  finish(b, static_cast<float>(1u << by));  // BREAKS shift_too_wide
}

__device__ int deeper(volatile const char* above, int depth) {      // BREAKS stack_overflow
  volatile char here[4096];                                         // BREAKS stack_overflow
  here[0] = above[0];                                               // BREAKS stack_overflow
  return depth == 0 ? here[0] : deeper(here, depth - 1) + here[0];  // BREAKS stack_overflow
}
template <bool broken>
__global__ void stack_overflow(Buffers b) {
  const char zero[1] = {};
  finish(b, static_cast<float>(deeper(zero, broken ? 100 : 30)));
}

// ---- the table -------------------------------------------------------------------------------------------------

struct Entry {
  const char* name;
  void (*broken)(Buffers);
  void (*clean)(Buffers);
};
#define ENTRY(kernel) {#kernel, &kernel<true>, &kernel<false>}
const Entry table[] = {
    ENTRY(no_syncthreads),
    ENTRY(no_syncwarp),
    ENTRY(shuffle_instead_of_syncwarp),
    ENTRY(overwrites_what_another_warp_reads),
    ENTRY(overwrites_what_its_warp_reads),
    ENTRY(two_warps_write),
    ENTRY(two_lanes_write),
    ENTRY(global_memory_without_syncthreads),
    ENTRY(half_words),
    ENTRY(ldmatrix_of_unordered_rows),
    ENTRY(barriers_apart),
    ENTRY(barrier_of_some),
    ENTRY(returns_before_barrier),
    ENTRY(half_a_warp),
    ENTRY(collectives_apart),
    ENTRY(one_lane_does_not_multiply),
    ENTRY(warp_waits_while_block_waits),
    ENTRY(mask_beyond_the_warp),
    ENTRY(beyond_shared),
    ENTRY(before_shared),
    ENTRY(misaligned_shared),
    ENTRY(ldmatrix_misaligned),
    ENTRY(uninitialised_shared),
    ENTRY(contents_of_another_block),
    ENTRY(beyond_global),
    ENTRY(before_global),
    ENTRY(partly_beyond_global),
    ENTRY(unregistered),
    ENTRY(misaligned_global),
    ENTRY(misaligned_pair),
    ENTRY(uninitialised_global),
    ENTRY(adds_to_nothing),
    ENTRY(writes_to_read_only),
    ENTRY(adds_to_read_only),
    ENTRY(reads_before_copy_is_there),
    ENTRY(waits_for_its_own_copy_only),
    ENTRY(barrier_without_waiting),
    ENTRY(waits_for_the_wrong_group),
    ENTRY(does_not_commit),
    ENTRY(writes_where_a_copy_goes),
    ENTRY(copies_over_what_is_read),
    ENTRY(returns_while_copying),
    ENTRY(copies_from_misaligned),
    ENTRY(copies_from_beyond),
    ENTRY(two_blocks_write),
    ENTRY(reads_what_another_block_writes),
    ENTRY(writes_what_all_blocks_read),
    ENTRY(reads_a_sum_of_all_blocks),
    ENTRY(adds_where_another_writes),
    ENTRY(plain_pointer),
    ENTRY(null_pointer),
    ENTRY(division_by_zero),
    ENTRY(beyond_a_local_array),
    ENTRY(shift_too_wide),
    ENTRY(stack_overflow),
};

}  // namespace
}  // namespace mmca

using namespace mmca;

// Name number i; null past the last.
extern "C" const char* fault_name(int i) {
  return i < static_cast<int>(sizeof table / sizeof *table) ? table[i].name : nullptr;
}
extern "C" int run_fault(int i, bool broken, const float* in, float* out, float* scratch, float* total) {
  return prim::launch(broken ? table[i].broken : table[i].clean, dim3(blocks), dim3(threads), shared_size, nullptr,
                      Buffers{in, out, scratch, total});
}
