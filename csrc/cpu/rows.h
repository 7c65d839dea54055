// The rows a work item handles and what they see; included inside the namespace of an instruction set.
//
// The query heads that share a KV head are packed into one list of rows, heads varying fastest: entry e is row
// plan.row(e / heads_per_kv) of head kv_head * heads_per_kv + e % heads_per_kv. Grouped heads thus share packed keys and
// fill tiles, and neighbours see nearly the same keys. Tiles work on strips of tile_rows entries.

struct Row {
  std::int32_t row, head;  // query row, query head
};

struct RowList {
  const Problem& problem;
  const SequencePlan& plan;
  std::int64_t batch, kv_head;

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
struct Visibility {
  const RowList& rows;
  const KeyList& keys;
  int group;

  bool sees(std::int64_t entry, std::int32_t key) const {
    const Range range = rows.range(group, entry);
    return key >= range.begin && key < range.end && mask(rows.at(entry), key);
  }

  bool has_mask() const { return rows.problem.attn_mask.data != nullptr; }

  bool mask(Row row, std::int32_t key) const {
    const auto& mask = rows.problem.attn_mask;
    return !mask.data || mask.data[mask.offset(rows.batch, row.head, row.row) + keys.position(key) * mask.feature];
  }

  enum Tile { none, some, all };

  // The pairs of entries begin..begin+count-1 with keys key..key+width-1 into visible[count][width].
  template <int width>
  MMCA_NOINLINE Tile look(std::int64_t begin, int count, std::int32_t key, std::uint8_t* visible) const {
    int seen = 0;
    for (int r = 0; r < count; ++r) {
      std::uint8_t* out = visible + r * width;
      const Range range = rows.range(group, begin + r);
      const int from = std::clamp(range.begin - key, 0, width), to = std::clamp(range.end - key, 0, width);
      for (int c = 0; c < width; ++c) out[c] = c >= from && c < to;
      if (has_mask() && from < to) {
        const auto& mask = rows.problem.attn_mask;
        const Row row = rows.at(begin + r);
        const std::uint8_t* source = mask.data + mask.offset(rows.batch, row.head, row.row);
        if (keys.identity() && mask.feature == 1 && to - from == width) {
          for (int c = 0; c < width; ++c) out[c] = source[key + c] != 0;
        } else {
          for (int c = from; c < to; ++c) out[c] = source[keys.position(key + c) * mask.feature] != 0;
        }
      }
      for (int c = 0; c < width; ++c) seen += out[c];
    }
    return seen == 0 ? none : seen == count * width ? all : some;
  }
};

// Keeps the visible scores of a row and replaces the others.
template <class T, int width>
MMCA_INLINE void hide(T* scores, const std::uint8_t* visible, T replacement) {
  for (int c = 0; c < width; ++c) scores[c] = visible[c] ? scores[c] : replacement;
}
