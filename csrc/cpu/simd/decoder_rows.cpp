// Norm, rotary embedding, attention over slots and the draw of a token, a row at a time.
#include "zs_decoder_rows.h"
#include "zs_row_sums.h"

namespace zs {
namespace ZS_ISA {
namespace {

ZS_INLINE Floats rounded(Floats x, const float*) { return x; }
ZS_INLINE Floats rounded(Floats x, const Bf16*) { return floats_of(round_to_bf16(x) & 0xffff0000u); }

ZS_INLINE int64_t lanes_left(int64_t i, int64_t count) { return count - i < kLanes ? count - i : kLanes; }
template <class T>
ZS_INLINE Floats load_some(const T* from, int64_t count) {
  return count == kLanes ? load(from) : load(from, count, 0.0f);
}
template <class T>
ZS_INLINE void store_some(T* to, Floats x, int64_t count) {
  if (count == kLanes)
    store(to, x);
  else
    store(to, x, count);
}

template <class T>
ZS_INLINE float inverse_root_mean_square(const T* x, int64_t count, float eps) {
  Floats squares = 0.0f;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats one = load_some(x + i, lanes_left(i, count));
    squares = fma(one, one, squares);
  }
  return 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(count) + eps);
}

template <class T>
void norm(const NormRows& in, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(in.weight);
  const int64_t count = in.x.columns;
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(in.x.data) + row * in.x.stride;
    T* out = static_cast<T*>(in.out) + row * in.out_stride;
    const Floats scale = inverse_root_mean_square(x, count, in.eps);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t lanes = lanes_left(i, count);
      store_some(out + i, load_some(weight + i, lanes) * rounded(load_some(x + i, lanes) * scale, x), lanes);
    }
  }
}

// One head: its own norm where there is one, then the rotary embedding.
template <class T>
ZS_INLINE void rotate(const T* x, const T* weight, float eps, const T* cos, const T* sin, int64_t half, T* out) {
  const Floats scale = weight ? inverse_root_mean_square(x, 2 * half, eps) : 1.0f;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t lanes = lanes_left(i, half);
    Floats a = load_some(x + i, lanes), b = load_some(x + half + i, lanes);
    if (weight) {
      a = rounded(load_some(weight + i, lanes) * rounded(a * scale, x), x);
      b = rounded(load_some(weight + half + i, lanes) * rounded(b * scale, x), x);
    }
    const Floats c = load_some(cos + i, lanes), s = load_some(sin + i, lanes);
    store_some(out + i, rounded(a * c, x) - rounded(b * s, x), lanes);
    store_some(out + half + i, rounded(b * c, x) + rounded(a * s, x), lanes);
  }
}

template <class T>
void rotate_tokens(const RotateRows& in, int64_t first, int64_t last) {
  const AttentionRows& at = in.at;
  const int64_t half = at.head_dim / 2;
  for (int64_t t = first; t < last; ++t) {
    const int64_t position = at.positions[t];
    const T* cos = static_cast<const T*>(in.cos) + position * half;
    const T* sin = static_cast<const T*>(in.sin) + position * half;
    T* q = static_cast<T*>(in.q) + t * in.q_stride;
    for (int64_t h = 0; h < at.heads; ++h, q += at.head_dim)
      rotate(q, static_cast<const T*>(in.q_norm), in.eps, cos, sin, half, q);
    const T* k = static_cast<const T*>(in.k) + t * in.k_stride;
    const T* v = static_cast<const T*>(in.v) + t * in.v_stride;
    for (int64_t h = 0; h < at.kv_heads; ++h) {
      const int64_t to = ((at.slots[t] * at.kv_heads + h) * at.capacity + position) * at.head_dim;
      rotate(k + h * at.head_dim, static_cast<const T*>(in.k_norm), in.eps, cos, sin, half,
             static_cast<T*>(in.keys) + to);
      std::memcpy(static_cast<T*>(in.values) + to, v + h * at.head_dim, static_cast<size_t>(at.head_dim) * sizeof(T));
    }
  }
}

template <class T>
void silu(const SiluRows& in, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* gate = static_cast<const T*>(in.gate.data) + row * in.gate.stride;
    const T* up = static_cast<const T*>(in.up) + row * in.up_stride;
    T* out = static_cast<T*>(in.out) + row * in.out_stride;
    for (int64_t i = 0; i < in.gate.columns; i += kLanes) {
      const int64_t lanes = lanes_left(i, in.gate.columns);
      const Floats x = load_some(gate + i, lanes);
      store_some(out + i, rounded(x / (exp(-x) + 1.0f), gate) * load_some(up + i, lanes), lanes);
    }
  }
}

constexpr int kKeys = 8;  // at once

// scores[0 .. count) = scale * query . key
template <class T, int count>
ZS_INLINE void score_keys(const T* query, const T* keys, int64_t head_dim, float scale, float* scores) {
  Floats total[count];
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) total[j] = 0.0f;
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const Floats q = load(query + d);
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) total[j] = fma(q, load(keys + j * head_dim + d), total[j]);
  }
  if constexpr (count == kKeys) {
    sum_eight(total, scores);
    for (int j = 0; j < count; ++j) scores[j] *= scale;
  } else {
    for (int j = 0; j < count; ++j) scores[j] = sum_lanes(total[j]) * scale;
  }
}

// out = sum_j weights[j] values[j], over C vectors of the head. Eight sums are under way, so that none waits for
// itself: those of every (8 / C)th key.
template <class T, int C>
ZS_INLINE void mix_values(const float* weights, const T* values, int64_t count, int64_t head_dim, float scale, T* out) {
  constexpr int kApart = 8 / C;
  Floats total[kApart][C];
#pragma GCC unroll 8
  for (int u = 0; u < kApart; ++u)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) total[u][c] = 0.0f;
  int64_t j = 0;
  for (; j + kApart <= count; j += kApart) {
#pragma GCC unroll 8
    for (int u = 0; u < kApart; ++u) {
      const Floats weight = weights[j + u];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        total[u][c] = fma(weight, load(values + (j + u) * head_dim + c * kLanes), total[u][c]);
    }
  }
  for (; j < count; ++j) {
    const Floats weight = weights[j];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) total[0][c] = fma(weight, load(values + j * head_dim + c * kLanes), total[0][c]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 3
    for (int width = kApart / 2; width > 0; width /= 2)
#pragma GCC unroll 4
      for (int u = 0; u < width; ++u) total[u][c] = total[u][c] + total[u + width][c];
    store(out + c * kLanes, total[0][c] * scale);
  }
}

// scores become weights exp(score - largest), and their sum is given. Room for 16 more is used.
ZS_INLINE float exponentials(float* scores, int64_t count) {
  for (int64_t j = count; j < count + kLanes - 1; ++j) scores[j] = -__builtin_inff();
  Floats largest = -__builtin_inff();
  for (int64_t j = 0; j < count; j += kLanes) largest = max(load(scores + j), largest);
  const Floats top = max_lane(largest);
  Floats total = 0.0f;
  for (int64_t j = 0; j < count; j += kLanes) {
    const Floats weight = exp(load(scores + j) - top);
    store(scores + j, weight);
    total = total + weight;
  }
  return sum_lanes(total);
}

template <class T>
void attend(const AttendRows& in, int64_t first, int64_t last, float* scratch) {
  const AttentionRows& at = in.at;
  const int64_t group = at.heads / at.kv_heads, head_dim = at.head_dim;
  for (int64_t pair = first; pair < last; ++pair) {
    const int64_t t = pair / at.kv_heads, h = pair % at.kv_heads;
    const int64_t count = at.positions[t] + 1, room = count + kLanes;
    const int64_t begin = (at.slots[t] * at.kv_heads + h) * at.capacity * head_dim;
    const T* keys = static_cast<const T*>(in.keys) + begin;
    const T* values = static_cast<const T*>(in.values) + begin;
    const T* query = static_cast<const T*>(in.q) + t * in.q_stride + h * group * head_dim;
    T* out = static_cast<T*>(in.out) + t * in.out_stride + h * group * head_dim;
    int64_t j = 0;
    for (; j + kKeys <= count; j += kKeys)
      for (int64_t g = 0; g < group; ++g)
        score_keys<T, kKeys>(query + g * head_dim, keys + j * head_dim, head_dim, in.scale, scratch + g * room + j);
    for (; j < count; ++j)
      for (int64_t g = 0; g < group; ++g)
        score_keys<T, 1>(query + g * head_dim, keys + j * head_dim, head_dim, in.scale, scratch + g * room + j);
    for (int64_t g = 0; g < group; ++g) {
      float* weights = scratch + g * room;
      const float scale = 1.0f / exponentials(weights, count);
      int64_t d = 0;
      for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
        mix_values<T, 4>(weights, values + d, count, head_dim, scale, out + g * head_dim + d);
      for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes)
        mix_values<T, 2>(weights, values + d, count, head_dim, scale, out + g * head_dim + d);
      if (d < head_dim)
        mix_values<T, 1>(weights, values + d, count, head_dim, scale, out + g * head_dim + d);
    }
  }
}

template <class T>
void draw(const DrawRows& in, int64_t first, int64_t last, double* sums) {
  const int64_t vocabulary = in.logits.columns;
  for (int64_t row = first; row < last; ++row) {
    const T* logits = static_cast<const T*>(in.logits.data) + row * in.logits.stride;
    const Floats temperature = in.temperatures[row];
    const float none = -__builtin_inff();
    Floats largest = none;
    for (int64_t i = 0; i < vocabulary; i += kLanes) {
      const int64_t lanes = lanes_left(i, vocabulary);
      largest = max(lanes == kLanes ? load(logits + i) : load(logits + i, lanes, none), largest);
    }
    const float top = (Floats(max_lane(largest)) / temperature).part[0][0];
    double total = 0.0;
    float tops[kLanes], weights[kLanes];
    for (int64_t block = 0, b = 0; block < vocabulary; block += kDrawBlock, ++b) {
      Floats sum_of_block = 0.0f;
      const int64_t end = vocabulary - block < kDrawBlock ? vocabulary : block + kDrawBlock;
      for (int64_t i = block; i < end; i += kLanes) {
        const int64_t lanes = lanes_left(i, end);
        const Floats z = lanes == kLanes ? load(logits + i) : load(logits + i, lanes, none);
        sum_of_block = sum_of_block + exp(z / temperature - top);
      }
      store(tops, sum_of_block);
      double of_block = 0.0;
      for (int l = 0; l < kLanes; ++l) of_block += tops[l];
      sums[b] = of_block;
      total += of_block;
    }
    int64_t id = -1;
    if (in.draws[row] < 0.0) {
      for (int64_t i = 0; id < 0 && i < vocabulary; ++i)
        if ((Floats(load_one(logits + i)) / temperature).part[0][0] == top) id = i;
    } else {
      // The first token whose cumulative weight exceeds the target; where rounding leaves none, the last with a weight.
      const double target = in.draws[row] * total;
      double before = 0.0;
      int64_t blocks = (vocabulary + kDrawBlock - 1) / kDrawBlock, b = 0, likely = -1;
      for (; b + 1 < blocks && before + sums[b] <= target; ++b) before += sums[b];
      bool found = false;
      for (; b < blocks && !found; ++b) {
        const int64_t end = vocabulary - b * kDrawBlock < kDrawBlock ? vocabulary : (b + 1) * kDrawBlock;
        for (int64_t i = b * kDrawBlock; i < end && !found; i += kLanes) {
          const int64_t lanes = lanes_left(i, end);
          const Floats z = lanes == kLanes ? load(logits + i) : load(logits + i, lanes, none);
          store(weights, exp(z / temperature - top));
          for (int64_t l = 0; l < lanes && !found; ++l) {
            if (weights[l] > 0.0f) likely = i + l;
            before += weights[l];
            found = before > target && weights[l] > 0.0f;
          }
        }
      }
      for (int64_t i = vocabulary; likely < 0 && i-- > 0;)
        if ((exp(Floats(load_one(logits + i)) / temperature - top)).part[0][0] > 0.0f) likely = i;
      id = likely;
    }
    in.ids[row] = id < 0 ? 0 : id;
    const float chosen = (Floats(load_one(logits + in.ids[row])) / temperature).part[0][0];
    in.logprobs[row] = (chosen - top) - log(Floats(static_cast<float>(total))).part[0][0];
  }
}

}  // namespace

void norm_rows(const NormRows& in, int64_t first, int64_t last) {
  in.type == RowType::float32 ? norm<float>(in, first, last) : norm<Bf16>(in, first, last);
}
void silu_rows(const SiluRows& in, int64_t first, int64_t last) {
  in.type == RowType::float32 ? silu<float>(in, first, last) : silu<Bf16>(in, first, last);
}
void rotate_rows(const RotateRows& in, int64_t first, int64_t last) {
  in.at.type == RowType::float32 ? rotate_tokens<float>(in, first, last) : rotate_tokens<Bf16>(in, first, last);
}
void attend_rows(const AttendRows& in, int64_t first, int64_t last, float* scratch) {
  in.at.type == RowType::float32 ? attend<float>(in, first, last, scratch) : attend<Bf16>(in, first, last, scratch);
}
void draw_rows(const DrawRows& in, int64_t first, int64_t last, double* sums) {
  in.type == RowType::float32 ? draw<float>(in, first, last, sums) : draw<Bf16>(in, first, last, sums);
}

}  // namespace ZS_ISA
}  // namespace zs
