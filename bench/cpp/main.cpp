#include <gtest/gtest.h>

#include <cstdio>
#include <stdexcept>

#include "measure.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  try {
    const mmca::bench::Settings settings = mmca::bench::settings_of_environment();
    mmca::bench::register_tests(mmca::bench::family(), settings);
    if (!testing::GTEST_FLAG(list_tests))
      std::printf("%d threads, %g s a test (MMCA_BENCH_THREADS, MMCA_BENCH_SECONDS; MMCA_EXT_ISA for one of %s)\n",
                  settings.threads, settings.seconds, mmca::isa_names().c_str());
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return RUN_ALL_TESTS();
}
