// What the compiled parts compute, on raw pointers: no torch, no Python.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace zs {

// Bounds of consecutive runs of segments, [0, ..., lengths.size()]: as few runs as the budget allows, and among those
// the smallest largest run. A segment longer than the budget is a run of its own. Lengths are not negative.
std::vector<int64_t> pack_segments(std::span<const int64_t> lengths, int64_t token_budget);

}  // namespace zs
