#include "shadow.h"

#include <bit>

namespace mmca::emulation {

Times times;
Level level = Level::races;

namespace {

bool by_another_block(std::uint32_t time) { return time >= times.launch && time < times.block; }

}  // namespace

Shadow::Shadow(std::string name, std::size_t bytes, bool per_block) : name_(std::move(name)), per_block_(per_block) {
  reset(bytes);
}

void Shadow::reset(std::size_t bytes) {
  shift_ = 4;
  cells_.assign((bytes >> shift_) + 1, Cell());
}

void Shadow::refine(std::size_t alignment) {
  const int shift = std::countr_zero(alignment), parts = 1 << (shift_ - shift);
  std::vector<Cell> finer;
  finer.reserve(cells_.size() * parts);
  for (const Cell& cell : cells_) finer.insert(finer.end(), parts, cell);
  cells_.swap(finer);
  shift_ = shift;
}

void Shadow::add(std::size_t offset, std::size_t bytes, int thread, Location at) {
  for (Cell *cell = first(offset, bytes), *end = cell + (bytes >> shift_); cell != end; ++cell) {
    if (level != Level::bounds && cell->written == 0)
      fail(thread, at, "atomic addition to uninitialised %s", place(*cell).c_str());
    check_write(*cell, thread, true, at);
    const bool foreign =
        by_another_block(cell->written) || (cell->written >= times.launch && cell->writer & foreign_bit);
    note_write(*cell, thread, at);
    cell->writer |= atomic_bit | (foreign ? foreign_bit : 0);
  }
}

void Shadow::begin_copy(std::size_t offset, std::size_t bytes, int thread, Location at) {
  write(offset, bytes, thread, at);
  for (Cell *cell = first(offset, bytes), *end = cell + (bytes >> shift_); cell != end; ++cell)
    cell->written = under_way;
}

void Shadow::end_copy(std::size_t offset, std::size_t bytes, int thread) {
  for (Cell *cell = first(offset, bytes), *end = cell + (bytes >> shift_); cell != end; ++cell)
    cell->written = warps[thread / warp_size].since;
}

void Shadow::set_initialised(std::size_t offset, std::size_t bytes) {
  if (bytes == 0) return;
  for (Cell *cell = first(offset, bytes), *end = cell + (bytes >> shift_); cell != end; ++cell) {
    *cell = Cell();
    cell->written = times.now;
  }
}

void Shadow::forget_order() {
  for (Cell& cell : cells_) {
    const bool initialised = cell.written != 0 && !per_block_;
    cell = Cell();
    cell.written = initialised;
  }
}

bool Shadow::is_write_ordered(const Cell& cell, int thread, bool whole_warp) const {
  const std::uint32_t time = cell.written;
  if (time < (per_block_ ? times.block : times.launch)) return true;
  if (time < times.block || cell.writer & foreign_bit) return false;
  if (time < times.barrier) return true;
  if (cell.writer & atomic_bit || cell.writer / warp_size != static_cast<unsigned>(thread / warp_size)) return false;
  return time < warps[thread / warp_size].since || (!whole_warp && cell.writer == static_cast<unsigned>(thread));
}

void Shadow::check_read(const Cell& cell, int thread, bool whole_warp, Location at) const {
  if (level == Level::bounds) return;
  if (cell.written == under_way)
    fail(thread, at, "read of %s while a cp.async to it is under way, begun %s", place(cell).c_str(),
         writer(cell).c_str());
  if (cell.written < (per_block_ ? times.block : 1)) fail(thread, at, "read of uninitialised %s", place(cell).c_str());
  if (level != Level::races || is_write_ordered(cell, thread, whole_warp)) return;
  fail(thread, at, "race: read of %s, written %s", place(cell).c_str(), writer(cell).c_str());
}

void Shadow::check_write(const Cell& cell, int thread, bool atomic, Location at) const {
  if (level == Level::bounds) return;
  if (cell.written == under_way)
    fail(thread, at, "write to %s while a cp.async to it is under way, begun %s", place(cell).c_str(),
         writer(cell).c_str());
  if (level != Level::races) return;
  const bool both_atomic = atomic && cell.writer & atomic_bit;
  if (!both_atomic && !is_write_ordered(cell, thread, false))
    fail(thread, at, "race: write to %s, also written %s", place(cell).c_str(), writer(cell).c_str());
  if (!per_block_ && (by_another_block(cell.read) || cell.shared_by_blocks == times.launch))
    fail(thread, at, "race: write to %s, which another block reads", place(cell).c_str());
  if (cell.read < times.barrier) return;
  const int warp = thread / warp_size;
  if (const std::uint32_t others = cell.reading_warps & ~(1u << warp))
    fail(thread, at, "race: write to %s, which warp %d reads with no syncthreads in between", place(cell).c_str(),
         std::countr_zero(others));
  if (cell.read < warps[warp].since) return;
  if (const std::uint32_t others = cell.reading_lanes & ~(1u << thread % warp_size))
    fail(thread, at, "race: write to %s, which lane %d of the warp reads with no syncwarp in between",
         place(cell).c_str(), std::countr_zero(others));
}

std::string Shadow::writer(const Cell& cell) const {
  std::string text =
      cell.writer & atomic_bit ? "by atomic additions" : "by thread " + std::to_string(cell.writer % max_threads);
  if (cell.written < times.block || cell.writer & foreign_bit) text += " of another block";
  return text + " at " + site(cell.written_at);
}

std::string Shadow::place(const Cell& cell) const {
  return name_ + " at byte " + std::to_string(static_cast<std::size_t>(&cell - cells_.data()) << shift_);
}

}  // namespace mmca::emulation
