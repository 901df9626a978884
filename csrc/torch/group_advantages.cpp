// `zs_native::group_advantages` for the CPU, through the LibTorch stable ABI.
// Door and reference: kernels/zs_kernels/group_advantages.py.
#include "zs_group_advantages.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Tensor make(const Tensor& like, int64_t size, ScalarType dtype) {
  const std::array<int64_t, 1> shape{size};
  return torch::stable::new_empty(like, shape, dtype);
}

// The door has checked shapes, dtypes and group numbers: rewards [S] (or, with `per_token`, [N]) float32, groups [S]
// int64, valid [S] bool, mask [N] bool, cu_seqlens [S + 1] int64; mode as zs::GroupMode counts.
// Returns advantages [S], mean [G], std [G], dead [G], statistics [3] float64, tokens [N] ([0] without cu_seqlens).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_advantages(
    Tensor rewards, Tensor groups, int64_t num_groups, int64_t mode, std::optional<Tensor> valid, double eps,
    int64_t ddof, bool keep_singletons, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, int64_t num_tokens,
    bool per_token) {
  rewards = torch::stable::contiguous(rewards);
  groups = torch::stable::contiguous(groups);
  for (std::optional<Tensor>* given : {&valid, &mask, &cu_seqlens})
    if (*given) *given = torch::stable::contiguous(**given);
  const int64_t num_sequences = groups.numel();
  const float* given_rewards = rewards.const_data_ptr<float>();
  const bool* counted = mask ? mask->const_data_ptr<bool>() : nullptr;
  const int64_t* bounds = cu_seqlens ? cu_seqlens->const_data_ptr<int64_t>() : nullptr;
  const int64_t mean_length = num_sequences > 0 ? num_tokens / num_sequences : 0;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, mean_length));  // tokens worth a thread

  const bool weighted = bounds && zs::whitens(static_cast<zs::GroupMode>(mode));
  std::vector<double> sums(num_sequences), counts(weighted ? num_sequences : 0);
  if (per_token || weighted) {
    torch::stable::parallel_for(0, num_sequences, grain, [&](int64_t first, int64_t last) {
      if (per_token) ZS_CALL(sum_sequences, given_rewards, counted, bounds, first, last, sums.data());
      if (weighted) ZS_CALL(count_sequences, counted, bounds, first, last, counts.data());
    });
  }
  if (!per_token) std::copy(given_rewards, given_rewards + num_sequences, sums.begin());
  Tensor advantages = make(rewards, num_sequences, ScalarType::Float);
  Tensor mean = make(rewards, num_groups, ScalarType::Float);
  Tensor std = make(rewards, num_groups, ScalarType::Float);
  Tensor dead = make(rewards, num_groups, ScalarType::Bool);
  Tensor statistics = make(rewards, 3, ScalarType::Double);
  Tensor tokens = make(rewards, bounds ? num_tokens : 0, ScalarType::Float);
  const zs::GroupInputs inputs{sums.data(),
                               groups.const_data_ptr<int64_t>(),
                               valid ? valid->const_data_ptr<bool>() : nullptr,
                               weighted ? counts.data() : nullptr,
                               num_sequences,
                               num_groups,
                               static_cast<zs::GroupMode>(mode),
                               eps,
                               ddof,
                               keep_singletons};
  const zs::Moments batch = zs::group_advantages(
      inputs, {advantages.mutable_data_ptr<float>(), mean.mutable_data_ptr<float>(), std.mutable_data_ptr<float>(),
               dead.mutable_data_ptr<bool>()});
  double* out = statistics.mutable_data_ptr<double>();
  out[0] = batch.count, out[1] = batch.mean, out[2] = batch.squares;
  if (bounds) {
    const float* per_sequence = advantages.const_data_ptr<float>();
    float* to = tokens.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, num_sequences, grain, [&](int64_t first, int64_t last) {
      ZS_CALL(spread_sequences, per_sequence, counted, bounds, first, last, to);
    });
  }
  return {advantages, mean, std, dead, statistics, tokens};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zs_native, library) {
  library.def(
      "group_advantages(Tensor rewards, Tensor groups, int num_groups, int mode, Tensor? valid, float eps, int ddof, "
      "bool keep_singletons, Tensor? mask, Tensor? cu_seqlens, int num_tokens, bool per_token) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CPU, library) {
  library.impl("group_advantages", TORCH_BOX(&group_advantages));
}
