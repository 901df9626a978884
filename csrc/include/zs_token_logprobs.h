// Sweeps over rows of logits: statistics of each row's softmax and the logits' gradient, on raw pointers.
// Meaning: z = softcap * tanh(logits / softcap) + bias, times 1 / temperature; see
// kernels/zs_kernels/token_logprobs.py.
#pragma once

#include <cstdint>

#include "zs_isa.h"

namespace zs {

enum class Element { float32, bfloat16, float16 };

struct LogitRows {
  const void* data;
  Element element;
  int64_t row_stride;  // in elements; within a row they are consecutive
  int64_t vocabulary;
  const int64_t* index;              // [rows]
  const float* inverse_temperature;  // [rows]
  const bool* mask;                  // [rows] or null: all rows
  const float* bias;                 // [vocabulary] or null
  float softcap;                     // 0: none
  bool bias_first;                   // the bias goes inside the softcap
};

// All [rows]; entropy and sum_squares may be null.
struct RowStatistics {
  float* logprobs;
  float* logsumexp;
  float* entropy;
  float* sum_squares;
};

struct RowGradients {
  const float* grad_logprobs;  // [rows]
  const float* grad_entropy;   // [rows] or null
  const float* logsumexp;      // [rows]
  const float* entropy;        // [rows]; null where grad_entropy is
  void* out;                   // may be the logits themselves, then with the same element and stride
  Element out_element;
  int64_t out_row_stride;
};

}  // namespace zs

// Each works on rows first .. last - 1. An index outside [0, vocabulary) has log-probability NaN and no gradient of its
// own.
ZS_DECLARE(void token_logprobs_forward(const zs::LogitRows& rows, const zs::RowStatistics& out, int64_t first,
                                       int64_t last))
ZS_DECLARE(void token_logprobs_backward(const zs::LogitRows& rows, const zs::RowGradients& grads, int64_t first,
                                        int64_t last))
// out [rows, 5]: max z, sum e^(z - max), sum e^(z - max) z, sum e^(2 (z - max)), z of the index (0 outside).
ZS_DECLARE(void token_logprobs_partials(const zs::LogitRows& rows, float* out, int64_t first, int64_t last))
