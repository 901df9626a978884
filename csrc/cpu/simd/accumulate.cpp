#include "zs_accumulate.h"

#include "zs_simd.h"

namespace zs::ZS_ISA {
namespace {

typedef int8_t SixteenBytes __attribute__((vector_size(16)));

template <class T>
void add_to(float* sum, const T* addend, int64_t first, int64_t last) {
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) store(sum + i, load(sum + i) + load(addend + i));
  if (i < last) store(sum + i, load(sum + i, last - i, 0.0f) + load(addend + i, last - i, 0.0f), last - i);
}

ZS_INLINE Uints widened(const int8_t* from) {
  const SixteenBytes bytes = load_part<SixteenBytes>(from);
#if defined(__AVX512F__)
  Uints r;
  r.part[0] = (UintPart)_mm512_cvtepi8_epi32((__m128i)bytes);
  return r;
#elif defined(__AVX2__)
  Uints r;
  r.part[0] = (UintPart)_mm256_cvtepi8_epi32((__m128i)bytes);
  r.part[1] = (UintPart)_mm256_cvtepi8_epi32(_mm_bsrli_si128((__m128i)bytes, 8));
  return r;
#else
  Uints r;
  ZS_PARTS for (int i = 0; i < kPartLanes; ++i) r.part[p][i] = static_cast<uint32_t>(bytes[p * kPartLanes + i]);
  return r;
#endif
}
// Each lane's lowest byte.
ZS_INLINE SixteenBytes narrowed(Uints x) {
#if defined(__AVX512F__)
  return (SixteenBytes)_mm512_cvtepi32_epi8((__m512i)x.part[0]);
#else
  SixteenBytes r;
  ZS_PARTS for (int i = 0; i < kPartLanes; ++i) r[p * kPartLanes + i] = static_cast<int8_t>(x.part[p][i]);
  return r;
#endif
}

// high's bits in the upper half plus low, in units of 2^8, are the bits of the sum as a float.
ZS_INLINE void add_split(Bf16* high, int8_t* low, const Bf16* addend) {
  const Floats sum = floats_of(bits_of(load(high)) + (widened(low) << 8)) + load(addend);
  const Uints bits = bits_of(sum) + 0x80u;       // rounded to 24 bits
  const Uints nearest = (bits + 0x8000u) >> 16;  // half way goes up: what is left lies in [-128, 127]
  store(high, floats_of(nearest << 16));
  const SixteenBytes left = narrowed((bits - (nearest << 16)) >> 8);
  std::memcpy(low, &left, sizeof left);
}

}  // namespace

void accumulate(float* sum, const void* addend, Element element, int64_t first, int64_t last) {
  switch (element) {
    case Element::float32: return add_to(sum, static_cast<const float*>(addend), first, last);
    case Element::bfloat16: return add_to(sum, static_cast<const Bf16*>(addend), first, last);
    case Element::float16: return add_to(sum, static_cast<const Half*>(addend), first, last);
  }
}

void accumulate_split(void* high_, int8_t* low, const void* addend_, int64_t first, int64_t last) {
  Bf16* high = static_cast<Bf16*>(high_);
  const Bf16* addend = static_cast<const Bf16*>(addend_);
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) add_split(high + i, low + i, addend + i);
  if (i == last) return;
  Bf16 some_high[kLanes] = {}, some_addend[kLanes] = {};
  int8_t some_low[kLanes] = {};
  const size_t left = static_cast<size_t>(last - i);
  std::memcpy(some_high, high + i, left * sizeof(Bf16));
  std::memcpy(some_addend, addend + i, left * sizeof(Bf16));
  std::memcpy(some_low, low + i, left);
  add_split(some_high, some_low, some_addend);
  std::memcpy(high + i, some_high, left * sizeof(Bf16));
  std::memcpy(low + i, some_low, left);
}

}  // namespace zs::ZS_ISA
