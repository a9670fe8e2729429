// Vectors of W floats, their exp2 and softplus, and sums over their lanes, in the vector types of GCC and Clang.
// Exact to about 1e-7; no -ffast-math, which would fold the rounding below.

#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWide = 16, kNarrow = 8;  // lanes
#elif defined(__AVX2__)
constexpr int kWide = 8, kNarrow = 8;
#else
constexpr int kWide = 4, kNarrow = 4;
#endif
constexpr float kLog2e = 1.44269504088896341f;

template <int W>
struct Simd {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));
  typedef double D __attribute__((vector_size(8 * W)));
  typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
};

template <int W>
inline typename Simd<W>::F load(const float *from, int count) {
  if (count == W) return *reinterpret_cast<const typename Simd<W>::Unaligned *>(from);
  typename Simd<W>::F result = {};
  for (int lane = 0; lane < count; lane++) result[lane] = from[lane];
  return result;
}

template <int W>
inline void store(float *to, int count, typename Simd<W>::F value) {
  if (count == W) {
    *reinterpret_cast<typename Simd<W>::Unaligned *>(to) = value;
    return;
  }
  for (int lane = 0; lane < count; lane++) to[lane] = value[lane];
}

template <int W>
inline void put(float *to, int count, typename Simd<W>::F value, bool add) {
  store<W>(to, count, add ? load<W>(to, count) + value : value);
}

// The larger of x and `low`, NaN for NaN.
template <int W>
inline typename Simd<W>::F at_least(typename Simd<W>::F x, float low) {
  const typename Simd<W>::F limit = typename Simd<W>::F{} + low;
#if defined(__AVX512F__)
  if constexpr (W == 16) return (typename Simd<W>::F)_mm512_max_ps((__m512)limit, (__m512)x);
#endif
#if defined(__AVX2__)
  if constexpr (W == 8) return (typename Simd<W>::F)_mm256_max_ps((__m256)limit, (__m256)x);
#endif
  return limit > x ? limit : x;
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold

template <int W>
inline typename Simd<W>::F nearest(typename Simd<W>::F x) {
  return (x + kRound) - kRound;
}

// p * 2^n for an integer n >= -127 and 1/2 < p < 2.
template <int W>
inline typename Simd<W>::F scale(typename Simd<W>::F p, typename Simd<W>::F n) {
  using F = typename Simd<W>::F;
  using I = typename Simd<W>::I;
#if defined(__AVX512F__)
  if constexpr (W == 16) return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#endif
#if defined(__AVX512VL__)
  if constexpr (W == 8) return (F)_mm256_scalef_ps((__m256)p, (__m256)n);
#endif
  return (F)((I)p + ((I)(n + kRound) << 23));
}

// 2^f for |f| <= 1/2. The polynomial for (2^f - 1) / f is a Chebyshev interpolation (relative error 2e-8), so that
// decays near 1 keep their distance from 1.
template <int W>
inline typename Simd<W>::F fraction(typename Simd<W>::F f) {
  typename Simd<W>::F p = f * 1.545316294e-04f + 1.339086336e-03f;
  p = p * f + 9.618082557e-03f;
  p = p * f + 5.550357114e-02f;
  p = p * f + 2.402265076e-01f;
  p = p * f + 6.931471880e-01f;
  return p * f + 1.0f;
}

// 2^x for x <= 0; 0 below 2^-127, NaN for NaN.
template <int W>
inline typename Simd<W>::F exp2(typename Simd<W>::F x) {
  x = at_least<W>(x, -127.0f);
  const typename Simd<W>::F n = nearest<W>(x);
  return scale<W>(fraction<W>(x - n), n);
}

// softplus(v) and its derivative. exp(-|v|) subtracts n ln 2 in two parts, because v log2(e) alone would lose bits;
// log1p(e) is the series of 2 artanh(e / (2 + e)), exact to 1.4e-8 for e in [0, 1].
template <int W>
inline typename Simd<W>::F softplus(typename Simd<W>::F v, typename Simd<W>::F *derivative) {
  using F = typename Simd<W>::F;
  const F zero = {}, x = at_least<W>(v > zero ? -v : v, -87.0f), n = nearest<W>(x * kLog2e);
  const F rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const F e = scale<W>(fraction<W>(rest * kLog2e), n);
  const F s = e / (e + 2.0f), s2 = s * s;
  F series = s2 * (1.0f / 13) + 1.0f / 11;
  series = series * s2 + 1.0f / 9;
  series = series * s2 + 1.0f / 7;
  series = series * s2 + 1.0f / 5;
  series = series * s2 + 1.0f / 3;
  series = (series * s2 + 1.0f) * s;
  if (derivative) *derivative = (v >= zero ? zero + 1.0f : e) / (e + 1.0f);
  return (v > zero ? v : zero) + (series + series);
}

template <class V, int... Index>
inline V pick(V a, V b, std::integer_sequence<int, Index...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Index...);
#else
  typedef int32_t Mask __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Mask{Index...});
#endif
}

// Lanes of (a, b), in blocks of `Step`: even blocks of the result from a, odd ones from b, the lower or higher half.
template <int W, int Step, int Half, class V, int... Lane>
inline V halves(V a, V b, std::integer_sequence<int, Lane...>) {
  return pick(a, b, std::integer_sequence<int, ((Lane / Step & ~1) * Step + Lane % Step + Half * Step +
                                                (Lane / Step % 2) * W)...>());
}

// Sum the lanes of W vectors; lane i of v[0] becomes the sum of v[i].
template <int W, int Step = 1>
inline void sum_lanes(typename Simd<W>::F *v) {
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  for (int i = 0; i < W / (2 * Step); i++)
    v[i] = halves<W, Step, 0>(v[2 * i], v[2 * i + 1], lanes) + halves<W, Step, 1>(v[2 * i], v[2 * i + 1], lanes);
  if constexpr (2 * Step < W) sum_lanes<W, 2 * Step>(v);
}

}  // namespace
