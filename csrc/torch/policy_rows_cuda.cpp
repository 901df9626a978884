// `zs_native::policy_rows` for CUDA, through the LibTorch stable ABI. Caller: kernels/zs_kernels/_cuda.py.
#include "zs_policy_rows.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

using torch::stable::Tensor;

namespace {

const float* floats(const std::optional<Tensor>& given) { return given ? given->const_data_ptr<float>() : nullptr; }

// The caller has checked shapes, types and alignment: logits, out [M, V] bfloat16 with rows at multiples of 16 bytes
// (out may be logits), the columns [M] float32 contiguous, index [M] int64; bounds that don't apply are infinite.
// stream: the handle of torch's current one; taking it as a number keeps this file free of libtorch_cuda.so.
// Returns log-probabilities, logsumexps, entropies [M].
std::tuple<Tensor, Tensor, Tensor> policy_rows(
    Tensor logits, Tensor out, Tensor index, std::optional<Tensor> inverse_temperatures, double inverse_temperature,
    std::optional<Tensor> old_logprobs, Tensor advantages, Tensor weights, std::optional<Tensor> ref_logprobs,
    std::optional<Tensor> importance_weights, std::optional<Tensor> gradient_scale, int64_t form, double ratio_low,
    double ratio_high, double dual_clip, double ratio_cap, double min_log_ratio, double max_log_ratio,
    double kl_coefficient, int64_t kl_estimator, bool kl_straight_through, double kl_bound, double kl_output_bound,
    double entropy_coefficient, int64_t blocks, int64_t stream) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const std::array<int64_t, 1> rows{logits.size(0)};
  Tensor logprobs = torch::stable::new_empty(advantages, rows);
  Tensor logsumexps = torch::stable::new_empty(advantages, rows);
  Tensor entropies = torch::stable::new_empty(advantages, rows);
  const auto number = [](double x) { return static_cast<float>(x); };
  const zs::PolicyRows work{
      logits.const_data_ptr(),
      out.mutable_data_ptr(),
      logits.size(0),
      logits.size(1),
      logits.stride(0),
      out.stride(0),
      index.const_data_ptr<int64_t>(),
      floats(inverse_temperatures),
      number(inverse_temperature),
      floats(old_logprobs),
      advantages.const_data_ptr<float>(),
      weights.const_data_ptr<float>(),
      floats(ref_logprobs),
      floats(importance_weights),
      floats(gradient_scale),
      logprobs.mutable_data_ptr<float>(),
      logsumexps.mutable_data_ptr<float>(),
      entropies.mutable_data_ptr<float>(),
      {static_cast<zs::PolicyForm>(form), number(ratio_low), number(ratio_high), number(dual_clip), number(ratio_cap),
       number(min_log_ratio), number(max_log_ratio), number(kl_coefficient), number(entropy_coefficient),
       {static_cast<zs::KlEstimator>(kl_estimator), kl_straight_through, number(kl_bound), number(kl_output_bound)}}};
  if (const char* wrong = zs_policy_rows(&work, static_cast<int>(blocks), reinterpret_cast<void*>(stream)))
    throw std::runtime_error(std::string("policy_rows: ") + wrong);
  return {logprobs, logsumexps, entropies};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zs_native, library) {
  library.def(
      "policy_rows(Tensor logits, Tensor(a!) out, Tensor index, Tensor? inverse_temperatures, "
      "float inverse_temperature, Tensor? old_logprobs, Tensor advantages, Tensor weights, Tensor? ref_logprobs, "
      "Tensor? importance_weights, Tensor? gradient_scale, int form, float ratio_low, float ratio_high, "
      "float dual_clip, float ratio_cap, float min_log_ratio, float max_log_ratio, float kl_coefficient, "
      "int kl_estimator, bool kl_straight_through, float kl_bound, float kl_output_bound, float entropy_coefficient, "
      "int blocks, int stream) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CUDA, library) { library.impl("policy_rows", TORCH_BOX(&policy_rows)); }
