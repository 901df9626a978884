// One row of logits becomes the loss's gradient by them: the mathematics of one element, one batch, one token, for a
// GPU and (in tests) for a CPU. The same formulas as kernels/zs_kernels/_sweep_kernels.py and _policy_terms.py:
// base 2, scale = log2(e) / temperature, sums relative to the largest logit.
#pragma once

#include <cmath>
#include <cstdint>

#include "zs_policy_loss.h"

#ifdef __CUDACC__
#define ZS_HD __host__ __device__ __forceinline__
#else
#define ZS_HD inline
#endif

namespace zs::row {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// 2^d is 0 for anything lower: 0 times it stays 0 where 0 times -infinity would not.
constexpr float kLowest = -16384.0f;

// Of some columns: largest logit m, s = sum 2^d, t = sum 2^d d with d = (z - m) scale.
struct Statistics {
  float m = -INFINITY, s = 0.0f, t = 0.0f;
};

ZS_HD Statistics merged(Statistics a, Statistics b, float scale) {
  const float m = fmaxf(a.m, b.m), top = m == -INFINITY ? 0.0f : m;
  const float da = a.m == -INFINITY ? 0.0f : (a.m - top) * scale, db = b.m == -INFINITY ? 0.0f : (b.m - top) * scale;
  const float ea = exp2f(da), eb = exp2f(db);
  return {m, ea * a.s + eb * b.s, ea * (a.t + da * a.s) + eb * (b.t + db * b.s)};
}

template <int kCount>
ZS_HD Statistics of_batch(const float (&z)[kCount], float scale) {
  Statistics made;
#pragma unroll
  for (int i = 0; i < kCount; ++i) made.m = fmaxf(made.m, z[i]);
  const float top = made.m == -INFINITY ? 0.0f : made.m;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float d = (z[i] - top) * scale, e = exp2f(d);
    made.s += e;
    made.t += e * fmaxf(d, kLowest);
  }
  return made;
}

struct Row {
  float logprob, logsumexp, entropy;  // in nats
};

ZS_HD Row finished(Statistics all, float chosen, float scale) {
  if (all.s == 0.0f) return {-INFINITY, -INFINITY, 0.0f};  // no finite logit; NaN goes on
  const float log2_s = log2f(all.s);
  const float logprob = ((chosen - all.m) * scale - log2_s) * kLn2;
  return {logprob > 0.0f ? 0.0f : logprob, (all.m * scale + log2_s) * kLn2, (log2_s - all.t / all.s) * kLn2};
}

// What the loss knows of a token besides its logits; numbers that do not apply are not read.
struct Token {
  float old_logprob, advantage, weight, importance, ref_logprob;
  bool has_old, has_importance;
};

struct Slopes {
  float by_logprob, by_entropy;
};

// Derivative of the KL estimate of d = ref_logprob - logprob by logprob.
ZS_HD float kl_slope(float difference, const KlSettings& kl) {
  if (kl.straight_through) return -difference;
  const float d = difference > kl.bound ? kl.bound : difference < -kl.bound ? -kl.bound : difference;
  const float power = expm1f(d);
  float value = fabsf(d), slope = d > 0.0f ? -1.0f : d < 0.0f ? 1.0f : -d;
  if (kl.estimator == KlEstimator::k1) slope = 1.0f;
  if (kl.estimator == KlEstimator::k2) value = 0.5f * d * d, slope = -d;
  if (kl.estimator == KlEstimator::k3) value = power - d, slope = -power;
  return fabsf(difference) > kl.bound || fabsf(value) > kl.output_bound ? 0.0f : slope;
}

// Derivatives of the token's loss, weight included.
ZS_HD Slopes slopes(float logprob, const Token& token, const PolicySettings& s) {
  const float log_ratio = token.has_old ? logprob - token.old_logprob : logprob - logprob;
  const bool clamped = log_ratio < s.min_log_ratio || log_ratio > s.max_log_ratio;
  const float bounded = log_ratio < s.min_log_ratio   ? s.min_log_ratio
                        : log_ratio > s.max_log_ratio ? s.max_log_ratio
                                                      : log_ratio;
  const float ratio = expf(bounded);
  const float clipped = ratio < s.ratio_low ? s.ratio_low : ratio > s.ratio_high ? s.ratio_high : ratio;
  const float cut = ratio > s.ratio_cap ? s.ratio_cap : ratio;
  float slope = -token.advantage;
  if (s.form == PolicyForm::ppo) {
    const bool negative = token.advantage < 0.0f;
    float used = negative ? (clipped > cut ? clipped : cut) : (clipped < cut ? clipped : cut);
    if (negative && used > s.dual_clip) used = s.dual_clip;
    slope = used < ratio || used > ratio || clamped ? 0.0f : -token.advantage * used;
  }
  if (s.form == PolicyForm::cispo) slope = -clipped * token.advantage;
  if (s.form == PolicyForm::cispo_cap) slope = -cut * token.advantage;
  if (token.has_importance) slope *= token.importance;
  if (s.kl_coefficient != 0.0f) slope += s.kl_coefficient * kl_slope(token.ref_logprob - logprob, s.kl);
  return {token.weight * slope, -s.entropy_coefficient * token.weight};
}

// Whether the row's gradient is anything but 0.
ZS_HD bool moves(const Row& row, const Slopes& by) {
  return (by.by_logprob != 0.0f || by.by_entropy != 0.0f) && row.logsumexp != -INFINITY;
}

// Gradient of one raw logit z.
ZS_HD float gradient(float z, bool chosen, const Row& row, const Slopes& by, float inverse_temperature) {
  if (z == -INFINITY) return 0.0f;
  const float log2_p = z * (inverse_temperature * kLog2e) - row.logsumexp * kLog2e;
  const float weight = -by.by_logprob - by.by_entropy * (fmaxf(log2_p, kLowest) * kLn2 + row.entropy);
  return (exp2f(log2_p) * weight + (chosen ? by.by_logprob : 0.0f)) * inverse_temperature;
}

}  // namespace zs::row
