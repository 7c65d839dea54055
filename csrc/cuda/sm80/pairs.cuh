// Scores and weights pair by pair, for what is more than a scaled product, on accumulators of 16 rows x 8 N keys.
#pragma once

#include "cuda/row_results.cuh"
#include "cuda/sm80/tile.cuh"

namespace mmca::cuda::sm80 {

// What the scores' two rows of a lane are, and which keys their columns.
struct PairRows {
  std::int32_t row[2];
  Interval seen[2];               // entries of the list
  const std::int32_t* positions;  // of the list
  std::int32_t first;             // the entry of column 0

  PRIM bool sees(int h, std::int32_t entry) const { return entry >= seen[h].begin && entry < seen[h].end; }
  PRIM std::int32_t entry(int n, int e) const { return first + 8 * n + fragment_column() + e; }
};

// f(score, h, key) for every pair that is seen; what is not becomes -inf.
template <int N, class F>
PRIM void for_pairs(float (&score)[N][4], const PairRows& rows, F&& f) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const std::int32_t entry = rows.entry(n, e);
      const bool seen[2] = {rows.sees(0, entry), rows.sees(1, entry)};
      const std::int32_t key = seen[0] || seen[1] ? position_at(rows.positions, entry) : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& s = score[n][2 * h + e];
        if (seen[h]) f(s, h, key);
        else s = -infinity<float>();
      }
    }
}

// Products become scores: natural ones where `shaped` (Problem::shapes_scores()), else exponents of 2.
template <int N>
PRIM void shape_scores(float (&score)[N][4], const PairScores<float>& scores, const PairRows& rows, bool shaped,
                       float scale_log2) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float slope;
      score[n][e] = shaped ? scores.capped(score[n][e], slope) : score[n][e] * scale_log2;
    }
  scores.with_bias([&](auto bias) {
    for_pairs(score, rows, [&](float& s, int h, std::int32_t key) {
      const float b = bias(rows.row[h], key);
      s = b == -infinity<float>() ? b : s + b;  // it hides even a NaN
    });
  });
  for_pairs(score, rows, [&](float& s, int h, std::int32_t key) {
    if (!scores.visible(rows.row[h], key)) s = -infinity<float>();
  });
}

// Lane t of a quad has w[i] of block t; afterwards it has in w[i] what lane i had in w[t].
PRIM void transpose_quad(std::uint32_t (&w)[4]) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = lane & bit;
      const std::uint32_t other = prim::shfl_xor(upper ? w[i] : w[i | bit], bit);
      if (upper) w[i] = other;
      else w[i | bit] = other;
    }
}

// Weights that dropout takes become 0; the factor of the others, PairDropout::kept(), is the caller's. drops[h]:
// whether row h is subject to it.
template <int N>
PRIM void drop_weights(float (&weight)[N][4], const PairDropout& dropout, const PairRows& rows,
                       const bool (&drops)[2]) {
  if (N % 4 == 0 && !rows.positions &&
      rows.first % 8 == 0) {  // 8 columns are a block of Philox: a quarter of a quad's work
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n + 4 <= N; n += 4) {
        std::uint32_t word[4];
        dropout.words(rows.row[h], rows.first / 8 + n + lane_of_thread() % 4, word);
        transpose_quad(word);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (drops[h] && dropout.factor(word[i], e) == 0.0f) weight[n + i][2 * h + e] = 0.0f;
      }
    return;
  }
  static_assert(4 * N <= 32);
  std::uint32_t dropped = 0;
  for (int i = 0; i < 4 * N; ++i) {  // bit 4 n + 2 h + e
    const bool lower = i & 2;
    const std::int32_t entry = rows.entry(i / 4, i % 2);
    const bool seen = lower ? rows.sees(1, entry) && drops[1] : rows.sees(0, entry) && drops[0];
    if (seen && dropout.factor_of(lower ? rows.row[1] : rows.row[0], position_at(rows.positions, entry)) == 0.0f)
      dropped |= 1u << i;
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (dropped >> (4 * n + e) & 1u) weight[n][e] = 0.0f;
}

// The two together, for the rows of an m16 tile that a lane has a part in, in one group.
class PairTerms {
 public:
  PRIM PairTerms(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group, std::int64_t head)
      : scores_(problem, sequence, head),
        dropout_(problem, sequence, head),
        scale_log2_(static_cast<float>(problem.scale * log2_e)),
        shaped_(problem.shapes_scores()) {
    rows_.positions = list_positions(plan, sequence, group);
  }
  // Row h of the lane's two is `entry`, negative: none.
  PRIM void set_row(const Problem& problem, const DevicePlan& plan, const Sequence& sequence, int group, int h,
                    std::int32_t entry) {
    const bool exists = entry >= 0;
    rows_.row[h] = exists ? row_of(plan, sequence, entry) : 0;
    rows_.seen[h] = exists ? entry_range(problem, plan, sequence, entry, group) : Interval{0, 0};
    drops_[h] = exists && dropout_.any() && !(group == 1 && is_self_entry(plan, sequence, entry));
  }

  // `first`: the list's entry of column 0.
  template <int N>
  PRIM void shape(float (&score)[N][4], std::int32_t first) {
    rows_.first = first;
    shape_scores(score, scores_, rows_, shaped_, scale_log2_);
  }
  template <int N>
  PRIM void drop(float (&weight)[N][4], std::int32_t first) {
    rows_.first = first;
    if (dropout_.any()) drop_weights(weight, dropout_, rows_, drops_);
  }

 private:
  PairScores<float> scores_;
  PairDropout dropout_;
  float scale_log2_;
  bool shaped_;
  PairRows rows_;
  bool drops_[2];
};

}  // namespace mmca::cuda::sm80
