// `zs_native::masked_statistics` and `zs_native::masked_whiten` for the CPU, through the LibTorch stable ABI.
// Door: kernels/zs_kernels/reductions.py; it passes contiguous values [R, C] float32 and masks [R, C] bool.
#include "zs_reductions.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <vector>

using torch::stable::Tensor;

namespace {

struct Blocks {
  int64_t rows, columns, per_row;

  explicit Blocks(const Tensor& values)
      : rows(values.size(0)), columns(values.size(1)), per_row((columns + zs::kMomentBlock - 1) / zs::kMomentBlock) {}
  // Calls work(row, first element, number of elements, block) for every block.
  template <class Work>
  void each(const Work& work) const {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, std::min(columns, zs::kMomentBlock)));
    torch::stable::parallel_for(0, rows * per_row, grain, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t row = b / per_row, column = b % per_row * zs::kMomentBlock;
        work(row, row * columns + column, std::min(zs::kMomentBlock, columns - column), b);
      }
    });
  }
};

// [R, 4]: count, mean, sum of squared distances to the mean, sum.
Tensor masked_statistics(Tensor values, Tensor mask) {
  const Blocks blocks(values);
  const float* from = values.const_data_ptr<float>();
  const bool* counted = mask.const_data_ptr<bool>();
  std::vector<zs::MaskedMoments> partials(blocks.rows * blocks.per_row);
  blocks.each([&](int64_t, int64_t begin, int64_t count, int64_t b) {
    partials[b] = ZS_CALL(masked_moments, from + begin, counted + begin, count);
  });
  Tensor statistics = torch::stable::new_empty(values, std::array<int64_t, 2>{blocks.rows, 4});
  float* out = statistics.mutable_data_ptr<float>();
  for (int64_t r = 0; r < blocks.rows; ++r, out += 4) {
    zs::MaskedMoments row;
    for (int64_t b = 0; b < blocks.per_row; ++b) row.add(partials[r * blocks.per_row + b]);
    out[0] = static_cast<float>(row.count);
    out[1] = static_cast<float>(row.sum / std::max(row.count, 1.0));
    out[2] = static_cast<float>(row.squares);
    out[3] = static_cast<float>(row.sum);
  }
  return statistics;
}

// (values - mean) * scale (+ offset unless shifted), row by row; masked entries: masked_value, where fill_masked.
Tensor masked_whiten(Tensor values, Tensor mask, Tensor mean, Tensor scale, Tensor offset, bool shifted,
                     bool fill_masked, double masked_value) {
  const Blocks blocks(values);
  const float *from = values.const_data_ptr<float>(), *means = mean.const_data_ptr<float>();
  const float *scales = scale.const_data_ptr<float>(), *offsets = offset.const_data_ptr<float>();
  const bool* counted = mask.const_data_ptr<bool>();
  Tensor result = torch::stable::empty_like(values);
  float* out = result.mutable_data_ptr<float>();
  blocks.each([&](int64_t row, int64_t begin, int64_t count, int64_t) {
    const zs::WhitenRow how{means[row], scales[row], offsets[row], shifted, fill_masked,
                            static_cast<float>(masked_value)};
    ZS_CALL(whiten, how, from + begin, counted + begin, count, out + begin);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zs_native, library) {
  library.def("masked_statistics(Tensor values, Tensor mask) -> Tensor");
  library.def(
      "masked_whiten(Tensor values, Tensor mask, Tensor mean, Tensor scale, Tensor offset, bool shifted, "
      "bool fill_masked, float masked_value) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CPU, library) {
  library.impl("masked_statistics", TORCH_BOX(&masked_statistics));
  library.impl("masked_whiten", TORCH_BOX(&masked_whiten));
}
