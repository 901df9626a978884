
#include "zs_cpu.h"

namespace zs {
namespace {

// Fills each run up to `limit`; a segment longer than that stands alone.
std::vector<int64_t> fill(std::span<const int64_t> lengths, int64_t limit) {
  std::vector<int64_t> bounds{0};
  int64_t used = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const bool first = bounds.back() == static_cast<int64_t>(i);
    if (!first && lengths[i] > limit - used) {
      bounds.push_back(static_cast<int64_t>(i));
      used = 0;
    }
    // An overlong segment fills its run to the brim; the sum never passes limit, so it can't overflow.
    used = lengths[i] > limit - used ? limit : used + lengths[i];
  }
  if (!lengths.empty()) bounds.push_back(static_cast<int64_t>(lengths.size()));
  return bounds;
}

}  // namespace

std::vector<int64_t> pack_segments(std::span<const int64_t> lengths, int64_t token_budget) {
  std::vector<int64_t> best = fill(lengths, token_budget);
  int64_t low = 1, high = token_budget;  // the smallest limit that still needs no more runs than the budget does
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    std::vector<int64_t> bounds = fill(lengths, middle);
    if (bounds.size() <= best.size()) {
      best = std::move(bounds);
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return best;
}

}  // namespace zs
