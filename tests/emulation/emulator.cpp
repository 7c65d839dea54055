// Fibers, their scheduling, barriers, launches, and the functions for tests.
#include "emulator.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>

#include "memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mmca::emulation {

Thread* current;
Warp warps[max_warps];
Statistics statistics;

namespace {

enum class Order : int { ascending, descending, random };

struct Block {
  int threads, warps;
  void (*entry)(void*);
  void* kernel;
  // syncthreads
  int arrived;
  bool any, result;
  Location at;
};

std::mutex lock;  // one launch, one call of a test's function at a time
thread_local std::string error;

Thread threads[max_threads];
Thread host;  // the one that launched
Block block;
Order order = Order::ascending;
std::minstd_rand generator;
int sm = 90, multiprocessors = 4;

// ---- fibers ----------------------------------------------------------------------------------------------------

#if !defined(__x86_64__)
#error "the emulation's switch between fibers is written for x86-64"
#endif

// Saves what the calling convention asks a function to keep, exchanges the stacks, and returns on the other one.
extern "C" void mmca_switch_stacks(void** save, void* load);
asm(R"(
  .text
  .local mmca_switch_stacks
  .type mmca_switch_stacks, @function
mmca_switch_stacks:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
  .size mmca_switch_stacks, . - mmca_switch_stacks
)");
constexpr int saved_registers = 6;

constexpr std::size_t stack_bytes = 256 * 1024, guard_bytes = 64 * 1024, stack_stride = guard_bytes + stack_bytes;
unsigned char* stacks;  // each above a guard that cannot be touched

void make_stacks() {
  if (stacks) return;
  void* memory = mmap(nullptr, max_threads * stack_stride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::perror("stacks of the emulation"), std::abort();
  stacks = static_cast<unsigned char*>(memory);
  for (int i = 0; i < max_threads; ++i) mprotect(stacks + i * stack_stride, guard_bytes, PROT_NONE);
}

void switch_to(Thread& next) {
  Thread& from = *current;
  current = &next;
  threadIdx = next.index;
  ++statistics.switches;
  mmca_switch_stacks(&from.stack_pointer, next.stack_pointer);
}

void thread_main();

void start(Thread& thread) {
  unsigned char* top = stacks + (thread.number + 1) * stack_stride;
  top -= thread.number * 17 % 64 * 64;  // over all sets of the cache
  void** stack = reinterpret_cast<void**>(top) - 1;
  *stack = nullptr;  // where thread_main would return to
  *--stack = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < saved_registers; ++i) *--stack = nullptr;
  thread.stack_pointer = stack;
}

void report(int thread, const std::string& where, const std::string& what) {
  error = where + ": block " + std::to_string(blockIdx.x);
  if (gridDim.y > 1 || gridDim.z > 1) error += "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z);
  error += " thread " + std::to_string(thread) + ": " + what;
}

// ---- scheduling ------------------------------------------------------------------------------------------------

int random_below(int n) { return static_cast<int>(generator() % static_cast<unsigned>(n)); }

int next_lane(std::uint32_t ready, int after) {
  if (order == Order::descending) {
    const std::uint32_t lower = ready & ((1u << after) - 1);
    return 31 - std::countl_zero(lower ? lower : ready);
  }
  const std::uint32_t higher = ready & ~(all_lanes >> (31 - after));
  return std::countr_zero(higher ? higher : ready);
}

// The next warp that can run, or -1.
int next_warp(int after) {
  const int step = order == Order::descending ? block.warps - 1 : 1;
  if (order == Order::random) after = random_below(block.warps);
  for (int i = 0, warp = after; i < block.warps; ++i) {
    warp = (warp + step) % block.warps;
    if (warps[warp].ready) return warp;
  }
  return -1;
}

std::string described(const Thread& thread) {
  switch (thread.wait) {
    case Wait::nothing: break;
    case Wait::warp: return "wait for their warp at " + site(thread.at);
    case Wait::block: return "wait for their block at " + site(thread.at);
    case Wait::exited: return "have returned";
  }
  return "run at " + site(thread.at);
}

// Nobody can run: says what every thread waits for, under the place where the first one waits.
[[noreturn]] void fail_stuck() {
  std::string text;
  const Thread* first_waiting = nullptr;
  for (int begin = 0, end; begin < block.threads; begin = end) {
    const std::string what = described(threads[begin]);
    for (end = begin + 1; end < block.threads && described(threads[end]) == what;) ++end;
    if (!first_waiting && threads[begin].wait != Wait::exited) first_waiting = &threads[begin];
    if (text.size() > 700) continue;
    text += (text.empty() ? "threads " : "; threads ") + std::to_string(begin) + "-" + std::to_string(end - 1) + " ";
    text += what;
  }
  fail(first_waiting->number, first_waiting->at, "deadlock: %s", text.c_str());
}

// Runs others until somebody makes the present thread ready again.
void give_way() {
  Warp& warp = warps[current->warp];
  warp.ready &= ~(1u << current->lane);
  int next = current->warp, lane;
  if (warp.ready) {
    lane = next_lane(warp.ready, current->lane);
  } else {
    next = next_warp(current->warp);
    if (next < 0) {
      for (int w = 0; w < block.warps; ++w)
        if (warps[w].alive) fail_stuck();
      return switch_to(host);
    }
    lane = next_lane(warps[next].ready, order == Order::descending ? 0 : 31);
  }
  switch_to(threads[next * warp_size + lane]);
}

void thread_main() {
  block.entry(block.kernel);
  Thread& me = *current;
  if (!me.copies.empty())
    fail(me.number, me.at, "the thread returns, its last primitive here, with cp.async under way");
  warps[me.warp].alive &= ~(1u << me.lane);
  me.wait = Wait::exited;
  give_way();
  std::abort();
}

}  // namespace

std::string site(Location at) {
  if (at.line() == 0) return "the kernel's beginning";
  const char* slash = std::strrchr(at.file_name(), '/');
  return std::string(slash ? slash + 1 : at.file_name()) + ":" + std::to_string(at.line());
}

void fail(int thread, Location at, const char* format, ...) {
  char text[1200];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  report(thread, site(at), text);
  switch_to(host);
  std::abort();
}

void fail_apart(Location there, Location here, const char* whose) {
  fail(current->number, here, "thread %d is here while others of its %s are at %s", current->number, whose,
       site(there).c_str());
}

void wait_for_warp() {
  current->wait = Wait::warp;
  give_way();
  current->wait = Wait::nothing;
}

void begin_warp_interval() { warps[current->warp].since = ++times.now; }

bool block_barrier(bool condition, Location at) {
  current->at = at;
  if (block.arrived == 0) block.at = at, block.any = false;
  else if (!same_site(block.at, at)) fail_apart(block.at, at, "block");
  block.any = block.any || condition;
  current->wait = Wait::block;
  if (++block.arrived == block.threads) {
    block.arrived = 0;
    block.result = block.any;
    times.barrier = ++times.now;
    for (int w = 0; w < block.warps; ++w) warps[w].ready = all_lanes, warps[w].since = times.now;
    const int next = order == Order::ascending ? current->warp : next_warp(current->warp);
    if (next != current->warp) switch_to(threads[next * warp_size + next_lane(warps[next].ready, 31)]);
  } else {
    give_way();
  }
  current->wait = Wait::nothing;
  return block.result;
}

const std::string& last_error() { return error; }
int device_sm() { return sm; }
int device_multiprocessors() { return multiprocessors; }

// ---- launches --------------------------------------------------------------------------------------------------

namespace {

// What a signal said of the thread that raised it.
struct Fault {
  const char* what = nullptr;
  int thread = 0;
  const void* instruction = nullptr;
};
Fault fault;
pthread_t launching_thread;

const char* meaning(int number, const void* address) {
  const auto* byte = static_cast<const unsigned char*>(address);
  const unsigned char* guard = stacks + current->number * stack_stride;
  if (number == SIGFPE) return "integer division by zero";
  if (number == SIGILL) return "undefined behaviour, found by the compiler's checks";
  if (byte >= guard && byte < guard + guard_bytes) return "stack overflow";
  return "access through a plain pointer";
}

// The launch ends, and the stack that the signal is handled on is left for good.
void on_signal(int number, siginfo_t* info, void* context) {
  if (!current || current == &host || !pthread_equal(pthread_self(), launching_thread)) {
    ::signal(number, SIG_DFL);
    return;
  }
  const auto instruction = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
  fault = {meaning(number, info->si_addr), current->number, reinterpret_cast<const void*>(instruction)};
  switch_to(host);
}

// "file:line" of an instruction, or nothing: needs debug information and addr2line.
std::string site_of(const void* instruction) {
  Dl_info library;
  if (!dladdr(instruction, &library)) return "";
  const auto offset = static_cast<const char*>(instruction) - static_cast<const char*>(library.dli_fbase);
  char command[1200], line[300] = "";
  std::snprintf(command, sizeof command, "addr2line -s -e '%s' %#tx 2>/dev/null", library.dli_fname, offset);
  if (std::FILE* output = popen(command, "r")) {
    if (!std::fgets(line, sizeof line, output)) line[0] = 0;
    pclose(output);
  }
  line[std::strcspn(line, " \n")] = 0;
  return std::strchr(line, '?') ? "" : line;
}

void report_fault() {
  const Fault found = fault;
  fault = {};
  const std::string exact = site_of(found.instruction);
  report(found.thread, exact.empty() ? site(threads[found.thread].at) : exact,
         found.what + std::string(exact.empty() ? ", after the primitive here" : ""));
}

// Signals that kernels may raise become errors, for the length of a launch.
class SignalGuard {
 public:
  SignalGuard() {
    stack_t alternate{};
    alternate.ss_sp = stack_, alternate.ss_size = sizeof stack_;
    sigaltstack(&alternate, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = &on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < count; ++i) sigaction(signals[i], &action, &previous_[i]);
  }
  ~SignalGuard() {
    for (int i = 0; i < count; ++i) sigaction(signals[i], &previous_[i], nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

 private:
  static constexpr int count = 4;
  static constexpr int signals[count] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  inline static unsigned char stack_[64 * 1024];
  stack_t previous_stack_{};
  struct sigaction previous_[count];
};

void run_block() {
  poison_shared();
  times.block = times.barrier = ++times.now;
  block.arrived = 0;
  for (int w = 0; w < block.warps; ++w) {
    warps[w].ready = warps[w].alive = all_lanes;
    warps[w].arrived = 0;
    warps[w].since = times.now;
  }
  for (int i = 0; i < block.threads; ++i) {
    Thread& thread = threads[i];
    const unsigned number = static_cast<unsigned>(i);
    thread.index = {number % blockDim.x, number / blockDim.x % blockDim.y, number / (blockDim.x * blockDim.y)};
    thread.number = i, thread.warp = i / warp_size, thread.lane = i % warp_size;
    thread.wait = Wait::nothing;
    thread.at = Location();
    thread.copies.clear();
    thread.copy_groups.clear();
    start(thread);
  }
  current = &host;
  const int warp = next_warp(order == Order::descending ? 0 : block.warps - 1);
  switch_to(threads[warp * warp_size + next_lane(all_lanes, order == Order::descending ? 0 : 31)]);
  ++statistics.blocks;
}

std::vector<std::uint32_t> order_of_blocks(std::uint64_t count) {
  std::vector<std::uint32_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order == Order::descending) std::reverse(numbers.begin(), numbers.end());
  if (order == Order::random) std::shuffle(numbers.begin(), numbers.end(), generator);
  return numbers;
}

std::size_t shared_memory_of_device() {
  switch (sm) {
    case 80:
    case 87: return 163 * 1024;
    case 86:
    case 89:
    case 120: return 99 * 1024;
    default: return largest_shared_memory;
  }
}

std::string refusal(dim3 grid, dim3 threads_of, std::size_t shared_bytes) {
  const std::uint64_t count = std::uint64_t{threads_of.x} * threads_of.y * threads_of.z;
  const std::string launch = "launch of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                             std::to_string(grid.z) + " blocks of " + std::to_string(count) + " threads with " +
                             std::to_string(shared_bytes) + " bytes of shared memory: ";
  if (count == 0 || count > max_threads) return launch + "from 1 to 1024 threads are possible";
  if (count % warp_size) return launch + "kernels here have whole warps";
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return launch + "from 1 to 2147483647 x 65535 x 65535 blocks are possible";
  if (shared_bytes > shared_memory_of_device())
    return launch + "the device has " + std::to_string(shared_memory_of_device());
  if (std::uint64_t{grid.x} * grid.y * grid.z > 1u << 28) return launch + "too many to emulate";
  return "";
}

}  // namespace

int run_grid(dim3 grid, dim3 threads_of_block, std::size_t shared_bytes, void (*entry)(void*), void* kernel) {
  const std::lock_guard<std::mutex> guard(lock);
  if (sm < 80) {
    error = "no kernel image is available for the device";
    return missing_kernel;
  }
  error = refusal(grid, threads_of_block, shared_bytes);
  if (!error.empty()) return 1;
  make_stacks();
  resize_shared(shared_bytes);
  if (times.now > 1u << 31) {
    times = {};
    forget_order();
  }
  times.launch = ++times.now;
  gridDim = grid, blockDim = threads_of_block;
  block.threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z), block.warps = block.threads / warp_size;
  block.entry = entry, block.kernel = kernel;
  ++statistics.launches;
  std::fenv_t floating_point;
  std::fegetenv(&floating_point);
  std::fesetenv(FE_DFL_ENV);
  {
    const SignalGuard signals;
    launching_thread = pthread_self();
    for (const std::uint32_t number : order_of_blocks(std::uint64_t{grid.x} * grid.y * grid.z)) {
      blockIdx = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
      run_block();
      if (fault.what) report_fault();
      if (!error.empty()) break;
    }
    current = nullptr;
  }
  std::fesetenv(&floating_point);
  return error.empty() ? 0 : 1;
}

int fill_zero(void* p, std::size_t bytes) {
  const std::lock_guard<std::mutex> guard(lock);
  error = zero_global(p, bytes) ? "" : "fill_zero: " + std::to_string(bytes) + " bytes outside what may be written";
  return error.empty() ? 0 : 1;
}

}  // namespace mmca::emulation

// ---- for tests -------------------------------------------------------------------------------------------------

using namespace mmca::emulation;

void* emulation_register(void* pointer, std::size_t bytes, int access, const char* name) {
  const std::lock_guard<std::mutex> guard(lock);
  void* address = register_region(pointer, bytes, access, name);
  error = address || !pointer ? "" : std::string(name) + " overlaps another registered range in part";
  return address;
}
int emulation_unregister(void* pointer) {
  const std::lock_guard<std::mutex> guard(lock);
  return unregister_region(pointer) ? 0 : 1;
}
void emulation_unregister_all() {
  const std::lock_guard<std::mutex> guard(lock);
  unregister_all_regions();
}
void emulation_order(int mode, std::uint32_t seed) {
  const std::lock_guard<std::mutex> guard(lock);
  order = static_cast<Order>(std::clamp(mode, 0, 2));
  generator.seed(seed);
}
void emulation_check_level(int wanted) {
  const std::lock_guard<std::mutex> guard(lock);
  level = static_cast<Level>(std::clamp(wanted, 0, 2));
}
void emulation_device(int new_sm, int count) {
  const std::lock_guard<std::mutex> guard(lock);
  sm = new_sm, multiprocessors = count;
}
const char* emulation_last_error() { return error.c_str(); }
void emulation_statistics(std::uint64_t* out) {
  const std::lock_guard<std::mutex> guard(lock);
  std::memcpy(out, &statistics, sizeof statistics);
  statistics = {};
}
