// Sums over the lanes of one vector and of eight at once, in the order of `sum`; for sources under csrc/cpu/simd.
#pragma once

#include "zs_simd.h"

namespace zs::ZS_ISA {

#if defined(__AVX2__)
ZS_INLINE float sum_quarter(__m128 x) {
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
ZS_INLINE float sum_lanes(Floats x) {
#if defined(__AVX512F__)
  const __m512 all = (__m512)x.part[0];
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
  const __m256 half = _mm256_add_ps((__m256)x.part[0], (__m256)x.part[1]);
#endif
  return sum_quarter(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#else
ZS_INLINE float sum_lanes(Floats x) { return sum(x); }
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// The sums of four vectors, each in two lanes that are still to be added: 0 0 2 2 1 1 3 3.
ZS_INLINE __m256 fold_four(const Floats* x) {
  __m256 a[4], b[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) a[i] = _mm256_add_ps((__m256)x[i].part[0], (__m256)x[i].part[1]);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    b[i] = _mm256_add_ps(_mm256_permute2f128_ps(a[2 * i], a[2 * i + 1], 0x20),
                         _mm256_permute2f128_ps(a[2 * i], a[2 * i + 1], 0x31));
  const __m256d low = _mm256_castps_pd(b[0]), high = _mm256_castps_pd(b[1]);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)),
                       _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
}
#endif

ZS_INLINE void sum_eight(const Floats* x, float* to) {
#if defined(__AVX512F__)
  __m512 a[4], b[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 p = (__m512)x[2 * i].part[0], q = (__m512)x[2 * i + 1].part[0];
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xee));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
  const __m512d low = _mm512_castps_pd(b[0]), high = _mm512_castps_pd(b[1]);
  const __m512 c = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m512 d = _mm512_add_ps(c, _mm512_permute_ps(c, 0xb1));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, d)));
#elif defined(__AVX2__)
  const __m256 c[2] = {fold_four(x), fold_four(x + 4)};
  const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(c[0], c[1], 0x88), _mm256_shuffle_ps(c[0], c[1], 0xdd));
  _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
  for (int i = 0; i < 8; ++i) to[i] = sum_lanes(x[i]);
#endif
}

ZS_INLINE void sum_four(const Floats* x, float* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256 c = fold_four(x);
  const __m256 d = _mm256_add_ps(_mm256_shuffle_ps(c, c, 0x88), _mm256_shuffle_ps(c, c, 0xdd));
  _mm_storeu_ps(to, _mm_unpacklo_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
#else
  for (int i = 0; i < 4; ++i) to[i] = sum_lanes(x[i]);
#endif
}

}  // namespace zs::ZS_ISA
