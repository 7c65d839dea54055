// Every kernel there is, and how one is chosen. Selection, the listing users see, the tests and the benchmarks all read
// this table, so a kernel outside it cannot exist.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "core/executor.h"
#include "core/linear_problem.h"
#include "core/plan.h"
#include "core/problem.h"
#include "cpu/cpu_features.h"

namespace mmca {

// MMCA is attention over two key groups.
enum class Operation : std::uint8_t { attention_forward, attention_backward, linear_forward, linear_backward };
constexpr bool is_linear(Operation operation) { return operation >= Operation::linear_forward; }

struct Kernel {
  const char* name;  // "cpu.avx2.attention_forward.f32"
  Operation operation;
  DType dtype;
  Isa isa;
  std::int64_t fewest_keys;  // with fewer, its tiles are mostly empty and a narrower instruction set is quicker
  void (*run)(const Problem&, const Plan&, Executor&);            // null for linear attention,
  void (*run_linear)(const LinearProblem&, Executor&) = nullptr;  // which has problems of its own; null for all others
};

const char* to_string(Operation operation);
const char* to_string(DType dtype);
const char* to_string(Isa isa);
std::optional<Isa> parse_isa(const std::string& name);
std::string isa_names();  // "scalar, avx2, avx512" or "scalar, neon": those built into this binary

// All kernels, the best instruction set first.
const std::vector<Kernel>& kernel_table();
// How often a kernel of the table has been run by this process.
std::uint64_t launches(const Kernel& kernel);

inline constexpr std::int64_t many_keys = std::numeric_limits<std::int64_t>::max();

// Why a kernel does not serve a processor with these features, under this choice of instruction set, for this length of
// keys; empty: it does.
std::string refusal(const Kernel& kernel, const std::vector<CpuFeature>& features, std::optional<Isa> forced,
                    std::int64_t k_len = many_keys);

// The first kernel of the table that serves the case and does not refuse; throws std::runtime_error with every reason.
const Kernel& select_kernel(Operation operation, DType dtype, const std::vector<CpuFeature>& features,
                            std::optional<Isa> forced, std::int64_t k_len = many_keys);

// Restricts selection to one instruction set, for tests and measurements, until unforce_isa(). The environment variable
// MMCA_EXT_ISA gives the initial choice. Throws std::invalid_argument where this processor or binary lacks it.
void force_isa(const std::string& name);
void unforce_isa();
std::optional<Isa> forced_isa();

// Plans the problem, selects a kernel for the running processor and runs it.
void run(Operation operation, const Problem& problem, Executor& executor);
void run(Operation operation, const LinearProblem& problem, Executor& executor);

}  // namespace mmca
