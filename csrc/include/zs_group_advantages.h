// Advantages of trajectories against their own group; formulas in kernels/zs_kernels/group_advantages.py.
#pragma once

#include <cstdint>

#include "zs_gae.h"
#include "zs_isa.h"

namespace zs {

// As kernels/zs_kernels/group_advantages.py counts them: reinforce is the reward itself, `plus_plus` whitens it and
// `baseline` what is left of it without its group's mean.
enum class GroupMode : int64_t { grpo, dr_grpo, rloo, batch_std, reinforce, plus_plus, baseline };

inline bool whitens(GroupMode mode) { return mode == GroupMode::plus_plus || mode == GroupMode::baseline; }

struct GroupInputs {
  const double* rewards;  // [num_sequences]
  const int64_t* groups;  // [num_sequences] in [0, num_groups)
  const bool* valid;      // [num_sequences]; null: all of them
  const double* weights;  // [num_sequences] tokens of each, for the modes that whiten; null: 1
  int64_t num_sequences;
  int64_t num_groups;
  GroupMode mode;
  double eps;
  int64_t ddof;
  bool keep_singletons;  // a group of one has mean 0 and standard deviation 1
};

struct GroupOutputs {
  float* advantages;  // [num_sequences]
  float* mean;        // [num_groups]
  float* std;         // [num_groups]
  bool* dead;         // [num_groups]
};

// Returns what batch_std and the modes that whiten divide by: the moments over the whole batch (else zeros).
Moments group_advantages(const GroupInputs& inputs, const GroupOutputs& outputs);

}  // namespace zs

// Of sequences first .. last - 1: the sum of the unmasked rewards (mask null: all of them), and how many they are.
ZS_DECLARE(void sum_sequences(const float* rewards, const bool* mask, const int64_t* bounds, int64_t first, int64_t last,
                              double* sums))
ZS_DECLARE(void count_sequences(const bool* mask, const int64_t* bounds, int64_t first, int64_t last, double* counts))
// Each unmasked token of sequences first .. last - 1 gets its sequence's number, the others 0.
ZS_DECLARE(void spread_sequences(const float* per_sequence, const bool* mask, const int64_t* bounds, int64_t first,
                                 int64_t last, float* out))
