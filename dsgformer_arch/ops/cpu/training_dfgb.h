// Training: DFGB's transforms, GELU and their gradients.
#pragma once

#include "fft8.h"
#include "training_vectors.h"

namespace {

using dsgformer::complex_fft;
using dsgformer::real_fft;
using dsgformer::real_inverse;

// rfft2 of an 8×8 block: the columns 0 and 4 as real_fft orders them, the others as complex numbers.
template <class W>
struct Spectrum {
  typename W::V real[2][8], re[3][8], im[3][8];
};

template <class W, class V = typename W::V>
void transform(const V block[PIXELS], Spectrum<W>& s) {
  for (int y = 0; y < 8; ++y) {
    V row[8];
    real_fft(block + 8 * y, row);
    s.real[0][y] = row[0], s.real[1][y] = row[1];
    for (int v = 0; v < 3; ++v) s.re[v][y] = row[2 + 2 * v], s.im[v][y] = row[3 + 2 * v];
  }
  for (int j = 0; j < 2; ++j) {
    V x[8];
    for (int y = 0; y < 8; ++y) x[y] = s.real[j][y];
    real_fft(x, s.real[j]);
  }
  for (int v = 0; v < 3; ++v) complex_fft<1>(s.re[v], s.im[v]);
}

// The frequency u of the i-th number that real_fft gives.
constexpr int REAL_ROWS[8] = {0, 4, 1, 1, 2, 2, 3, 3};

// irfft2 of the spectrum times the mask, which is (8, 5, C) with 1/64 in it and equal at ±u in the columns 0 and 4.
template <class W, class V = typename W::V>
void inverse(const Spectrum<W>& s, const typename W::S* mask, int64_t C, V block[PIXELS]) {
  auto m = [&](int u, int v) { return load<W>(mask + (u * HALF + v) * C); };
  V rows[8][8];
  for (int j = 0; j < 2; ++j) {
    V in[8], x[8];
    for (int i = 0; i < 8; ++i) in[i] = s.real[j][i] * m(REAL_ROWS[i], 4 * j);
    real_inverse(in, x);
    for (int y = 0; y < 8; ++y) rows[y][j] = x[y];
  }
  for (int v = 0; v < 3; ++v) {
    V re[8], im[8];
    for (int u = 0; u < 8; ++u) {
      const V mask_uv = m(u, v + 1);
      re[u] = s.re[v][u] * mask_uv, im[u] = s.im[v][u] * mask_uv;
    }
    complex_fft<-1>(re, im);
    for (int y = 0; y < 8; ++y) rows[y][2 + 2 * v] = re[y], rows[y][3 + 2 * v] = im[y];
  }
  for (int y = 0; y < 8; ++y) real_inverse(rows[y], block + 8 * y);
}

// Adds to (8, 5, C) the gradient of the mask; of the columns 0 and 4 only u = 0 … 4, for ±u together.
template <class W>
void mask_gradient(const Spectrum<W>& u, const Spectrum<W>& d, typename W::S* out, int64_t C) {
  auto add = [&](int row, int v, typename W::V value) {
    auto* at = out + (row * HALF + v) * C;
    store<W>(at, load<W>(at) + value);
  };
  for (int j = 0; j < 2; ++j) {
    add(0, 4 * j, u.real[j][0] * d.real[j][0]);
    add(4, 4 * j, u.real[j][1] * d.real[j][1]);
    for (int i = 1; i < 4; ++i)
      add(i, 4 * j, u.real[j][2 * i] * d.real[j][2 * i] + u.real[j][2 * i + 1] * d.real[j][2 * i + 1]);
  }
  for (int v = 0; v < 3; ++v)
    for (int i = 0; i < 8; ++i) add(i, v + 1, u.re[v][i] * d.re[v][i] + u.im[v][i] * d.im[v][i]);
}

// GELU(x) and, where asked for, its slope.  In float Φ is 7.1.26 of Abramowitz and Stegun's handbook, |error| < 1e-7.
template <class W, bool SLOPE, class V = typename W::V>
inline V gelu(V x, V& slope) {
  if constexpr (std::is_same_v<typename W::S, double>) {
    V phi, density;
    for (int i = 0; i < W::L; ++i) {
      phi[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
      density[i] = 0.39894228040143267794 * std::exp(-0.5 * x[i] * x[i]);
    }
    if constexpr (SLOPE) slope = phi + x * density;
    return x * phi;
  } else {
    const V z = (x < 0 ? -x : x) * 0.70710678118654752f;
    const V denominator = 1.0f + 0.3275911f * z;
    V t;
#if defined(__AVX512F__)
    if constexpr (W::L == 16) {
      t = (V)_mm512_rcp14_ps((__m512)denominator);
      t = t * (2.0f - denominator * t);
    } else {
      t = 1.0f / denominator;
    }
#else
    t = 1.0f / denominator;
#endif
    const V poly =
        t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    // e^(-z²) = 2^n 2^f, n whole and |f| ≤ 1/2
    V e = -z * z * 1.44269504088896341f;
    e = e < -126.0f ? splat<W>(-126.0f) : e;
    const V shifted = e + 12582912.0f;
    const V f = (e - (shifted - 12582912.0f)) * 0.693147180559945f;
    const V power =
        1.0f +
        f * (1.0f +
             f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
    const auto scale = (__builtin_convertvector(shifted - 12582912.0f, typename W::I) + 127) << 23;
    const V density = power * (V)scale;
    const V tail = 0.5f * poly * density;
    const V phi = x < 0 ? tail : 1.0f - tail;
    if constexpr (SLOPE) slope = phi + x * density * 0.39894228040143268f;
    return x * phi;
  }
}

}  // namespace
