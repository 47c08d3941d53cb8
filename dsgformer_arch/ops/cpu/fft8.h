// Fourier transforms of 8 values, each a vector V of channels.
#pragma once

#include <type_traits>
#include <utility>

namespace dsgformer {
namespace {

template <class V>
using Scalar = std::remove_reference_t<decltype(std::declval<V&>()[0])>;

// Real transform; out = Re 0, Re 4, Re 1, Im 1, Re 2, Im 2, Re 3, Im 3.
template <class V>
inline void real_fft(const V x[8], V out[8]) {
  constexpr Scalar<V> root_half = 0.70710678118654752440;
  const V a0 = x[0] + x[4], a1 = x[1] + x[5], a2 = x[2] + x[6], a3 = x[3] + x[7];
  const V b0 = x[0] - x[4], b1 = x[1] - x[5], b2 = x[2] - x[6], b3 = x[3] - x[7];
  const V s = a0 + a2, t = a1 + a3;
  out[0] = s + t;
  out[1] = s - t;
  out[4] = a0 - a2;
  out[5] = a3 - a1;
  const V c = (b1 - b3) * root_half, d = (b1 + b3) * root_half;
  out[2] = b0 + c;
  out[3] = -b2 - d;
  out[6] = b0 - c;
  out[7] = b2 - d;
}

// The inverse of real_fft times 8.
template <class V>
inline void real_inverse(const V in[8], V x[8]) {
  constexpr Scalar<V> root = 1.41421356237309504880;
  const V s = in[0] + in[1], t = in[0] - in[1];
  const V r2 = in[4] + in[4], i2 = in[5] + in[5];
  const V a0 = s + r2, a2 = s - r2, a1 = t - i2, a3 = t + i2;
  const V e = in[2] + in[6], f = in[7] - in[3];
  const V b0 = e + e, b2 = f + f;
  const V c = (in[2] - in[6]) * root, d = (in[3] + in[7]) * -root;
  const V b1 = c + d, b3 = d - c;
  x[0] = a0 + b0, x[4] = a0 - b0;
  x[1] = a1 + b1, x[5] = a1 - b1;
  x[2] = a2 + b2, x[6] = a2 - b2;
  x[3] = a3 + b3, x[7] = a3 - b3;
}

// Complex transform in place; e^(-2πi/8·jk), or its conjugate for SIGN = -1.
template <int SIGN, class V>
inline void complex_fft(V re[8], V im[8]) {
  constexpr Scalar<V> root_half = 0.70710678118654752440, g = SIGN;
  V er[4], ei[4], dr[4], di[4];
  for (int j = 0; j < 4; ++j) {
    er[j] = re[j] + re[j + 4], ei[j] = im[j] + im[j + 4];
    dr[j] = re[j] - re[j + 4], di[j] = im[j] - im[j + 4];
  }
  // odd outputs: d_j rotated by j eighths of a turn
  const V r1 = (dr[1] + g * di[1]) * root_half, i1 = (di[1] - g * dr[1]) * root_half;
  const V r2 = g * di[2], i2 = -g * dr[2];
  const V r3 = (g * di[3] - dr[3]) * root_half, i3 = (-g * dr[3] - di[3]) * root_half;
  const V odd_r[4] = {dr[0], r1, r2, r3}, odd_i[4] = {di[0], i1, i2, i3};
  auto four = [&](const V* ar, const V* ai, int first) {
    const V sr = ar[0] + ar[2], si = ai[0] + ai[2], tr = ar[1] + ar[3], ti = ai[1] + ai[3];
    const V ur = ar[0] - ar[2], ui = ai[0] - ai[2], vr = ar[1] - ar[3], vi = ai[1] - ai[3];
    re[first] = sr + tr, im[first] = si + ti;
    re[first + 4] = sr - tr, im[first + 4] = si - ti;
    re[first + 2] = ur + g * vi, im[first + 2] = ui - g * vr;
    re[first + 6] = ur - g * vi, im[first + 6] = ui + g * vr;
  };
  four(er, ei, 0);
  four(odd_r, odd_i, 1);
}

}  // namespace
}  // namespace dsgformer
