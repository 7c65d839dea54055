// The kernel table, and how a kernel is chosen for a processor: with made-up processors.
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <tuple>

#include "case.h"
#include "core/kernel_table.h"

namespace mmca::test {
namespace {

constexpr Operation operations[] = {Operation::attention_forward, Operation::attention_backward,
                                    Operation::linear_forward, Operation::linear_backward};
constexpr DType dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

using Features = std::vector<CpuFeature>;

constexpr const char* tile_leave = "leave from the system to use amx_tile";

// A processor with these features and no other the table knows.
Features having(const std::set<std::string>& names) {
  Features features;
  for (const char* name : {"sse2", "avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512bw", "avx512dq", "amx_bf16",
                           "amx_tile", tile_leave, "neon"})
    features.push_back({name, names.count(name) == 1});
  return features;
}

const std::set<std::string> avx2_names = {"sse2", "avx2", "fma", "f16c"};
const std::set<std::string> avx512_names = {"sse2",    "avx2",     "fma",      "f16c",
                                            "avx512f", "avx512vl", "avx512bw", "avx512dq"};
const std::set<std::string> all_names = {"sse2",     "avx2",     "fma",      "f16c",     "avx512f", "avx512vl",
                                         "avx512bw", "avx512dq", "amx_bf16", "amx_tile", tile_leave};

Isa chosen(const Features& features, Operation operation = Operation::attention_forward, DType dtype = DType::f32) {
  return select_kernel(operation, dtype, features, std::nullopt).isa;
}

template <class Error, class Body>
std::string message(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

TEST(Table, NamesSayWhatARowIs) {
  std::set<std::string> names;
  for (const Kernel& kernel : kernel_table()) {
    EXPECT_TRUE(names.insert(kernel.name).second) << kernel.name << " is listed twice";
    EXPECT_EQ(kernel.name, std::string("cpu.") + to_string(kernel.isa) + "." + to_string(kernel.operation) + "." +
                               to_string(kernel.dtype));
    EXPECT_EQ(kernel.run == nullptr, is_linear(kernel.operation)) << kernel.name;
    EXPECT_EQ(kernel.run_linear != nullptr, is_linear(kernel.operation)) << kernel.name;
  }
}

TEST(Table, EveryInstructionSetCoversEveryOperationAndType) {
  std::set<std::tuple<Isa, Operation, DType>> rows;
  std::set<Isa> isas;
  for (const Kernel& kernel : kernel_table()) {
    EXPECT_TRUE(rows.insert({kernel.isa, kernel.operation, kernel.dtype}).second) << kernel.name;
    isas.insert(kernel.isa);
  }
  EXPECT_EQ(isas.count(Isa::scalar), 1u);
  for (const Isa isa : isas)
    for (const Operation operation : operations)
      for (const DType dtype : dtypes)
        EXPECT_EQ(rows.count({isa, operation, dtype}), isa != Isa::amx || dtype == DType::bf16 ? 1u : 0u)
            << to_string(isa) << to_string(operation) << to_string(dtype);
}

TEST(Table, AnyProcessorRunsScalar) {
  for (const Operation operation : operations)
    for (const DType dtype : dtypes) {
      EXPECT_EQ(chosen(having({"sse2"}), operation, dtype), Isa::scalar);
      EXPECT_EQ(chosen({}, operation, dtype), Isa::scalar);
    }
}

#if defined(__x86_64__)
TEST(Table, TheBestInstructionSetIsChosen) {
  for (const Operation operation : operations)
    for (const DType dtype : dtypes) {
      EXPECT_EQ(chosen(having(avx2_names), operation, dtype), Isa::avx2);
      EXPECT_EQ(chosen(having(avx512_names), operation, dtype), Isa::avx512);
      EXPECT_EQ(chosen(having(all_names), operation, dtype), dtype == DType::bf16 ? Isa::amx : Isa::avx512);
    }
}

TEST(Table, TilesNeedEveryFeatureOfTheirs) {
  for (const std::string& name : all_names) {
    std::set<std::string> names = all_names;
    names.erase(name);
    const Isa found = chosen(having(names), Operation::attention_backward, DType::bf16);
    EXPECT_EQ(found == Isa::amx, name == "sse2") << "without " << name;
  }
  std::set<std::string> names = all_names;
  names.erase(tile_leave);
  const Kernel& amx =
      select_kernel(Operation::attention_forward, DType::bf16, having(all_names), std::nullopt, many_keys);
  EXPECT_EQ(refusal(amx, having(names), std::nullopt), "this processor lacks leave from the system to use amx_tile");
}

TEST(Table, EveryNeededFeatureIsNeeded) {
  EXPECT_EQ(chosen(having({"sse2", "avx2", "f16c"})), Isa::scalar);
  EXPECT_EQ(chosen(having({"sse2", "fma", "f16c"})), Isa::scalar);
  EXPECT_EQ(chosen(having({"sse2", "avx2", "fma"})), Isa::scalar);
  for (const std::string& name : avx512_names) {
    std::set<std::string> names = avx512_names;
    names.erase(name);
    const bool avx2_needs_it = name == "avx2" || name == "fma" || name == "f16c";
    const Isa expected = avx2_needs_it ? Isa::scalar : name == "sse2" ? Isa::avx512 : Isa::avx2;
    EXPECT_EQ(chosen(having(names)), expected) << "without " << name;
  }
}

// The arithmetic decides, not the storage.
TEST(Table, FewKeysGetANarrowerInstructionSet) {
  for (const Operation operation : operations)
    for (const DType dtype : dtypes) {
      if (is_linear(operation)) {  // whose tiles are as full of features as of keys
        EXPECT_EQ(select_kernel(operation, dtype, having(all_names), std::nullopt, 0).isa, Isa::avx512);
        continue;
      }
      const int few = dtype == DType::f64 ? 4 : 8;
      EXPECT_EQ(select_kernel(operation, dtype, having(all_names), std::nullopt, few).isa, Isa::avx2);
      EXPECT_EQ(select_kernel(operation, dtype, having(avx512_names), std::nullopt, few + 1).isa, Isa::avx512);
      EXPECT_EQ(select_kernel(operation, dtype, having(all_names), std::nullopt, few + 1).isa,
                dtype == DType::bf16 ? Isa::amx : Isa::avx512);
      EXPECT_EQ(select_kernel(operation, dtype, having(all_names), Isa::avx512, few).isa, Isa::avx512);
    }
}

TEST(Table, RefusalsNameWhatIsMissing) {
  const Kernel& avx512 = select_kernel(Operation::attention_forward, DType::f32, having(all_names), std::nullopt);
  EXPECT_EQ(refusal(avx512, having(all_names), std::nullopt), "");
  EXPECT_EQ(refusal(avx512, having(all_names), Isa::avx512), "");
  EXPECT_EQ(refusal(avx512, having(all_names), Isa::scalar), "scalar is forced");
  EXPECT_EQ(refusal(avx512, having({"avx2", "avx512f", "avx512vl", "avx512bw"}), std::nullopt),
            "this processor lacks fma, f16c, avx512dq");
}

TEST(Table, ForcingChoosesAmongTheRunnable) {
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
    for (const DType dtype : dtypes)
      EXPECT_EQ(select_kernel(Operation::attention_backward, dtype, having(all_names), isa).isa, isa);
  for (const DType dtype : dtypes)  // what it has no kernel for is served by the set that it extends
    EXPECT_EQ(select_kernel(Operation::attention_backward, dtype, having(all_names), Isa::amx, /*k_len=*/1).isa,
              dtype == DType::bf16 ? Isa::amx : Isa::avx512);
  const Kernel& avx512 = select_kernel(Operation::attention_forward, DType::bf16, having(all_names), Isa::avx512);
  EXPECT_EQ(refusal(avx512, having(all_names), Isa::amx), "amx is forced");
  const std::string text = message<std::runtime_error>(
      [] { select_kernel(Operation::attention_forward, DType::f32, having({"sse2", "avx2", "f16c"}), Isa::avx2); });
  EXPECT_EQ(text,
            "mmca_ext: no kernel for attention_forward in f32"
            "; cpu.avx512.attention_forward.f32: this processor lacks fma, avx512f, avx512vl, avx512bw, avx512dq"
            "; cpu.avx2.attention_forward.f32: this processor lacks fma"
            "; cpu.scalar.attention_forward.f32: avx2 is forced");
}
#endif

#if defined(__aarch64__)
TEST(Table, EveryAArch64ProcessorRunsNeon) {
  EXPECT_TRUE(missing_features(Isa::neon, cpu_features()).empty());
  for (const Operation operation : operations)
    for (const DType dtype : dtypes) {
      EXPECT_EQ(chosen(cpu_features(), operation, dtype), Isa::neon);
      EXPECT_EQ(select_kernel(operation, dtype, cpu_features(), std::nullopt, /*k_len=*/1).isa, Isa::neon);
      EXPECT_EQ(select_kernel(operation, dtype, cpu_features(), Isa::scalar).isa, Isa::scalar);
    }
  const std::string text = message<std::runtime_error>(
      [] { select_kernel(Operation::attention_forward, DType::f32, having({}), Isa::neon); });
  EXPECT_EQ(text,
            "mmca_ext: no kernel for attention_forward in f32"
            "; cpu.neon.attention_forward.f32: this processor lacks neon"
            "; cpu.scalar.attention_forward.f32: neon is forced");
}
#endif

TEST(Table, NamesOfInstructionSets) {
  EXPECT_EQ(parse_isa("scalar"), Isa::scalar);
  for (const char* name : {"", "Scalar", "sse2", "avx", "avx2 ", "scalar, avx2"})
    EXPECT_EQ(parse_isa(name), std::nullopt) << name;
#if defined(__x86_64__)
  EXPECT_EQ(parse_isa("avx2"), Isa::avx2);
  EXPECT_EQ(parse_isa("avx512"), Isa::avx512);
  EXPECT_EQ(parse_isa("amx"), Isa::amx);
  EXPECT_EQ(isa_names(), "scalar, avx2, avx512, amx");
  EXPECT_EQ(parse_isa("neon"), std::nullopt);  // known, but not built here
#elif defined(__aarch64__)
  EXPECT_EQ(parse_isa("neon"), Isa::neon);
  EXPECT_EQ(isa_names(), "scalar, neon");
  EXPECT_EQ(parse_isa("avx2"), std::nullopt);
#endif
}

struct Forcing : testing::Test {
  ~Forcing() override { unforce_isa(); }
};

TEST_F(Forcing, AnUnknownNameSaysWhatIsAccepted) {
  const std::string text = message<std::invalid_argument>([] { force_isa("sse9"); });
  EXPECT_EQ(text, "mmca_ext: force_isa got 'sse9'; accepted: " + isa_names());
}

// One key: its value; and no kernel but the forced one ran.
template <class T>
void expect_runs(Isa isa) {
  std::vector<std::uint64_t> before;
  for (const Kernel& kernel : kernel_table()) before.push_back(launches(kernel));
  Case<T> c(Choices{});
  SerialExecutor serial;
  run(Operation::attention_forward, c.problem, serial);
  EXPECT_TRUE(same_bits(c.out.at(0, 0, 0, 0), c.value.at(0, 0, 0, 0)));
  for (const Kernel& kernel : kernel_table()) {
    const bool ran =
        kernel.isa == isa && kernel.dtype == dtype_of<T> && kernel.operation == Operation::attention_forward;
    EXPECT_EQ(launches(kernel) - before[static_cast<std::size_t>(&kernel - kernel_table().data())], ran ? 1u : 0u)
        << kernel.name;
  }
}

TEST_F(Forcing, RestrictsWhatRuns) {
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx, Isa::neon}) {
    const auto missing = missing_features(isa, cpu_features());
    if (!parse_isa(to_string(isa))) continue;
    if (!missing.empty()) {
      const std::string text = message<std::invalid_argument>([&] { force_isa(to_string(isa)); });
      EXPECT_NE(text.find(missing[0]), std::string::npos) << text;
      continue;
    }
    force_isa(to_string(isa));
    EXPECT_EQ(forced_isa(), isa);
    const Isa others = isa == Isa::amx ? Isa::avx512 : isa;
    expect_runs<float>(others), expect_runs<double>(others), expect_runs<BFloat16>(isa), expect_runs<Float16>(others);
  }
  unforce_isa();
  EXPECT_EQ(forced_isa(), std::nullopt);
}

}  // namespace
}  // namespace mmca::test
