// Timing a kernel beside what the processor can do at most, and putting the figures into a test's record.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "pool.h"
#include "subject.h"

namespace mmca::bench {

struct Settings {
  double seconds = 0.3;  // for each test, the check not counted; MMCA_BENCH_SECONDS
  int threads = 1;       // MMCA_BENCH_THREADS; as many as the processor runs
};
Settings settings_of_environment();  // throws std::invalid_argument

struct Quartiles {
  double low = 0, middle = 0, high = 0;
};
Quartiles quartiles(std::vector<double> values);  // of at least one

double wall_clock();
// By the thread's own processor time: programs it shares its core with do not count.
double seconds_of_one_thread(const std::function<void()>& body);

struct Figures {
  Quartiles seconds, gflops, share;  // of one call; share of the limit, round by round
  double limit = 0;                  // in GF/s, or GB/s of keys and values
  int rounds = 0;
};

// Rounds of kernel, limit, kernel, limit, ...: a processor that changes its frequency, or whose other users come and
// go, does so for both. The kernel plans each call anew, as operators do, and writes to the same memory.
Figures measure(const Kernel& kernel, const Subject& subject, Pool& pool, Limit limit, double seconds);

// The body of a test: checks the kernel's results, then times it. A wrong result is a failure and nothing is timed.
void run_case(const Kernel& kernel, Subject& subject, Pool& pool, const std::string& name, Limit limit, double seconds);

// One test for each workload, dtype, direction and instruction set that this processor has.
void register_tests(const Family& family, const Settings& settings);

}  // namespace mmca::bench
