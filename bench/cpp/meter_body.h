// get_meter() of one instruction set; included inside its namespace, after its simd_*.h, by meter_<isa>.cpp.

MMCA_NOINLINE float multiply_add(std::int64_t steps, float factor, float addend) {
  using S = Simd<float>;
  constexpr int chains = 2 * S::tile_rows;
  const auto x = S::broadcast(factor), y = S::broadcast(addend);
  S::Reg chain[chains];
#pragma GCC unroll 32
  for (int i = 0; i < chains; ++i) chain[i] = S::broadcast(static_cast<float>(i));
  for (; steps > 0; --steps) {
#pragma GCC unroll 32
    for (int i = 0; i < chains; ++i) chain[i] = S::fma(chain[i], x, y);
  }
#pragma GCC unroll 32
  for (int i = 1; i < chains; ++i) chain[0] = S::add(chain[0], chain[i]);
  return S::reduce_add(chain[0]);
}

MMCA_NOINLINE float sum(const float* data, std::int64_t count) {
  using S = Simd<float>;
  constexpr int chains = 8;
  S::Reg chain[chains];
#pragma GCC unroll 8
  for (auto& one : chain) one = S::zero();
  std::int64_t i = 0;
  for (; i + chains * S::width <= count; i += chains * S::width) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) chain[c] = S::add(chain[c], S::loadu(data + i + c * S::width));
  }
#pragma GCC unroll 8
  for (int c = 1; c < chains; ++c) chain[0] = S::add(chain[0], chain[c]);
  float total = S::reduce_add(chain[0]);
  for (; i < count; ++i) total += data[i];
  return total;
}

void get_meter(bench::Meter& meter) {
  meter = {Simd<float>::width, 2.0 * 2 * Simd<float>::tile_rows * Simd<float>::width, multiply_add, sum};
}
