// Row sweeps, sixteen logits at a time. A row is read once: sums of e^z run relative to a power of two taken from the
// row's first block, and only where a later block outgrows it are they moved to a new one. Everything that is done once
// per row is done in double.
#include "zs_token_logprobs.h"

#include <cmath>

#include "zs_logit_blocks.h"

namespace zs::ZS_ISA {
namespace {

constexpr int64_t kBlock = 2048;         // logits; what a row needs beside itself stays in the first cache
constexpr double kExponentLimit = 1e6;   // up to here exponents are exact in float arithmetic, with room to spare
constexpr float kOutgrown = 0x1p50f;     // a block's sum above this asks for another power of two
constexpr double kLn2 = 0.6931471805599453094;

ZS_INLINE double total(Floats x) {
  alignas(64) float lane[kLanes];
  store(lane, x);
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += lane[i];
  return sum;
}

template <class T>
float block_max(const T* z, int64_t count) {
  Floats a = kNothing, b = kNothing;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    Floats x, y;
    load_pair(z + i, x, y);
    a = max(x, a);  // a NaN is passed over here; the sums keep it
    b = max(y, b);
  }
  for (; i < count; i += kLanes) a = max(load_some(z + i, count - i, kNothing), a);
  return max_lane(max(a, b));
}

// Sums over a row, relative to 2^exponent: e = 2^(scale z - exponent), `t` of e (z - center), `q` of e^2.
template <bool kEntropy, bool kSquares>
struct Sums {
  const float scale;
  double exponent = 0.0;
  bool started = false;
  float center = 0.0f;
  Floats s = 0.0f, t = 0.0f, q = 0.0f;

  explicit Sums(float scale_) : scale(scale_) {}

  // False where exponents would leave the range that is exact: the row has to be taken with an offset.
  template <class T>
  bool add(const T* z, int64_t count) {
    if (!started && !move_to(block_max(z, count))) return false;
    for (bool again = false;; again = true) {
      Floats block_s = 0.0f, block_t = 0.0f, block_q = 0.0f;
      add_block(z, count, block_s, block_t, block_q);
      if (!again && any(block_s > kOutgrown)) {
        if (!move_to(block_max(z, count))) return false;
        continue;
      }
      s += block_s;
      t += block_t;
      q += block_q;
      return true;
    }
  }

 private:
  bool move_to(float largest) {
    if (largest == kNothing) return true;
    const double next = std::nearbyint(static_cast<double>(largest) * scale);
    if (!(std::fabs(next) <= kExponentLimit)) return false;
    const float next_center = static_cast<float>(next / scale);
    const Floats factor = started ? static_cast<float>(std::exp2(exponent - next)) : 1.0f;  // not 0 * infinity
    t = (t + s * (center - next_center)) * factor;
    s *= factor;
    q = q * factor * factor;
    exponent = next;
    center = next_center;
    started = true;
    return true;
  }

  template <class T>
  ZS_INLINE void add_block(const T* z, int64_t count, Floats& s_out, Floats& t_out, Floats& q_out) const {
    const PowerOfTwo<5> power(scale, exponent, 1.0);
    Floats s0 = 0.0f, s1 = 0.0f, t0 = 0.0f, t1 = 0.0f, q0 = 0.0f, q1 = 0.0f;
    const auto step = [&](Floats x, Floats y) __attribute__((always_inline)) {
      x = power.clamp_both(x);
      y = power.clamp_both(y);
      const Floats a = power(x), b = power(y);
      s0 += a;
      s1 += b;
      if (kEntropy) {
        t0 = fma(a, x - center, t0);
        t1 = fma(b, y - center, t1);
      }
      if (kSquares) {
        q0 = fma(a, a, q0);
        q1 = fma(b, b, q1);
      }
    };
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      Floats x, y;
      load_pair(z + i, x, y);
      step(x, y);
    }
    if (i < count) {
      const int64_t above = count - i - kLanes;
      step(load_some(z + i, count - i, kNothing), above > 0 ? load(z + i + kLanes, above, kNothing) : Floats(kNothing));
    }
    s_out = s0 + s1;
    t_out = t0 + t1;
    q_out = q0 + q1;
  }
};

// One row's sums in double, with the exponent they are relative to, and the transform they were taken with.
struct RowSums {
  double s, t, q;
  double exponent;
  float center, scale;
  Transform transform;
};

template <class T, class RowsSums>
bool sum_row(const T* row, int64_t vocabulary, const Transform& transform, RowsSums& sums) {
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t count = vocabulary - begin < kBlock ? vocabulary - begin : kBlock;
    if (transform.idle()) {
      if (!sums.add(row + begin, count)) return false;
    } else {
      alignas(64) float z[kBlock];
      transform.block(row, begin, count, z, nullptr);
      if (!sums.add(z, count)) return false;
    }
  }
  return true;
}

template <class T>
float row_max(const T* row, int64_t vocabulary, const Transform& transform) {
  float largest = kNothing;
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t count = vocabulary - begin < kBlock ? vocabulary - begin : kBlock;
    alignas(64) float z[kBlock];
    if (!transform.idle()) transform.block(row, begin, count, z, nullptr);
    const float here = transform.idle() ? block_max(row + begin, count) : block_max(z, count);
    largest = here > largest ? here : largest;
  }
  return largest;
}

template <bool kEntropy, bool kSquares, class T>
RowSums sums_of(const T* row, int64_t vocabulary, Transform transform, float scale) {
  Sums<kEntropy, kSquares> sums(scale);
  if (!sum_row(row, vocabulary, transform, sums)) {
    // Taken relative to the largest z: the exponent is then 0.
    transform.offset = row_max(row, vocabulary, transform);
    Sums<kEntropy, kSquares> again(scale);
    again.started = true;
    sum_row(row, vocabulary, transform, again);
    return {total(again.s), total(again.t), total(again.q), 0.0, 0.0f, scale, transform};
  }
  return {total(sums.s), total(sums.t), total(sums.q), sums.exponent, sums.center, scale, transform};
}

template <class T>
RowSums sums_of(const T* row, int64_t vocabulary, const Transform& transform, float scale, bool entropy, bool squares) {
  if (squares) return sums_of<true, true>(row, vocabulary, transform, scale);
  if (entropy) return sums_of<true, false>(row, vocabulary, transform, scale);
  return sums_of<false, false>(row, vocabulary, transform, scale);
}

float scale_of(float inverse_temperature) { return static_cast<float>(inverse_temperature / kLn2); }

template <class T>
void forward_row(const LogitRows& rows, const RowStatistics& out, int64_t n) {
  const T* row = static_cast<const T*>(rows.data) + n * rows.row_stride;
  const double inverse_temperature = rows.inverse_temperature[n];
  const Transform plain{rows.bias, rows.softcap, rows.bias_first};
  const RowSums sums =
      sums_of(row, rows.vocabulary, plain, scale_of(rows.inverse_temperature[n]), out.entropy, out.sum_squares);
  const bool dead = sums.s == 0.0;
  const double log_sum = std::log(sums.s), shift = sums.exponent * kLn2;
  const double rate = sums.scale * kLn2;  // 1 / temperature as the sums have it, after the rounding of `scale`
  const double center = sums.center;

  const int64_t chosen = rows.index[n];
  double logprob = NAN;
  if (chosen >= 0 && chosen < rows.vocabulary) {
    float slope;
    const float z = sums.transform.one(row, chosen, &slope);
    const PowerOfTwo<5> power(sums.scale, sums.exponent, 1.0);
    const double share = power(power.clamp(z)).part[0][0] / sums.s;
    // A likely token's own error is in the sum as well and falls out of their ratio.
    logprob = share > 0.5 ? std::log(share) : rate * z - shift - log_sum;
    if (logprob > 0.0) logprob = 0.0;
  }
  out.logprobs[n] = dead ? kNothing : static_cast<float>(logprob);
  const double at_center = inverse_temperature * (center + sums.transform.offset);
  out.logsumexp[n] = dead ? kNothing : static_cast<float>(at_center + (shift - rate * center) + log_sum);
  if (out.entropy) {
    const double entropy = log_sum + (shift - rate * center) - rate * (sums.t / sums.s);
    out.entropy[n] = dead || entropy < 0.0 ? 0.0f : static_cast<float>(entropy);
  }
  if (out.sum_squares) out.sum_squares[n] = dead ? 0.0f : static_cast<float>(sums.q / (sums.s * sums.s));
}

template <class T>
void partials_row(const LogitRows& rows, float* out, int64_t n) {
  const T* row = static_cast<const T*>(rows.data) + n * rows.row_stride;
  const double inverse_temperature = rows.inverse_temperature[n];
  const Transform plain{rows.bias, rows.softcap, rows.bias_first};
  const RowSums sums =
      sums_of(row, rows.vocabulary, plain, scale_of(rows.inverse_temperature[n]), true, true);
  const float largest = row_max(row, rows.vocabulary, sums.transform);
  const bool dead = sums.s == 0.0;
  const double factor = dead ? 0.0 : std::exp2(sums.exponent - static_cast<double>(largest) * sums.scale);
  const double offset = sums.transform.offset, center = sums.center;
  out[0] = dead ? kNothing : static_cast<float>(inverse_temperature * (largest + offset));
  out[1] = static_cast<float>(sums.s * factor);
  out[2] = dead ? 0.0f : static_cast<float>(inverse_temperature * (sums.t + (center + offset) * sums.s) * factor);
  out[3] = static_cast<float>(sums.q * factor * factor);
  const int64_t chosen = rows.index[n];
  float slope;
  const bool here = chosen >= 0 && chosen < rows.vocabulary;
  out[4] = here ? static_cast<float>(inverse_temperature * (sums.transform.one(row, chosen, &slope) + offset)) : 0.0f;
}

template <class T, class Out>
constexpr bool kBothBf16 = false;
template <>
constexpr bool kBothBf16<Bf16, Bf16> = true;

// p (at_center + rate (z - center)): the gradient of the logits of one row, up to the chosen one's own share.
template <int kDegree>
struct RowGradient {
  PowerOfTwo<kDegree> power;
  float center, at_center, rate;

  template <bool kEntropy>
  ZS_INLINE Floats of(Floats z) const {
    z = power.clamp(z);
    const Floats p = power(z);  // without an entropy gradient the factor is in the coefficients
    return kEntropy ? p * fma(z - center, rate, at_center) : p;
  }
  template <bool kEntropy, class T, class Out>
  void block(const T* z, Out* out, int64_t count) const {
    int64_t i = 0;
    if constexpr (kBothBf16<T, Out>) {
      for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        Floats x, y;
        load_pair(z + i, x, y);
        store_pair(out + i, of<kEntropy>(x), of<kEntropy>(y));
      }
    }
    for (; i < count; i += kLanes) store_some(out + i, of<kEntropy>(load_some(z + i, count - i, kNothing)), count - i);
  }
};

template <class T, class Out>
void backward_row(const LogitRows& rows, const RowGradients& grads, int64_t n) {
  constexpr int kDegree = sizeof(Out) == sizeof(float) ? 5 : 4;
  const T* row = static_cast<const T*>(rows.data) + n * rows.row_stride;
  Out* out = static_cast<Out*>(grads.out) + n * grads.out_row_stride;
  const double g = grads.grad_logprobs[n], h = grads.grad_entropy ? grads.grad_entropy[n] : 0.0;
  const double logsumexp = grads.logsumexp[n], entropy = h == 0.0 ? 0.0 : grads.entropy[n];
  if ((rows.mask && !rows.mask[n]) || logsumexp == kNothing || (g == 0.0 && h == 0.0)) {
    std::memset(static_cast<void*>(out), 0, static_cast<size_t>(rows.vocabulary) * sizeof(Out));
    return;
  }
  const double inverse_temperature = rows.inverse_temperature[n];
  const float scale = scale_of(rows.inverse_temperature[n]);
  Transform transform{rows.bias, rows.softcap, rows.bias_first};
  double exponent = logsumexp / inverse_temperature * scale;  // of two; the sum itself is 2^exponent
  if (!(std::fabs(exponent) <= kExponentLimit)) {
    transform.offset = static_cast<float>(logsumexp / inverse_temperature);
    exponent = (logsumexp / inverse_temperature - transform.offset) * scale;
  }
  const double whole = std::nearbyint(exponent), center = static_cast<float>(whole / scale);
  // log p = (z + offset) / temperature - logsumexp, here at z = center.
  const double logp_center = inverse_temperature * (center + transform.offset) - logsumexp;
  const double factor = std::exp2(whole - exponent) * (h == 0.0 ? -inverse_temperature * g : 1.0);
  const RowGradient<kDegree> gradient{{scale, whole, factor},
                                      static_cast<float>(center),
                                      static_cast<float>(-inverse_temperature * (g + h * (entropy + logp_center))),
                                      static_cast<float>(-inverse_temperature * h * inverse_temperature)};

  if (std::isnan(factor) || std::isnan(gradient.at_center)) {
    for (int64_t i = 0; i < rows.vocabulary; ++i) store_one(out + i, NAN);
    return;
  }

  const int64_t chosen = rows.index[n];
  const bool here = chosen >= 0 && chosen < rows.vocabulary;
  float slope = 0.0f;
  double chosen_gradient = 0.0;
  // Before the row is overwritten.
  const double z_chosen = here ? transform.one(row, chosen, &slope) : kNothing;
  if (z_chosen != kNothing) {
    const double logp = inverse_temperature * (z_chosen + transform.offset) - logsumexp, p = std::exp(logp);
    chosen_gradient = inverse_temperature * slope * (g * (1.0 - p) - (h == 0.0 ? 0.0 : h * p * (logp + entropy)));
  }
  for (int64_t begin = 0; begin < rows.vocabulary; begin += kBlock) {
    const int64_t count = rows.vocabulary - begin < kBlock ? rows.vocabulary - begin : kBlock;
    if (transform.idle()) {
      if (h == 0.0) gradient.template block<false>(row + begin, out + begin, count);
      else gradient.template block<true>(row + begin, out + begin, count);
      continue;
    }
    alignas(64) float z[kBlock], slopes[kBlock];
    transform.block(row, begin, count, z, slopes);
    if (h == 0.0) gradient.template block<false>(z, z, count);
    else gradient.template block<true>(z, z, count);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats slope_here = load_some(slopes + i, count - i, 0.0f);
      store_some(out + begin + i, load_some(z + i, count - i, 0.0f) * slope_here, count - i);
    }
  }
  if (here) store_one(out + chosen, static_cast<float>(chosen_gradient));
}

template <class T>
void backward_rows(const LogitRows& rows, const RowGradients& grads, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) switch (grads.out_element) {
      case Element::float32: backward_row<T, float>(rows, grads, n); break;
      case Element::bfloat16: backward_row<T, Bf16>(rows, grads, n); break;
      case Element::float16: backward_row<T, Half>(rows, grads, n); break;
    }
}

}  // namespace

void token_logprobs_forward(const LogitRows& rows, const RowStatistics& out, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    if (rows.mask && !rows.mask[n]) {
      out.logprobs[n] = out.logsumexp[n] = 0.0f;
      if (out.entropy) out.entropy[n] = 0.0f;
      if (out.sum_squares) out.sum_squares[n] = 0.0f;
      continue;
    }
    switch (rows.element) {
      case Element::float32: forward_row<float>(rows, out, n); break;
      case Element::bfloat16: forward_row<Bf16>(rows, out, n); break;
      case Element::float16: forward_row<Half>(rows, out, n); break;
    }
  }
}

void token_logprobs_partials(const LogitRows& rows, float* out, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) switch (rows.element) {
      case Element::float32: partials_row<float>(rows, out + 5 * n, n); break;
      case Element::bfloat16: partials_row<Bf16>(rows, out + 5 * n, n); break;
      case Element::float16: partials_row<Half>(rows, out + 5 * n, n); break;
    }
}

void token_logprobs_backward(const LogitRows& rows, const RowGradients& grads, int64_t first, int64_t last) {
  switch (rows.element) {
    case Element::float32: return backward_rows<float>(rows, grads, first, last);
    case Element::bfloat16: return backward_rows<Bf16>(rows, grads, first, last);
    case Element::float16: return backward_rows<Half>(rows, grads, first, last);
  }
}

}  // namespace zs::ZS_ISA
