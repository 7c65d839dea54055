#include "cpu/cpu_features.h"

#include <cstring>

namespace mmca {

const std::vector<CpuFeature>& cpu_features() {
#if defined(__x86_64__)
#define MMCA_FEATURE(name) {name, __builtin_cpu_supports(name) != 0}
  static const std::vector<CpuFeature> features = {
      MMCA_FEATURE("sse2"),    MMCA_FEATURE("avx2"),     MMCA_FEATURE("fma"),      MMCA_FEATURE("f16c"),
      MMCA_FEATURE("avx512f"), MMCA_FEATURE("avx512vl"), MMCA_FEATURE("avx512bw"), MMCA_FEATURE("avx512dq"),
  };
#undef MMCA_FEATURE
#elif defined(__aarch64__)
  static const std::vector<CpuFeature> features = {{"neon", true}};  // part of the architecture's baseline
#else
  static const std::vector<CpuFeature> features;
#endif
  return features;
}

std::vector<const char*> missing_features(Isa isa, const std::vector<CpuFeature>& features) {
  static const std::vector<const char*> needed[] = {
      {},
      {"avx2", "fma", "f16c"},
      {"avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512bw", "avx512dq"},
      {"neon"},
  };
  std::vector<const char*> missing;
  for (const char* name : needed[static_cast<int>(isa)]) {
    bool present = false;
    for (const CpuFeature& feature : features) present |= feature.present && std::strcmp(feature.name, name) == 0;
    if (!present) missing.push_back(name);
  }
  return missing;
}

}  // namespace mmca
