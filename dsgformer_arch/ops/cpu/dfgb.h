// DFGB: GELU and the filter of an 8×8 block.
#pragma once

#include <cstring>

#include "fft8.h"
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

// A vector of 16 channels as a value: `vec` without the attributes of a place in memory, which templates drop.
typedef float value __attribute__((vector_size(64)));

// DFGB's filter of 16 channels of an 8×8 block, in place.
// Row y of the block begins at U + y·row; a pixel is ld floats on.
// mask: (8, 5, C) with 1/64 in it and equal values at ±u in the columns 0 and 4.
void filter_block(float* U, int64_t row, int64_t ld, const float* mask, int64_t C) {
  value spectrum[8][8];
  for (int y = 0; y < 8; ++y) {
    value x[8];
    for (int j = 0; j < 8; ++j) x[j] = load(U + y * row + j * ld);
    real_fft(x, spectrum[y]);
  }
  for (int j = 0; j < 2; ++j) {  // v = 0 and v = 4
    const float* m = mask + j * 4 * C;
    auto at = [&](int u) { return load(m + u * HALF * C); };
    value x[8], s[8];
    for (int y = 0; y < 8; ++y) x[y] = spectrum[y][j];
    real_fft(x, s);
    s[0] *= at(0), s[1] *= at(4);
    for (int u = 1; u < 4; ++u) s[2 * u] *= at(u), s[2 * u + 1] *= at(u);
    real_inverse(s, x);
    for (int y = 0; y < 8; ++y) spectrum[y][j] = x[y];
  }
  for (int v = 1; v < 4; ++v) {
    value re[8], im[8];
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
    value x[8];
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
