// The numbers of every kernel's exp2; cpu/exp2.h describes the method.
#pragma once

namespace mmca {

template <class T>
struct Exp2Constants;

template <>
struct Exp2Constants<float> {
  static constexpr int degree = 6;
  static constexpr float magic = 12582912.0f + 127.0f, lowest = -127.0f;
  static constexpr float coefficient[degree + 1] = {0x1.000000p+0f, 0x1.62e430p-1f,  0x1.ebfbdap-3f, 0x1.c6aed4p-5f,
                                                    0x1.3b2dbcp-7f, 0x1.5f456ap-10f, 0x1.41d334p-13f};
};

template <>
struct Exp2Constants<double> {
  static constexpr int degree = 11;
  static constexpr double magic = 6755399441055744.0 + 1023.0, lowest = -1023.0;
  static constexpr double coefficient[degree + 1] = {
      0x1.0000000000000p+0,  0x1.62e42fefa39efp-1,  0x1.ebfbdff82c5adp-3,  0x1.c6b08d7049fd1p-5,
      0x1.3b2ab6fb9f413p-7,  0x1.5d87fe78cf260p-10, 0x1.43091310bf66dp-13, 0x1.ffcbfba7bc9a1p-17,
      0x1.62bfc3c1d2153p-20, 0x1.b5267882d5309p-24, 0x1.e620fb67ac6ddp-28, 0x1.e7aa1c12faa3cp-32};
};

}  // namespace mmca
