// exp, exp2, expm1, log and tanh of sixteen floats; included by zs_simd.h. Polynomials fitted by Remez exchange for the
// least largest relative error; errors are in units in the last place (ulp) over all floats.
#pragma once

namespace zs::ZS_ISA {

// x * factor rounded to the nearest whole number, for sizes below 2^22, and 2^(that + Bias) where it is at least 2^-126;
// 2^-127 becomes 0.
template <int Bias>
struct WholePower {
  Floats whole, power;
  ZS_INLINE explicit WholePower(Floats x, Floats factor) {
    // Adding 1.5 * 2^23 pushes the fraction out; the exponent's bias rides along, and a shift makes it an exponent.
    const float push = 12582912.0f + 127 + Bias;
    const Floats pushed = fma(x, factor, push);
    whole = pushed - push;
    power = floats_of(bits_of(pushed) << 23);
  }
};

// 2^x, <= 2 ulp, for -127 <= x < 2^21: 0 below -126.5, infinity from 127.5 on, NaN where x is NaN.
ZS_INLINE Floats exp2_from_127(Floats x) {
  const float push = 12582912.0f + 127;  // as in WholePower; the argument is whole + r already
  const Floats pushed = x + push;
  const Floats r = x - (pushed - push);
  Floats q = fma(r, 0x1.5bda7ap-10f, 0x1.3ce8bp-7f);
  q = fma(q, r, 0x1.c6b6d8p-5f);
  q = fma(q, r, 0x1.ebf9c2p-3f);
  q = fma(q, r, 0x1.62e42ap-1f);
  q = fma(q, r, 1.0f);
  return q * floats_of(bits_of(pushed) << 23);
}
// The same for any x < 2^21, -inf too.
ZS_INLINE Floats exp2(Floats x) { return exp2_from_127(max(-127.0f, x)); }

// e^x, <= 1.5 ulp. Results below 2^-125.5 (1.7e-38) are 0; infinity where the result exceeds the largest float.
ZS_INLINE Floats exp(Floats x) {
  x = min(89.0f, max(-87.6f, x));
  const WholePower<-1> split(x, 0x1.715476p+0f);
  Floats r = fma(split.whole, -0x1.62e4p-1f, x);
  r = fma(split.whole, -0x1.7f7d1cp-20f, r);
  Floats q = fma(r, 0x1.5dce1ep-10f, 0x1.11ea8cp-7f);
  q = fma(q, r, 0x1.556424p-5f);
  q = fma(q, r, 0x1.5554fcp-3f);
  q = fma(q, r, 0x1.fffff6p-2f);
  q = fma(r * r, q, r) + 1.0f;
  return q * split.power * 2.0f;
}

// e^x - 1, accurate near 0 too, <= 2 ulp.
ZS_INLINE Floats expm1(Floats x) {
  const Floats bounded = min(89.0f, max(-87.6f, x));
  const WholePower<-1> split(bounded, 0x1.715476p+0f);
  Floats r = fma(split.whole, -0x1.62e4p-1f, bounded);
  r = fma(split.whole, -0x1.7f7d1cp-20f, r);
  Floats q = fma(r, 0x1.975248p-13f, 0x1.6d23cap-10f);
  q = fma(q, r, 0x1.11160ap-7f);
  q = fma(q, r, 0x1.5554fep-5f);
  q = fma(q, r, 0x1.555554p-3f);
  q = fma(q, r, 0.5f);
  q = fma(r * r, q, r);  // e^r - 1
  const Floats power = split.power;
  const Floats large = fma(q, power, power - 0.5f) * 2.0f;
  // -0 and the smallest inputs pass unchanged.
  return select(split.whole == 0.0f, select(abs(x) < 0x1p-24f, x, q), large);
}

// Natural logarithm, <= 1 ulp; log(0) = -inf, NaN below 0.
ZS_INLINE Floats log(Floats x) {
  const Mask tiny = x < 0x1p-126f;  // denormal, 0 or negative
  const Uints u = bits_of(select(tiny, x * 0x1p25f, x));
  // Exponent and fraction such that the fraction lies in [sqrt(1/2), sqrt(2)).
  const Uints shifted = u - 0x3f3504f3u;
  Floats exponent;
  ZS_PARTS exponent.part[p] = __builtin_convertvector((IntPart)shifted.part[p] >> 23, FloatPart);
  exponent = select(tiny, exponent - 25.0f, exponent);
  const Floats f = floats_of((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  Floats q = fma(f, 0x1.1457c4p-4f, -0x1.de3c1cp-4f);
  q = fma(q, f, 0x1.e6f062p-4f);
  q = fma(q, f, -0x1.fc2206p-4f);
  q = fma(q, f, 0x1.233768p-3f);
  q = fma(q, f, -0x1.555c4ep-3f);
  q = fma(q, f, 0x1.99a4b6p-3f);
  q = fma(q, f, -0x1.000006p-2f);
  q = fma(q, f, 0x1.555548p-2f);
  const Floats square = f * f;
  Floats low = fma(exponent, 0x1.7f7d1cp-20f, square * f * q);
  low = fma(square, -0.5f, low) + f;
  Floats r = fma(exponent, 0x1.62e4p-1f, low);
  r = select(x == __builtin_inff(), x, r);
  r = select(x == 0.0f, -__builtin_inff(), r);
  return select(x >= 0.0f, r, __builtin_nanf(""));
}

// Hyperbolic tangent, <= 3 ulp.
ZS_INLINE Floats tanh(Floats x) {
  const Floats e = expm1(min(20.0f, abs(x)) * 2.0f);  // from 10 on the result rounds to 1
  return select(unordered(x), x, copy_sign(e / (e + 2.0f), x));
}

}  // namespace zs::ZS_ISA
