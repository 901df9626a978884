// A decoder's forward, a row at a time, for the CPU through the LibTorch stable ABI.
// Door and reference: kernels/zs_kernels/decoder_rows.py. Shapes and types are checked here.
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

void run(const zs::SiluRows& in) {
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, in.gate.columns));
  torch::stable::parallel_for(0, in.gate.rows, grain,
                              [&](int64_t first, int64_t last) { ZS_CALL(silu_rows, in, first, last); });
}

// --- the operators ---

zs::LinearRows linear(const Tensor& like, zs::RowMatrix x, const Tensor& weight, const std::optional<Tensor>& bias,
                      void* out, int64_t out_stride, bool add) {
  const zs::LinearRows in{type_of(like), x, matrix(weight, like, "weight"), nullptr,
                          vector(bias, like, weight.size(0), "bias"), out, out_stride, add};
  STD_TORCH_CHECK(in.x.columns == in.weight.columns && in.x.columns > 0, "zs_native: x is [M, K], K = ", in.x.columns,
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
  run(in);
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

// A layer's weights and biases, in the order of LayerWeights in kernels/zs_kernels/decoder_rows.py.
enum Weight {
  kInputNorm, kQ, kQBias, kK, kKBias, kV, kVBias, kQNorm, kKNorm, kO, kOBias, kPostNorm, kGate, kUp, kDown, kWeights
};
// Products that may have an adapter, in the order of Adapters there.
enum Product { kOnQ, kOnK, kOnV, kOnO, kOnGate, kOnUp, kOnDown, kProducts };
// Where a tenant's tokens are, in the order of Places there.
enum Place { kCos, kSin, kSlots, kPositions, kKeys, kValues, kPlaces };

using OptionalTensors = std::vector<std::optional<Tensor>>;

const Tensor& needed(const OptionalTensors& tensors, size_t index) {
  STD_TORCH_CHECK(tensors[index].has_value(), "zs_native: a layer's weight ", index, " is absent");
  return *tensors[index];
}

// Rows that are one model's: of all tokens, and of those that are due.
struct Tenant {
  int64_t first, tokens, first_due, due;
  const Tensor* places;                   // kPlaces of them
  const std::optional<Tensor>* adapters;  // A and B of each product, or null
  bool adapts(Product product) const {
    const std::optional<Tensor>* of = adapters ? &adapters[2 * product] : nullptr;
    STD_TORCH_CHECK(!of || of[0].has_value() == of[1].has_value(), "zs_native: an adapter is an A and a B");
    return of && of[0];
  }
};

std::vector<Tenant> tenants_of(int64_t rows, const std::vector<int64_t>& tokens, const std::vector<Tensor>& places,
                               const OptionalTensors& adapters, const std::optional<Tensor>& due) {
  STD_TORCH_CHECK(!tokens.empty() && places.size() == kPlaces * tokens.size() &&
                      (adapters.empty() || adapters.size() == 2 * kProducts * tokens.size()),
                  "zs_native: places, and adapters or none, for each tenant");
  const int64_t* which = due ? due->const_data_ptr<int64_t>() : nullptr;
  const int64_t num_due = due ? due->numel() : rows;
  std::vector<Tenant> tenants;
  int64_t first = 0, first_due = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    Tenant one{first, tokens[i], first_due, tokens[i], &places[kPlaces * i],
               adapters.empty() ? nullptr : &adapters[2 * kProducts * i]};
    STD_TORCH_CHECK(one.tokens >= 0, "zs_native: a tenant has no fewer than 0 tokens");
    first += one.tokens;
    if (due) {
      int64_t r = first_due;
      while (r < num_due && which[r] >= one.first && which[r] < first) ++r;
      one.due = r - first_due;
    }
    first_due += one.due;
    tenants.push_back(one);
  }
  STD_TORCH_CHECK(first == rows, "zs_native: the tenants have ", first, " tokens, but x has ", rows, " rows");
  STD_TORCH_CHECK(first_due == num_due, "zs_native: a row of `due` that is not there, or before an earlier tenant's");
  return tenants;
}

// The calls above in one, with what is between them in memory of this thread: a small model's decode step is mostly
// calls otherwise. out: [R, H], R = T or the number of rows `due`, which alone go on once keys and values are stored.
// The tenants' tokens stand one after another; they pass by the same weights at once, each by its own adapters.
void layer_of_tenants(Tensor x, OptionalTensors weights, std::vector<int64_t> tenant_tokens,
                      std::vector<Tensor> tenant_places, OptionalTensors adapters, double eps, double scale,
                      std::optional<Tensor> due, Tensor out) {
  STD_TORCH_CHECK(weights.size() == kWeights, "zs_native: a layer has ", static_cast<int64_t>(kWeights), " weights");
  const zs::RowType type = type_of(x);
  const int64_t item = type == zs::RowType::float32 ? 4 : 2;
  const zs::RowMatrix rows = matrix(x, x, "x"), target = matrix(out, x, "out");
  const int64_t tokens = rows.rows, hidden = rows.columns, passing = target.rows;
  STD_TORCH_CHECK(due ? due->scalar_type() == ScalarType::Long && due->is_contiguous() && due->numel() == passing
                      : passing == tokens,
                  "zs_native: out has a row for each of `due`, or for all");
  const std::vector<Tenant> tenants = tenants_of(tokens, tenant_tokens, tenant_places, adapters, due);
  const Tensor &q_weight = needed(weights, kQ), &up = needed(weights, kUp), &down = needed(weights, kDown);
  const int64_t width = q_weight.size(0), inner = up.size(0), kv_width = needed(weights, kK).size(0);
  STD_TORCH_CHECK(needed(weights, kV).size(0) == kv_width && needed(weights, kO).size(0) == hidden &&
                      needed(weights, kGate).size(0) == inner && down.size(0) == hidden && target.columns == hidden,
                  "zs_native: the layer's weights do not fit each other");
  int64_t rank = 0;
  bool gate_is_adapted = false;
  for (const Tenant& one : tenants) {
    for (int product = 0; product < kProducts; ++product)
      if (one.adapts(Product(product))) rank = std::max(rank, one.adapters[2 * product]->size(0));
    gate_is_adapted |= one.adapts(kOnGate) || one.adapts(kOnUp);
  }

  const int64_t sizes[] = {std::max(tokens, passing) * hidden, tokens * width, 2 * tokens * kv_width, passing * width,
                           passing * width, passing * inner, gate_is_adapted ? passing * inner : 0,
                           std::max(tokens, passing) * rank};
  thread_local std::vector<char> memory;
  int64_t total = 64;
  for (const int64_t size : sizes) total += (size * item + 63) / 64 * 64;
  if (static_cast<int64_t>(memory.size()) < total) memory.resize(total);
  char* free = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  std::array<char*, 8> parts;
  for (size_t i = 0; i < parts.size(); ++i) parts[i] = free, free += (sizes[i] * item + 63) / 64 * 64;
  char *const normed = parts[0], *const q = parts[1], *const kv = parts[2], *const asking = parts[3],
              *const mixed = parts[4], *const gated = parts[5], *const gates = parts[6], *const low = parts[7];

  const auto normalise = [&](zs::RowMatrix from, Weight weight) {
    const void* values = vector(needed(weights, weight), x, hidden, "norm");
    run(zs::NormRows{type, from, values, static_cast<float>(eps), normed, hidden});
    return zs::RowMatrix{normed, from.rows, hidden, hidden};
  };
  // Of all rows with the weight, then of each tenant's with its adapter. `of_due`: the rows are those due.
  const auto multiply = [&](Product product, zs::RowMatrix from, Weight weight, const std::optional<Tensor>& bias,
                            char* to, int64_t stride, bool add, bool of_due) {
    run(linear(x, from, needed(weights, weight), bias, to, stride, add));
    for (const Tenant& one : tenants) {
      const int64_t first = of_due ? one.first_due : one.first, count = of_due ? one.due : one.tokens;
      if (!one.adapts(product) || !count) continue;
      const Tensor& a = *one.adapters[2 * product];
      const std::optional<Tensor>& b = one.adapters[2 * product + 1];
      STD_TORCH_CHECK(b && b->dim() == 2 && b->size(0) == weights[weight]->size(0),
                      "zs_native: an adapter's B is [N, r], N that of its product");
      const char* begin = static_cast<const char*>(from.data) + first * from.stride * item;
      run(linear(x, {begin, count, from.columns, from.stride}, a, std::nullopt, low, a.size(0), false));
      run(linear(x, {low, count, a.size(0), a.size(0)}, *b, std::nullopt, to + first * stride * item, stride, true));
    }
  };

  const zs::RowMatrix input = normalise(rows, kInputNorm);
  multiply(kOnQ, input, kQ, weights[kQBias], q, width, false, false);
  multiply(kOnK, input, kK, weights[kKBias], kv, 2 * kv_width, false, false);
  multiply(kOnV, input, kV, weights[kVBias], kv + kv_width * item, 2 * kv_width, false, false);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  std::vector<int64_t> places_of(2 * passing);
  for (const Tenant& one : tenants) {
    const Tensor &keys = one.places[kKeys], &values = one.places[kValues];
    const zs::AttentionRows at = attention(x, one.tokens, width, keys, values, one.places[kSlots],
                                          one.places[kPositions]);
    STD_TORCH_CHECK(kv_width == at.kv_heads * at.head_dim, "zs_native: the layer's weights do not fit each other");
    zs::RotateRows turn = rotation(x, at, one.tokens, one.places[kCos], one.places[kSin], weights[kQNorm],
                                   weights[kKNorm], eps, keys, values);
    char* const q_rows = q + one.first * width * item;
    char* const kv_rows = kv + one.first * 2 * kv_width * item;
    turn.q = q_rows, turn.q_stride = width;
    turn.k = kv_rows, turn.v = kv_rows + kv_width * item, turn.k_stride = turn.v_stride = 2 * kv_width;
    run(turn, one.tokens);

    zs::AttendRows look{};
    look.at = at;
    look.q = q_rows, look.q_stride = width;
    for (int64_t r = one.first_due; r < one.first_due + one.due; ++r) {
      const int64_t t = due ? due->const_data_ptr<int64_t>()[r] : r;
      std::memcpy(to + r * target.stride * item, static_cast<const char*>(rows.data) + t * rows.stride * item,
                  static_cast<size_t>(hidden * item));
      if (!due) continue;
      std::memcpy(asking + r * width * item, q + t * width * item, static_cast<size_t>(width * item));
      places_of[r] = at.slots[t - one.first], places_of[passing + r] = at.positions[t - one.first];
    }
    if (due) {
      look.q = asking + one.first_due * width * item;
      look.at.slots = places_of.data() + one.first_due, look.at.positions = look.at.slots + passing;
    }
    look.keys = keys.const_data_ptr(), look.values = values.const_data_ptr();
    look.out = mixed + one.first_due * width * item, look.out_stride = width;
    look.scale = static_cast<float>(scale);
    run(look, one.due);
  }

  multiply(kOnO, {mixed, passing, width, width}, kO, weights[kOBias], to, target.stride, true, true);
  const zs::RowMatrix after = normalise({to, passing, hidden, target.stride}, kPostNorm);
  if (gate_is_adapted) {
    multiply(kOnGate, after, kGate, std::nullopt, gates, inner, false, true);
    multiply(kOnUp, after, kUp, std::nullopt, gated, inner, false, true);
    run(zs::SiluRows{type, {gates, passing, inner, inner}, gated, inner, gated, inner});
  } else {
    zs::LinearRows product = linear(x, after, up, std::nullopt, gated, inner, false);
    set_gate(product, needed(weights, kGate), x);
    run(product);
  }
  multiply(kOnDown, {gated, passing, inner, inner}, kDown, std::nullopt, to, target.stride, true, true);
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
      "layer_of_tenants(Tensor x, Tensor?[] weights, int[] tenant_tokens, Tensor(a!)[] tenant_places, Tensor?[] adapters, "
      "float eps, float scale, Tensor? due, Tensor(b!) out) -> ()");
  library.def("draw_rows(Tensor logits, Tensor temperatures, Tensor draws) -> (Tensor, Tensor)");
  library.def("has_fast_rows(Tensor any) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(zs_native, CPU, library) {
  library.impl("linear_rows", TORCH_BOX(&linear_rows));
  library.impl("norm_rows", TORCH_BOX(&norm_rows));
  library.impl("silu_rows", TORCH_BOX(&silu_rows));
  library.impl("rotate_rows", TORCH_BOX(&rotate_rows));
  library.impl("attend_rows", TORCH_BOX(&attend_rows));
  library.impl("layer_of_tenants", TORCH_BOX(&layer_of_tenants));
  library.impl("draw_rows", TORCH_BOX(&draw_rows));
  library.impl("has_fast_rows", TORCH_BOX(&has_fast_rows));
}
