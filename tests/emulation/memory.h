// What the scheduler and the tests' functions ask of memory.cpp; its callers hold the emulator's lock.
#pragma once

#include "shadow.h"

namespace mmca::emulation {

inline constexpr std::size_t largest_shared_memory = 227 * 1024;

void resize_shared(std::size_t bytes);  // for a launch
void poison_shared();                   // for a block

void* register_region(void* p, std::size_t bytes, int access, const char* name);  // null: overlaps another in part
bool unregister_region(void* p);
void unregister_all_regions();
bool zero_global(void* p, std::size_t bytes);  // false: not within one region that may be written

void forget_order();  // times begin anew

}  // namespace mmca::emulation
