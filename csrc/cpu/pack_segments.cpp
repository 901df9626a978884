
#include "zs_cpu.h"

namespace zs {
namespace {

using Prefixes = std::span<const std::vector<Prefix>>;

// Tokens of segment i that a run from segment `first` on holds already.
int64_t held(Prefixes prefixes, size_t i, int64_t first) {
  int64_t longest = 0;
  if (prefixes.empty()) return longest;
  for (const auto& [source, length] : prefixes[i]) {
    if (source < first) break;
    longest = length;
  }
  return longest;
}

// Fills each run up to `limit`; a segment longer than that stands alone.
std::vector<int64_t> fill(std::span<const int64_t> lengths, int64_t limit, Prefixes prefixes) {
  std::vector<int64_t> bounds{0};
  int64_t used = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const bool first = bounds.back() == static_cast<int64_t>(i);
    int64_t own = lengths[i] - held(prefixes, i, bounds.back());
    if (!first && own > limit - used) {
      bounds.push_back(static_cast<int64_t>(i));
      used = 0;
      own = lengths[i];
    }
    // An overlong segment fills its run to the brim; the sum never passes limit, so it can't overflow.
    used = own > limit - used ? limit : used + own;
  }
  if (!lengths.empty()) bounds.push_back(static_cast<int64_t>(lengths.size()));
  return bounds;
}

}  // namespace

std::vector<int64_t> pack_segments(std::span<const int64_t> lengths, int64_t token_budget, Prefixes prefixes) {
  std::vector<int64_t> best = fill(lengths, token_budget, prefixes);
  int64_t low = 1, high = token_budget;  // the smallest limit that still needs no more runs than the budget does
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    std::vector<int64_t> bounds = fill(lengths, middle, prefixes);
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
