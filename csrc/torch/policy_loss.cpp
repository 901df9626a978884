// `zs_native::policy_terms` for the CPU, through the LibTorch stable ABI. Door: kernels/zs_kernels/policy_loss.py.
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
const float* floats(const std::optional<Tensor>& given) { return given ? given->const_data_ptr<float>() : nullptr; }

// The door passes contiguous float32 tensors [N] (advantages, weights: or one number, with the step 0), mask [N] bool,
// cu_seqlens [S + 1] int64 rising from 0 to N; bounds that don't apply are infinite.
// Returns losses [N] ([0] unless write_loss), grad_logprobs [N], grad_entropy [N] or [0], totals [14].
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_terms(
    Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor weights, std::optional<Tensor> entropy,
    std::optional<Tensor> ref_logprobs, std::optional<Tensor> importance_weights, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, int64_t advantage_step, int64_t weight_step, int64_t form, double ratio_low,
    double ratio_high, double dual_clip, double ratio_cap, double min_log_ratio, double max_log_ratio,
    double kl_coefficient, int64_t kl_estimator, bool kl_straight_through, double kl_bound, double kl_output_bound,
    double entropy_coefficient, bool write_loss) {
  const int64_t count = logprobs.numel();
  const auto number = [](double x) { return static_cast<float>(x); };
  const zs::PolicySettings settings{
      static_cast<zs::PolicyForm>(form), number(ratio_low), number(ratio_high), number(dual_clip), number(ratio_cap),
      number(min_log_ratio), number(max_log_ratio), number(kl_coefficient), number(entropy_coefficient),
      {static_cast<zs::KlEstimator>(kl_estimator), kl_straight_through, number(kl_bound), number(kl_output_bound)}};
  zs::PolicyColumns columns{logprobs.const_data_ptr<float>(), old_logprobs.const_data_ptr<float>(),
                            advantages.const_data_ptr<float>(), weights.const_data_ptr<float>(), floats(entropy),
                            floats(ref_logprobs), floats(importance_weights),
                            mask ? mask->const_data_ptr<bool>() : nullptr, advantage_step, weight_step, false};
  Tensor losses = make(logprobs, write_loss ? count : 0);
  Tensor grad_logprobs = make(logprobs, count);
  Tensor grad_entropy = make(logprobs, entropy && entropy_coefficient != 0.0 ? count : 0);
  Tensor totals = make(logprobs, zs::kPolicyTotals);
  if (cu_seqlens) {
    // The log ratios may stand where the derivatives will: a block reads its own before it writes them.
    float* ratios = grad_logprobs.mutable_data_ptr<float>();
    const int64_t* bounds = cu_seqlens->const_data_ptr<int64_t>();
    const int64_t sequences = cu_seqlens->numel() - 1;
    const int64_t grain = std::max<int64_t>(1, sequences * 16384 / std::max<int64_t>(1, count));
    torch::stable::parallel_for(0, sequences, grain, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) ZS_CALL(sequence_log_ratios, columns, bounds[s], bounds[s + 1], ratios);
    });
    columns.old_logprobs = ratios;
    columns.given_ratios = true;
  }
  const zs::PolicyOutputs outputs{write_loss ? losses.mutable_data_ptr<float>() : nullptr,
                                  grad_logprobs.mutable_data_ptr<float>(),
                                  grad_entropy.numel() ? grad_entropy.mutable_data_ptr<float>() : nullptr};
  const int64_t blocks = (count + zs::kTokenBlock - 1) / zs::kTokenBlock;
  std::vector<double> partials(blocks * zs::kPolicyTotals);
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * zs::kTokenBlock, end = std::min(count, begin + zs::kTokenBlock);
      ZS_CALL(policy_terms, settings, columns, outputs, begin, end, &partials[b * zs::kPolicyTotals]);
    }
  });
  std::array<double, zs::kPolicyTotals> folded{};
  for (int64_t b = 0; b < blocks; ++b) {
    const double* row = &partials[b * zs::kPolicyTotals];
    for (int i = 0; i < zs::kPolicyTotals - 1; ++i) folded[i] += row[i];
    folded.back() = std::max(folded.back(), row[zs::kPolicyTotals - 1]);
  }
  std::copy(folded.begin(), folded.end(), totals.mutable_data_ptr<float>());
  return {losses, grad_logprobs, grad_entropy, totals};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zs_native, library) {
  library.def(
      "policy_terms(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor weights, Tensor? entropy, "
      "Tensor? ref_logprobs, Tensor? importance_weights, Tensor? mask, Tensor? cu_seqlens, int advantage_step, "
      "int weight_step, int form, float ratio_low, float ratio_high, float dual_clip, float ratio_cap, "
      "float min_log_ratio, float max_log_ratio, float kl_coefficient, int kl_estimator, bool kl_straight_through, "
      "float kl_bound, float kl_output_bound, float entropy_coefficient, bool write_loss) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CPU, library) {
  library.impl("policy_terms", TORCH_BOX(&policy_terms));
}
