// Products of few rows with a weight matrix as it lies in memory, without packing it first: dot products along its
// rows. A tile of rows x columns keeps one vector of sixteen partial sums for each of its results; its rows share each
// load of a weight, its columns each load of an input. Where a vector takes several registers, the tile passes by once
// for each of them, so that the sums stay in registers. Of the weights a tile stays in the first cache while all rows
// pass by, and the next one is fetched meanwhile. bfloat16 is multiplied in pairs where the processor does that, or
// widened to float on the way, once for each tile.
#include "zs_decoder_rows.h"
#include "zs_row_sums.h"

namespace zs {
namespace ZS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileColumns = 6;  // 24 sums in 32 registers
#else
constexpr int kTileRows = 3, kTileColumns = 4;  // 12 in 16
#endif
static_assert(kTileColumns <= kLinearTile);

constexpr int64_t kStretch = 64;  // vectors of a row at once

// What is multiplied: float, and bfloat16 where that needs no widening. A vector holds kStep of them.
template <class T>
struct Factor {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Factor<Bf16> {
  using type = Bf16;
};
#endif
template <class E>
constexpr int64_t kStep = 64 / static_cast<int64_t>(sizeof(E));

template <class E>
ZS_INLINE int64_t padded(int64_t columns) {
  return (columns + kStep<E> - 1) / kStep<E> * kStep<E>;
}
template <class E>
ZS_INLINE FloatPart load_factors(const E* from, int p) {
  return load_part<FloatPart>(reinterpret_cast<const char*>(from) + p * sizeof(FloatPart));
}
ZS_INLINE FloatPart multiply_add(FloatPart a, FloatPart b, FloatPart c, const float*) { return fma_part(a, b, c); }
#if defined(__AVX512BF16__)
ZS_INLINE FloatPart multiply_add(FloatPart a, FloatPart b, FloatPart c, const Bf16*) {
  return (FloatPart)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#endif

// One load for all rows, where the compiler would make it one for each.
ZS_INLINE void in_register(FloatPart& x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("" : "+x"(x));
#else
  (void)x;
#endif
}

// What the tile after this one will read.
struct Ahead {
  const char* at;
  const char* end;
  int64_t gate;  // where its gate lies from there; 0: none
  int per_step;
};

// A stretch of the rows that stays in the first cache beside the inputs.
struct Stretch {
  int64_t begin, end;  // in vectors
  bool first, last;
};

// sums[m, n] over a stretch of A columns at `a`, then of B columns at `b`; added to `partial` [sum, lane] unless it is
// the first stretch, and left there unless it is the last.
template <class E, int M, int A, int B>
ZS_INLINE void tile(const E* x, int64_t x_stride, const E* a, const E* b, int64_t stride, Stretch stretch,
                    Ahead& ahead, float* partial, float* sums) {
  constexpr int N = A + B;
  Floats total[M * N];
  const char* fetch = ahead.at;
  ZS_PARTS {
    FloatPart sum[M * N];
#pragma GCC unroll 32
    for (int i = 0; i < M * N; ++i)
      sum[i] = stretch.first ? FloatPart{} : load_part<FloatPart>(partial + i * kLanes + p * kPartLanes);
    for (int64_t k = stretch.begin * kStep<E>; k < stretch.end * kStep<E>; k += kStep<E>) {
      for (int f = 0; p == 0 && f < ahead.per_step && fetch < ahead.end; ++f, fetch += 64) {
        prefetch(fetch);
        if constexpr (B > 0) prefetch(fetch + ahead.gate);
      }
      FloatPart row[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) row[m] = load_factors(x + m * x_stride + k, p);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        FloatPart weight = load_factors((n < A ? a + n * stride : b + (n - A) * stride) + k, p);
        in_register(weight);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          FloatPart& one = sum[n < A ? m * A + n : M * A + m * B + n - A];
          one = multiply_add(row[m], weight, one, static_cast<const E*>(nullptr));
        }
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < M * N; ++i) total[i].part[p] = sum[i];
  }
  ahead.at = fetch;
  if (!stretch.last) {
#pragma GCC unroll 32
    for (int i = 0; i < M * N; ++i) std::memcpy(partial + i * kLanes, &total[i], sizeof(Floats));
    return;
  }
  int i = 0;
#pragma GCC unroll 4
  for (; i + 8 <= M * N; i += 8) sum_eight(total + i, sums + i);
  if (i + 4 <= M * N) sum_four(total + i, sums + i), i += 4;
#pragma GCC unroll 8
  for (; i < M * N; ++i) sums[i] = sum_lanes(total[i]);
}

ZS_INLINE Floats rounded(Floats x, const float*) { return x; }
ZS_INLINE Floats rounded(Floats x, const Bf16*) { return floats_of(round_to_bf16(x) & 0xffff0000u); }

template <class T>
ZS_INLINE Floats silu_product(Floats gate, Floats up) {
  const T* type = nullptr;
  gate = rounded(gate, type);
  const Floats silu = gate / (exp(-gate) + 1.0f);
  return rounded(silu, type) * rounded(up, type);
}

// The results of M rows and N columns from their sums [M, N]. bias: [M, N], that of the columns again for each row. What
// lies past the end of an array is not used.
template <class T, int M, int N>
ZS_INLINE void finish(const LinearRows& in, int64_t row, int64_t column, const float* sums, const float* bias) {
  T* out = static_cast<T*>(in.out) + row * in.out_stride + column;
#if defined(__AVX2__)
  if constexpr (N == 4 && sizeof(T) == sizeof(float)) {
    for (int m = 0; m < M; ++m, out += in.out_stride) {
      __m128 result = _mm_loadu_ps(sums + m * N);
      if (bias) result = _mm_add_ps(result, _mm_loadu_ps(bias));
      if (in.add) result = _mm_add_ps(_mm_loadu_ps(reinterpret_cast<float*>(out)), result);
      _mm_storeu_ps(reinterpret_cast<float*>(out), result);
    }
    return;
  }
#endif
  T results[M * N + kLanes] = {};
  if (in.add)
    for (int m = 0; m < M; ++m) std::memcpy(results + m * N, out + m * in.out_stride, N * sizeof(T));
  for (int i = 0; i < M * N; i += kLanes) {
    Floats result = load(sums + i);
    if (bias) result = result + load(bias + i);
    if (in.add) result = load(results + i) + rounded(result, results);
    store(results + i, result);
  }
  for (int m = 0; m < M; ++m) std::memcpy(out + m * in.out_stride, results + m * N, N * sizeof(T));
}

// silu(gate) * up of all rows of a chunk in N columns, from sums [rows, N] of each, with room for 16 more.
template <class T, int N>
ZS_INLINE void finish_gated(const LinearRows& in, int64_t row, int64_t rows, int64_t column, float* gates,
                            const float* ups) {
  T* results = reinterpret_cast<T*>(gates);  // no wider, and behind what is read
  for (int64_t i = 0; i < rows * N; i += kLanes) store(results + i, silu_product<T>(load(gates + i), load(ups + i)));
  T* out = static_cast<T*>(in.out) + row * in.out_stride + column;
  for (int64_t m = 0; m < rows; ++m) std::memcpy(out + m * in.out_stride, results + m * N, N * sizeof(T));
}

template <int value_>
struct Number {
  static constexpr int value = value_;
};
#define ZS_ALWAYS __attribute__((always_inline))

// All rows of a chunk against N columns.
template <class T, class E, int N, bool gated>
void column_strip(const LinearRows& in, const E* x, int64_t x_stride, int64_t row, int64_t rows, const E* weight,
                  const E* gate, int64_t stride, int64_t steps, int64_t column, Ahead ahead, float* partials) {
  constexpr int64_t kTotals = N * (gated ? 2 : 1) * kLanes;
  float sums[kTileRows * N * (gated ? 2 : 1) + kLanes] = {};
  float biases[kTileRows * N + kLanes] = {};
  const float* bias = in.bias ? biases : nullptr;
  if (bias)
    for (int i = 0; i < kTileRows * N; ++i) biases[i] = load_one(static_cast<const T*>(in.bias) + column + i % N);
  float* const gates = partials + kLinearRows * kTotals;  // [rows, N], then the same of the other product
  float* const ups = gates + kLinearRows * N + kLanes;
  const auto pass = [&](auto tile_rows, int64_t m, Stretch stretch, float* partial) ZS_ALWAYS {
    constexpr int M = decltype(tile_rows)::value;
    if constexpr (gated) {
      tile<E, M, N, N>(x + m * x_stride, x_stride, gate, weight, stride, stretch, ahead, partial, sums);
      if (!stretch.last) return;
      std::memcpy(gates + m * N, sums, M * N * sizeof(float));
      std::memcpy(ups + m * N, sums + M * N, M * N * sizeof(float));
    } else {
      tile<E, M, N, 0>(x + m * x_stride, x_stride, weight, weight, stride, stretch, ahead, partial, sums);
      if (stretch.last) finish<T, M, N>(in, row + m, column, sums, bias);
    }
  };
  for (int64_t begin = 0; begin < steps; begin += kStretch) {
    const int64_t end = steps - begin < kStretch ? steps : begin + kStretch;
    const Stretch stretch{begin, end, begin == 0, end == steps};
    int64_t m = 0;
    float* partial = partials;
    for (; m + kTileRows <= rows; m += kTileRows, partial += kTileRows * kTotals)
      pass(Number<kTileRows>{}, m, stretch, partial);
    switch (rows - m) {
      case 1: pass(Number<1>{}, m, stretch, partial); break;
      case 2: if constexpr (kTileRows > 2) pass(Number<2>{}, m, stretch, partial); break;
      case 3: if constexpr (kTileRows > 3) pass(Number<3>{}, m, stretch, partial); break;
      default: break;
    }
  }
  if constexpr (gated) finish_gated<T, N>(in, row, rows, column, gates, ups);
}

template <class T, class E, bool gated>
ZS_INLINE void columns_of(int64_t count, const LinearRows& in, const E* x, int64_t x_stride, int64_t row,
                          int64_t rows, const E* weight, const E* gate, int64_t stride, int64_t steps,
                          int64_t column, const Ahead& ahead, float* partials) {
#define ZS_STRIP(N)                                                                                              \
  case N: {                                                                                                      \
    if constexpr (N <= (gated ? (kTileColumns + 1) / 2 : kTileColumns))                                                      \
      column_strip<T, E, N, gated>(in, x, x_stride, row, rows, weight, gate, stride, steps, column, ahead, partials); \
    break;                                                                                                       \
  }
  switch (count) { ZS_STRIP(1) ZS_STRIP(2) ZS_STRIP(3) ZS_STRIP(4) ZS_STRIP(5) ZS_STRIP(6) default: break; }
#undef ZS_STRIP
}

// A row of factors, padded with zeros.
template <class T>
ZS_INLINE void copy_factors(const T* from, int64_t columns, T* to) {
  std::memcpy(to, from, static_cast<size_t>(columns) * sizeof(T));
  std::memset(to + columns, 0, static_cast<size_t>(padded<T>(columns) - columns) * sizeof(T));
}
ZS_INLINE void copy_factors(const Bf16* from, int64_t columns, float* to) {
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) store(to + k, load(from + k));
  if (k < columns) store(to + k, load(from + k, columns - k, 0.0f));
}

template <class T, bool gated>
void run(const LinearRows& in, int64_t first, int64_t last, float* scratch) {
  using E = typename Factor<T>::type;
  constexpr int64_t width = gated ? (kTileColumns + 1) / 2 : kTileColumns;
  const int64_t columns = in.x.columns, wide = padded<E>(columns), steps = wide / kStep<E>;
  const bool as_it_lies = sizeof(E) == sizeof(T) && columns == wide;
  int64_t chunk = kLinearInputs / wide / kTileRows * kTileRows;
  chunk = chunk < kTileRows ? kTileRows : chunk < kLinearRows ? chunk : kLinearRows;
  float* partials = scratch;  // kLinearPartials
  E* weights = reinterpret_cast<E*>(scratch + kLinearPartials);  // [2, kTileColumns, wide]
  E* gates = weights + kTileColumns * wide;
  E* inputs = gates + kTileColumns * wide;  // [chunk, wide]
  const T* weight = static_cast<const T*>(in.weight.data);
  const T* gate = static_cast<const T*>(in.gate);
  for (int64_t row = 0; row < in.x.rows; row += chunk) {
    const int64_t rows = in.x.rows - row < chunk ? in.x.rows - row : chunk;
    const T* from = static_cast<const T*>(in.x.data) + row * in.x.stride;
    if (!as_it_lies)
      for (int64_t m = 0; m < rows; ++m) copy_factors(from + m * in.x.stride, columns, inputs + m * wide);
    const E* x = as_it_lies ? reinterpret_cast<const E*>(from) : inputs;
    const int64_t x_stride = as_it_lies ? in.x.stride : wide;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t lines = width * static_cast<int64_t>(sizeof(T)) * kStep<E> / 64;  // of a tile's weights, in each step
    for (int64_t n = first; n < last; n += width) {
      const int64_t count = last - n < width ? last - n : width;
      const T* w = weight + n * in.weight.stride;
      const T* g = gated ? gate + n * in.weight.stride : w;
      const int64_t bytes = width * in.weight.stride * static_cast<int64_t>(sizeof(T));
      const char* next = reinterpret_cast<const char*>(w) + bytes;
      const Ahead ahead{next, n + 2 * width > in.weight.rows ? next : next + bytes,
                        reinterpret_cast<const char*>(g) - reinterpret_cast<const char*>(w),
                        static_cast<int>((lines + tiles - 1) / tiles)};
      if (as_it_lies) {
        columns_of<T, E, gated>(count, in, x, x_stride, row, rows, reinterpret_cast<const E*>(w),
                                reinterpret_cast<const E*>(g), in.weight.stride, steps, n, ahead, partials);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        copy_factors(w + i * in.weight.stride, columns, weights + i * wide);
        if (gated) copy_factors(g + i * in.weight.stride, columns, gates + i * wide);
      }
      columns_of<T, E, gated>(count, in, x, x_stride, row, rows, weights, gates, wide, steps, n, ahead, partials);
    }
  }
}

}  // namespace

void linear_rows(const LinearRows& in, int64_t first, int64_t last, float* scratch) {
  if (in.type == RowType::float32)
    in.gate ? run<float, true>(in, first, last, scratch) : run<float, false>(in, first, last, scratch);
  else
    in.gate ? run<Bf16, true>(in, first, last, scratch) : run<Bf16, false>(in, first, last, scratch);
}

}  // namespace ZS_ISA
}  // namespace zs
