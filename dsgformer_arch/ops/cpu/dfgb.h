// DFGB: GELU and the filter of an 8×8 block.
#pragma once

#include <cstring>

#include "simd.h"

namespace dsgformer {
namespace {

constexpr int64_t BLOCK = 8;
constexpr int64_t HALF = BLOCK / 2 + 1;

// Φ by 7.1.26 of Abramowitz and Stegun's handbook, |error| < 1e-7: GELU(x) = x Φ(x).
inline vec gelu(vec x) {
  const vec z = (x < 0 ? -x : x) * 0.70710678118654752f;
  const vec t = reciprocal(1.0f + 0.3275911f * z);
  const vec poly =
      t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  // e^(-z²) = 2^n 2^f, n whole and |f| ≤ 1/2
  vec e = -z * z * 1.44269504088896341f;
  e = e < -126.0f ? splat(-126.0f) : e;
  const vec shifted = e + 12582912.0f;
  const vec f = (e - (shifted - 12582912.0f)) * 0.693147180559945f;
  const vec power = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
  const vec_i scale = (__builtin_convertvector(shifted - 12582912.0f, vec_i) + 127) << 23;
  const vec tail = 0.5f * poly * power * (vec)scale;
  return x * (x < 0 ? tail : 1.0f - tail);
}

constexpr float ROOT_HALF = 0.70710678118654752f;

// Real transform of 8 values; out = Re 0, Re 4, Re 1, Im 1, Re 2, Im 2, Re 3, Im 3.
inline void real_fft(const vec x[8], vec out[8]) {
  const vec a0 = x[0] + x[4], a1 = x[1] + x[5], a2 = x[2] + x[6], a3 = x[3] + x[7];
  const vec b0 = x[0] - x[4], b1 = x[1] - x[5], b2 = x[2] - x[6], b3 = x[3] - x[7];
  const vec s = a0 + a2, t = a1 + a3;
  out[0] = s + t;
  out[1] = s - t;
  out[4] = a0 - a2;
  out[5] = a3 - a1;
  const vec c = (b1 - b3) * ROOT_HALF, d = (b1 + b3) * ROOT_HALF;
  out[2] = b0 + c;
  out[3] = -b2 - d;
  out[6] = b0 - c;
  out[7] = b2 - d;
}

// The inverse of real_fft times 8.
inline void real_inverse(const vec in[8], vec x[8]) {
  const vec s = in[0] + in[1], t = in[0] - in[1];
  const vec r2 = in[4] + in[4], i2 = in[5] + in[5];
  const vec a0 = s + r2, a2 = s - r2, a1 = t - i2, a3 = t + i2;
  const vec b0 = 2.0f * (in[2] + in[6]), b2 = 2.0f * (in[7] - in[3]);
  const vec c = (in[2] - in[6]) * (2.0f * ROOT_HALF), d = (in[3] + in[7]) * (-2.0f * ROOT_HALF);
  const vec b1 = c + d, b3 = d - c;
  x[0] = a0 + b0, x[4] = a0 - b0;
  x[1] = a1 + b1, x[5] = a1 - b1;
  x[2] = a2 + b2, x[6] = a2 - b2;
  x[3] = a3 + b3, x[7] = a3 - b3;
}

// Complex transform of 8 values in place; e^(-2πi/8·jk), or its conjugate for SIGN = -1.
template <int SIGN>
inline void complex_fft(vec re[8], vec im[8]) {
  vec er[4], ei[4], dr[4], di[4];
  for (int j = 0; j < 4; ++j) {
    er[j] = re[j] + re[j + 4], ei[j] = im[j] + im[j + 4];
    dr[j] = re[j] - re[j + 4], di[j] = im[j] - im[j + 4];
  }
  // odd outputs: d_j turned by j eighths of a turn
  const float g = SIGN;
  const vec r1 = (dr[1] + g * di[1]) * ROOT_HALF, i1 = (di[1] - g * dr[1]) * ROOT_HALF;
  const vec r2 = g * di[2], i2 = -g * dr[2];
  const vec r3 = (g * di[3] - dr[3]) * ROOT_HALF, i3 = (-g * dr[3] - di[3]) * ROOT_HALF;
  const vec or_[4] = {dr[0], r1, r2, r3}, oi[4] = {di[0], i1, i2, i3};
  auto four = [&](const vec* ar, const vec* ai, int first) {
    const vec sr = ar[0] + ar[2], si = ai[0] + ai[2], tr = ar[1] + ar[3], ti = ai[1] + ai[3];
    const vec ur = ar[0] - ar[2], ui = ai[0] - ai[2], vr = ar[1] - ar[3], vi = ai[1] - ai[3];
    re[first] = sr + tr, im[first] = si + ti;
    re[first + 4] = sr - tr, im[first + 4] = si - ti;
    re[first + 2] = ur + g * vi, im[first + 2] = ui - g * vr;
    re[first + 6] = ur - g * vi, im[first + 6] = ui + g * vr;
  };
  four(er, ei, 0);
  four(or_, oi, 1);
}

// DFGB's filter of 16 channels of an 8×8 block, in place.
// Row y of the block begins at U + y·row; a pixel is ld floats on.
// mask: (8, 5, C) with 1/64 in it and equal values at ±u in the columns 0 and 4.
void filter_block(float* U, int64_t row, int64_t ld, const float* mask, int64_t C) {
  vec spectrum[8][8];
  for (int y = 0; y < 8; ++y) {
    vec x[8];
    for (int j = 0; j < 8; ++j) x[j] = load(U + y * row + j * ld);
    real_fft(x, spectrum[y]);
  }
  for (int j = 0; j < 2; ++j) {  // v = 0 and v = 4
    const float* m = mask + j * 4 * C;
    auto at = [&](int u) { return load(m + u * HALF * C); };
    vec x[8], s[8];
    for (int y = 0; y < 8; ++y) x[y] = spectrum[y][j];
    real_fft(x, s);
    s[0] *= at(0), s[1] *= at(4);
    for (int u = 1; u < 4; ++u) s[2 * u] *= at(u), s[2 * u + 1] *= at(u);
    real_inverse(s, x);
    for (int y = 0; y < 8; ++y) spectrum[y][j] = x[y];
  }
  for (int v = 1; v < 4; ++v) {
    vec re[8], im[8];
    for (int y = 0; y < 8; ++y) re[y] = spectrum[y][2 * v], im[y] = spectrum[y][2 * v + 1];
    complex_fft<1>(re, im);
    for (int u = 0; u < 8; ++u) {
      const vec m = load(mask + (u * HALF + v) * C);
      re[u] *= m, im[u] *= m;
    }
    complex_fft<-1>(re, im);
    for (int y = 0; y < 8; ++y) spectrum[y][2 * v] = re[y], spectrum[y][2 * v + 1] = im[y];
  }
  for (int y = 0; y < 8; ++y) {
    vec x[8];
    real_inverse(spectrum[y], x);
    for (int j = 0; j < 8; ++j) store(U + y * row + j * ld, x[j]);
  }
}

// M as filter_block takes it: `irfft2` leaves the mean of ±u in the columns 0 and 4, and divides by 64.
Buffer<float> filter_mask(const float* M, int64_t C) {
  auto mask = buffer<float>(BLOCK * HALF * C);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t u = 0; u < BLOCK; ++u)
      for (int64_t v = 0; v < HALF; ++v) {
        const int64_t negative = v % 4 == 0 ? (BLOCK - u) % BLOCK : u;
        mask[(u * HALF + v) * C + c] = (M[(c * BLOCK + u) * HALF + v] + M[(c * BLOCK + negative) * HALF + v]) / 128;
      }
  return mask;
}

// Repeats the last of `columns` columns and `rows` rows of an 8-row group of `width` columns into the rest of it.
void replicate(float* U, int64_t rows, int64_t columns, int64_t width, int64_t C) {
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t j = columns; j < width; ++j)
      std::memcpy(U + (y * width + j) * C, U + (y * width + columns - 1) * C, C * sizeof(float));
  for (int64_t y = rows; y < BLOCK; ++y)
    std::memcpy(U + y * width * C, U + (rows - 1) * width * C, width * C * sizeof(float));
}

}  // namespace
}  // namespace dsgformer
