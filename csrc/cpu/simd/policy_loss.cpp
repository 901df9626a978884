#include "zs_policy_loss.h"

#include "zs_token_math.h"

namespace zs::ZS_ISA {
namespace {

// Sums per lane over a block, in the order of the totals.
struct Sums {
  Floats loss = 0.0f, count = 0.0f, ratio = 0.0f, log_ratio = 0.0f, low = 0.0f, high = 0.0f, dual = 0.0f,
         capped = 0.0f, clamped = 0.0f, kl = 0.0f, kl_clamped = 0.0f, entropy = 0.0f, policy = 0.0f, largest = 0.0f;

  void write(double* totals) const {
    const Floats* in_order[] = {&loss,    &count, &ratio,      &log_ratio, &low,    &high, &dual, &capped,
                                &clamped, &kl,    &kl_clamped, &entropy,   &policy};
    for (int i = 0; i < kPolicyTotals - 1; ++i) totals[i] = sum(*in_order[i]);
    totals[kPolicyTotals - 1] = max_lane(largest);
  }
};

struct Policy {
  Floats value, slope;
};

// The policy term and its derivative by logprob.
template <PolicyForm Form>
ZS_INLINE Policy policy_of(const PolicySettings& s, Floats logprob, Floats ratio, Floats advantage, Mask clamped,
                           Mask counted, Sums& sums) {
  const Floats cut = select(ratio > s.ratio_cap, s.ratio_cap, ratio);
  sums.capped += one_where((ratio > s.ratio_cap) & counted);
  if constexpr (Form == PolicyForm::reinforce) {
    return {-advantage * logprob, -advantage};
  } else if constexpr (Form == PolicyForm::cispo_cap) {
    const Floats slope = -cut * advantage;
    return {slope * logprob, slope};
  }
  const Mask below = ratio < s.ratio_low, above = ratio > s.ratio_high;
  const Floats clipped = select(below, s.ratio_low, select(above, s.ratio_high, ratio));
  if constexpr (Form == PolicyForm::cispo) {
    sums.low += one_where(below & counted);
    sums.high += one_where(above & counted);
    const Floats slope = -clipped * advantage;
    return {slope * logprob, slope};
  }
  // max(-a A, -b A) = -A (the larger of a, b where A < 0, else the smaller).
  const Mask negative = advantage < 0.0f;
  Floats used = select(negative, select(clipped > cut, clipped, cut), select(clipped < cut, clipped, cut));
  const Mask beyond = negative & (used > s.dual_clip);
  used = select(beyond, s.dual_clip, used);
  sums.dual += one_where(beyond);  // a token that isn't counted has advantage 0, here and below
  sums.low += one_where(below & negative);
  sums.high += one_where(above & (advantage > 0.0f));
  const Floats value = -advantage * used;
  return {value, select((used < ratio) | (used > ratio) | clamped, 0.0f, value)};
}

template <PolicyForm Form, KlEstimator Kl, bool Whole>
ZS_INLINE void sixteen(const PolicySettings& s, const PolicyColumns& c, const PolicyOutputs& out, Tokens<Whole> tokens,
                       Sums& sums) {
  const bool all = Whole && !c.mask;
  const Mask counted = all ? everywhere() : tokens.counted(c.mask);
  const auto read = [&](const float* column) {
    const Floats x = tokens.load_from(column);
    return all ? x : select(counted, x, 0.0f);  // a masked slot may hold anything
  };
  const auto read_step = [&](const float* column, int64_t step) {
    const Floats x = tokens.load_from(column, step);
    return all ? x : select(counted, x, 0.0f);
  };
  const Floats logprob = read(c.logprobs);
  const Floats old = read(c.old_logprobs);
  const Floats log_ratio = c.given_ratios ? old : logprob - old;
  const Mask clamped = (log_ratio < s.min_log_ratio) | (log_ratio > s.max_log_ratio);
  const Floats kept = bounded(log_ratio, s.min_log_ratio, s.max_log_ratio);
  const Floats ratio = exp(kept);
  const Floats advantage = read_step(c.advantages, c.advantage_step), weight = read_step(c.weights, c.weight_step);
  Policy policy = policy_of<Form>(s, logprob, ratio, advantage, clamped, counted, sums);
  if (c.importance_weights) {
    const Floats importance = read(c.importance_weights);
    policy = {policy.value * importance, policy.slope * importance};
  }
  const Floats one = one_where(counted), counted_ratio = all ? ratio : select(counted, ratio, 0.0f);
  sums.count += one;
  sums.ratio += counted_ratio;
  sums.largest = max(sums.largest, counted_ratio);
  sums.log_ratio += all ? kept : select(counted, kept, 0.0f);
  sums.clamped += one_where(clamped & counted);
  sums.policy += weight * policy.value;
  Floats total = policy.value, slope = policy.slope;
  if constexpr (Kl != KlEstimator::none) {
    const KlParts kl = kl_parts<Kl>(read(c.ref_logprobs) - logprob, s.kl);
    sums.kl += kl.value;
    sums.kl_clamped += one_where(kl.clamped);
    if (s.kl_coefficient != 0.0f) {  // 0 * infinity must not reach the loss
      total += kl.value * s.kl_coefficient;
      slope += kl.slope * s.kl_coefficient;
    }
  }
  if (c.entropy) {
    const Floats entropy = read(c.entropy);
    sums.entropy += entropy;
    if (s.entropy_coefficient != 0.0f) total -= entropy * s.entropy_coefficient;
    if (out.grad_entropy) tokens.store_to(out.grad_entropy, weight * -s.entropy_coefficient);
  }
  const Floats loss = weight * total;
  sums.loss += loss;
  if (out.losses) tokens.store_to(out.losses, loss);
  tokens.store_to(out.grad_logprobs, weight * slope);
}

template <PolicyForm Form, KlEstimator Kl>
void block(const PolicySettings& s, const PolicyColumns& c, const PolicyOutputs& out, int64_t begin, int64_t end,
           double* totals) {
  Sums sums;
  int64_t n = begin;
  for (; n + kLanes <= end; n += kLanes) sixteen<Form, Kl>(s, c, out, Tokens<true>{n, kLanes}, sums);
  if (n < end) sixteen<Form, Kl>(s, c, out, Tokens<false>{n, end - n}, sums);
  sums.write(totals);
}

template <PolicyForm Form>
void block_of_form(const PolicySettings& s, const PolicyColumns& c, const PolicyOutputs& out, int64_t begin,
                   int64_t end, double* totals) {
  switch (c.ref_logprobs ? s.kl.estimator : KlEstimator::none) {
    case KlEstimator::none: return block<Form, KlEstimator::none>(s, c, out, begin, end, totals);
    case KlEstimator::k1: return block<Form, KlEstimator::k1>(s, c, out, begin, end, totals);
    case KlEstimator::k2: return block<Form, KlEstimator::k2>(s, c, out, begin, end, totals);
    case KlEstimator::k3: return block<Form, KlEstimator::k3>(s, c, out, begin, end, totals);
    case KlEstimator::absolute: return block<Form, KlEstimator::absolute>(s, c, out, begin, end, totals);
  }
}

}  // namespace

void policy_terms(const PolicySettings& s, const PolicyColumns& c, const PolicyOutputs& out, int64_t begin, int64_t end,
                  double* totals) {
  switch (s.form) {
    case PolicyForm::ppo:
    case PolicyForm::gspo: return block_of_form<PolicyForm::ppo>(s, c, out, begin, end, totals);
    case PolicyForm::cispo: return block_of_form<PolicyForm::cispo>(s, c, out, begin, end, totals);
    case PolicyForm::cispo_cap: return block_of_form<PolicyForm::cispo_cap>(s, c, out, begin, end, totals);
    case PolicyForm::reinforce: return block_of_form<PolicyForm::reinforce>(s, c, out, begin, end, totals);
  }
}

void sequence_log_ratios(const PolicyColumns& c, int64_t begin, int64_t end, float* out) {
  double total = 0.0;
  int64_t count = 0;
  for (int64_t n = begin; n < end; ++n)
    if (!c.mask || c.mask[n]) {
      total += static_cast<double>(c.logprobs[n]) - c.old_logprobs[n];
      ++count;
    }
  const float mean = static_cast<float>(total / static_cast<double>(count > 0 ? count : 1));
  for (int64_t n = begin; n < end; ++n) out[n] = mean;
}

}  // namespace zs::ZS_ISA
