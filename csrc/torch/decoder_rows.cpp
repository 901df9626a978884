// A decoder's forward, a row at a time, for the CPU through the LibTorch stable ABI.
// Door and reference: kernels/zs_kernels/decoder_rows.py, which has checked shapes and types.
#include "zs_decoder_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

zs::RowType type_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::BFloat16,
                  "zs_native: rows are float32 or bfloat16");
  return tensor.scalar_type() == ScalarType::Float ? zs::RowType::float32 : zs::RowType::bfloat16;
}

// A [M, N] tensor of dense rows, of the type of `like`.
zs::RowMatrix matrix(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) == 1 || tensor.stride(1) == 1) &&
                      tensor.scalar_type() == like.scalar_type(),
                  "zs_native: ", name, " is a matrix with dense rows, of the others' type");
  return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

const void* vector(const std::optional<Tensor>& tensor, const Tensor& like, int64_t size, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->numel() == size && tensor->is_contiguous() && tensor->scalar_type() == like.scalar_type(),
                  "zs_native: wrong size or type of ", name);
  return tensor->const_data_ptr();
}

float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats + 16) memory.resize(floats + 16);
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (64 - at % 64) % 64 / sizeof(float);
}

// --- each piece on all its rows, by as many threads as are worth it ---

void run(const zs::LinearRows& in) {
  const int64_t tiles = (in.weight.rows + zs::kLinearTile - 1) / zs::kLinearTile;
  const int64_t work = std::max<int64_t>(1, in.x.rows * in.x.columns * zs::kLinearTile);
  const int64_t grain = std::max<int64_t>(1, 200000 / work);  // multiplications worth a thread
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) {
    ZS_CALL(linear_rows, in, first * zs::kLinearTile, std::min(last * zs::kLinearTile, in.weight.rows),
            scratch(zs::linear_scratch(in)));
  });
}

void run(const zs::NormRows& in) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, in.x.columns));
  torch::stable::parallel_for(0, in.x.rows, grain,
                              [&](int64_t first, int64_t last) { ZS_CALL(norm_rows, in, first, last); });
}

void run(const zs::RotateRows& in, int64_t tokens) {
  const int64_t grain = std::max<int64_t>(1, 8192 / (in.at.heads * in.at.head_dim));
  torch::stable::parallel_for(0, tokens, grain,
                              [&](int64_t first, int64_t last) { ZS_CALL(rotate_rows, in, first, last); });
}

void run(const zs::AttendRows& in, int64_t tokens) {
  int64_t longest = 0;
  for (int64_t t = 0; t < tokens; ++t) longest = std::max(longest, in.at.positions[t] + 1);
  const int64_t floats = (longest + 32) * (in.at.heads / in.at.kv_heads);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, longest * in.at.head_dim));
  torch::stable::parallel_for(0, tokens * in.at.kv_heads, grain, [&](int64_t first, int64_t last) {
    ZS_CALL(attend_rows, in, first, last, scratch(floats));
  });
}

// --- the operators ---

zs::LinearRows linear(const Tensor& like, zs::RowMatrix x, const Tensor& weight, const std::optional<Tensor>& bias,
                      void* out, int64_t out_stride, bool add) {
  const zs::LinearRows in{type_of(like), x, matrix(weight, like, "weight"), nullptr,
                          vector(bias, like, weight.size(0), "bias"), out, out_stride, add};
  STD_TORCH_CHECK(in.x.columns == in.weight.columns, "zs_native: x is [M, K], K = ", in.x.columns,
                  ", but its weight [N, K], K = ", in.weight.columns);
  return in;
}

void set_gate(zs::LinearRows& in, const Tensor& gate, const Tensor& like) {
  const zs::RowMatrix other = matrix(gate, like, "gate");
  STD_TORCH_CHECK(other.rows == in.weight.rows && other.columns == in.weight.columns &&
                      other.stride == in.weight.stride && !in.bias && !in.add,
                  "zs_native: gate is laid out as weight is, without bias or sum");
  in.gate = other.data;
}

void linear_rows(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> gate, bool add,
                 Tensor out) {
  const zs::RowMatrix target = matrix(out, x, "out");
  zs::LinearRows in = linear(x, matrix(x, x, "x"), weight, bias, out.mutable_data_ptr(), target.stride, add);
  STD_TORCH_CHECK(target.rows == in.x.rows && target.columns == in.weight.rows,
                  "zs_native: linear_rows takes x [M, K], weight [N, K], out [M, N]");
  if (gate) set_gate(in, *gate, x);
  run(in);
}

void norm_rows(Tensor x, Tensor weight, double eps, Tensor out) {
  const zs::NormRows in{type_of(x), matrix(x, x, "x"), vector(weight, x, x.size(1), "weight"),
                        static_cast<float>(eps), out.mutable_data_ptr(), matrix(out, x, "out").stride};
  STD_TORCH_CHECK(out.size(0) == x.size(0) && out.size(1) == x.size(1), "zs_native: out is of the shape of x");
  run(in);
}

void silu_rows(Tensor gate, Tensor up, Tensor out) {
  const zs::RowMatrix other = matrix(up, gate, "up"), target = matrix(out, gate, "out");
  const zs::SiluRows in{type_of(gate), matrix(gate, gate, "gate"), other.data, other.stride, out.mutable_data_ptr(),
                        target.stride};
  STD_TORCH_CHECK(other.rows == in.gate.rows && other.columns == in.gate.columns && target.rows == in.gate.rows &&
                      target.columns == in.gate.columns,
                  "zs_native: up and out are of the shape of gate");
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, in.gate.columns));
  torch::stable::parallel_for(0, in.gate.rows, grain,
                              [&](int64_t first, int64_t last) { ZS_CALL(silu_rows, in, first, last); });
}

// Of queries of `width` = heads * head_dim numbers, of the type of `like`.
// keys, values: [slots, kv_heads, capacity, head_dim], contiguous; slots, positions: [T] int64.
zs::AttentionRows attention(const Tensor& like, int64_t tokens, int64_t width, const Tensor& keys,
                            const Tensor& values, const Tensor& slots, const Tensor& positions) {
  STD_TORCH_CHECK(keys.dim() == 4 && keys.is_contiguous() && values.is_contiguous() &&
                      keys.scalar_type() == like.scalar_type() && values.scalar_type() == like.scalar_type() &&
                      values.numel() == keys.numel() && keys.size(3) % 16 == 0 &&
                      width % (keys.size(3) * keys.size(1)) == 0,
                  "zs_native: keys and values are [slots, kv_heads, capacity, head_dim], head_dim a multiple of 16");
  STD_TORCH_CHECK(slots.numel() == tokens && positions.numel() == tokens && slots.is_contiguous() &&
                      positions.is_contiguous() && slots.scalar_type() == ScalarType::Long &&
                      positions.scalar_type() == ScalarType::Long,
                  "zs_native: a slot and a position for each token");
  const int64_t head_dim = keys.size(3);
  const zs::AttentionRows at{type_of(like), width / head_dim, keys.size(1), head_dim, keys.size(2),
                             slots.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>()};
  for (int64_t t = 0; t < tokens; ++t)
    STD_TORCH_CHECK(at.slots[t] >= 0 && at.slots[t] < keys.size(0) && at.positions[t] >= 0 &&
                        at.positions[t] < at.capacity,
                    "zs_native: a slot or position outside the storage");
  return at;
}

// What is the same of all tokens; q, k and v are still to be set.
zs::RotateRows rotation(const Tensor& like, const zs::AttentionRows& at, int64_t tokens, const Tensor& cos,
                        const Tensor& sin, const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                        double eps, const Tensor& keys, const Tensor& values) {
  zs::RotateRows in{};
  in.at = at;
  const zs::RowMatrix cosines = matrix(cos, like, "cos");
  STD_TORCH_CHECK(2 * cosines.columns == at.head_dim && cos.is_contiguous() && sin.is_contiguous() &&
                      sin.numel() == cos.numel() && sin.scalar_type() == cos.scalar_type(),
                  "zs_native: cos and sin are [positions, head_dim / 2]");
  for (int64_t t = 0; t < tokens; ++t)
    STD_TORCH_CHECK(at.positions[t] < cosines.rows, "zs_native: a position beyond cos and sin");
  in.cos = cosines.data, in.sin = sin.const_data_ptr();
  in.q_norm = vector(q_norm, like, at.head_dim, "q_norm"), in.k_norm = vector(k_norm, like, at.head_dim, "k_norm");
  in.eps = static_cast<float>(eps);
  in.keys = keys.mutable_data_ptr(), in.values = values.mutable_data_ptr();
  return in;
}

void rotate_rows(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, std::optional<Tensor> q_norm,
                 std::optional<Tensor> k_norm, double eps, Tensor slots, Tensor positions, Tensor keys, Tensor values) {
  const int64_t tokens = q.size(0);
  const zs::AttentionRows at = attention(q, tokens, q.size(1), keys, values, slots, positions);
  zs::RotateRows in = rotation(q, at, tokens, cos, sin, q_norm, k_norm, eps, keys, values);
  const zs::RowMatrix k_rows = matrix(k, q, "k"), v_rows = matrix(v, q, "v");
  STD_TORCH_CHECK(k_rows.columns == at.kv_heads * at.head_dim && v_rows.columns == k_rows.columns &&
                      k_rows.rows == tokens && v_rows.rows == tokens,
                  "zs_native: k and v are [T, kv_heads * head_dim]");
  in.q_stride = matrix(q, q, "q").stride;
  in.q = q.mutable_data_ptr();
  in.k = k_rows.data, in.k_stride = k_rows.stride, in.v = v_rows.data, in.v_stride = v_rows.stride;
  run(in, tokens);
}

void attend_rows(Tensor q, Tensor keys, Tensor values, Tensor slots, Tensor positions, double scale, Tensor out) {
  zs::AttendRows in{};
  in.at = attention(q, q.size(0), q.size(1), keys, values, slots, positions);
  in.q = q.const_data_ptr(), in.q_stride = matrix(q, q, "q").stride;
  in.keys = keys.const_data_ptr(), in.values = values.const_data_ptr();
  in.out = out.mutable_data_ptr(), in.out_stride = matrix(out, q, "out").stride;
  STD_TORCH_CHECK(out.size(0) == q.size(0) && out.size(1) == q.size(1), "zs_native: out is of the shape of q");
  in.scale = static_cast<float>(scale);
  run(in, q.size(0));
}

// The calls above in one, with what is between them in memory of this thread: a small model's decode step is mostly
// calls otherwise. out: [R, H], R = T or the number of rows `due`, which alone go on once keys and values are stored.
void layer_rows(Tensor x, Tensor input_norm, Tensor q_weight, std::optional<Tensor> q_bias, Tensor k_weight,
                std::optional<Tensor> k_bias, Tensor v_weight, std::optional<Tensor> v_bias,
                std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, Tensor o_weight,
                std::optional<Tensor> o_bias, Tensor post_norm, Tensor gate, Tensor up, Tensor down, Tensor cos,
                Tensor sin, Tensor slots, Tensor positions, Tensor keys, Tensor values, double eps, double scale,
                std::optional<Tensor> due, Tensor out) {
  const zs::RowType type = type_of(x);
  const int64_t item = type == zs::RowType::float32 ? 4 : 2;
  const zs::RowMatrix rows = matrix(x, x, "x"), target = matrix(out, x, "out");
  const int64_t tokens = rows.rows, hidden = rows.columns, passing = target.rows;
  const int64_t width = q_weight.size(0), inner = up.size(0);
  const zs::AttentionRows at = attention(x, tokens, width, keys, values, slots, positions);
  const int64_t kv_width = at.kv_heads * at.head_dim;
  STD_TORCH_CHECK(k_weight.size(0) == kv_width && v_weight.size(0) == kv_width && o_weight.size(0) == hidden &&
                      down.size(0) == hidden && target.columns == hidden,
                  "zs_native: the layer's weights do not fit each other");
  STD_TORCH_CHECK(due ? due->scalar_type() == ScalarType::Long && due->is_contiguous() && due->numel() == passing
                      : passing == tokens,
                  "zs_native: out has a row for each of `due`, or for all");

  const int64_t sizes[] = {std::max(tokens, passing) * hidden, tokens * width, 2 * tokens * kv_width, passing * width,
                           passing * width, passing * inner};
  thread_local std::vector<char> memory;
  int64_t total = 64;
  for (const int64_t size : sizes) total += (size * item + 63) / 64 * 64;
  if (static_cast<int64_t>(memory.size()) < total) memory.resize(total);
  char* free = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  std::array<char*, 6> places;
  for (size_t i = 0; i < places.size(); ++i) places[i] = free, free += (sizes[i] * item + 63) / 64 * 64;
  const auto [normed, q, kv, asking, mixed, gated] = places;

  const auto normalise = [&](zs::RowMatrix from, const Tensor& weight) {
    run(zs::NormRows{type, from, vector(weight, x, hidden, "norm"), static_cast<float>(eps), normed, hidden});
    return zs::RowMatrix{normed, from.rows, hidden, hidden};
  };
  zs::RowMatrix input = normalise(rows, input_norm);
  run(linear(x, input, q_weight, q_bias, q, width, false));
  run(linear(x, input, k_weight, k_bias, kv, 2 * kv_width, false));
  run(linear(x, input, v_weight, v_bias, kv + kv_width * item, 2 * kv_width, false));
  zs::RotateRows turn = rotation(x, at, tokens, cos, sin, q_norm, k_norm, eps, keys, values);
  turn.q = q, turn.q_stride = width;
  turn.k = kv, turn.v = kv + kv_width * item, turn.k_stride = turn.v_stride = 2 * kv_width;
  run(turn, tokens);

  zs::AttendRows look{};
  look.at = at;
  look.q = q, look.q_stride = width;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  std::vector<int64_t> places_of(2 * passing);
  for (int64_t r = 0; r < passing; ++r) {
    const int64_t t = due ? due->const_data_ptr<int64_t>()[r] : r;
    STD_TORCH_CHECK(t >= 0 && t < tokens, "zs_native: a row of `due` that is not there");
    std::memcpy(to + r * target.stride * item, static_cast<const char*>(rows.data) + t * rows.stride * item,
                static_cast<size_t>(hidden * item));
    if (!due) continue;
    std::memcpy(asking + r * width * item, q + t * width * item, static_cast<size_t>(width * item));
    places_of[r] = at.slots[t], places_of[passing + r] = at.positions[t];
  }
  if (due) look.q = asking, look.at.slots = places_of.data(), look.at.positions = places_of.data() + passing;
  look.keys = keys.const_data_ptr(), look.values = values.const_data_ptr();
  look.out = mixed, look.out_stride = width;
  look.scale = static_cast<float>(scale);
  run(look, passing);

  run(linear(x, {mixed, passing, width, width}, o_weight, o_bias, to, target.stride, true));
  zs::LinearRows product = linear(x, normalise({to, passing, hidden, target.stride}, post_norm), up, std::nullopt,
                                  gated, inner, false);
  set_gate(product, gate, x);
  run(product);
  run(linear(x, {gated, passing, inner, inner}, down, std::nullopt, to, target.stride, true));
}

std::tuple<Tensor, Tensor> draw_rows(Tensor logits, Tensor temperatures, Tensor draws) {
  const zs::RowMatrix rows = matrix(logits, logits, "logits");
  STD_TORCH_CHECK(temperatures.numel() == rows.rows && draws.numel() == rows.rows && temperatures.is_contiguous() &&
                      draws.is_contiguous() && draws.scalar_type() == ScalarType::Double && rows.columns > 0,
                  "zs_native: a temperature and a draw (float64) for each row");
  const std::array<int64_t, 1> shape{rows.rows};
  Tensor ids = torch::stable::new_empty(logits, shape, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(logits, shape, ScalarType::Float);
  const zs::DrawRows in{type_of(logits), rows, temperatures.const_data_ptr<float>(), draws.const_data_ptr<double>(),
                        ids.mutable_data_ptr<int64_t>(), logprobs.mutable_data_ptr<float>()};
  const int64_t grain = std::max<int64_t>(1, 32768 / rows.columns);
  torch::stable::parallel_for(0, rows.rows, grain, [&](int64_t first, int64_t last) {
    std::vector<double> sums(rows.columns / zs::kDrawBlock + 1);
    ZS_CALL(draw_rows, in, first, last, sums.data());
  });
  return {ids, logprobs};
}

// Has the processor the vector instructions (with fused multiply-add) that make the row products fast?
bool has_fast_rows(Tensor) { return zs::isa() != zs::Isa::base; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zs_native, library) {
  library.def("linear_rows(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, bool add, Tensor(a!) out) -> ()");
  library.def("norm_rows(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  library.def("silu_rows(Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  library.def(
      "rotate_rows(Tensor(a!) q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, "
      "float eps, Tensor slots, Tensor positions, Tensor(b!) keys, Tensor(c!) values) -> ()");
  library.def(
      "attend_rows(Tensor q, Tensor keys, Tensor values, Tensor slots, Tensor positions, float scale, Tensor(a!) out) "
      "-> ()");
  library.def(
      "layer_rows(Tensor x, Tensor input_norm, Tensor q_weight, Tensor? q_bias, Tensor k_weight, Tensor? k_bias, "
      "Tensor v_weight, Tensor? v_bias, Tensor? q_norm, Tensor? k_norm, Tensor o_weight, Tensor? o_bias, "
      "Tensor post_norm, Tensor gate, Tensor up, Tensor down, Tensor cos, Tensor sin, Tensor slots, Tensor positions, "
      "Tensor(a!) keys, Tensor(b!) values, float eps, float scale, Tensor? due, Tensor(c!) out) -> ()");
  library.def("draw_rows(Tensor logits, Tensor temperatures, Tensor draws) -> (Tensor, Tensor)");
  library.def("has_fast_rows(Tensor any) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CPU, library) {
  library.impl("linear_rows", TORCH_BOX(&linear_rows));
  library.impl("norm_rows", TORCH_BOX(&norm_rows));
  library.impl("silu_rows", TORCH_BOX(&silu_rows));
  library.impl("rotate_rows", TORCH_BOX(&rotate_rows));
  library.impl("attend_rows", TORCH_BOX(&attend_rows));
  library.impl("layer_rows", TORCH_BOX(&layer_rows));
  library.impl("draw_rows", TORCH_BOX(&draw_rows));
  library.impl("has_fast_rows", TORCH_BOX(&has_fast_rows));
}
