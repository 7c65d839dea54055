#include "cpu/cpu_features.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mmca {
namespace {

#if defined(__x86_64__)
bool has_amx(unsigned bit) {  // of EDX, leaf 7: 22 amx-bf16, 24 amx-tile
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> bit & 1);
}

// The tiles' 8 KiB are part of a thread's state only once the process has asked for them; the answer holds for all its
// threads and children. (Linux 5.16 and later; others have no such call and are taken to say no.)
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_amx(24) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const std::vector<CpuFeature>& cpu_features() {
#if defined(__x86_64__)
#define MMCA_FEATURE(name) {name, __builtin_cpu_supports(name) != 0}
  static const std::vector<CpuFeature> features = {
      MMCA_FEATURE("sse2"),
      MMCA_FEATURE("avx2"),
      MMCA_FEATURE("fma"),
      MMCA_FEATURE("f16c"),
      MMCA_FEATURE("avx512f"),
      MMCA_FEATURE("avx512vl"),
      MMCA_FEATURE("avx512bw"),
      MMCA_FEATURE("avx512dq"),
      {"amx_bf16", has_amx(22)},
      {"amx_tile", has_amx(24)},
      {"leave from the system to use amx_tile", may_use_tiles()},
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
      {"avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512bw", "avx512dq", "amx_bf16", "amx_tile",
       "leave from the system to use amx_tile"},
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
