// Row sweeps over logits for the CPU, through the LibTorch stable ABI. Callers: kernels/zs_kernels/_sweeps.py.
#include "zs_token_logprobs.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "zs_pages.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

zs::Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return zs::Element::float32;
    case ScalarType::BFloat16: return zs::Element::bfloat16;
    case ScalarType::Half: return zs::Element::float16;
    default: STD_TORCH_CHECK(false, "zs_native: logits and gradients are float32, bfloat16 or float16");
  }
}

bool has_dense_rows(const Tensor& tensor) { return tensor.size(1) == 1 || tensor.stride(1) == 1; }

Tensor column(const Tensor& given, int64_t rows, ScalarType type, const char* name) {
  STD_TORCH_CHECK(given.numel() == rows && given.scalar_type() == type, "zs_native: wrong size or dtype of ", name);
  return torch::stable::contiguous(given);
}

// Keeps the tensors that the pointers in `rows` lead to.
struct Inputs {
  Tensor logits, index, inverse_temperature;
  std::optional<Tensor> bias, mask;
  zs::LogitRows rows;
  int64_t count;

  Inputs(const Tensor& logits_, const Tensor& index_, const Tensor& inverse_temperature_,
         const std::optional<Tensor>& bias_, double softcap, const std::optional<Tensor>& mask_, bool bias_first)
      : logits(logits_) {
    STD_TORCH_CHECK(logits.dim() == 2, "zs_native: logits are of shape [M, V]");
    count = logits.size(0);
    if (!has_dense_rows(logits)) logits = torch::stable::contiguous(logits);
    index = column(index_, count, ScalarType::Long, "index");
    inverse_temperature = column(inverse_temperature_, count, ScalarType::Float, "inverse_temperature");
    if (mask_) mask = column(*mask_, count, ScalarType::Bool, "mask");
    if (bias_) bias = column(torch::stable::to(*bias_, ScalarType::Float), logits.size(1), ScalarType::Float, "bias");
    rows = {logits.const_data_ptr(), element_of(logits), logits.stride(0), logits.size(1),
            index.const_data_ptr<int64_t>(), inverse_temperature.const_data_ptr<float>(),
            mask ? mask->const_data_ptr<bool>() : nullptr, bias ? bias->const_data_ptr<float>() : nullptr,
            static_cast<float>(softcap), bias_first};
  }

  Tensor make(int64_t size) const {
    const std::array<int64_t, 1> shape{size};
    return torch::stable::new_empty(inverse_temperature, shape);
  }
  template <class Sweep>
  void for_rows(const Sweep& sweep) const {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, rows.vocabulary));  // logits worth a thread
    torch::stable::parallel_for(0, count, grain, sweep);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor logits, Tensor index, Tensor inverse_temperature,
                                                   std::optional<Tensor> bias, double softcap,
                                                   std::optional<Tensor> mask, bool entropy, bool sum_squares,
                                                   bool bias_first) {
  const Inputs in(logits, index, inverse_temperature, bias, softcap, mask, bias_first);
  Tensor logprobs = in.make(in.count), logsumexp = in.make(in.count);
  Tensor entropies = in.make(entropy ? in.count : 0), squares = in.make(sum_squares ? in.count : 0);
  const zs::RowStatistics out{logprobs.mutable_data_ptr<float>(), logsumexp.mutable_data_ptr<float>(),
                              entropy ? entropies.mutable_data_ptr<float>() : nullptr,
                              sum_squares ? squares.mutable_data_ptr<float>() : nullptr};
  in.for_rows([&](int64_t first, int64_t last) { ZS_CALL(token_logprobs_forward, in.rows, out, first, last); });
  return {logprobs, logsumexp, entropies, squares};
}

void backward(Tensor logits, Tensor index, Tensor grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logsumexp,
              std::optional<Tensor> entropy, Tensor inverse_temperature, std::optional<Tensor> bias, double softcap,
              std::optional<Tensor> mask, Tensor out, bool bias_first) {
  const Inputs in(logits, index, inverse_temperature, bias, softcap, mask, bias_first);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == in.count && out.size(1) == logits.size(1) && has_dense_rows(out),
                  "zs_native: out is of the shape of logits, its rows dense");
  STD_TORCH_CHECK(grad_entropy.has_value() <= entropy.has_value(), "zs_native: grad_entropy needs entropy");
  if (out.const_data_ptr() != in.logits.const_data_ptr() && out.is_contiguous())  // fresh memory, most likely
    zs::prefer_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  grad_logprobs = column(grad_logprobs, in.count, ScalarType::Float, "grad_logprobs");
  logsumexp = column(logsumexp, in.count, ScalarType::Float, "logsumexp");
  if (grad_entropy) {
    grad_entropy = column(*grad_entropy, in.count, ScalarType::Float, "grad_entropy");
    entropy = column(*entropy, in.count, ScalarType::Float, "entropy");
  }
  const zs::RowGradients grads{grad_logprobs.const_data_ptr<float>(),
                               grad_entropy ? grad_entropy->const_data_ptr<float>() : nullptr,
                               logsumexp.const_data_ptr<float>(),
                               grad_entropy ? entropy->const_data_ptr<float>() : nullptr,
                               out.mutable_data_ptr(),
                               element_of(out),
                               out.stride(0)};
  in.for_rows([&](int64_t first, int64_t last) { ZS_CALL(token_logprobs_backward, in.rows, grads, first, last); });
}

Tensor partials(Tensor logits, Tensor index, Tensor inverse_temperature, std::optional<Tensor> bias, double softcap,
                bool bias_first) {
  const Inputs in(logits, index, inverse_temperature, bias, softcap, std::nullopt, bias_first);
  const std::array<int64_t, 2> shape{in.count, 5};
  Tensor out = torch::stable::new_empty(in.inverse_temperature, shape);
  float* to = out.mutable_data_ptr<float>();
  in.for_rows([&](int64_t first, int64_t last) { ZS_CALL(token_logprobs_partials, in.rows, to, first, last); });
  return out;
}

}  // namespace

// softcap 0: none. The results that were not asked for are of shape [0]. `out` may be `logits`.
STABLE_TORCH_LIBRARY_FRAGMENT(zs_native, library) {
  library.def(
      "token_logprobs_forward(Tensor logits, Tensor index, Tensor inverse_temperature, Tensor? bias, float softcap, "
      "Tensor? mask, bool entropy, bool sum_squares, bool bias_first=False) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "token_logprobs_backward(Tensor logits, Tensor index, Tensor grad_logprobs, Tensor? grad_entropy, "
      "Tensor logsumexp, Tensor? entropy, Tensor inverse_temperature, Tensor? bias, float softcap, Tensor? mask, "
      "Tensor(a!) out, bool bias_first=False) -> ()");
  library.def(
      "token_logprobs_partials(Tensor logits, Tensor index, Tensor inverse_temperature, Tensor? bias, float softcap, "
      "bool bias_first=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CPU, library) {
  library.impl("token_logprobs_forward", TORCH_BOX(&forward));
  library.impl("token_logprobs_backward", TORCH_BOX(&backward));
  library.impl("token_logprobs_partials", TORCH_BOX(&partials));
}
