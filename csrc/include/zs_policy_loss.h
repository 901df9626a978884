// Losses over tokens with their derivatives, on raw pointers; formulas and names: kernels/zs_kernels/_policy_terms.py,
// value_loss.py and kl_estimates.py. Every function works on tokens [begin, end), at most kTokenBlock of them, and sums
// in one order whatever the instruction set; the caller adds the blocks' totals up, first to last.
#pragma once

#include <cstdint>

#include "zs_isa.h"

namespace zs {

constexpr int64_t kTokenBlock = 1024;

enum class PolicyForm { ppo, gspo, cispo, cispo_cap, reinforce };
enum class KlEstimator { none, k1, k2, k3, absolute };

struct KlSettings {
  KlEstimator estimator;
  bool straight_through;
  float bound, output_bound;  // infinity: none
};

struct PolicySettings {
  PolicyForm form;
  float ratio_low, ratio_high;
  float dual_clip, ratio_cap;  // infinity: none
  float min_log_ratio, max_log_ratio;
  float kl_coefficient, entropy_coefficient;
  KlSettings kl;
};

// A step of 0 reads one number for every token. Pointers that were not given are null.
struct PolicyColumns {
  const float* logprobs;
  const float* old_logprobs;  // or, with given_ratios, the log ratios
  const float* advantages;
  const float* weights;
  const float* entropy;
  const float* ref_logprobs;
  const float* importance_weights;
  const bool* mask;
  int64_t advantage_step, weight_step;
  bool given_ratios;
};

struct PolicyOutputs {
  float* losses;  // may be null
  float* grad_logprobs;
  float* grad_entropy;  // may be null
};

constexpr int kPolicyTotals = 14;  // the loss, then METRICS; the last is a maximum

struct ValueColumns {
  const float* values;
  const float* old_values;
  const float* returns;
  const float* weights;
  const bool* mask;
  int64_t weight_step;
  float clip;  // infinity: none
};

constexpr int kValueTotals = 7;  // the loss, then METRICS of value_loss.py

}  // namespace zs

ZS_DECLARE(void policy_terms(const zs::PolicySettings& settings, const zs::PolicyColumns& columns,
                             const zs::PolicyOutputs& outputs, int64_t begin, int64_t end, double* totals))
// out[n] = mean over the unmasked tokens of one whole sequence [begin, end), of any length.
ZS_DECLARE(void sequence_log_ratios(const zs::PolicyColumns& columns, int64_t begin, int64_t end, float* out))
ZS_DECLARE(void value_terms(const zs::ValueColumns& columns, float* grad_values, int64_t begin, int64_t end,
                            double* totals))
// values[n] and slopes[n] (the derivative by logprob; may be null); returns how many estimates a clamp changed.
ZS_DECLARE(int64_t kl_terms(const zs::KlSettings& settings, const float* logprobs, const float* ref_logprobs,
                            const bool* mask, float* values, float* slopes, int64_t begin, int64_t end))
