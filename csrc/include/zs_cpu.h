// What the compiled parts compute, on raw pointers: no torch, no Python.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace zs {

// One stretch of packed tokens, [begin, end), that belongs to one sequence; see kernels/zs_kernels/gae.py for the formula.
struct GaeInputs {
  const float* rewards;
  const float* values;
  const bool* mask;
  double gamma;
  double lam;
};

// Writes advantages and returns of tokens begin .. end - 1. Sums run in double, from the last token to the first.
void gae_segment(const GaeInputs& inputs, int64_t begin, int64_t end, float* advantages, float* returns);

// Bounds of consecutive runs of segments, [0, ..., lengths.size()]: as few runs as the budget allows, and among those
// the smallest largest run. A segment longer than the budget is a run of its own. Lengths are not negative.
std::vector<int64_t> pack_segments(std::span<const int64_t> lengths, int64_t token_budget);

}  // namespace zs
