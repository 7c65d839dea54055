// Small kernels that show what every primitive does, for tests/test_emulation.py to compare with what it should do.
#include "cuda/primitives.cuh"

namespace mmca {
namespace {

using namespace prim;

PRIM int self() { return static_cast<int>(threadIdx.x); }

// One mma of one warp; a lane's registers lie together.
template <class T>
__global__ void mma_kernel(const std::uint32_t* a, const std::uint32_t* b, float* d) {
  std::uint32_t own_a[4];
  float own_d[4];
  for (int i = 0; i < 4; ++i) own_a[i] = ld_global(a + 4 * self() + i), own_d[i] = ld_global(d + 4 * self() + i);
  mma_m16n8k16<T>(own_d, own_a, ld_global(b + 2 * self()), ld_global(b + 2 * self() + 1));
  for (int i = 0; i < 4; ++i) st_global(d + 4 * self() + i, own_d[i]);
}

// One ldmatrix of one warp: `memory` becomes the shared memory, lane l gives addresses[l].
__global__ void ldmatrix_kernel(const uint4* memory, int bytes, const std::uint32_t* addresses, bool transposed,
                                uint4* registers) {
  for (int i = self() * 16; i < bytes; i += 32 * 16) st_shared(static_cast<smem_t>(i), ld_global(memory + i / 16));
  syncthreads();
  std::uint32_t r[4];
  const smem_t address = ld_global(addresses + self());
  if (transposed) ldmatrix_x4_trans(r, address);
  else ldmatrix_x4(r, address);
  st_global(registers + self(), make_uint4(r[0], r[1], r[2], r[3]));
}

template <class T>
__global__ void widen_kernel(const std::uint16_t* bits, float* numbers) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  st_global(numbers + i, to_float<T>(ld_global(bits + i)));
}

template <class T>
__global__ void narrow_kernel(const float2* numbers, std::uint32_t* bits) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const float2 x = ld_global(numbers + i);
  st_global(bits + i, pack2<T>(x.x, x.y));
}

__global__ void exp2_kernel(const float* x, float* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  st_global(y + i, exp2_approx(ld_global(x + i)));
}

// Every thread writes down where it is.
__global__ void index_kernel(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const int lane = shfl(static_cast<int>(thread), 0);  // of its warp's first thread
  st_global(out + block * threads + thread, static_cast<int>(block * threads) + lane);
}

// out[0..31]: x of lane 31 - l; [32..63]: of lane l ^ 5; then whether any lane, none, any thread of the block, none.
__global__ void collectives_kernel(double* out) {
  const double x = 100.0 + self();
  const double mirrored = shfl(x, 31 - self() % 32), crossed = shfl_xor(x, 5);
  const bool votes[4] = {any_lane(self() == 17), any_lane(self() < 0), syncthreads_or(self() == 63),
                         syncthreads_or(false)};
  if (self() >= 32) return;
  st_global(out + self(), mirrored);
  st_global(out + 32 + self(), crossed);
  if (self() < 4) st_global(out + 64 + self(), votes[self()] ? 1.0 : 0.0);
}

// Blocks add their numbers in the order in which they run.
__global__ void sum_kernel(const float* x, float* sum) {
  if (self() == 0) atomic_add(sum, ld_global(x + blockIdx.x));
}
__global__ void add_kernel(float* f, double* d) {
  atomic_add(f, 1.0f);
  atomic_add(d, 0.5);
  atomic_add_pair(f + 2, 2.0f, 3.0f);
}

// Copies of 16, 8 and 4 bytes, every third one not valid; a second group is under way meanwhile.
__global__ void copy_kernel(const unsigned char* from, unsigned char* to) {
  const smem_t at = static_cast<smem_t>(self() * 32);
  const bool valid = self() % 3 != 2;
  cp_async<16>(at, from + at, valid);
  cp_async<8>(at + 16, from + at + 16, valid);
  cp_async<4>(at + 24, from + at + 24, valid);
  cp_async<4>(at + 28, from + at + 28, valid);
  cp_async_commit();
  cp_async<16>(static_cast<smem_t>(32 * 64 + self() * 16), from, true);
  cp_async_commit();
  cp_async_wait<1>();
  syncthreads();
  const smem_t neighbour = static_cast<smem_t>((self() ^ 33) * 32);
  st_global_16(to + neighbour, ld_shared<uint4>(neighbour));
  st_global_16(to + neighbour + 16, ld_shared<uint4>(neighbour + 16));
  cp_async_wait<0>();
}

// What a kernel finds in shared memory, local variables and the global memory of `from`, if it looks unasked.
__global__ void contents_kernel(const float* from, float* out) {
  float local[4];
  for (int i = 0; i < static_cast<int>(blockIdx.x); ++i) local[i] = 0;
  st_global(out, ld_shared<float>(0));
  st_global(out + 1, local[1]);  // NOLINT: uninitialised
  st_global(out + 2, ld_global(from));
}

__global__ void write_kernel(float* out) { st_global(out + blockIdx.x * blockDim.x + threadIdx.x, 7.0f); }
__global__ void read_kernel(const float* in, float* out) { st_global(out + self(), ld_global(in + self())); }
__global__ void nothing_kernel() {}

}  // namespace
}  // namespace mmca

using namespace mmca;

extern "C" {
int probe_mma(bool f16, const std::uint32_t* a, const std::uint32_t* b, float* d) {
  return prim::launch(f16 ? &mma_kernel<Float16> : &mma_kernel<BFloat16>, dim3(1), dim3(32), 0, nullptr, a, b, d);
}
int probe_ldmatrix(const uint4* memory, int bytes, const std::uint32_t* addresses, bool transposed, uint4* registers) {
  return prim::launch(&ldmatrix_kernel, dim3(1), dim3(32), static_cast<std::size_t>(bytes), nullptr, memory, bytes,
                      addresses, transposed, registers);
}
int probe_widen(bool f16, int blocks, const std::uint16_t* bits, float* numbers) {
  return prim::launch(f16 ? &widen_kernel<Float16> : &widen_kernel<BFloat16>, dim3(blocks), dim3(256), 0, nullptr, bits,
                      numbers);
}
int probe_narrow(bool f16, int blocks, const float2* numbers, std::uint32_t* bits) {
  return prim::launch(f16 ? &narrow_kernel<Float16> : &narrow_kernel<BFloat16>, dim3(blocks), dim3(256), 0, nullptr,
                      numbers, bits);
}
int probe_exp2(int blocks, const float* x, float* y) {
  return prim::launch(&exp2_kernel, dim3(blocks), dim3(256), 0, nullptr, x, y);
}
int probe_index(int* out, const unsigned* grid, const unsigned* block) {
  return prim::launch(&index_kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, nullptr,
                      out);
}
int probe_collectives(double* out) { return prim::launch(&collectives_kernel, dim3(1), dim3(64), 0, nullptr, out); }
int probe_sum(int blocks, const float* x, float* sum) {
  return prim::launch(&sum_kernel, dim3(blocks), dim3(32), 0, nullptr, x, sum);
}
int probe_add(float* f, double* d) { return prim::launch(&add_kernel, dim3(5), dim3(64), 0, nullptr, f, d); }
int probe_copy(const unsigned char* from, unsigned char* to) {
  return prim::launch(&copy_kernel, dim3(1), dim3(64), 64 * 48, nullptr, from, to);
}
int probe_contents(const float* from, float* out) {
  return prim::launch(&contents_kernel, dim3(1), dim3(32), 64, nullptr, from, out);
}
int probe_write(int blocks, float* out) { return prim::launch(&write_kernel, dim3(blocks), dim3(32), 0, nullptr, out); }
int probe_read(const float* in, float* out) {
  return prim::launch(&read_kernel, dim3(1), dim3(32), 0, nullptr, in, out);
}
int probe_zero(void* p, std::size_t bytes) { return prim::fill_zero(p, bytes, nullptr); }
int probe_shape(const unsigned* grid, const unsigned* block, std::size_t shared_bytes) {
  return prim::launch(&nothing_kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                      shared_bytes, nullptr);
}
void probe_device(int* facts) {
  prim::DeviceFacts device;
  prim::device_facts(0, device);
  facts[0] = device.sm, facts[1] = device.multiprocessors;
}
bool probe_is_missing_kernel(int error) { return prim::is_missing_kernel(error); }
// The text that belongs to an error code, as kernels' host code sees it.
const char* probe_error_text(int error) {
  static thread_local std::string text;
  text = prim::error_text(error);
  return text.c_str();
}
}
