#include "zs_reductions.h"

#include "zs_token_math.h"

namespace zs::ZS_ISA {
namespace {

template <class Step>
ZS_INLINE void for_sixteen(int64_t count, const Step& step) {
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) step(Tokens<true>{n, kLanes});
  if (n < count) step(Tokens<false>{n, count - n});
}

}  // namespace

MaskedMoments masked_moments(const float* values, const bool* mask, int64_t count) {
  Floats sums = 0.0f, ones = 0.0f;
  for_sixteen(count, [&](auto tokens) {
    const Mask counted = tokens.counted(mask);
    sums += select(counted, tokens.load_from(values), 0.0f);  // a masked slot may hold anything
    ones += one_where(counted);
  });
  MaskedMoments moments{sum(ones), sum(sums), 0.0};
  if (moments.count == 0.0) return moments;
  const Floats mean = static_cast<float>(moments.sum / moments.count);
  Floats squares = 0.0f, rest = 0.0f;
  for_sixteen(count, [&](auto tokens) {
    const Floats distance = select(tokens.counted(mask), tokens.load_from(values) - mean, 0.0f);
    squares += distance * distance;
    rest += distance;
  });
  const double left = sum(rest);  // the distances would add up to 0 but for the rounding of the mean
  moments.squares = sum(squares) - left * left / moments.count;
  return moments;
}

void whiten(const WhitenRow& row, const float* values, const bool* mask, int64_t count, float* out) {
  for_sixteen(count, [&](auto tokens) {
    Floats x = (tokens.load_from(values) - row.mean) * row.scale;
    if (!row.shifted) x = x + row.offset;
    if (row.fill_masked) x = select(tokens.counted(mask), x, row.masked_value);
    tokens.store_to(out, x);
  });
}

}  // namespace zs::ZS_ISA
