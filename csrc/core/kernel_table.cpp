#include "core/kernel_table.h"

#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "cpu/isa.h"

namespace mmca {
namespace {

constexpr Isa isas[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx, Isa::neon};

std::atomic<std::uint64_t>* launch_counts() {
  static const auto counts = std::make_unique<std::atomic<std::uint64_t>[]>(kernel_table().size());
  return counts.get();
}

std::string join(const std::vector<const char*>& names) {
  std::string text;
  for (const char* name : names) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

// The instruction set that serves where `isa` is forced: itself or, where it has no kernel, the one it extends.
Isa serving(Isa isa, Operation operation, DType dtype) {
  for (const Kernel& kernel : kernel_table())
    if (kernel.isa == isa && kernel.operation == operation && kernel.dtype == dtype) return isa;
  return isa == Isa::amx ? Isa::avx512 : isa;
}

// -1: any; otherwise the forced instruction set. -2: the environment has not been read yet.
constexpr int any_isa = -1, unread = -2;
std::atomic<int> forced_choice{unread};

Isa check_isa(const std::string& name, const std::string& source) {
  const std::optional<Isa> isa = parse_isa(name);
  if (!isa) throw std::invalid_argument(source + " got '" + name + "'; accepted: " + isa_names());
  const auto missing = missing_features(*isa, cpu_features());
  if (!missing.empty())
    throw std::invalid_argument(source + " got '" + name + "', but this processor lacks " + join(missing));
  return *isa;
}

}  // namespace

const std::vector<Kernel>& kernel_table() {
#define MMCA_TABLE_ROW(operation, dtype, isa, fewest_keys)                                           \
  {"cpu." #isa "." #operation "." #dtype, Operation::operation, DType::dtype, Isa::isa, fewest_keys, \
   &cpu::isa::operation##_##dtype},
#define MMCA_LINEAR_ROW(operation, dtype, isa)                                                      \
  {"cpu." #isa "." #operation "." #dtype, Operation::operation, DType::dtype, Isa::isa, 0, nullptr, \
   &cpu::isa::operation##_##dtype},
#define MMCA_SCALAR_ROW(operation, dtype, T) MMCA_TABLE_ROW(operation, dtype, scalar, 0)
#define MMCA_AVX2_ROW(operation, dtype, T) MMCA_TABLE_ROW(operation, dtype, avx2, 0)
// One AVX2 register of keys would leave most of a tile of AVX-512 empty. Measured: where small heads (cpu/small.h) gain
// a tenth or more from the wider registers, tiles of few keys lose a twentieth.
#define MMCA_AVX512_ROW(operation, dtype, T) MMCA_TABLE_ROW(operation, dtype, avx512, 32 / sizeof(T) + 1)
#define MMCA_AMX_ROW(operation, dtype, T) MMCA_TABLE_ROW(operation, dtype, amx, 32 / sizeof(T) + 1)
#define MMCA_NEON_ROW(operation, dtype, T) MMCA_TABLE_ROW(operation, dtype, neon, 0)
#define MMCA_LINEAR_SCALAR_ROW(operation, dtype, T) MMCA_LINEAR_ROW(operation, dtype, scalar)
#define MMCA_LINEAR_AVX2_ROW(operation, dtype, T) MMCA_LINEAR_ROW(operation, dtype, avx2)
#define MMCA_LINEAR_AVX512_ROW(operation, dtype, T) MMCA_LINEAR_ROW(operation, dtype, avx512)
#define MMCA_LINEAR_NEON_ROW(operation, dtype, T) MMCA_LINEAR_ROW(operation, dtype, neon)
  static const std::vector<Kernel> table = {
#if defined(__x86_64__)
      MMCA_AMX_KERNELS(MMCA_AMX_ROW) MMCA_CPU_KERNELS(MMCA_AVX512_ROW) MMCA_CPU_LINEAR_KERNELS(MMCA_LINEAR_AVX512_ROW)
          MMCA_CPU_KERNELS(MMCA_AVX2_ROW) MMCA_CPU_LINEAR_KERNELS(MMCA_LINEAR_AVX2_ROW)
#endif
#if defined(__aarch64__)
              MMCA_CPU_KERNELS(MMCA_NEON_ROW) MMCA_CPU_LINEAR_KERNELS(MMCA_LINEAR_NEON_ROW)
#endif
                  MMCA_CPU_KERNELS(MMCA_SCALAR_ROW) MMCA_CPU_LINEAR_KERNELS(MMCA_LINEAR_SCALAR_ROW)};
  return table;
}

std::optional<Isa> parse_isa(const std::string& name) {
  for (const Isa isa : isas)
    for (const Kernel& kernel : kernel_table())
      if (kernel.isa == isa && name == to_string(isa)) return isa;
  return std::nullopt;
}

std::string isa_names() {
  std::vector<const char*> names;
  for (const Isa isa : isas)
    if (parse_isa(to_string(isa))) names.push_back(to_string(isa));
  return join(names);
}

std::uint64_t launches(const Kernel& kernel) { return launch_counts()[&kernel - kernel_table().data()].load(); }

std::string refusal(const Kernel& kernel, const std::vector<CpuFeature>& features, std::optional<Isa> forced,
                    std::int64_t k_len) {
  const auto missing = missing_features(kernel.isa, features);
  if (!missing.empty()) return "this processor lacks " + join(missing);
  if (forced && serving(*forced, kernel.operation, kernel.dtype) != kernel.isa)
    return std::string(to_string(*forced)) + " is forced";
  if (!forced && k_len < kernel.fewest_keys) return "fewer than " + std::to_string(kernel.fewest_keys) + " keys";
  return "";
}

const Kernel& select_kernel(Operation operation, DType dtype, const std::vector<CpuFeature>& features,
                            std::optional<Isa> forced, std::int64_t k_len) {
  std::string reasons;
  for (const Kernel& kernel : kernel_table()) {
    if (kernel.operation != operation || kernel.dtype != dtype) continue;
    const std::string reason = refusal(kernel, features, forced, k_len);
    if (reason.empty()) return kernel;
    reasons += std::string("; ") + kernel.name + ": " + reason;
  }
  throw std::runtime_error(std::string("mmca_ext: no kernel for ") + to_string(operation) + " in " + to_string(dtype) +
                           (reasons.empty() ? "; none is built" : reasons));
}

void force_isa(const std::string& name) { forced_choice = static_cast<int>(check_isa(name, "mmca_ext: force_isa")); }

void unforce_isa() { forced_choice = any_isa; }

std::optional<Isa> forced_isa() {
  int choice = forced_choice.load(std::memory_order_relaxed);
  if (choice == unread) {
    const char* name = std::getenv("MMCA_EXT_ISA");
    choice =
        name && *name ? static_cast<int>(check_isa(name, "mmca_ext: the environment variable MMCA_EXT_ISA")) : any_isa;
    forced_choice = choice;
  }
  return choice == any_isa ? std::nullopt : std::optional<Isa>(static_cast<Isa>(choice));
}

void run(Operation operation, const Problem& problem, Executor& executor) {
  // One kernel for all packed sequences: a sequence's bits must not depend on how many tokens there are besides.
  const std::int64_t k_len = problem.q_offsets ? many_keys : problem.k_len;
  const Kernel& kernel = select_kernel(operation, problem.dtype, cpu_features(), forced_isa(), k_len);
  launch_counts()[&kernel - kernel_table().data()].fetch_add(1, std::memory_order_relaxed);
  kernel.run(problem, make_plan(problem), executor);
}

void run(Operation operation, const LinearProblem& problem, Executor& executor) {
  const Kernel& kernel = select_kernel(operation, problem.dtype, cpu_features(), forced_isa());
  launch_counts()[&kernel - kernel_table().data()].fetch_add(1, std::memory_order_relaxed);
  kernel.run_linear(problem, executor);
}

}  // namespace mmca
