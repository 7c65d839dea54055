// What the running processor offers, as far as the kernels care.
#pragma once

#include <cstdint>
#include <vector>

namespace mmca {

enum class Isa : std::uint8_t { scalar, avx2, avx512, amx, neon };

struct CpuFeature {
  const char* name;
  bool present;
};

// Asked of the processor once.
const std::vector<CpuFeature>& cpu_features();

// The features an instruction set's kernels need that are missing from `features`; empty: they can run.
std::vector<const char*> missing_features(Isa isa, const std::vector<CpuFeature>& features);

}  // namespace mmca
