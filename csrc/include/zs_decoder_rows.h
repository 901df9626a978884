// The pieces of a decoder's forward, a row (token) at a time; their meaning is in kernels/zs_kernels/decoder_rows.py.
// A row's results are the same bits whatever rows come with it, on any number of threads: sums run over sixteen lanes
// in one order, each lane by fused multiply-adds.
#pragma once

#include <cstdint>

#include "zs_isa.h"

namespace zs {

enum class RowType { float32, bfloat16 };

// A matrix whose rows are dense.
struct RowMatrix {
  const void* data;
  int64_t rows, columns, stride;
};

// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n], added to what is there with `add`; with a `gate`:
// silu(sum_k x[m, k] gate[n, k]) * sum_k x[m, k] weight[n, k].
struct LinearRows {
  RowType type;  // of all of them
  RowMatrix x, weight;
  const void* gate;  // null, or of weight's shape and stride
  const void* bias;  // null, or [N]
  void* out;
  int64_t out_stride;
  bool add;
};

struct NormRows {
  RowType type;
  RowMatrix x;
  const void* weight;
  float eps;
  void* out;
  int64_t out_stride;
};

// Where the tokens' keys and values are, and the queries that read them.
struct AttentionRows {
  RowType type;
  int64_t heads, kv_heads, head_dim;
  int64_t capacity;         // tokens of a slot
  const int64_t* slots;     // [T]
  const int64_t* positions; // [T]
};

struct RotateRows {
  AttentionRows at;
  void* q;  // [T, heads * head_dim], rotated in place
  int64_t q_stride;
  const void* k;  // [T, kv_heads * head_dim]
  int64_t k_stride;
  const void* v;
  int64_t v_stride;
  const void* cos;  // [positions, head_dim / 2]
  const void* sin;
  const void* q_norm;  // [head_dim], or null
  const void* k_norm;
  float eps;
  void* keys;  // [slots, kv_heads, capacity, head_dim]
  void* values;
};

struct AttendRows {
  AttentionRows at;
  const void* q;
  int64_t q_stride;
  const void* keys;
  const void* values;
  void* out;  // [T, heads * head_dim]
  int64_t out_stride;
  float scale;
};

// out = silu(gate) * up, elementwise.
struct SiluRows {
  RowType type;
  RowMatrix gate;
  const void* up;
  int64_t up_stride;
  void* out;
  int64_t out_stride;
};

struct DrawRows {
  RowType type;
  RowMatrix logits;
  const float* temperatures;  // [R]; 1 / temperature is not taken: x / 1 is exact
  const double* draws;        // [R] in [0, 1); negative: the arg max
  int64_t* ids;
  float* logprobs;
};

constexpr int64_t kLinearTile = 6;            // most columns of a step of `linear_rows`; half as many with a gate
constexpr int64_t kLinearInputs = 96 * 1024;  // floats of inputs that stay in the second cache while weights pass by

constexpr int64_t kLinearRows = 512;          // rows at once, however short

// A vector of sums for each result of a tile and all rows, and what of it comes out.
constexpr int64_t kLinearPartials = kLinearRows * kLinearTile * 16 + 2 * (kLinearRows * kLinearTile + 16);

// Floats of scratch that `linear_rows` needs in each thread: two tiles of weights, partial sums, and the inputs.
inline int64_t linear_scratch(const LinearRows& in) {
  const int64_t padded = (in.x.columns + 15) / 16 * 16;
  const int64_t inputs = kLinearInputs > 4 * padded ? kLinearInputs : 4 * padded;
  return 2 * kLinearTile * padded + kLinearPartials + inputs;
}

constexpr int64_t kDrawBlock = 1024;  // logits whose weights are summed together

}  // namespace zs

// Columns first .. last - 1 of all rows, in whole tiles.
ZS_DECLARE(void linear_rows(const zs::LinearRows& in, int64_t first, int64_t last, float* scratch))
ZS_DECLARE(void norm_rows(const zs::NormRows& in, int64_t first, int64_t last))
ZS_DECLARE(void silu_rows(const zs::SiluRows& in, int64_t first, int64_t last))
// Tokens first .. last - 1.
ZS_DECLARE(void rotate_rows(const zs::RotateRows& in, int64_t first, int64_t last))
// Pairs (token, kv head) first .. last - 1; scratch: (longest context + 16) * heads / kv_heads floats.
ZS_DECLARE(void attend_rows(const zs::AttendRows& in, int64_t first, int64_t last, float* scratch))
// Rows first .. last - 1; sums: vocabulary / kDrawBlock + 1 doubles.
ZS_DECLARE(void draw_rows(const zs::DrawRows& in, int64_t first, int64_t last, double* sums))
