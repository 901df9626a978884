// Advice to the system about large pieces of memory.
#pragma once

#include <cstdint>

namespace zs {

// Asks for 2 MiB pages for memory not written yet: the first write to a piece of hundreds of MB then costs a quarter.
// Does nothing below 32 MiB (above it, malloc returns memory that goes back to the system when freed) and where the
// system has no such pages.
void prefer_huge_pages(void* memory, int64_t bytes);

}  // namespace zs
