#include "zs_eight.h"
#include "zs_group_advantages.h"

namespace zs {
namespace ZS_ISA {

using namespace eight;

namespace {

constexpr int kSums = 4;  // at a time, so that an addition need not wait for the one before it

template <bool has_mask>
double sum_of(const float* rewards, const bool* mask, int64_t n, int64_t end) {
  Doubles sums[kSums] = {};
  double rest = 0.0;
  const auto add = [&](Doubles& to, int64_t at) __attribute__((always_inline)) {
    const Floats x = load(rewards + at);  // selected, not multiplied: a masked reward may be NaN
    to = to + widened(has_mask ? or_zero(float_mask_of(mask + at), x) : x);
  };
  for (; n + kSums * kLanes <= end; n += kSums * kLanes)
    for (int k = 0; k < kSums; ++k) add(sums[k], n + k * kLanes);
  for (; n + kLanes <= end; n += kLanes) add(sums[0], n);
  for (; n < end; ++n)
    if (!has_mask || mask[n]) rest += rewards[n];
  return sum_of_lanes((sums[0] + sums[2]) + (sums[1] + sums[3])) + rest;
}

double count_of_all(const bool* mask, int64_t n, int64_t end) {
  int64_t counted = 0;
  for (; n + kLanes <= end; n += kLanes) counted += count_of(mask + n);
  for (; n < end; ++n) counted += mask[n];
  return static_cast<double>(counted);
}

}  // namespace

void sum_sequences(const float* rewards, const bool* mask, const int64_t* bounds, int64_t first, int64_t last,
                   double* sums) {
  for (int64_t s = first; s < last; ++s)
    sums[s] = mask ? sum_of<true>(rewards, mask, bounds[s], bounds[s + 1])
                   : sum_of<false>(rewards, mask, bounds[s], bounds[s + 1]);
}

void count_sequences(const bool* mask, const int64_t* bounds, int64_t first, int64_t last, double* counts) {
  for (int64_t s = first; s < last; ++s)
    counts[s] = mask ? count_of_all(mask, bounds[s], bounds[s + 1]) : static_cast<double>(bounds[s + 1] - bounds[s]);
}

void spread_sequences(const float* per_sequence, const bool* mask, const int64_t* bounds, int64_t first, int64_t last,
                      float* out) {
  for (int64_t s = first; s < last; ++s) {
    const Floats number = floats(per_sequence[s]);
    int64_t n = bounds[s];
    for (; n + kLanes <= bounds[s + 1]; n += kLanes)
      store(out + n, mask ? or_zero(float_mask_of(mask + n), number) : number);
    for (; n < bounds[s + 1]; ++n) out[n] = !mask || mask[n] ? per_sequence[s] : 0.0f;
  }
}

}  // namespace ZS_ISA
}  // namespace zs
