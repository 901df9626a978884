// `zs_native::gae` for the CPU, through the LibTorch stable ABI. Door and reference: kernels/zs_kernels/gae.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "zs_cpu.h"

using torch::stable::Tensor;

namespace {

// The door has checked shapes and dtypes: rewards, values [N] float32, mask [N] bool, cu_seqlens [S + 1] int64.
std::tuple<Tensor, Tensor> gae(Tensor rewards, Tensor values, Tensor mask, Tensor cu_seqlens, double gamma, double lam) {
  rewards = torch::stable::contiguous(rewards);
  values = torch::stable::contiguous(values);
  mask = torch::stable::contiguous(mask);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  Tensor advantages = torch::stable::empty_like(rewards);
  Tensor returns = torch::stable::empty_like(rewards);
  const zs::GaeInputs inputs{rewards.const_data_ptr<float>(), values.const_data_ptr<float>(),
                             mask.const_data_ptr<bool>(), gamma, lam};
  const int64_t* bounds = cu_seqlens.const_data_ptr<int64_t>();
  float* advantages_out = advantages.mutable_data_ptr<float>();
  float* returns_out = returns.mutable_data_ptr<float>();
  const int64_t num_sequences = cu_seqlens.numel() - 1;
  const int64_t mean_length = num_sequences > 0 ? rewards.numel() / num_sequences : 0;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, mean_length));  // tokens worth a thread
  torch::stable::parallel_for(0, num_sequences, grain, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      zs::gae_segment(inputs, bounds[s], bounds[s + 1], advantages_out, returns_out);
    }
  });
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zs_native, library) {
  library.def("gae(Tensor rewards, Tensor values, Tensor mask, Tensor cu_seqlens, float gamma, float lam) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CPU, library) {
  library.impl("gae", TORCH_BOX(&gae));
}
