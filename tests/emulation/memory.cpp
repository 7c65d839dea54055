// Shared and global memory as kernels reach them, and the copies between them.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "memory.h"

namespace mmca::emulation {

// ---- shared memory ---------------------------------------------------------------------------------------------

namespace {

alignas(1024) unsigned char shared_memory[largest_shared_memory];
std::uint32_t shared_size;
Shadow shared_shadow("shared memory", 0, /*per_block=*/true);

void check_shared(std::uint32_t address, std::uint32_t bytes, int thread, Location at) {
  if (address > shared_size || bytes > shared_size - address)
    fail(thread, at, "shared memory: %u bytes at byte %d of %u", bytes, static_cast<int>(address), shared_size);
  if (address % bytes) fail(thread, at, "shared memory: %u bytes at byte %u, misaligned", bytes, address);
}

}  // namespace

void resize_shared(std::size_t bytes) {
  shared_size = static_cast<std::uint32_t>(bytes);
  shared_shadow.reset(bytes);
}

void poison_shared() { std::memset(shared_memory, 0xff, shared_size); }

template <int Bytes>
const unsigned char* shared_read(std::uint32_t address, int thread, bool whole_warp, Location at) {
  current->at = at;
  check_shared(address, Bytes, thread, at);
  shared_shadow.read(address, Bytes, thread, whole_warp, at);
  return shared_memory + address;
}

template <int Bytes>
unsigned char* shared_write(std::uint32_t address, Location at) {
  current->at = at;
  check_shared(address, Bytes, current->number, at);
  shared_shadow.write(address, Bytes, current->number, at);
  return shared_memory + address;
}

template const unsigned char* shared_read<2>(std::uint32_t, int, bool, Location);
template const unsigned char* shared_read<4>(std::uint32_t, int, bool, Location);
template const unsigned char* shared_read<8>(std::uint32_t, int, bool, Location);
template const unsigned char* shared_read<16>(std::uint32_t, int, bool, Location);
template unsigned char* shared_write<2>(std::uint32_t, Location);
template unsigned char* shared_write<4>(std::uint32_t, Location);
template unsigned char* shared_write<8>(std::uint32_t, Location);
template unsigned char* shared_write<16>(std::uint32_t, Location);

// ---- global memory ---------------------------------------------------------------------------------------------

namespace {

constexpr std::uintptr_t kernel_bit = std::uintptr_t{1} << 62;  // no address of a process has it: `*p` is a fault

std::uintptr_t host_address(const void* p) { return reinterpret_cast<std::uintptr_t>(p) & ~kernel_bit; }

struct Region {
  std::uintptr_t begin, end;
  std::string name;
  std::unique_ptr<Shadow> shadow;  // null: read only

  std::size_t offset(std::uintptr_t host) const { return host - begin / 16 * 16; }  // the shadow's
};

std::map<std::uintptr_t, Region> regions;  // by end
Region* latest_region;

Region* find_region(std::uintptr_t host, std::size_t bytes) {
  if (latest_region && host >= latest_region->begin && host + bytes <= latest_region->end) return latest_region;
  const auto found = regions.upper_bound(host);
  if (found == regions.end() || host < found->second.begin || host + bytes > found->second.end) return nullptr;
  return latest_region = &found->second;
}

[[noreturn]] void fail_outside(std::uintptr_t host, std::size_t bytes, const char* verb, Location at) {
  constexpr std::uintptr_t near = 1 << 16;
  const Region* nearest = nullptr;
  const auto distance = [host](const Region& r) {
    return host < r.begin ? r.begin - host : host < r.end ? 0 : host - r.end;
  };
  for (const auto& [end, region] : regions)
    if (!nearest || distance(region) < distance(*nearest)) nearest = &region;
  if (nearest && distance(*nearest) < near)
    fail(current->number, at, "global memory: %s %zu bytes at byte %td of %s, which has %zu", verb, bytes,
         static_cast<std::ptrdiff_t>(host - nearest->begin), nearest->name.c_str(), nearest->end - nearest->begin);
  fail(current->number, at, "global memory: %s %zu bytes at %p, which is in no registered range", verb, bytes,
       reinterpret_cast<void*>(host));
}

}  // namespace

unsigned char* global_access(const void* p, std::size_t bytes, std::size_t alignment, Use use, Location at) {
  const char* verb = use == Use::read ? "reads" : use == Use::write ? "writes" : "adds to";
  const std::uintptr_t host = host_address(p);
  const int thread = current->number;
  current->at = at;
  const Region* region = find_region(host, bytes);
  if (!region) fail_outside(host, bytes, verb, at);
  if (host % alignment)
    fail(thread, at, "global memory: %s %zu bytes at byte %zu of %s, misaligned", verb, bytes, host - region->begin,
         region->name.c_str());
  if (region->shadow) {
    const std::size_t offset = region->offset(host);
    switch (use) {
      case Use::read: region->shadow->read(offset, bytes, thread, false, at); break;
      case Use::write: region->shadow->write(offset, bytes, thread, at); break;
      case Use::add: region->shadow->add(offset, bytes, thread, at); break;
    }
  } else if (use != Use::read) {
    fail(thread, at, "global memory: %s %s, which is read only", verb, region->name.c_str());
  }
  return reinterpret_cast<unsigned char*>(host);
}

bool zero_global(void* p, std::size_t bytes) {
  if (bytes == 0) return true;
  const std::uintptr_t host = host_address(p);
  const Region* region = find_region(host, bytes);
  if (!region || !region->shadow) return false;
  std::memset(reinterpret_cast<void*>(host), 0, bytes);
  region->shadow->set_initialised(region->offset(host), bytes);
  return true;
}

void* register_region(void* p, std::size_t bytes, int access, const char* name) {
  const std::uintptr_t begin = host_address(p), end = begin + bytes;
  void* const kernel_address = reinterpret_cast<void*>(begin | kernel_bit);
  if (bytes == 0) return kernel_address;
  const auto found = regions.upper_bound(begin);
  Region* region = found == regions.end() || found->second.begin >= end ? nullptr : &found->second;
  if (region && (region->begin != begin || region->end != end)) return nullptr;
  latest_region = nullptr;
  if (!region) region = &regions.emplace(end, Region{begin, end, name, nullptr}).first->second;
  if (access == 0) return kernel_address;
  if (!region->shadow) region->shadow = std::make_unique<Shadow>(name, end - begin / 16 * 16, /*per_block=*/false);
  if (access == 1) region->shadow->set_initialised(region->offset(begin), bytes);
  return kernel_address;
}

bool unregister_region(void* p) {
  const auto found = regions.upper_bound(host_address(p));
  if (found == regions.end() || found->second.begin != host_address(p)) return false;
  latest_region = nullptr;
  regions.erase(found);
  return true;
}

void unregister_all_regions() {
  latest_region = nullptr;
  regions.clear();
}

void forget_order() {
  shared_shadow.forget_order();
  for (auto& [end, region] : regions)
    if (region.shadow) region.shadow->forget_order();
}

// ---- cp.async --------------------------------------------------------------------------------------------------

// The destination is NaN from the start of the copy and gets its contents when the copy is waited for: whoever still
// needs what was there, or comes too early, sees NaN even with the checks off.
void cp_async(std::uint32_t destination, const void* source, bool valid, int bytes, Location at) {
  Thread& thread = *current;
  const auto size = static_cast<std::uint32_t>(bytes);
  thread.at = at;
  check_shared(destination, size, thread.number, at);
  if (reinterpret_cast<std::uintptr_t>(source) % size)
    fail(thread.number, at, "cp.async of %d bytes from a misaligned global address", bytes);
  const unsigned char* from = valid ? global_access(source, size, size, Use::read, at) : nullptr;
  shared_shadow.begin_copy(destination, size, thread.number, at);
  std::memset(shared_memory + destination, 0xff, size);
  thread.copies.push_back({destination, size, from});
}

void cp_async_commit(Location at) {
  current->at = at;
  current->copy_groups.push_back(current->copies.size());
}

void cp_async_wait(unsigned pending_groups, Location at) {
  Thread& thread = *current;
  thread.at = at;
  if (thread.copy_groups.size() <= pending_groups) return;
  const auto last_group = thread.copy_groups.end() - pending_groups - 1;
  const auto done = static_cast<std::ptrdiff_t>(*last_group);
  for (auto copy = thread.copies.begin(); copy != thread.copies.begin() + done; ++copy) {
    if (copy->source) std::memcpy(shared_memory + copy->destination, copy->source, copy->bytes);
    else std::memset(shared_memory + copy->destination, 0, copy->bytes);
    shared_shadow.end_copy(copy->destination, copy->bytes, thread.number);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + done);
  thread.copy_groups.erase(thread.copy_groups.begin(), last_group + 1);
  for (std::size_t& end : thread.copy_groups) end -= static_cast<std::size_t>(done);
}

}  // namespace mmca::emulation
