// `zs_native::value_terms` and `zs_native::kl_terms` for the CPU, through the LibTorch stable ABI.
// Doors: kernels/zs_kernels/value_loss.py and kl_estimates.py; they pass contiguous float32 tensors and bool masks [N].
#include "zs_policy_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

using torch::stable::Tensor;

namespace {

Tensor make(const Tensor& like, int64_t size) {
  const std::array<int64_t, 1> shape{size};
  return torch::stable::new_empty(like, shape);
}
const bool* bools(const std::optional<Tensor>& given) { return given ? given->const_data_ptr<bool>() : nullptr; }
int64_t blocks_of(int64_t count) { return (count + zs::kTokenBlock - 1) / zs::kTokenBlock; }

// Returns grad_values [N] and totals [7]: the loss, then METRICS. A clip that doesn't apply comes without old_values.
std::tuple<Tensor, Tensor> value_terms(Tensor values, std::optional<Tensor> old_values, Tensor returns, Tensor weights,
                                       std::optional<Tensor> mask, int64_t weight_step, double clip) {
  const int64_t count = values.numel(), blocks = blocks_of(count);
  const zs::ValueColumns columns{values.const_data_ptr<float>(),
                                 old_values ? old_values->const_data_ptr<float>() : nullptr,
                                 returns.const_data_ptr<float>(),
                                 weights.const_data_ptr<float>(),
                                 bools(mask),
                                 weight_step,
                                 static_cast<float>(clip)};
  Tensor grad_values = make(values, count), totals = make(values, zs::kValueTotals);
  float* grad = grad_values.mutable_data_ptr<float>();
  std::vector<double> partials(blocks * zs::kValueTotals);
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * zs::kTokenBlock, end = std::min(count, begin + zs::kTokenBlock);
      ZS_CALL(value_terms, columns, grad, begin, end, &partials[b * zs::kValueTotals]);
    }
  });
  std::array<double, zs::kValueTotals> folded{};
  for (int64_t i = 0; i < blocks * zs::kValueTotals; ++i) folded[i % zs::kValueTotals] += partials[i];
  std::copy(folded.begin(), folded.end(), totals.mutable_data_ptr<float>());
  return {grad_values, totals};
}

// Returns values [N], slopes [N] ([0] unless wanted) and the number of clamped estimates, [] float32.
std::tuple<Tensor, Tensor, Tensor> kl_terms(Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask,
                                            int64_t estimator, bool straight_through, double bound,
                                            double output_bound, bool want_slopes) {
  const int64_t count = logprobs.numel(), blocks = blocks_of(count);
  const zs::KlSettings settings{static_cast<zs::KlEstimator>(estimator), straight_through, static_cast<float>(bound),
                                static_cast<float>(output_bound)};
  Tensor values = make(logprobs, count), slopes = make(logprobs, want_slopes ? count : 0);
  Tensor clamped = torch::stable::new_empty(logprobs, std::array<int64_t, 0>{});
  const float *policy = logprobs.const_data_ptr<float>(), *reference = ref_logprobs.const_data_ptr<float>();
  float* values_out = values.mutable_data_ptr<float>();
  float* slopes_out = want_slopes ? slopes.mutable_data_ptr<float>() : nullptr;
  std::vector<int64_t> counts(blocks);
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * zs::kTokenBlock, end = std::min(count, begin + zs::kTokenBlock);
      counts[b] = ZS_CALL(kl_terms, settings, policy, reference, bools(mask), values_out, slopes_out, begin, end);
    }
  });
  int64_t total = 0;
  for (int64_t number : counts) total += number;
  *clamped.mutable_data_ptr<float>() = static_cast<float>(total);
  return {values, slopes, clamped};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zs_native, library) {
  library.def(
      "value_terms(Tensor values, Tensor? old_values, Tensor returns, Tensor weights, Tensor? mask, int weight_step, "
      "float clip) -> (Tensor, Tensor)");
  library.def(
      "kl_terms(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, int estimator, bool straight_through, float bound, "
      "float output_bound, bool want_slopes) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CPU, library) {
  library.impl("value_terms", TORCH_BOX(&value_terms));
  library.impl("kl_terms", TORCH_BOX(&kl_terms));
}
