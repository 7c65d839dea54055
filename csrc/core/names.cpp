// The words for what a kernel does, apart from the table, which drags every CPU kernel in.
#include "core/kernel_table.h"

namespace mmca {

const char* to_string(Operation operation) {
  static const char* const names[] = {"attention_forward", "attention_backward", "linear_forward", "linear_backward"};
  return names[static_cast<int>(operation)];
}

const char* to_string(DType dtype) {
  static const char* const names[] = {"f32", "f64", "bf16", "f16"};
  return names[static_cast<int>(dtype)];
}

const char* to_string(Isa isa) {
  static const char* const names[] = {"scalar", "avx2", "avx512", "amx", "neon"};
  return names[static_cast<int>(isa)];
}

}  // namespace mmca
