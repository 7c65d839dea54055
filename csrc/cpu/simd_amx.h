// AMX: eight tile registers of 16 rows of 64 bytes, and products of bfloat16 matrices; included inside a namespace of
// its own together with simd_avx512.h.
//
//     C (16 x 16 floats) += A (16 rows x 32 terms) * B (16 pairs of terms x 16 columns x 2)
//
// Products are exact and sums are floats, rounded to nearest even: the 16 first terms of A's pairs one after the other,
// the 16 second ones likewise, then both to C. Numbers below 2^-126 count as 0, among operands, sums and results.

struct Tiles {
  static constexpr int rows = 16, columns = 16, depth = 32, row_bytes = 64;
  static constexpr int elements = rows * depth;  // 16-bit, of a tile

  // All registers whole. A thread's tiles are its own, and cost the system nothing once released.
  struct Session {
    Session() {
      struct alignas(64) {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t bytes_of_row[16] = {};
        std::uint8_t rows_of_tile[16] = {};
      } configuration;
      for (int t = 0; t < 8; ++t) configuration.bytes_of_row[t] = row_bytes, configuration.rows_of_tile[t] = rows;
      asm volatile("ldtilecfg %0" ::"m"(configuration));
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session() { asm volatile("tilerelease"); }
  };

  template <int tile>
  static MMCA_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile>
  static MMCA_INLINE void load(const void* from, std::ptrdiff_t stride = row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  static MMCA_INLINE void store(void* to, std::ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
  }
  template <int c, int a, int b>
  static MMCA_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};
