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

  // How much of a tile is visible that the rows' ranges do not all cover, or a mask or a bias (rows of the tile, null:
  // none) may hide: entries begin..begin+count-1, keys key..key+width-1. With one of these the pairs are written to
  // visible[count][width]; otherwise the ranges say it all.
  template <int width, class T>
  MMCA_NOINLINE Tile look(std::int64_t begin, int count, std::int32_t key, const T* const* bias,
                          std::uint8_t* visible) const {
    if (!has_mask() && !bias) return some;
    const auto& mask = rows.problem.attn_mask;
    int seen = 0;
    for (int r = 0; r < count; ++r) {
      std::uint8_t* out = visible + r * width;
      const auto [from, to] = columns<width>(begin + r, key);
      std::fill_n(out, width, std::uint8_t{0});
      std::fill_n(out + from, to - from, std::uint8_t{1});
      if (has_mask()) {
        const Row row = rows.at(begin + r);
        const std::uint8_t* source = mask.data + mask.offset(row.head, row.row);
        if (keys.identity() && mask.feature == 1 && to - from == width) {
          for (int c = 0; c < width; ++c) out[c] = source[key + c] != 0;
        } else {
          for (int c = from; c < to; ++c) out[c] = source[keys.position(key + c) * mask.feature] != 0;
        }
      }
      if (bias)
        for (int c = 0; c < width; ++c) out[c] &= bias[r][c] != -infinity<T>;
      for (int c = 0; c < width; ++c) seen += out[c];
    }
    return seen == 0 ? none : seen == count * width ? all : some;
  }

  // Replaces what a tile that was looked at hides, in `tile_rows` rows `stride` apart; rows from `count` on hide
  // everything. `visible`: null if the ranges say it all.
  template <int width, class T>
  MMCA_INLINE void hide(std::int64_t begin, int count, int tile_rows, std::int32_t key, const std::uint8_t* visible,
                        T* tile, std::ptrdiff_t stride, T replacement) const {
    for (int r = 0; r < tile_rows; ++r, tile += stride) {
      if (r >= count) {
        std::fill_n(tile, width, replacement);
      } else if (visible) {
        for (int c = 0; c < width; ++c) tile[c] = visible[r * width + c] ? tile[c] : replacement;
      } else {
        const auto [from, to] = columns<width>(begin + r, key);
        for (int c = 0; c < from; ++c) tile[c] = replacement;
        for (int c = to; c < width; ++c) tile[c] = replacement;
      }
    }
  }

 private:
  struct Columns {
    int from, to;  // from == to: none
  };

  // The columns of a tile at `key` that lie in an entry's range.
  template <int width>
  MMCA_INLINE Columns columns(std::int64_t entry, std::int32_t key) const {
    const Range range = rows.range(group, entry);
    const int from = std::clamp(range.begin - key, 0, width);
    return {from, std::max(from, std::clamp(range.end - key, 0, width))};
  }
};
