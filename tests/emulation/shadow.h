// What is known of every piece of a range of memory: who wrote and read it last, and when.
//
// Time counts synchronisations. An access bears the time at which its warp's present interval began (Warp::since), so
// of two accesses within a block the earlier is ordered before the later if its time lies before
//
//     times.barrier     the block's latest syncthreads, or
//     Warp::since       the latest syncwarp of its warp, if both are of one warp,
//
// or if one thread makes both. What lies before times.launch is another launch's; between times.launch and times.block,
// another block's of this launch, and nothing orders that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"

namespace mmca::emulation {

struct Times {
  std::uint32_t now = 1, launch = 0, block = 0, barrier = 0;  // 0: before all
};
extern Times times;

enum class Level : int { bounds, contents, races };
extern Level level;

class Shadow {
 public:
  // `per_block`: shared memory, whose contents end with the block.
  Shadow(std::string name, std::size_t bytes, bool per_block);

  // One access of `bytes` at `offset` by a thread: held against the earlier ones, then noted. `whole_warp`: every lane
  // gets some of what is read.
  void read(std::size_t offset, std::size_t bytes, int thread, bool whole_warp, Location at) {
    const std::uint32_t valid = per_block_ ? times.block : 1, ordered = per_block_ ? times.barrier : times.launch;
    for (Cell *cell = first(offset, bytes), *end = cell + (bytes >> shift_); cell != end; ++cell) {
      if (cell->written - valid >= ordered - valid) check_read(*cell, thread, whole_warp, at);  // one for both bounds
      note_read(*cell, thread, whole_warp);
    }
  }
  void write(std::size_t offset, std::size_t bytes, int thread, Location at) {
    const std::uint32_t ordered = per_block_ ? times.barrier : times.launch;
    for (Cell *cell = first(offset, bytes), *end = cell + (bytes >> shift_); cell != end; ++cell) {
      if (cell->written >= ordered || cell->read >= ordered) check_write(*cell, thread, false, at);
      note_write(*cell, thread, at);
    }
  }
  void add(std::size_t offset, std::size_t bytes, int thread, Location at);  // atomically

  // From begin_copy to end_copy nobody may touch what is copied to; then it is as written by `thread` just now.
  void begin_copy(std::size_t offset, std::size_t bytes, int thread, Location at);
  void end_copy(std::size_t offset, std::size_t bytes, int thread);

  void set_initialised(std::size_t offset, std::size_t bytes);
  void forget_order();  // for when times begin anew: contents stay
  void reset(std::size_t bytes);

 private:
  // What all bytes of a cell have in common. Times: 0 is never.
  struct Cell {
    std::uint32_t written = 0, read = 0;
    std::uint32_t writer = 0;            // a thread, and the bits below
    std::uint32_t reading_warps = 0;     // since times.barrier
    std::uint32_t reading_lanes = 0;     // of the latest of these warps, since its syncwarp
    std::uint32_t shared_by_blocks = 0;  // times.launch when blocks of that launch other than this one read it
    Location written_at;
  };
  static constexpr std::uint32_t under_way = ~0u;         // as time of writing: a copy has begun
  static constexpr std::uint32_t atomic_bit = 1u << 16;   // writer: atomic additions, of anyone in the block
  static constexpr std::uint32_t foreign_bit = 1u << 17;  // and of another block of this launch

  // The first cell of an access. Cells are as large as all accesses so far allow.
  Cell* first(std::size_t offset, std::size_t bytes) {
    if ((offset | bytes) & ((std::size_t{1} << shift_) - 1)) refine(offset | bytes);
    return cells_.data() + (offset >> shift_);
  }
  void refine(std::size_t alignment);

  void note_read(Cell& cell, int thread, bool whole_warp) {
    const std::uint32_t since = warps[thread / warp_size].since;
    if (cell.read < times.barrier) {
      if (cell.read >= times.launch && cell.read < times.block) cell.shared_by_blocks = times.launch;
      cell.reading_warps = cell.reading_lanes = 0;
    } else if (cell.read < since) {
      cell.reading_lanes = 0;
    }
    cell.read = since;
    cell.reading_warps |= 1u << thread / warp_size;
    cell.reading_lanes |= whole_warp ? all_lanes : 1u << thread % warp_size;
  }
  void note_write(Cell& cell, int thread, Location at) {
    cell.written = warps[thread / warp_size].since;
    cell.writer = static_cast<std::uint32_t>(thread);
    cell.written_at = at;
  }

  void check_read(const Cell& cell, int thread, bool whole_warp, Location at) const;
  void check_write(const Cell& cell, int thread, bool atomic, Location at) const;
  bool is_write_ordered(const Cell& cell, int thread, bool whole_warp) const;
  std::string writer(const Cell& cell) const;
  std::string place(const Cell& cell) const;

  std::string name_;
  bool per_block_;
  int shift_ = 4;  // a cell is 2^shift_ bytes
  std::vector<Cell> cells_;
};

}  // namespace mmca::emulation
