// What a head worked off in chunks needs on the CPU, through the LibTorch stable ABI: sums of rounded products, and
// memory that is cheap to write for the first time.
#include "zs_accumulate.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "zs_pages.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kGrain = 1 << 17;  // elements worth a thread

void require_like(const Tensor& sum, const Tensor& addend) {
  STD_TORCH_CHECK(sum.is_contiguous() && addend.is_contiguous() && sum.numel() == addend.numel(),
                  "zs_native: sum and addend are contiguous and of one size");
}

void accumulate(Tensor sum, Tensor addend) {
  require_like(sum, addend);
  STD_TORCH_CHECK(sum.scalar_type() == ScalarType::Float, "zs_native::accumulate_: sum is float32");
  const ScalarType type = addend.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "zs_native::accumulate_: addend is float32, bfloat16 or float16");
  const zs::Element element = type == ScalarType::Float      ? zs::Element::float32
                              : type == ScalarType::BFloat16 ? zs::Element::bfloat16
                                                             : zs::Element::float16;
  float* to = sum.mutable_data_ptr<float>();
  const void* from = addend.const_data_ptr();
  torch::stable::parallel_for(0, sum.numel(), kGrain, [&](int64_t first, int64_t last) {
    ZS_CALL(accumulate, to, from, element, first, last);
  });
}

void accumulate_split(Tensor high, Tensor low, Tensor addend) {
  require_like(high, addend);
  require_like(low, addend);
  STD_TORCH_CHECK(high.scalar_type() == ScalarType::BFloat16 && addend.scalar_type() == ScalarType::BFloat16 &&
                      low.scalar_type() == ScalarType::Char,
                  "zs_native::accumulate_split_: high and addend are bfloat16, low is int8");
  void* high_to = high.mutable_data_ptr();
  int8_t* low_to = low.mutable_data_ptr<int8_t>();
  const void* from = addend.const_data_ptr();
  torch::stable::parallel_for(0, high.numel(), kGrain, [&](int64_t first, int64_t last) {
    ZS_CALL(accumulate_split, high_to, low_to, from, first, last);
  });
}

void prefer_huge_pages(Tensor memory) {
  STD_TORCH_CHECK(memory.is_contiguous(), "zs_native::prefer_huge_pages: memory is contiguous");
  zs::prefer_huge_pages(memory.data_ptr(), memory.numel() * memory.element_size());
}

}  // namespace

// accumulate_split_: the sum is `high`, a bfloat16 tensor that can be used as it is, plus what `low` (zeros at first)
// adds to it: 24 bits in all, three quarters of the memory of a float32 sum and no conversion at the end.
STABLE_TORCH_LIBRARY_FRAGMENT(zs_native, library) {
  library.def("accumulate_(Tensor(a!) sum, Tensor addend) -> ()");
  library.def("accumulate_split_(Tensor(a!) high, Tensor(b!) low, Tensor addend) -> ()");
  // For a tensor fresh from torch.empty; see zs_pages.h.
  library.def("prefer_huge_pages(Tensor memory) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CPU, library) {
  library.impl("accumulate_", TORCH_BOX(&accumulate));
  library.impl("accumulate_split_", TORCH_BOX(&accumulate_split));
  library.impl("prefer_huge_pages", TORCH_BOX(&prefer_huge_pages));
}
