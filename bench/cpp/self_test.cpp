// The benchmarks' own tests: a wrong result is never timed, and what the figures are made of is right.
#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <array>

#include "case.h"
#include "measure.h"
#include "meter.h"
#include "visible.h"

namespace mmca::bench {
namespace {

using test::Choices;

Choices small() { return attention(2, 4, 2, 10, 20, 8); }
Choices large() { return attention(2, 4, 4, 600, 600, 8); }  // checked by a sample
Choices mmca(ImageRows image_rows) {
  return with(attention(2, 2, 1, 12, 12, 4), [&](Choices& c) {
    c.mmca = true, c.image_rows = image_rows, c.modality = {1, 1, 2, 2, 2, 1, 0, 2, 2, 3, 1, 1};
  });
}

const Kernel& kernel_for(Operation operation) {
  return select_kernel(operation, DType::f32, cpu_features(), std::nullopt);
}

// A kernel that spoils one number of its results, or forgets to write one. Kernels are plain functions: what they spoil
// is said by these.
float* (*spoiled)(const Problem& problem);
float spoiled_value;
int calls;

template <Operation operation>
Kernel wrong_kernel() {
  Kernel kernel = kernel_for(operation);
  kernel.run = [](const Problem& problem, const Plan& plan, Executor& executor) {
    kernel_for(operation).run(problem, plan, executor);
    if (spoiled) *spoiled(problem) = spoiled_value;
    ++calls;
  };
  return kernel;
}

template <Operation operation>
std::string faults_of(const Choices& choices) {
  const auto subject = make_subject({"", choices}, DType::f32, operation);
  SerialExecutor serial;
  calls = 0;
  return subject->faults(wrong_kernel<operation>(), serial);
}

template <Operation operation>
void run_wrong_case(int threads = 1) {
  const auto subject = make_subject({"", small()}, DType::f32, operation);
  Pool pool(threads);
  calls = 0;
  run_case(wrong_kernel<operation>(), *subject, pool, "wrong", Limit::multiply_add, 0);
}

using Place = float* (*)(const Problem&);
const Place forward_places[] = {
    [](const Problem& p) { return static_cast<float*>(p.out.data) + p.out.batch + 3 * p.out.row; },
    [](const Problem& p) { return static_cast<float*>(p.lse.data); },
};
const Place backward_places[] = {
    [](const Problem& p) { return static_cast<float*>(p.grad_query.data) + 5; },
    [](const Problem& p) { return static_cast<float*>(p.grad_key.data) + p.grad_key.head; },
    [](const Problem& p) { return static_cast<float*>(p.grad_value.data) + 2 * p.grad_value.row; },
};

TEST(BenchCase, RightResultsAreTimed) {
  spoiled = nullptr;
  for (const int threads : {1, 2}) {
    run_wrong_case<Operation::attention_forward>(threads);
    EXPECT_GT(calls, 5);
    run_wrong_case<Operation::attention_backward>(threads);
    EXPECT_GT(calls, 5);
  }
}

TEST(BenchCase, AWrongNumberFailsAndIsNotTimed) {
  for (const float value : {0.25f, std::numeric_limits<float>::quiet_NaN()}) {
    spoiled_value = value;
    for (const Place place : forward_places) {
      spoiled = place;
      EXPECT_NONFATAL_FAILURE(run_wrong_case<Operation::attention_forward>(), "is wrong, and not timed");
      EXPECT_EQ(calls, 1);
    }
    for (const Place place : backward_places) {
      spoiled = place;
      EXPECT_NONFATAL_FAILURE(run_wrong_case<Operation::attention_backward>(), "is wrong, and not timed");
      EXPECT_EQ(calls, 1);
    }
  }
}

TEST(BenchCase, ANumberNotWrittenIsFound) {
  spoiled_value = test::sentinel<float>();
  spoiled = forward_places[0];
  EXPECT_NE(faults_of<Operation::attention_forward>(small()).find("not written"), std::string::npos);
  EXPECT_NE(faults_of<Operation::attention_forward>(large()).find("not written"), std::string::npos);
}

TEST(BenchCase, LargeProblemsAreCheckedByASample) {
  spoiled_value = 0.25f;
  spoiled = nullptr;
  EXPECT_EQ(faults_of<Operation::attention_forward>(large()), "");
  EXPECT_EQ(faults_of<Operation::attention_backward>(large()), "");
  spoiled = [](const Problem& p) { return static_cast<float*>(p.out.data) + p.out.head + 2 * p.out.row; };
  EXPECT_NE(faults_of<Operation::attention_forward>(large()), "");  // 1 + 2 is a multiple of the step
  spoiled = [](const Problem& p) { return static_cast<float*>(p.grad_key.data) + 3 * p.grad_key.head; };
  EXPECT_NE(faults_of<Operation::attention_backward>(large()), "");  // the last KV head
}

TEST(BenchFlops, VisiblePairsAreThoseOfThePredicate) {
  std::vector<Choices> problems = {
      small(),
      with(small(), [](Choices& c) { c.causal = true; }),
      with(small(), [](Choices& c) { c.window_left = 3, c.window_right = 1; }),
      with(small(),
           [](Choices& c) {
             c.key_lengths = {20, 13};
             c.causal = true;
           }),
      with(small(), [](Choices& c) { c.attend = 0.4, c.mask_block = 4; }),
      with(small(), [](Choices& c) { c.q_offsets = {0, 3, 9}, c.k_offsets = {0, 10, 19}; })};
  for (const auto rows : {ImageRows::self, ImageRows::block, ImageRows::causal, ImageRows::self_text})
    problems.push_back(mmca(rows));
  for (const Choices& choices : problems) {
    test::Case<float> c(choices);
    const Problem& p = c.problem;
    std::int64_t pairs = 0;
    for (const test::Sequence& s : test::sequences(p))
      for (std::int64_t h = 0; h < p.q_heads; ++h)
        for (std::int64_t i = 0; i < s.q_len; ++i)
          for (std::int64_t j = 0; j < s.k_len; ++j) pairs += test::sees(p, s, h, i, j);
    EXPECT_EQ(visible_pairs(p), pairs) << choices.text();
    EXPECT_GT(pairs, 0);
  }
}

TEST(BenchFlops, TheBackwardCountsTwoAndAHalfTimes) {
  const Workload workload = {"", with(small(), [](Choices& c) { c.head_dim = 8, c.value_dim = 12; })};
  const double forward = make_subject(workload, DType::f32, Operation::attention_forward)->flops();
  EXPECT_EQ(forward, 2.0 * 2 * 4 * 10 * 20 * (8 + 12));
  EXPECT_EQ(make_subject(workload, DType::bf16, Operation::attention_backward)->flops(), 2.5 * forward);
  EXPECT_EQ(make_subject(workload, DType::bf16, Operation::attention_forward)->key_bytes(), 2 * 2 * 2 * 20 * (8 + 12));
}

TEST(BenchMeter, EveryInstructionSetSumsAndMultiplies) {
  std::vector<float> data(1003);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx, Isa::neon}) {
    if (!missing_features(isa, cpu_features()).empty() || !parse_isa(to_string(isa))) continue;
    const Meter meter = meter_of(isa);
    for (const std::int64_t count : {0, 1, 127, 128, 1003})
      EXPECT_EQ(meter.sum(data.data(), count), static_cast<float>(count * (count - 1) / 2)) << to_string(isa);
    // Every lane of every chain goes to 2, and a step is two flops a lane; a tile's sums of halves grow with each step.
    const double sum = isa == Isa::amx ? 100 * meter.flops_per_step / 4 : meter.flops_per_step;
    EXPECT_EQ(meter.multiply_add(100, 0.5f, 1.0f), sum) << to_string(isa);
  }
}

TEST(BenchPool, EveryWorkerRunsOnce) {
  for (const int threads : {1, 2, 3}) {
    Pool pool(threads);
    EXPECT_EQ(pool.concurrency(), threads);
    for (int repeat = 0; repeat < 300; ++repeat)
      for (const int workers : {1, 2, 5}) {
        std::array<std::atomic<int>, 5> ran{};
        pool.run(
            workers,
            [](void* context, int worker) {
              ++(*static_cast<std::array<std::atomic<int>, 5>*>(context))[static_cast<std::size_t>(worker)];
            },
            &ran);
        for (int worker = 0; worker < 5; ++worker)
          ASSERT_EQ(ran[static_cast<std::size_t>(worker)], worker < workers) << worker << " of " << workers;
      }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // helpers fall asleep, and wake
    std::atomic<int> ran{0};
    pool.on_each([&](int) { ++ran; });
    EXPECT_EQ(ran, threads);
  }
}

TEST(BenchQuartiles, LieBetweenNeighbours) {
  using List = std::vector<double>;
  const auto list = [](const Quartiles& x) { return List{x.low, x.middle, x.high}; };
  EXPECT_EQ(list(quartiles({3})), (List{3, 3, 3}));
  EXPECT_EQ(list(quartiles({5, 1, 4, 2, 3})), (List{2, 3, 4}));
  EXPECT_EQ(list(quartiles({1, 2, 3, 4})), (List{1.75, 2.5, 3.25}));
}

TEST(BenchSettings, ComeFromTheEnvironment) {
  setenv("MMCA_BENCH_SECONDS", "0.125", 1), setenv("MMCA_BENCH_THREADS", "3", 1);
  EXPECT_EQ(settings_of_environment().seconds, 0.125);
  EXPECT_EQ(settings_of_environment().threads, 3);
  for (const char* wrong : {"0", "-1", "two", "1x"}) {
    setenv("MMCA_BENCH_THREADS", wrong, 1);
    EXPECT_THROW(settings_of_environment(), std::invalid_argument) << wrong;
  }
  unsetenv("MMCA_BENCH_SECONDS"), unsetenv("MMCA_BENCH_THREADS");
  EXPECT_EQ(settings_of_environment().seconds, Settings().seconds);
  EXPECT_GE(settings_of_environment().threads, 1);
}

}  // namespace
}  // namespace mmca::bench
