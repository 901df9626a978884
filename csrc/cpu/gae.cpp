#include "zs_cpu.h"

namespace zs {

void gae_segment(const GaeInputs& inputs, int64_t begin, int64_t end, float* advantages, float* returns) {
  double next_value = 0.0;
  double advantage = 0.0;
  for (int64_t n = end - 1; n >= begin; --n) {
    if (inputs.mask[n]) {
      const double value = inputs.values[n];
      const double delta = inputs.rewards[n] + inputs.gamma * next_value - value;
      advantage = delta + inputs.gamma * inputs.lam * advantage;
      next_value = value;
      advantages[n] = static_cast<float>(advantage);
      returns[n] = static_cast<float>(advantage + value);
    } else {
      // A masked token is transparent, and what stands in it, NaN included, is never read.
      advantages[n] = 0.0f;
      returns[n] = 0.0f;
    }
  }
}

}  // namespace zs
