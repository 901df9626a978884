// Products of few rows with a weight matrix as it lies in memory, without packing it first: dot products along its rows.
// A tile of rows x columns keeps one vector of sixteen partial sums for each of its results; four rows share each load
// of a weight, six columns each load of an input. Of the weights a tile stays in the first cache while all rows pass by,
// and the next one is fetched meanwhile. bfloat16 is widened to float on the way, once for each tile.
#include "zs_decoder_rows.h"
#include "zs_row_sums.h"

namespace zs {
namespace ZS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 4;
#else
constexpr int kTileRows = 2;  // sixteen registers hold no more
#endif
constexpr int kTileColumns = static_cast<int>(kLinearTile);
#if defined(__AVX512F__)
constexpr int kStrip = kTileColumns;
#else
constexpr int kStrip = 2;
#endif

constexpr int64_t kStretch = 64;  // vectors of a row at once

ZS_INLINE int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

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

// sums[m, n] over a stretch, added to `partial` [m, n, lane] unless it is the first, and left there unless it is the
// last; columns from A on stand at `b`.
template <int M, int A, int B>
ZS_INLINE void tile(const float* x, int64_t x_stride, const float* a, const float* b, int64_t stride, Stretch stretch,
                    Ahead& ahead, float* partial, float* sums) {
  constexpr int N = A + B;
  Floats total[M * N];
  if (stretch.first) {
#pragma GCC unroll 32
    for (int i = 0; i < M * N; ++i) ZS_PARTS total[i].part[p] = FloatPart{};
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < M * N; ++i)
      ZS_PARTS total[i].part[p] = load_part<FloatPart>(partial + i * kLanes + p * kPartLanes);
  }
  const char* fetch = ahead.at;
  for (int64_t k = stretch.begin * kLanes; k < stretch.end * kLanes; k += kLanes) {
    for (int f = 0; f < ahead.per_step && fetch < ahead.end; ++f, fetch += 64) {
      prefetch(fetch);
      if constexpr (B > 0) prefetch(fetch + ahead.gate);
    }
    ZS_PARTS {
      FloatPart row[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) row[m] = load_part<FloatPart>(x + m * x_stride + k + p * kPartLanes);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const float* from = n < A ? a + n * stride : b + (n - A) * stride;
        const FloatPart weight = load_part<FloatPart>(from + k + p * kPartLanes);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) total[m * N + n].part[p] = fma_part(row[m], weight, total[m * N + n].part[p]);
      }
    }
  }
  ahead.at = fetch;
  if (!stretch.last) {
#pragma GCC unroll 32
    for (int i = 0; i < M * N; ++i)
      ZS_PARTS std::memcpy(partial + i * kLanes + p * kPartLanes, &total[i].part[p], sizeof(FloatPart));
    return;
  }
  int i = 0;
#pragma GCC unroll 4
  for (; i + 8 <= M * N; i += 8) sum_eight(total + i, sums + i);
#pragma GCC unroll 8
  for (; i < M * N; ++i) sums[i] = sum_lanes(total[i]);
}

ZS_INLINE float rounded(float x, const float*) { return x; }
ZS_INLINE float rounded(float x, const Bf16*) {
  Bf16 to;
  store_one(&to, x);
  return load_one(&to);
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

// The results of M rows and N columns from their sums [M, N], or [M, 2 N] with a gate.
template <class T, int M, int N, bool gated>
ZS_INLINE void finish(const LinearRows& in, int64_t row, int64_t column, const float* sums) {
  T* out = static_cast<T*>(in.out) + row * in.out_stride + column;
  if constexpr (gated) {
    float gates[kLanes] = {}, ups[kLanes] = {}, results[kLanes];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) gates[m * N + n] = sums[m * 2 * N + n], ups[m * N + n] = sums[m * 2 * N + N + n];
    store(results, silu_product<T>(load(gates), load(ups)));
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) store_one(out + m * in.out_stride + n, results[m * N + n]);
  } else {
    const T* bias = in.bias ? static_cast<const T*>(in.bias) + column : nullptr;
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        T* to = out + m * in.out_stride + n;
        float result = sums[m * N + n];
        if (bias) result += load_one(bias + n);
        if (in.add) result = load_one(to) + rounded(result, to);
        store_one(to, result);
      }
  }
}

// All rows of a chunk against N columns.
template <class T, int N, bool gated>
void column_strip(const LinearRows& in, const float* x, int64_t x_stride, int64_t row, int64_t rows, const float* weight,
                  const float* gate, int64_t stride, int64_t steps, int64_t column, Ahead ahead, float* partials) {
  constexpr int64_t kTotals = N * (gated ? 2 : 1) * kLanes;
  float sums[kTileRows * N * (gated ? 2 : 1)];
#define ZS_TILE(M)                                                                                        \
  if constexpr (gated)                                                                                    \
    tile<M, N, N>(x + m * x_stride, x_stride, gate, weight, stride, stretch, ahead, partial, sums);       \
  else                                                                                                    \
    tile<M, N, 0>(x + m * x_stride, x_stride, weight, weight, stride, stretch, ahead, partial, sums);     \
  if (stretch.last) finish<T, M, N, gated>(in, row + m, column, sums)
  for (int64_t begin = 0; begin < steps; begin += kStretch) {
    const int64_t end = steps - begin < kStretch ? steps : begin + kStretch;
    const Stretch stretch{begin, end, begin == 0, end == steps};
    int64_t m = 0;
    float* partial = partials;
    for (; m + kTileRows <= rows; m += kTileRows, partial += kTileRows * kTotals) { ZS_TILE(kTileRows); }
    switch (rows - m) {
      case 1: { ZS_TILE(1); break; }
      case 2: { if constexpr (kTileRows > 2) { ZS_TILE(2); } break; }
      case 3: { if constexpr (kTileRows > 3) { ZS_TILE(3); } break; }
      default: break;
    }
  }
#undef ZS_TILE
}

template <class T, bool gated>
ZS_INLINE void columns_of(int64_t count, const LinearRows& in, const float* x, int64_t x_stride, int64_t row,
                          int64_t rows, const float* weight, const float* gate, int64_t stride, int64_t steps,
                          int64_t column, const Ahead& ahead, float* partials) {
#define ZS_STRIP(N)                                                                                              \
  case N: {                                                                                                      \
    if constexpr (N <= (gated ? (kStrip + 1) / 2 : kStrip))                                                      \
      column_strip<T, N, gated>(in, x, x_stride, row, rows, weight, gate, stride, steps, column, ahead, partials); \
    break;                                                                                                       \
  }
  switch (count) { ZS_STRIP(1) ZS_STRIP(2) ZS_STRIP(3) ZS_STRIP(4) ZS_STRIP(5) ZS_STRIP(6) default: break; }
#undef ZS_STRIP
}

ZS_INLINE void widen(const float* from, int64_t columns, float* to) {
  std::memcpy(to, from, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t k = columns; k < padded(columns); ++k) to[k] = 0.0f;
}
ZS_INLINE void widen(const Bf16* from, int64_t columns, float* to) {
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) store(to + k, load(from + k));
  if (k < columns) store(to + k, load(from + k, columns - k, 0.0f));
}

template <class T>
int64_t chunk_rows(int64_t columns) {
  const int64_t rows = kLinearInputs / padded(columns) / kTileRows * kTileRows;
  return rows < kTileRows ? kTileRows : rows < kLinearRows ? rows : kLinearRows;
}

template <class T, bool gated>
void run(const LinearRows& in, int64_t first, int64_t last, float* scratch) {
  constexpr bool is_float = sizeof(T) == sizeof(float);
  constexpr int64_t width = gated ? (kStrip + 1) / 2 : kStrip;
  const int64_t columns = in.x.columns, steps = padded(columns) / kLanes;
  const bool as_it_lies = is_float && columns % kLanes == 0;
  const int64_t chunk = chunk_rows<T>(columns);
  float* weights = scratch;                                       // [2 * kTileColumns, padded]
  float* partials = scratch + 2 * kTileColumns * steps * kLanes;  // [chunk, kTileColumns, kLanes]
  float* inputs = partials + chunk * kTileColumns * kLanes;       // [chunk, padded]
  const T* weight = static_cast<const T*>(in.weight.data);
  const T* gate = static_cast<const T*>(in.gate);
  for (int64_t row = 0; row < in.x.rows; row += chunk) {
    const int64_t rows = in.x.rows - row < chunk ? in.x.rows - row : chunk;
    const T* from = static_cast<const T*>(in.x.data) + row * in.x.stride;
    const float* x = reinterpret_cast<const float*>(from);
    int64_t x_stride = in.x.stride;
    if (!as_it_lies) {
      for (int64_t m = 0; m < rows; ++m) widen(from + m * in.x.stride, columns, inputs + m * steps * kLanes);
      x = inputs, x_stride = steps * kLanes;
    }
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t n = first; n < last; n += width) {
      const int64_t count = last - n < width ? last - n : width;
      const T* w = weight + n * in.weight.stride;
      const T* g = gated ? gate + n * in.weight.stride : w;
      const int64_t bytes = width * in.weight.stride * static_cast<int64_t>(sizeof(T));
      const char* next = reinterpret_cast<const char*>(w) + bytes;
      const int per_step = static_cast<int>((width * static_cast<int64_t>(sizeof(T)) / 4 + tiles - 1) / tiles);
      const Ahead ahead{next, n + 2 * width > in.weight.rows ? next : next + bytes,
                        reinterpret_cast<const char*>(g) - reinterpret_cast<const char*>(w), per_step < 1 ? 1 : per_step};
      if (as_it_lies) {
        columns_of<T, gated>(count, in, x, x_stride, row, rows, reinterpret_cast<const float*>(w),
                             reinterpret_cast<const float*>(g), in.weight.stride, steps, n, ahead, partials);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          widen(w + i * in.weight.stride, columns, weights + i * steps * kLanes);
          if (gated) widen(g + i * in.weight.stride, columns, weights + (kTileColumns + i) * steps * kLanes);
        }
        columns_of<T, gated>(count, in, x, x_stride, row, rows, weights, weights + kTileColumns * steps * kLanes,
                             steps * kLanes, steps, n, ahead, partials);
      }
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
