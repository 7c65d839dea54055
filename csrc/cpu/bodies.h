// All kernel bodies; included inside the namespace of an instruction set, after its Simd<T>.

#include "cpu/common.h"
#include "cpu/exp2.h"
#include "cpu/tiles.h"
#include "cpu/pack.h"
#include "cpu/rows.h"
#include "cpu/scores.h"
#include "cpu/softmax.h"
#include "cpu/dropout.h"
#include "cpu/products.h"
#include "cpu/few_rows.h"
#include "cpu/small.h"
#include "cpu/forward.h"
#include "cpu/gradients.h"
#include "cpu/backward.h"

// What multiplies the matrices of both directions.
struct Packed {
  template <class T>
  using Forward = PackedProducts<T>;
  template <class T>
  using FewRows = DirectProducts<T>;  // of a forward
  template <class T>
  using Backward = PackedGradients<T>;
};

template <class T, class Products>
void attention_forward(const Problem& problem, const Plan& plan, Executor& executor) {
  using Kernel = Forward<T, Products>;
  const auto items = forward_items(problem, plan, executor.concurrency(), Kernel::row_block, Kernel::max_chunk);
  const Kernel kernel(problem, plan, items);
  for_each_item(executor, static_cast<std::int64_t>(items.size()), multiply_adds(problem, items, 1), kernel);
}

template <class T, class Products>
void attention_backward(const Problem& problem, const Plan& plan, Executor& executor) {
  using Kernel = Backward<T, Products::template Backward>;
  const std::int64_t row_bytes = Kernel::partial_row_bytes(problem);
  for (BackwardWave& wave :
       backward_waves(problem, plan, {Kernel::key_range, Kernel::row_block, Kernel::strip_rows, row_bytes})) {
    const auto bytes = static_cast<std::size_t>(wave.rows * row_bytes), flags = static_cast<std::size_t>(wave.blocks);
    Arena measure(nullptr);
    measure.take<unsigned char>(bytes);
    measure.take<std::uint8_t>(flags);
    Arena arena(call_scratch(measure.used()));
    T* partials = reinterpret_cast<T*>(arena.take<unsigned char>(bytes));
    std::uint8_t* touched = arena.take<std::uint8_t>(flags);
    std::fill_n(touched, flags, std::uint8_t{0});
    const Kernel kernel(problem, plan, wave, partials, touched);
    for_each_item(executor, static_cast<std::int64_t>(wave.items.size()), multiply_adds(problem, wave.items, 3),
                  kernel);
  }
}
