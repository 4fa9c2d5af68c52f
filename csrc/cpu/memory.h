// Memory for large tensors that stays with the process when they are freed.
//
// A fresh buffer costs a page fault per page, in which the system clears it: for the maps of a training step, a tenth
// of the step's time. Here a freed range is handed out again, joined with its free neighbours, so that the second step
// meets no faults; what the process holds is the most that was in use at a time, and the gaps between.
#pragma once

#include <cstdint>

namespace mvit3 {

constexpr int64_t kLeastPooled = int64_t(1) << 18;  // bytes: smaller tensors are malloc's business

// At least `bytes` bytes on a page boundary, or null where the system has no such memory to give.
void* take_memory(int64_t bytes);
void give_memory(void* p);

// Gives the pages of all free ranges back to the system; returns their bytes.
int64_t release_memory();

}  // namespace mvit3
