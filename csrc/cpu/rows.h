// The rows a work item handles and what they see; included inside the namespace of an instruction set.
//
// The query heads that share a KV head are packed into one list of rows, heads varying fastest: entry e is row
// plan.row(e / heads_per_kv) of head kv_head * heads_per_kv + e % heads_per_kv. Grouped heads thus share packed keys
// and fill tiles, and neighbours see nearly the same keys. Tiles work on strips of tile_rows entries.

struct Row {
  std::int32_t row, head;  // query row, query head
};

template <class T, class Pointer>
MMCA_INLINE T* statistic(const RowStatistic<Pointer>& statistic, int group, Row row) {
  return static_cast<T*>(statistic.data) + statistic.offset(group, row.head, row.row);
}

struct RowList {
  const Problem& problem;  // of the sequence
  const SequencePlan& plan;
  std::int64_t batch, kv_head;  // `batch` numbers the sequence, for dropout

  std::int64_t size() const { return problem.q_len * problem.heads_per_kv(); }
  Row at(std::int64_t entry) const {
    const std::int64_t heads = problem.heads_per_kv();
    return {plan.row(entry / heads), static_cast<std::int32_t>(kv_head * heads + entry % heads)};
  }
  Range range(int group, std::int64_t entry) const {
    return plan.ranges[group][static_cast<std::size_t>(entry / problem.heads_per_kv())];
  }
  std::int64_t position(std::int32_t row) const { return row + problem.row_shift(); }

  // Walks the entries from one on without dividing for each.
  struct Walk {
    const RowList& rows;
    std::int64_t index, head, heads;  // head: among those of the KV head

    Row row() const { return {rows.plan.row(index), static_cast<std::int32_t>(rows.kv_head * heads + head)}; }
    Range range(int group) const { return rows.plan.ranges[group][static_cast<std::size_t>(index)]; }
    void next() {
      if (++head == heads) head = 0, ++index;
    }
  };
  Walk walk(std::int64_t entry) const {
    const std::int64_t heads = problem.heads_per_kv();
    return {*this, entry / heads, entry % heads, heads};
  }
};

// What the rows of one strip see of one group, in list coordinates.
struct StripRange {
  Range any;  // hull of the rows' ranges: outside it nobody looks
  Range all;  // their intersection: inside it every row sees every key, but for attn_mask
};

inline Range hull(const RowList& rows, int group, std::int64_t begin, std::int64_t end) {
  Range hull{INT32_MAX, 0};
  const std::int64_t heads = rows.problem.heads_per_kv();
  const std::vector<Range>& ranges = rows.plan.ranges[group];
  for (std::int64_t index = begin / heads; index <= (end - 1) / heads; ++index) {
    const Range range = ranges[static_cast<std::size_t>(index)];
    if (range.size() == 0) continue;
    hull.begin = std::min(hull.begin, range.begin);
    hull.end = std::max(hull.end, range.end);
  }
  return hull.end ? hull : Range{};
}

inline StripRange strip_range(const RowList& rows, int group, std::int64_t begin, std::int64_t end) {
  StripRange strip{hull(rows, group, begin, end), {0, INT32_MAX}};
  const std::int64_t heads = rows.problem.heads_per_kv();
  for (std::int64_t index = begin / heads; index <= (end - 1) / heads; ++index) {
    const Range range = rows.plan.ranges[group][static_cast<std::size_t>(index)];
    strip.all.begin = std::max(strip.all.begin, range.begin);
    strip.all.end = std::min(strip.all.end, range.end);
  }
  return strip;
}

// The keys of one group as the tiles meet them: which of a tile's row-key pairs are visible.
class Visibility {
 public:
  Visibility(const RowList& rows_, const KeyList& keys_, int group_) : rows(rows_), keys(keys_), group(group_) {}

  const RowList& rows;
  const KeyList& keys;
  int group;

  bool sees(std::int64_t entry, std::int32_t key) const {
    const Range range = rows.range(group, entry);
    return key >= range.begin && key < range.end && mask(rows.at(entry), key);
  }

  bool has_mask() const { return rows.problem.attn_mask.data != nullptr; }

  // A bias of -inf hides, too.
  bool mask(Row row, std::int32_t key) const {
    const auto& mask = rows.problem.attn_mask;
    if (mask.data && !mask.data[mask.offset(row.head, row.row) + keys.position(key) * mask.feature]) return false;
    bool hidden = false;
    const Input& bias = rows.problem.bias;
    if (bias.data)
      with_elements(rows.problem.bias_dtype, bias.data, [&](const auto* data) {
        hidden = double(data[bias.offset(row.head, row.row) + keys.position(key) * bias.feature]) == -infinity<double>;
      });
    return !hidden;
  }

  enum Tile { none, some, all };

  // Which pairs of a tile are visible: entry r of it sees key c iff row[r][c] is not zero.
  template <int rows, int width>
  struct Pairs {
    const std::uint8_t* row[rows];
    alignas(64) std::uint8_t copy[rows * width];
  };

  // How much of a tile is visible that the rows' ranges do not all cover, or a mask or a bias (rows of the tile, null:
  // none) may hide: entries begin..begin+count-1, keys key..key+width-1. With one of these `pairs` is filled in;
  // otherwise the ranges say it all.
  template <int width, class T, int tile_rows>
  MMCA_NOINLINE Tile look(std::int64_t begin, int count, std::int32_t key, const T* const* bias,
                          Pairs<tile_rows, width>& pairs) const {
    if (!has_mask() && !bias) return some;
    const auto& mask = rows.problem.attn_mask;
    const bool in_place = has_mask() && !bias && keys.identity() && mask.feature == 1;
    alignas(64) std::uint8_t any[width] = {}, every[width];
    std::fill_n(every, width, std::uint8_t{1});
    auto entry = rows.walk(begin);
    for (int r = 0; r < count; ++r, entry.next()) {
      const auto [from, to] = columns<width>(entry.range(group), key);
      const Row row = entry.row();
      const std::uint8_t* source = has_mask() ? mask.data + mask.offset(row.head, row.row) : nullptr;
      if (in_place && to - from == width) {
        pairs.row[r] = source + key;
      } else {
        std::uint8_t* out = pairs.copy + r * width;
        std::fill_n(out, width, std::uint8_t{0});
        for (int c = from; c < to; ++c) out[c] = !source || source[keys.position(key + c) * mask.feature] != 0;
        if (bias)
          for (int c = 0; c < width; ++c) out[c] &= bias[r][c] != -infinity<T>;
        pairs.row[r] = out;
      }
      const std::uint8_t* visible = pairs.row[r];
      for (int c = 0; c < width; ++c) any[c] |= visible[c], every[c] &= visible[c];
    }
    int seen = 0, full = 0;  // every: a true byte that is not 1 may count as `some`, which is as right
    for (int c = 0; c < width; ++c) seen += any[c] != 0, full += every[c];
    return seen == 0 ? none : full == width ? all : some;
  }

  // Replaces what a tile that was looked at hides, in `tile_rows` rows `stride` apart; rows from `count` on hide
  // everything. `pairs`: null if the ranges say it all.
  template <int width, class T, int pair_rows>
  MMCA_INLINE void hide(std::int64_t begin, int count, int tile_rows, std::int32_t key,
                        const Pairs<pair_rows, width>* pairs, T* tile, std::ptrdiff_t stride, T replacement) const {
    auto entry = rows.walk(begin);
    for (int r = 0; r < tile_rows; ++r, tile += stride, entry.next()) {
      if (r >= count) {
        std::fill_n(tile, width, replacement);
      } else if (pairs) {
        const std::uint8_t* visible = pairs->row[r];
        for (int c = 0; c < width; ++c) tile[c] = visible[c] ? tile[c] : replacement;
      } else {
        const auto [from, to] = columns<width>(entry.range(group), key);
        for (int c = 0; c < from; ++c) tile[c] = replacement;
        for (int c = to; c < width; ++c) tile[c] = replacement;
      }
    }
  }

 private:
  struct Columns {
    int from, to;  // from == to: none
  };

  // The columns of a tile at `key` that lie in a range.
  template <int width>
  static MMCA_INLINE Columns columns(Range range, std::int32_t key) {
    const int from = std::clamp(range.begin - key, 0, width);
    return {from, std::max(from, std::clamp(range.end - key, 0, width))};
  }
};

// Calls body(from, to) for every run of set bits.
template <class Body>
MMCA_INLINE void for_each_run(std::uint64_t bits, const Body& body) {
  while (bits) {
    const int from = __builtin_ctzll(bits);
    const std::uint64_t after = ~(bits >> from);
    const int to = after ? from + __builtin_ctzll(after) : 64;
    body(from, to);
    bits = to >= 64 ? 0 : bits >> to << to;
  }
}
