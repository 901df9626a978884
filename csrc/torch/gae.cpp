// `zs_native::gae` and `zs_native::whiten_advantages` for the CPU, through the LibTorch stable ABI.
// Door and reference: kernels/zs_kernels/gae.py.
#include "zs_gae.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

using torch::stable::Tensor;

namespace {

// The door has checked shapes and dtypes: rewards, values [N] float32, mask [N] bool, cu_seqlens [S + 1] int64,
// gammas, lams, bootstrap [S] float32; mode as zs::GaeMode counts. The third result is [3] float64 (count, mean, sum of
// squared distances from it), or [0] when it is not asked for.
std::tuple<Tensor, Tensor, Tensor> gae(Tensor rewards, Tensor values, std::optional<Tensor> mask, Tensor cu_seqlens,
                                       double gamma, double lam, std::optional<Tensor> gammas,
                                       std::optional<Tensor> lams, std::optional<Tensor> bootstrap, int64_t mode,
                                       bool statistics) {
  rewards = torch::stable::contiguous(rewards);
  values = torch::stable::contiguous(values);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  for (std::optional<Tensor>* given : {&mask, &gammas, &lams, &bootstrap})
    if (*given) *given = torch::stable::contiguous(**given);
  Tensor advantages = torch::stable::empty_like(rewards);
  Tensor returns = torch::stable::empty_like(rewards);
  const auto numbers = [](const std::optional<Tensor>& given) {
    return given ? given->const_data_ptr<float>() : nullptr;
  };
  const zs::GaeInputs inputs{rewards.const_data_ptr<float>(),
                             values.const_data_ptr<float>(),
                             mask ? mask->const_data_ptr<bool>() : nullptr,
                             cu_seqlens.const_data_ptr<int64_t>(),
                             numbers(bootstrap),
                             numbers(gammas),
                             numbers(lams),
                             gamma,
                             lam,
                             static_cast<zs::GaeMode>(mode)};
  float* advantages_out = advantages.mutable_data_ptr<float>();
  float* returns_out = returns.mutable_data_ptr<float>();
  const int64_t num_sequences = cu_seqlens.numel() - 1;
  std::vector<zs::Moments> moments(statistics ? num_sequences : 0);
  zs::Moments* moments_out = statistics ? moments.data() : nullptr;
  const int64_t mean_length = num_sequences > 0 ? rewards.numel() / num_sequences : 0;
  const int64_t grain = std::max<int64_t>(8, 16384 / std::max<int64_t>(1, mean_length));  // tokens worth a thread
  torch::stable::parallel_for(0, num_sequences, grain, [&](int64_t first, int64_t last) {
    ZS_CALL(gae_sequences, inputs, first, last, advantages_out, returns_out, moments_out);
  });
  const std::array<int64_t, 1> size{statistics ? 3 : 0};
  Tensor found = torch::stable::new_empty(rewards, size, torch::headeronly::ScalarType::Double);
  if (statistics) {
    zs::Moments all;
    for (const zs::Moments& one : moments) all = zs::merged(all, one);
    double* out = found.mutable_data_ptr<double>();
    out[0] = all.count, out[1] = all.mean, out[2] = all.squares;
  }
  return {advantages, returns, found};
}

// values, out [N] float32 contiguous (out may be values); statistics [3] float64.
void whiten_advantages(Tensor values, std::optional<Tensor> mask, Tensor statistics, int64_t ddof, double eps,
                       bool shift_mean, Tensor out) {
  if (mask) *mask = torch::stable::contiguous(*mask);
  const double* moments = statistics.const_data_ptr<double>();
  const double count = moments[0], mean = moments[1];
  const double scale = 1.0 / std::sqrt(moments[2] / std::max(count - static_cast<double>(ddof), 1.0) + eps);
  const double shift = shift_mean ? 0.0 : mean;
  const float* from = values.const_data_ptr<float>();
  const bool* counted = mask ? mask->const_data_ptr<bool>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, values.numel(), 65536, [&](int64_t first, int64_t last) {
    ZS_CALL(whiten, from + first, counted ? counted + first : nullptr, last - first, mean, scale, shift, to + first);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zs_native, library) {
  library.def(
      "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor cu_seqlens, float gamma, float lam, "
      "Tensor? gammas=None, Tensor? lams=None, Tensor? bootstrap=None, int mode=0, bool statistics=False) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "whiten_advantages(Tensor values, Tensor? mask, Tensor statistics, int ddof, float eps, bool shift_mean, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CPU, library) {
  library.impl("gae", TORCH_BOX(&gae));
  library.impl("whiten_advantages", TORCH_BOX(&whiten_advantages));
}
