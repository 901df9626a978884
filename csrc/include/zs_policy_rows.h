// The launcher of csrc/cuda/policy_rows.cu, on raw device pointers. Pointers that were not given are null.
#pragma once

#include <cstdint>

#include "zs_policy_loss.h"

namespace zs {

struct PolicyRows {
  const void* logits;  // [rows, vocabulary] bfloat16; rows 16-byte aligned
  void* out;           // the same, or elsewhere with the same alignment: d loss / d logits
  int64_t rows, vocabulary, row_stride, out_stride;  // strides in elements, multiples of 8
  const int64_t* index;
  const float* inverse_temperatures;  // [rows], or null: inverse_temperature for all
  float inverse_temperature;
  const float* old_logprobs;  // null: the log-probabilities themselves (ratio 1)
  const float* advantages;
  const float* weights;
  const float* ref_logprobs;
  const float* importance_weights;
  const float* gradient_scale;  // [1], multiplies the gradient
  float* logprobs;
  float* logsumexps;
  float* entropies;
  PolicySettings settings;
};

}  // namespace zs

// Asynchronous on `stream` (a cudaStream_t of the current device). blocks: thread blocks that share a row, 1, 2, 4 or 8;
// 0 lets the launcher choose. Returns null, or what went wrong.
extern "C" const char* zs_policy_rows(const zs::PolicyRows* work, int blocks, void* stream);
