#include "zs_policy_loss.h"
#include "zs_token_math.h"

namespace zs::ZS_ISA {
namespace {

struct ValueSums {
  Floats loss = 0.0f, count = 0.0f, clipped = 0.0f, value = 0.0f, target = 0.0f, error = 0.0f, square = 0.0f;
};

template <bool Whole>
ZS_INLINE void value_of(const ValueColumns& c, float* grad_values, Tokens<Whole> tokens, ValueSums& sums) {
  const Mask counted = tokens.counted(c.mask);
  const auto read = [&](Floats x) { return select(counted, x, 0.0f); };
  const Floats value = read(tokens.load_from(c.values)), target = read(tokens.load_from(c.returns));
  const Floats weight = read(tokens.load_from(c.weights, c.weight_step));
  const Floats error = value - target;
  Floats square = error * error;
  sums.square += square;
  Floats slope = error;
  if (c.old_values) {
    const Floats old = read(tokens.load_from(c.old_values));
    const Floats clipped_error = bounded(value, old - c.clip, old + c.clip) - target;
    const Floats clipped_square = clipped_error * clipped_error;
    const Mask clipped = clipped_square > square;
    sums.clipped += one_where(clipped & counted);
    square = select(clipped, clipped_square, square);
    slope = select(clipped, 0.0f, slope);
  }
  sums.loss += weight * (square * 0.5f);
  sums.count += one_where(counted);
  sums.value += value;
  sums.target += target;
  sums.error += error;
  tokens.store_to(grad_values, weight * slope);
}

template <KlEstimator Estimator, bool Whole>
ZS_INLINE Floats kl_of(const KlSettings& settings, const float* logprobs, const float* ref_logprobs, const bool* mask,
                       float* values, float* slopes, Tokens<Whole> tokens) {
  Floats difference = tokens.load_from(ref_logprobs) - tokens.load_from(logprobs);
  Mask counted = everywhere();
  if (mask || !Whole) {
    counted = tokens.counted(mask);
    difference = select(counted, difference, 0.0f);
  }
  const KlParts parts = kl_parts<Estimator>(difference, settings);
  tokens.store_to(values, parts.value);
  if (slopes) tokens.store_to(slopes, mask ? select(counted, parts.slope, 0.0f) : parts.slope);
  return one_where(parts.clamped & counted);
}

template <KlEstimator Estimator>
int64_t kl_block(const KlSettings& settings, const float* logprobs, const float* ref_logprobs, const bool* mask,
                 float* values, float* slopes, int64_t begin, int64_t end) {
  Floats clamped = 0.0f;
  int64_t n = begin;
  for (; n + kLanes <= end; n += kLanes)
    clamped += kl_of<Estimator>(settings, logprobs, ref_logprobs, mask, values, slopes, Tokens<true>{n, kLanes});
  if (n < end)
    clamped += kl_of<Estimator>(settings, logprobs, ref_logprobs, mask, values, slopes, Tokens<false>{n, end - n});
  return static_cast<int64_t>(sum(clamped));
}

}  // namespace

void value_terms(const ValueColumns& c, float* grad_values, int64_t begin, int64_t end, double* totals) {
  ValueSums sums;
  int64_t n = begin;
  for (; n + kLanes <= end; n += kLanes) value_of(c, grad_values, Tokens<true>{n, kLanes}, sums);
  if (n < end) value_of(c, grad_values, Tokens<false>{n, end - n}, sums);
  const Floats* in_order[] = {&sums.loss,   &sums.count, &sums.clipped, &sums.value,
                              &sums.target, &sums.error, &sums.square};
  for (int i = 0; i < kValueTotals; ++i) totals[i] = sum(*in_order[i]);
}

int64_t kl_terms(const KlSettings& settings, const float* logprobs, const float* ref_logprobs, const bool* mask,
                 float* values, float* slopes, int64_t begin, int64_t end) {
  switch (settings.estimator) {
    case KlEstimator::none: break;
    case KlEstimator::k1:
      return kl_block<KlEstimator::k1>(settings, logprobs, ref_logprobs, mask, values, slopes, begin, end);
    case KlEstimator::k2:
      return kl_block<KlEstimator::k2>(settings, logprobs, ref_logprobs, mask, values, slopes, begin, end);
    case KlEstimator::k3:
      return kl_block<KlEstimator::k3>(settings, logprobs, ref_logprobs, mask, values, slopes, begin, end);
    case KlEstimator::absolute:
      return kl_block<KlEstimator::absolute>(settings, logprobs, ref_logprobs, mask, values, slopes, begin, end);
  }
  return 0;
}

}  // namespace zs::ZS_ISA
