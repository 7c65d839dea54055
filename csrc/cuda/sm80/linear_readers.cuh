// What the readers of a sweep of linear attention take: Y = X M + A G, and what becomes of it (linear_sweep.cuh).
#pragma once

#include "cuda/sm80/linear_block.cuh"
#include "cuda/sm80/linear_rows.cuh"

namespace mmca::cuda::sm80 {

// A warp's rows of readers: y, and (of out) the weights' sum.
template <int P>
struct ReaderRows {
  Accumulator<1, SweepTile<P>::y_tiles> y;
  float total[2];
};

PRIM int first_reader(int row_groups) { return 16 * (warp_of_thread() % row_groups); }

template <class T, int P>
PRIM void map_readers(const SweepBlock<P>& block, std::int32_t time, int tile) {
  using Shared = SweepTile<P>;
  const LinearSweep& sweep = block.sweep;
  if (sweep.makes_rows()) {
    map_queries<T, P, Shared::tokens, Shared::threads>(Shared::x, block.phi_features(), [&](int r, float top) {
      const std::int32_t token =
          sweep.role == SweepRole::facts && block.column == 0 ? block.reader_token(time + r) : -1;
      if (token < 0) return;
      const std::int64_t head = block.query_head(tile);
      prim::st_global(sweep.facts.top + row_fact(block.problem, block.plan, block.sequence(), head, token), top);
    });
  } else if (sweep.has_phi_f()) {
    map_keys<T, P, Shared::tokens, Shared::threads>(Shared::x, block.phi_features());
  }
}

// Y = X M, and X z.
template <class T, int P>
PRIM void read_state(ReaderRows<P>& rows, float state_scale, bool totals) {
  using Shared = SweepTile<P>;
  const LanePlace<P> x = rows_first<P>(Shared::x).fresh();
  const int first = first_reader(Shared::row_groups), column = warp_of_thread() / Shared::row_groups * Shared::y_tiles;
  const LanePlace<64> state = rows_first<64>(Shared::state).fresh();
  const LanePlace<64> high = state.from_chunk(column),
                      low = state.at(Shared::low).from_chunk(Shared::low_chunk + column);
#pragma unroll 4
  for (int k = 0; k < P; k += 16) {
    std::uint32_t a[1][4];
    load_a(a[0], x, first, k / 8);
    multiply_rows<T>(rows.y, a, high, k);
    multiply_rows<T>(rows.y, a, low, k);
    if (totals) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack2<T>(a[0][i]);
        const auto z = prim::ld_shared<float2>(Shared::vector + 4 * (k + i / 2 * 8 + fragment_column()));
        rows.total[i % 2] = fmaf(pair.x, z.x, fmaf(pair.y, z.y, rows.total[i % 2]));
      }
    }
  }
#pragma unroll
  for (int n = 0; n < Shared::y_tiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) rows.y[0][n][e] *= state_scale;
}

// Y += A G
template <class T, int P>
PRIM void read_writers(const SweepBlock<P>& block, ReaderRows<P>& rows, int buffer, float factor) {
  using Shared = SweepTile<P>;
  constexpr int tiles = Shared::tokens / 8;
  const SweepRole role = block.sweep.role;
  const int first = first_reader(Shared::row_groups), column = warp_of_thread() / Shared::row_groups * Shared::y_tiles;
  Accumulator<1, tiles> a;
  clear(a);
  const LanePlace<P> x = rows_first<P>(Shared::x).fresh(), f = chunks_first<P>(Shared::f(buffer)).fresh();
#pragma unroll 4
  for (int k = 0; k < P; k += 16) {
    std::uint32_t part[1][4];
    load_a(part[0], x, first, k / 8);
    multiply_columns<T>(a, part, f, k / 8);
  }

  const smem_t products = Shared::note(buffer) + 2 * Shared::note_bytes;
  PowerScale scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first + fragment_row(h);
    float product = 0.0f, top = 0.0f, total = 0.0f;
    if (role == SweepRole::query_gradient)
      product = prim::ld_shared<float>(Shared::x_note + 2 * Shared::note_bytes + 4 * row);
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
      float2 by_writer{0.0f, 0.0f};
      if (role == SweepRole::key_gradient)
        by_writer = prim::ld_shared<float2>(products + 4 * (8 * n + fragment_column()));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& weight = a[0][n][2 * h + e];
        weight -= product + (e ? by_writer.y : by_writer.x);
        if (8 * n + fragment_column() + e > row) weight = 0.0f;
        total += weight, top = fmaxf(top, fabsf(weight));
      }
    }
    rows.total[h] += total;
    if constexpr (is_f16<T>) {
      scale[h] = PowerScale(quad_max(top));
#pragma unroll
      for (int n = 0; n < tiles; ++n) a[0][n][2 * h] *= scale[h].up, a[0][n][2 * h + 1] *= scale[h].up;
    }
  }

  std::uint32_t rounded[tiles / 2][1][4];
#pragma unroll
  for (int n = 0; n < tiles; n += 2) pack_a<T>(rounded[n / 2][0], a[0][n], a[0][n + 1]);
  constexpr int at_once = Shared::y_tiles < 4 ? Shared::y_tiles : 4;
#pragma unroll
  for (int first_tile = 0; first_tile < Shared::y_tiles; first_tile += at_once) {
    const LanePlace<64> g = rows_first<64>(Shared::g(buffer)).fresh().from_chunk(column + first_tile);
    Accumulator<1, at_once> y;
    clear(y);
#pragma unroll
    for (int k = 0; k < tiles / 2; ++k) multiply_rows<T>(y, rounded[k], g, 16 * k);
#pragma unroll
    for (int n = 0; n < at_once; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& sum = rows.y[0][first_tile + n][e];
        sum = fmaf(factor * scale[e / 2].down, y[0][n][e], sum);
      }
  }
}

// Makes of y what it is for.
template <class T, int P>
PRIM void finish(const SweepBlock<P>& block, ReaderRows<P>& rows, std::int32_t time, int tile) {
  using Shared = SweepTile<P>;
  const LinearProblem& problem = block.problem;
  const LinearSweep& sweep = block.sweep;
  const LinearSequence sequence = block.sequence();
  const int part = warp_of_thread() / Shared::row_groups, in_block = part * Shared::y_tiles * 8;
  const int column = block.column + in_block, place = in_block + fragment_column();  // place: in the vector
  const std::int64_t head = sweep.backwards() ? block.kv_head : block.query_head(tile);
  const std::int64_t begin = sweep.backwards() ? sequence.k_begin : sequence.q_begin;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = first_reader(Shared::row_groups) + fragment_row(h);
    const std::int32_t token = block.reader_token(time + r);
    float total = quad_sum(rows.total[h]);
    const bool hidden = token < 0 || (!sweep.backwards() ? sequence.hides_all_from(problem, token)
                                                         : block.hides_key(token) ||
                                                               (!sequence.q_len && !problem.grad_final_state.sum));
    const std::int64_t row = token < 0 ? 0 : token;
    const auto each = [&](const auto& body) {
#pragma unroll
      for (int n = 0; n < Shared::y_tiles; ++n) {
        float &x = rows.y[0][n][2 * h], &y = rows.y[0][n][2 * h + 1];
        if (hidden) x = y = 0.0f;
        else body(n, x, y);
      }
    };
    const auto features = [&](const Input& of, int n, int count) {
      return pair_of_row<T>(of, sequence, begin, head, row, column + 8 * n + fragment_column(), count);
    };
    const auto head_dim = static_cast<int>(problem.head_dim), value_dim = static_cast<int>(problem.value_dim);

    if (sweep.makes_rows()) {
      const float inverse = hidden ? 0.0f : inverse_weight(total);
      each([&](int, float& x, float& y) { x = weighted(inverse, x), y = weighted(inverse, y); });
      if (sweep.role == SweepRole::facts) {
        float product = 0.0f;
        each([&](int n, float& x, float& y) {
          const float2 grad = features(problem.grad_out, n, value_dim);
          product = fmaf(x, grad.x, fmaf(y, grad.y, product));
        });
        product = quad_sum(product);
        if (token >= 0 && lane_of_thread() % 4 == 0) {
          const std::int64_t at = row_fact(problem, block.plan, sequence, head, row);
          const int index = block.column / Shared::columns * Shared::column_groups + part;
          prim::st_global(sweep.facts.parts + index * sweep.facts.size + at, product);
          if (index == 0) prim::st_global(sweep.facts.inverse + at, inverse);
        }
        continue;
      }
    } else if (sweep.role == SweepRole::query_gradient) {
      const smem_t note = Shared::x_note + 4 * r;
      const float inverse = prim::ld_shared<float>(note),
                  product = prim::ld_shared<float>(note + 2 * Shared::note_bytes);
      const RowMap map = map_of_query<T>(prim::ld_shared<float>(note + Shared::note_bytes));
      each([&](int n, float& x, float& y) {
        const float2 query = features(problem.query, n, head_dim);
        const auto z = prim::ld_shared<float2>(Shared::vector + 4 * (place + 8 * n));
        x = weighted(inverse, (x - product * z.x) * fminf(map.factor, map(query.x)));
        y = weighted(inverse, (y - product * z.y) * fminf(map.factor, map(query.y)));
      });
    } else if (sweep.role == SweepRole::key_gradient) {
      each([&](int n, float& x, float& y) {
        const float2 key = features(problem.key, n, head_dim);
        const auto z = prim::ld_shared<float2>(Shared::vector + 4 * (place + 8 * n));
        x = (x + z.x) * fminf(1.0f, phi(key.x)), y = (y + z.y) * fminf(1.0f, phi(key.y));
      });
    } else {
      each([](int, float&, float&) {});
    }
    store_fragment_row<T>(rows.y, h, sweep.y, sequence, begin, head, token, column, sweep.values, sweep.aligned);
  }
}

}  // namespace mmca::cuda::sm80
