// What the compiled parts compute, on raw pointers: no torch, no Python.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace zs {

// Bounds of consecutive runs of segments, [0, ..., lengths.size()]: as few runs as the budget allows, and among those
// the smallest largest run. A segment longer than the budget is a run of its own. Lengths are not negative.
// prefixes, empty or one list per segment: (source, length) of what a segment begins with alike with an earlier one,
// lengths rising and sources falling; in a run that holds the source, those tokens don't count again.
using Prefix = std::pair<int64_t, int64_t>;
std::vector<int64_t> pack_segments(std::span<const int64_t> lengths, int64_t token_budget,
                                   std::span<const std::vector<Prefix>> prefixes);

}  // namespace zs
