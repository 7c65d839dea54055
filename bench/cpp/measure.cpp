#include "measure.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <stdexcept>

#include "meter.h"

namespace mmca::bench {

double wall_clock() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

namespace {

constexpr double round_seconds = 1e-3;  // at least: the clock's resolution and waking threads are nothing beside it
constexpr double longest_limit_round = 10e-3;
constexpr int fewest_rounds = 5;

// One thread is measured by its own processor time, so that programs it shares its core with do not count; several by
// the time that passes, since they wait for each other.
struct Clock {
  bool one_thread;

  double now() const {
#if defined(CLOCK_THREAD_CPUTIME_ID)
    timespec time;
    if (one_thread && clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0)
      return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
#endif
    return wall_clock();
  }
  template <class Body>
  double time_of(const Body& body) const {
    const double start = now();
    body();
    return now() - start;
  }
};

thread_local volatile float result_of_a_meter;  // so that its loop is not optimised away

// Some work at a processor's limit, and how much of it there is in `times` repeats.
struct Bound {
  double amount = 0;  // flops, or bytes, of one repeat
  std::function<void(std::int64_t times)> work;
};

Bound multiply_adds(const Meter& meter, Pool& pool) {
  constexpr std::int64_t steps = 100;
  return {meter.flops_per_step * steps * pool.concurrency(), [&meter, &pool](std::int64_t times) {
            pool.on_each([&](int) { result_of_a_meter = meter.multiply_add(times * steps, 0.999f, 0.001f); });
          }};
}

// The keys and values, read as floats whatever they are: their sum does not matter.
Bound plain_sum(const Meter& meter, Pool& pool, const Subject& subject) {
  const std::int64_t floats = subject.key_bytes() / 4;
  return {
      static_cast<double>(subject.key_bytes()), [&meter, &pool, &subject, floats](std::int64_t times) {
        const Problem& p = subject.problem();
        const std::int64_t keys = floats * p.head_dim / (p.head_dim + p.value_dim);
        pool.on_each([&](int worker) {
          for (std::int64_t time = 0; time < times; ++time)
            for (const auto& [data, count] : {std::pair(p.key.data, keys), std::pair(p.value.data, floats - keys)}) {
              const std::int64_t begin = count * worker / pool.concurrency();
              result_of_a_meter =
                  meter.sum(static_cast<const float*>(data) + begin, count * (worker + 1) / pool.concurrency() - begin);
            }
        });
      }};
}

// How often to repeat what is short, so that a round takes at least so long.
std::int64_t repeats(const Clock& clock, double least, const std::function<void(std::int64_t)>& work) {
  std::int64_t times = 1;
  for (double seconds; (seconds = clock.time_of([&] { work(times); })) < least;)
    times = seconds < least / 8 ? 4 * times
                                : static_cast<std::int64_t>(static_cast<double>(times) * least / seconds * 1.1) + 1;
  return times;
}

double number_of_environment(const char* name, double otherwise, double least) {
  const char* text = std::getenv(name);
  if (!text || !*text) return otherwise;
  char* end = nullptr;
  const double value = std::strtod(text, &end);
  if (*end || !(value >= least && value <= 1e6))
    throw std::invalid_argument(std::string("the environment variable ") + name + " got '" + text +
                                "', expected a number from " + std::to_string(least));
  return value;
}

const char* dtype_name(DType dtype) {
  static const char* const names[] = {"fp32", "fp64", "bf16", "fp16"};
  return names[static_cast<int>(dtype)];
}

std::string text_of(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", x);
  return text;
}

class BenchTest : public testing::Test {
 public:
  explicit BenchTest(std::function<void()> body) : body_(std::move(body)) {}
  void TestBody() override { body_(); }

 private:
  std::function<void()> body_;
};

// The tests of one workload differ in their instruction set alone and come one after the other: the problem and what is
// expected are made once for all of them.
Subject& subject_of(const Workload& workload, DType dtype, Operation operation) {
  static std::unique_ptr<Subject> subject;
  static const Workload* last = nullptr;
  static DType last_dtype;
  static Operation last_operation;
  if (last != &workload || last_dtype != dtype || last_operation != operation) {
    last = nullptr, subject = nullptr;
    subject = make_subject(workload, dtype, operation);
    last = &workload, last_dtype = dtype, last_operation = operation;
  }
  return *subject;
}

// Of the instruction sets this processor has and MMCA_EXT_ISA allows, the best first. The portable kernels, one and a
// half orders slower, only where they are quick or there is nothing else.
std::vector<const Kernel*> kernels_of(const Workload& workload, DType dtype, Operation operation) {
  std::vector<const Kernel*> kernels;
  for (const Kernel& kernel : kernel_table())
    if (kernel.operation == operation && kernel.dtype == dtype && refusal(kernel, cpu_features(), forced_isa()).empty())
      if (kernel.isa != Isa::scalar || workload.scalar || kernels.empty()) kernels.push_back(&kernel);
  return kernels;
}

}  // namespace

Settings settings_of_environment() {
  Settings settings;
  settings.seconds = number_of_environment("MMCA_BENCH_SECONDS", settings.seconds, 0);
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  settings.threads = static_cast<int>(number_of_environment("MMCA_BENCH_THREADS", cores, 1));
  return settings;
}

double seconds_of_one_thread(const std::function<void()>& body) { return Clock{true}.time_of(body); }

Quartiles quartiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double part) {
    const double place = part * static_cast<double>(values.size() - 1);
    const auto below = static_cast<std::size_t>(place), above = std::min(below + 1, values.size() - 1);
    return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
  };
  return {at(0.25), at(0.5), at(0.75)};
}

Figures measure(const Kernel& kernel, const Subject& subject, Pool& pool, Limit limit, double seconds) {
  const Meter meter = meter_of(kernel.isa);
  const Bound bound = limit == Limit::memory ? plain_sum(meter, pool, subject) : multiply_adds(meter, pool);
  const auto call = [&](std::int64_t times) {
    for (; times > 0; --times) subject.run(kernel, pool);
  };
  const Clock clock{pool.concurrency() == 1};
  const std::int64_t calls = repeats(clock, round_seconds, call);
  const double round = clock.time_of([&] { call(calls); });
  const std::int64_t repeated = repeats(clock, std::clamp(round, round_seconds, longest_limit_round), bound.work);
  const double amount = limit == Limit::memory ? static_cast<double>(subject.key_bytes()) : subject.flops();
  std::vector<double> times, gflops, limits, shares;
  for (const double end = wall_clock() + seconds; times.size() < fewest_rounds || wall_clock() < end;) {
    const double ours = clock.time_of([&] { call(calls); }), theirs = clock.time_of([&] { bound.work(repeated); });
    times.push_back(ours / static_cast<double>(calls));
    gflops.push_back(subject.flops() / times.back() / 1e9);
    limits.push_back(bound.amount * static_cast<double>(repeated) / theirs / 1e9);
    shares.push_back(amount / times.back() / 1e9 / limits.back());
  }
  return {quartiles(times), quartiles(gflops), quartiles(shares), quartiles(limits).middle,
          static_cast<int>(times.size())};
}

void run_case(const Kernel& kernel, Subject& subject, Pool& pool, const std::string& name, Limit limit,
              double seconds) {
  if (const std::string faults = subject.faults(kernel, pool); !faults.empty()) {
    ADD_FAILURE() << kernel.name << " is wrong, and not timed:\n" << faults;
    return;
  }
  const Figures figures = measure(kernel, subject, pool, limit, seconds);
  const bool memory = limit == Limit::memory;
  std::printf("%-52s %11.1f us %8.1f GF/s [%.1f %.1f] %5.1f%% of %.1f %s%s\n", name.c_str(),
              1e6 * figures.seconds.middle, figures.gflops.middle, figures.gflops.low, figures.gflops.high,
              100 * figures.share.middle, figures.limit, memory ? "GB/s, a plain sum's" : "GF/s, the peak of ",
              memory ? "" : meter_of(kernel.isa).limit);
  std::fflush(stdout);

  const auto record = [](const char* key, const std::string& value) { testing::Test::RecordProperty(key, value); };
  const auto record_quartiles = [&](const std::string& key, const Quartiles& x, double unit) {
    record(key.c_str(), text_of(x.middle * unit));
    record((key + "_low").c_str(), text_of(x.low * unit)), record((key + "_high").c_str(), text_of(x.high * unit));
  };
  record("kernel", kernel.name), record("isa", to_string(kernel.isa)), record("dtype", dtype_name(kernel.dtype));
  record("threads", std::to_string(pool.concurrency()));
  record("rounds", std::to_string(figures.rounds));
  record_quartiles("microseconds", figures.seconds, 1e6);
  record_quartiles("gflops", figures.gflops, 1);
  record_quartiles("share", figures.share, 1);
  record("limit", memory ? "memory_gbytes_per_second" : "fma_gflops");
  record("limit_value", text_of(figures.limit));
  record("compared", std::to_string(subject.compared()));
}

void register_tests(const Family& family, const Settings& settings) {
  static Family kept;  // tests hold on to its workloads
  kept = family;
  static std::unique_ptr<Pool> pool;
  for (const Operation operation : {kept.forward, kept.backward})
    for (const Workload& workload : kept.workloads) {
      if (operation == kept.backward && !workload.backward) continue;
      for (const DType dtype : workload.dtypes)
        for (const Kernel* kernel : kernels_of(workload, dtype, operation)) {
          const std::string suite = kept.name + (operation == kept.backward ? "/backward" : "/forward");
          const std::string name = std::string(dtype_name(dtype)) + "_" + workload.name + "/" + to_string(kernel->isa);
          const auto body = [=, &workload] {
            if (!pool) pool = std::make_unique<Pool>(settings.threads);
            run_case(*kernel, subject_of(workload, dtype, operation), *pool, suite + "." + name, workload.limit,
                     settings.seconds);
          };
          testing::RegisterTest(suite.c_str(), name.c_str(), nullptr, nullptr, __FILE__, __LINE__,
                                [=]() -> testing::Test* { return new BenchTest(body); });
        }
    }
}

}  // namespace mmca::bench
