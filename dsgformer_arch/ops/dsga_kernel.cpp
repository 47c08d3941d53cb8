// The block DSGA on a CPU, float32 or bfloat16, without gradients: the arithmetic of `in_strips` in dsga.py;
// and the steps outside the levels, those of steps.py.
//
// An image is cut into columns of tiles, 8 rows high, that a thread walks down.
// Nothing wider than the image's C channels leaves the cache: of a tile, LN,
// the pointwise product, the depthwise convolution, DFGB, GELU and the gate
// follow each other in buffers of a few hundred kilobytes.  Matrix products
// are oneDNN's small ones ("brgemm"), which PyTorch exports; everything else
// is written on vectors of 16 channels.
//
// Compiled on demand by native.py.  One entry point a type, dsga_float32 and dsga_bfloat16, returns 0, or 1 if
// PyTorch has no such matrix product for this processor; likewise head_, down_, up_ and tail_.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace at::native::cpublas {
TORCH_API void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                      const float* A, const float* B, float* C, bool vnni);
TORCH_API void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                      const at::BFloat16* A, const at::BFloat16* B, float* C, bool vnni);
TORCH_API void brgemm_release(bool vnni);
}  // namespace at::native::cpublas

namespace {

using bf16 = at::BFloat16;
constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 8;
constexpr int64_t HALF = BLOCK / 2 + 1;
constexpr float NORM_EPSILON = 1e-5f;    // LN's
constexpr float LEAST_SQUARES = 1e-24f;  // of a row of Q or K

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vec_u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vec_i __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vec_h __attribute__((vector_size(32), aligned(2), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }

inline vec load(const bf16* p) {
  vec_u wide = __builtin_convertvector(*reinterpret_cast<const vec_h*>(p), vec_u) << 16;
  return (vec)wide;
}

inline void store(bf16* p, vec v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const vec_u bits = (vec_u)v;
  vec_u rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = v == v ? rounded : 0x7fc0u - (vec_u){};
  *reinterpret_cast<vec_h*>(p) = __builtin_convertvector(rounded, vec_h);
#endif
}

inline vec splat(float a) { return a - (vec){}; }

typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));

// The sums of four vectors.
inline vec4 sums(vec a, vec b, vec c, vec d) {
  auto fold = [](vec x, vec y) {  // of each quarter: x0+x2, y0+y2, x1+x3, y1+y3
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const vec ab = fold(a, b), cd = fold(c, d);
  const vec all = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const auto half = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}

// 1/v to float32's precision for v in 1 … 2^100.
inline vec reciprocal(vec v) {
#if defined(__AVX512F__)
  const vec guess = (vec)_mm512_rcp14_ps((__m512)v);
  return guess * (2.0f - v * guess);
#else
  return 1.0f / v;
#endif
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(int64_t count) {
  const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}

// ---------------------------------------------------------------- matrix products

// Half a stage of a 16×16 transposition: the rows of x and y change places where bit `D` of the column is set.
template <int D>
inline void exchange(vec& x, vec& y) {
  const vec low = x, high = y;
  if constexpr (D == 8) {
    x = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    y = __builtin_shufflevector(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  } else if constexpr (D == 4) {
    x = __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    y = __builtin_shufflevector(low, high, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  } else if constexpr (D == 2) {
    x = __builtin_shufflevector(low, high, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    y = __builtin_shufflevector(low, high, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else {
    x = __builtin_shufflevector(low, high, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    y = __builtin_shufflevector(low, high, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
}

template <int D>
inline void exchange_rows(vec rows[16]) {
  for (int i = 0; i < 16; ++i)
    if (!(i & D)) exchange<D>(rows[i], rows[i | D]);
}

inline void transpose(vec rows[16]) {
  exchange_rows<8>(rows);
  exchange_rows<4>(rows);
  exchange_rows<2>(rows);
  exchange_rows<1>(rows);
}

// B[k][n] = W[n][k] in T; for bfloat16 in oneDNN's order, pairs of k side by side.  N and K are multiples of LANES.
template <class T>
void transpose_into(T* B, const float* W, int64_t N, int64_t K) {
  constexpr int64_t PAIR = sizeof(float) / sizeof(T);
  at::parallel_for(0, N / LANES, std::max<int64_t>(1, (1 << 15) / (LANES * K)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * LANES; n < end * LANES; n += LANES)
      for (int64_t k = 0; k < K; k += LANES * PAIR) {
        vec rows[16] = {};
        const int64_t units = std::min(LANES, (K - k) / PAIR);
        for (int64_t i = 0; i < LANES; ++i) {
          const float* from = W + (n + i) * K + k;
          for (int64_t j = 0; j < units * PAIR; j += LANES) store(reinterpret_cast<T*>(&rows[i]) + j, load(from + j));
        }
        transpose(rows);
        for (int64_t u = 0; u < units; ++u) store(reinterpret_cast<float*>(B) + (k / PAIR + u) * N + n, rows[u]);
      }
  });
}

// C = A B, or C += A B; B from transpose_into.
template <class T>
void product(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, float* C,
             int64_t ldc, bool add = false) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, A, B, C, std::is_same_v<T, bf16>);
}

// G[i][j] += Σ_p q[p][i] k[p][j] for ROWS values of i and 16·COLUMNS of j, in registers.
template <int ROWS, int COLUMNS>
void outer_tile(float* G, int64_t ldg, const float* q, const float* k, int64_t ld, int64_t pixels) {
  vec total[ROWS][COLUMNS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) total[i][j] = load(G + i * ldg + j * LANES);
  for (int64_t p = 0; p < pixels; ++p, q += ld, k += ld) {
    vec row[COLUMNS];
#pragma GCC unroll 3
    for (int j = 0; j < COLUMNS; ++j) row[j] = load(k + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < COLUMNS; ++j) total[i][j] += q[i] * row[j];
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) store(G + i * ldg + j * LANES, total[i][j]);
}

// G += qᵀ k, both (pixels, c) with row stride ld.
void outer(float* G, const float* q, const float* k, int64_t c, int64_t ld, int64_t pixels) {
  for (int64_t j = 0; j < c;) {
    const bool wide = c - j >= 3 * LANES;
    for (int64_t i = 0; i < c; i += 8) {
      if (wide)
        outer_tile<8, 3>(G + i * c + j, c, q + i, k + j, ld, pixels);
      else
        outer_tile<8, 1>(G + i * c + j, c, q + i, k + j, ld, pixels);
    }
    j += wide ? 3 * LANES : LANES;
  }
}

// ---------------------------------------------------------------- LN

// LN of `pixels` neighbours; four at a time, as their sums and roots are then one instruction.
template <class T>
void layer_norm(T* out, const T* x, const float* weight, const float* bias, int64_t C, int64_t pixels) {
  for (int64_t p = 0; p < pixels; p += 4) {
    const T* in[4];
    for (int i = 0; i < 4; ++i) in[i] = x + std::min(p + i, pixels - 1) * C;
    vec total[4] = {}, squares[4] = {};
    for (int64_t c = 0; c < C; c += LANES)
      for (int i = 0; i < 4; ++i) total[i] += load(in[i] + c);
    const vec4 mean = sums(total[0], total[1], total[2], total[3]) / float(C);
    for (int64_t c = 0; c < C; c += LANES)
      for (int i = 0; i < 4; ++i) {
        const vec d = load(in[i] + c) - mean[i];
        squares[i] += d * d;
      }
    vec4 scale = sums(squares[0], squares[1], squares[2], squares[3]) / float(C) + NORM_EPSILON;
    for (int i = 0; i < 4; ++i) scale[i] = __builtin_sqrtf(scale[i]);
    scale = 1.0f / scale;
    const int64_t count = std::min<int64_t>(4, pixels - p);
    for (int64_t c = 0; c < C; c += LANES) {
      const vec w = load(weight + c), b = load(bias + c);
      for (int i = 0; i < count; ++i) store(out + (p + i) * C + c, (load(in[i] + c) - mean[i]) * (scale[i] * w) + b);
    }
  }
}

// ---------------------------------------------------------------- DFGB

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

// ---------------------------------------------------------------- tiles

enum Gate : int64_t { DFGB = 0, GELU = 1, IDENTITY = 2 };
enum Score : int64_t { RELU2 = 0, RELU = 1, SOFTMAX = 2 };

}  // namespace

extern "C" {

// One image, of type T, and one block's parameters, of float whatever T is; native.py mirrors this.
struct Dsga {
  int64_t height, width, channels, heads, gate, score, thresholds;
  const void* x;             // (height, width, C)
  void* y;                   // (height, width, C)
  const float* norm_weight;  // (C,)
  const float* norm_bias;    // (C,)
  const float* project_in;   // (4C, C)
  const float* depthwise;    // (4C, 9)
  const float* project_out;  // (C, C)
  const float* temperature;  // (heads,)
  const float* weights;      // W_n, (thresholds,)
  const int64_t* top_k;      // k_n, (thresholds,)
  const float* mask;         // M, (C, 8, 5); for gate DFGB
};
}

namespace {

struct Task {
  int64_t top, bottom, left, right;
};

// Columns of tiles, cut across where there are fewer than threads.
std::vector<Task> tasks(int64_t height, int64_t width, int64_t tile_width) {
  const int64_t threads = at::get_num_threads();
  const int64_t columns = (width + tile_width - 1) / tile_width;
  const int64_t tile_rows = (height + BLOCK - 1) / BLOCK;
  int64_t cuts = threads == 1 ? 1 : (4 * threads + columns - 1) / columns;
  // A cut costs two more rows of the pointwise product, so keep the pieces at 64 rows where that feeds all threads.
  cuts = std::min(cuts, std::max<int64_t>(tile_rows / 8, (threads + columns - 1) / columns));
  cuts = std::max<int64_t>(1, std::min(cuts, tile_rows));
  std::vector<Task> list;
  for (int64_t i = 0; i < cuts; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t top = tile_rows * i / cuts * BLOCK, bottom = tile_rows * (i + 1) / cuts * BLOCK;
      list.push_back({top, std::min(bottom, height), j * tile_width, std::min((j + 1) * tile_width, width)});
    }
  return list;
}

int64_t tile_width(int64_t channels) {
  const int64_t fitting = (512 << 10) / (10 * 2 * channels * int64_t(sizeof(float)));
  return std::max<int64_t>(32, fitting / BLOCK * BLOCK);
}

// Runs `work(i)` for i from 0 to count - 1, in any order; false if a matrix product is missing.
template <class T, class Work>
bool run(int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> sound{true};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      try {
        for (int64_t i; (i = next++) < count;) work(i);
        at::native::cpublas::brgemm_release(std::is_same_v<T, bf16>);
      } catch (...) {
        sound = false;
      }
  });
  return sound;
}

template <class T>
Buffer<T> packed(const float* W, int64_t N, int64_t K) {
  auto B = buffer<T>(N * K);
  transpose_into(B.get(), W, N, K);
  return B;
}

// The parameters that make Q and K (index 0) or V and U (index 1).
template <class T>
struct Half {
  Buffer<T> project_in;     // (C, 2C), packed
  Buffer<float> depthwise;  // (9, 2C)

  Half(const Dsga& d, int64_t index)
      : project_in(packed<T>(d.project_in + index * 2 * d.channels * d.channels, 2 * d.channels, d.channels)),
        depthwise(buffer<float>(9 * 2 * d.channels)) {
    const float* kernels = d.depthwise + index * 2 * d.channels * 9;
    for (int64_t c = 0; c < 2 * d.channels; ++c)
      for (int64_t i = 0; i < 9; ++i) depthwise[i * 2 * d.channels + c] = kernels[c * 9 + i];
  }
};

// W_p LN(x) of a tile and the rows above and below it, and W_d of that.
template <class T>
class Projection {
 public:
  Projection(const Dsga& d, const Half<T>& half, const Task& task)
      : d_(d), half_(half), task_(task), C_(d.channels), stride_(task.right - task.left + 2),
        normalised_(buffer<T>(10 * stride_ * C_)), projected_(buffer<float>(10 * stride_ * 2 * C_)) {}

  // Makes the rows top-1 … top+8 ready; `top` goes down the task in steps of 8.
  void advance(int64_t top) {
    const int64_t row = stride_ * 2 * C_;
    float* P = projected_.get();
    int64_t first = top - 1;
    if (top != task_.top) {
      std::memcpy(P, P + 8 * row, 2 * row * sizeof(float));
      first = top + 1;
    }
    const int64_t begin = std::max<int64_t>(first, 0), end = std::min(top + 9, d_.height);
    if (first < 0) std::memset(P, 0, row * sizeof(float));
    if (end < top + 9) std::memset(P + (end - top + 1) * row, 0, (top + 9 - end) * row * sizeof(float));
    if (begin >= end) return;
    normalise(begin, end);
    product<T>((end - begin) * stride_, 2 * C_, C_, normalised_.get(), C_, half_.project_in.get(),
               2 * C_, P + (begin - top + 1) * row, 2 * C_);
  }

  // W_d of channels c … c+15 at the 3×3 pixels from row y (0 … 7) of the tile and column j.
  const float* at(int64_t y, int64_t j) const { return projected_.get() + (y * stride_ + j) * 2 * C_; }

  // Writes `rows`×`columns` pixels of W_d P, channels from … from+count, from tile column j0.
  template <class Out>
  void convolve(Out* out, int64_t out_row, int64_t out_ld, int64_t rows, int64_t j0, int64_t columns, int64_t from,
                int64_t count) const {
    const int64_t ld = 2 * C_, row = stride_ * ld;
    for (int64_t c = from; c < from + count; c += LANES) {
      vec w[9];
      for (int i = 0; i < 9; ++i) w[i] = load(half_.depthwise.get() + i * ld + c);
      for (int64_t y = 0; y < rows; ++y) {
        const float* p = at(y, j0) + c;
        Out* o = out + y * out_row + c - from;
        for (int64_t j = 0; j < columns; ++j, p += ld, o += out_ld) {
          vec a = w[0] * load(p), b = w[3] * load(p + row), e = w[6] * load(p + 2 * row);
          a += w[1] * load(p + ld), b += w[4] * load(p + row + ld), e += w[7] * load(p + 2 * row + ld);
          a += w[2] * load(p + 2 * ld), b += w[5] * load(p + row + 2 * ld), e += w[8] * load(p + 2 * row + 2 * ld);
          store(o, a + b + e);
        }
      }
    }
  }

 private:
  void normalise(int64_t begin, int64_t end) {
    const auto* x = static_cast<const T*>(d_.x);
    const int64_t left = std::max<int64_t>(task_.left - 1, 0), right = std::min(task_.right + 1, d_.width);
    const size_t pixel = C_ * sizeof(T);
    for (int64_t r = begin; r < end; ++r) {
      T* out = normalised_.get() + (r - begin) * stride_ * C_;
      const T* in = x + (r * d_.width + left) * C_;
      // The depthwise convolution sees zeros beyond the image; without biases, LN's zeros stay zeros till then.
      if (left == task_.left) std::memset(static_cast<void*>(out), 0, pixel), out += C_;
      if (right == task_.right) std::memset(static_cast<void*>(out + (right - left) * C_), 0, pixel);
      if (r + BLOCK < d_.height) prefetch(in + BLOCK * d_.width * C_, (right - left) * pixel);  // the next tile's
      layer_norm(out, in, d_.norm_weight, d_.norm_bias, C_, right - left);
    }
  }

  static void prefetch(const T* from, int64_t bytes) {
    const auto* line = reinterpret_cast<const char*>(from);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
  }

  const Dsga& d_;
  const Half<T>& half_;
  const Task& task_;
  const int64_t C_, stride_;
  Buffer<T> normalised_;
  Buffer<float> projected_;
};

// Q Kᵀ of each head, (heads, c, c), then the rows' sums of squares, those of Q and those of K, (2C,).
template <class T>
bool gram(const Dsga& d, float* result) {
  const int64_t C = d.channels, c = C / d.heads, size = C * c + 2 * C;
  const auto list = tasks(d.height, d.width, tile_width(C));
  const Half<T> half(d, 0);
  // One sum a task, added in order: the result does not depend on which thread was faster.
  std::vector<float> sums(list.size() * size, 0.0f);
  const bool sound = run<T>(list.size(), [&](int64_t index) {
    const Task& task = list[index];
    float* products = sums.data() + index * size;
    float* squares = products + C * c;
    Projection<T> P(d, half, task);
    const int64_t group = 16;
    auto QK = buffer<float>(BLOCK * group * 2 * C);
    for (int64_t top = task.top; top < task.bottom; top += BLOCK) {
      P.advance(top);
      const int64_t rows = std::min(BLOCK, task.bottom - top);
      for (int64_t j = task.left; j < task.right; j += group) {
        const int64_t columns = std::min(group, task.right - j);
        P.convolve(QK.get(), columns * 2 * C, 2 * C, rows, j - task.left, columns, 0, 2 * C);
        const int64_t pixels = rows * columns;
        for (int64_t k = 0; k < 2 * C; k += LANES) {
          vec total = load(squares + k);
          for (int64_t p = 0; p < pixels; ++p) {
            const vec v = load(QK.get() + p * 2 * C + k);
            total += v * v;
          }
          store(squares + k, total);
        }
        for (int64_t h = 0; h < d.heads; ++h)
          outer(products + h * c * c, QK.get() + h * c, QK.get() + C + h * c, c, 2 * C, pixels);
      }
    }
  });
  std::fill_n(result, size, 0.0f);
  for (size_t t = 0; t < list.size(); ++t)
    for (int64_t i = 0; i < size; ++i) result[i] += sums[t * size + i];
  return sound;
}

// A row of Σ_n W_n φ(T_{k_n}(A)), in place.  T_k keeps an entry that fewer than k others exceed.
void sparse_row(float* A, float* scratch, const Dsga& d, int64_t c) {
  float* step = scratch;
  float* positive = scratch + c;
  const float largest = *std::max_element(A, A + c);
  float whole = 0;
  for (int64_t j = 0; j < c; ++j) {
    const float relu = A[j] < 0 ? 0 : A[j];
    positive[j] = d.score == SOFTMAX ? std::exp(A[j] - largest) : d.score == RELU2 ? relu * relu : relu;
    whole += positive[j];
  }
  if (d.thresholds == 0) {
    for (int64_t j = 0; j < c; ++j) A[j] = d.score == SOFTMAX ? positive[j] / whole : positive[j];
    return;
  }
  for (int64_t j = 0; j < c; j += LANES) {
    const vec own = load(A + j);
    vec_i above = {};
    for (int64_t i = 0; i < c; ++i) above -= A[i] > own;
    store(step + j, __builtin_convertvector(above, vec));
  }
  std::vector<float> share(d.weights, d.weights + d.thresholds);
  if (d.score == SOFTMAX)
    for (int64_t n = 0; n < d.thresholds; ++n) {
      float kept = 0;
      for (int64_t j = 0; j < c; ++j) kept += step[j] < d.top_k[n] ? positive[j] : 0;
      share[n] /= kept;
    }
  for (int64_t j = 0; j < c; ++j) {
    float total = 0;
    for (int64_t n = 0; n < d.thresholds; ++n) total += step[j] < d.top_k[n] ? share[n] : 0;
    A[j] = positive[j] * total;
  }
}

// The maps of the heads from `gram`, in place.
void sparse_maps(const Dsga& d, float* gram) {
  const int64_t C = d.channels, c = C / d.heads;
  const float* q_squares = gram + C * c;
  const float* k_squares = q_squares + C;
  at::parallel_for(0, C, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * c);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / c;
      const float scale = std::sqrt(std::max(q_squares[i], LEAST_SQUARES)) * d.temperature[head];
      for (int64_t j = 0; j < c; ++j)
        gram[i * c + j] /= scale * std::sqrt(std::max(k_squares[head * c + j], LEAST_SQUARES));
      sparse_row(gram + i * c, scratch.data(), d, c);
    }
  });
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

// Y is often fresh memory: a page fault each 4096 bytes would cost as much as computing them.
void use_large_pages([[maybe_unused]] void* start, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(start) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a wish
#endif
}

// Y, given the maps.
template <class T>
bool restore(const Dsga& d, const float* maps) {
  const int64_t C = d.channels, c = C / d.heads;
  const auto list = tasks(d.height, d.width, tile_width(C));
  const Half<T> half(d, 1);
  const auto B_out = packed<T>(d.project_out, C, C);
  auto B_map = buffer<T>(C * c);
  for (int64_t h = 0; h < d.heads; ++h) transpose_into(B_map.get() + h * c * c, maps + h * c * c, c, c);
  const auto mask = d.gate == DFGB ? filter_mask(d.mask, C) : Buffer<float>();
  const auto* x = static_cast<const T*>(d.x);
  auto* y = static_cast<T*>(d.y);
  use_large_pages(y, d.height * d.width * C * sizeof(T));
  return run<T>(list.size(), [&](int64_t index) {
    const Task& task = list[index];
    Projection<T> P(d, half, task);
    const int64_t group = C > 192 ? 16 : 32;
    auto U = buffer<float>(BLOCK * group * C);
    auto AV = buffer<float>(BLOCK * group * C);
    auto V = buffer<T>(BLOCK * group * C);
    std::memset(static_cast<void*>(V.get()), 0, BLOCK * group * C * sizeof(T));
    for (int64_t top = task.top; top < task.bottom; top += BLOCK) {
      P.advance(top);
      const int64_t rows = std::min(BLOCK, task.bottom - top);
      for (int64_t j = task.left; j < task.right; j += group) {
        const int64_t columns = std::min(group, task.right - j);
        const int64_t width = (columns + BLOCK - 1) / BLOCK * BLOCK;
        P.convolve(V.get(), width * C, C, rows, j - task.left, columns, 0, C);
        P.convolve(U.get(), width * C, C, rows, j - task.left, columns, C, C);
        if (d.gate == DFGB) {
          replicate(U.get(), rows, columns, width, C);
          for (int64_t b = 0; b < width; b += BLOCK)
            for (int64_t k = 0; k < C; k += LANES) filter_block(U.get() + b * C + k, width * C, C, mask.get() + k, C);
        }
        const int64_t pixels = (rows - 1) * width + columns;
        for (int64_t h = 0; h < d.heads; ++h)
          product<T>(BLOCK * width, c, c, V.get() + h * c, C, B_map.get() + h * c * c, c, AV.get() + h * c, C);
        for (int64_t i = 0; i < pixels * C; i += LANES) {
          const vec u = load(U.get() + i);
          store(V.get() + i, (d.gate == IDENTITY ? u : gelu(u)) * load(AV.get() + i));
        }
        product<T>(BLOCK * width, C, C, V.get(), C, B_out.get(), C, AV.get(), C);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t offset = ((top + r) * d.width + j) * C;
          const float* out = AV.get() + r * width * C;
          for (int64_t i = 0; i < columns * C; i += LANES) store(y + offset + i, load(x + offset + i) + load(out + i));
        }
      }
    }
  });
}

template <class T>
bool block(const Dsga& d) {
  const int64_t C = d.channels;
  auto maps = buffer<float>(C * C / d.heads + 2 * C);
  if (!gram<T>(d, maps.get())) return false;
  sparse_maps(d, maps.get());
  return restore<T>(d, maps.get());
}

}  // namespace

// ---------------------------------------------------------------- outside the levels

extern "C" {

// One image and one step outside the levels; images of type T where no other stands.  native.py mirrors this.
struct Step {
  int64_t height, width;  // of the coarser image
  int64_t fine, coarse;   // channels of the finer and of the coarser image; head and tail: of x and of y
  const void* x;          // down: (2 height, 2 width, fine); up: (height, width, coarse); else (height, width, fine)
  const float* weight;    // down: (2, coarse, 2 fine); up: (2, 2 fine, coarse);
                          // head: (coarse, 9 fine); tail: (9 coarse, fine), both filled up to whole vectors
  const float* bias;      // down, head, tail: (coarse,)
  const void* skip;       // up: (2 height, 2 width, fine), or null; tail: (height, width, coarse), float
  void* y;                // up: (2 height, 2 width, fine); else (height, width, coarse), for the tail float
};
}

namespace {

constexpr int64_t ROW_PIXELS = 64;  // in one product

// The numbers of a 3×3 neighbourhood, filled up to whole vectors.
int64_t neighbourhood(int64_t channels) { return (9 * channels + LANES - 1) / LANES * LANES; }

// y = sums + bias, (pixels, N).
template <class T>
void store_biased(T* y, const float* sums, const float* bias, int64_t pixels, int64_t N) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < N; c += LANES) store(y + p * N + c, load(sums + p * N + c) + load(bias + c));
}

// A 3×3 convolution of few channels, as a product of the neighbourhoods of a row's pixels.
template <class T>
bool head(const Step& s) {
  const int64_t K = neighbourhood(s.fine), N = s.coarse, row_values = s.width * s.fine;
  const auto B = packed<T>(s.weight, N, K);
  const auto* x = static_cast<const T*>(s.x);
  use_large_pages(s.y, s.height * s.width * N * sizeof(T));
  return run<T>(s.height, [&](int64_t row) {
    auto sums = buffer<float>(ROW_PIXELS * N);
    auto A = buffer<T>(ROW_PIXELS * K);
    auto rows = buffer<T>(3 * (row_values + 2 * s.fine));  // with a pixel of zeros on either side
    const int64_t stride = row_values + 2 * s.fine;
    std::memset(static_cast<void*>(A.get()), 0, ROW_PIXELS * K * sizeof(T));
    std::memset(static_cast<void*>(rows.get()), 0, 3 * stride * sizeof(T));
    for (int64_t i = 0; i < 3; ++i)
      if (const int64_t from = row + i - 1; 0 <= from && from < s.height)
        std::memcpy(static_cast<void*>(rows.get() + i * stride + s.fine), x + from * row_values, row_values * sizeof(T));
    for (int64_t j = 0; j < s.width; j += ROW_PIXELS) {
      const int64_t pixels = std::min(ROW_PIXELS, s.width - j);
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t i = 0; i < 3; ++i)
          std::memcpy(static_cast<void*>(A.get() + p * K + i * 3 * s.fine), rows.get() + i * stride + (j + p) * s.fine,
                      3 * s.fine * sizeof(T));
      product<T>(pixels, N, K, A.get(), K, B.get(), N, sums.get(), N);
      store_biased(static_cast<T*>(s.y) + (row * s.width + j) * N, sums.get(), s.bias, pixels, N);
    }
  });
}

// A row of the finer image is a matrix of pairs of pixels, (width, 2 fine).
template <class T>
bool downsample(const Step& s) {
  const int64_t K = 2 * s.fine, N = s.coarse;
  const Buffer<T> B[2] = {packed<T>(s.weight, N, K), packed<T>(s.weight + N * K, N, K)};
  use_large_pages(s.y, s.height * s.width * N * sizeof(T));
  return run<T>(s.height, [&](int64_t row) {
    auto sums = buffer<float>(ROW_PIXELS * N);
    const auto* upper = static_cast<const T*>(s.x) + 2 * row * s.width * K;
    auto* y = static_cast<T*>(s.y) + row * s.width * N;
    for (int64_t j = 0; j < s.width; j += ROW_PIXELS) {
      const int64_t pixels = std::min(ROW_PIXELS, s.width - j);
      product<T>(pixels, N, K, upper + j * K, K, B[0].get(), N, sums.get(), N);
      product<T>(pixels, N, K, upper + (s.width + j) * K, K, B[1].get(), N, sums.get(), N, true);
      store_biased(y + j * N, sums.get(), s.bias, pixels, N);
    }
  });
}

template <class T>
bool upsample(const Step& s) {
  const int64_t K = s.coarse, N = 2 * s.fine;
  const Buffer<T> B[2] = {packed<T>(s.weight, N, K), packed<T>(s.weight + N * K, N, K)};
  use_large_pages(s.y, 2 * s.height * s.width * N * sizeof(T));
  return run<T>(s.height, [&](int64_t row) {
    auto sums = buffer<float>(ROW_PIXELS * N);
    const auto* x = static_cast<const T*>(s.x) + row * s.width * K;
    for (int64_t j = 0; j < s.width; j += ROW_PIXELS) {
      const int64_t pixels = std::min(ROW_PIXELS, s.width - j);
      for (int64_t i = 0; i < 2; ++i) {
        product<T>(pixels, N, K, x + j * K, K, B[i].get(), N, sums.get(), N);
        const int64_t offset = ((2 * row + i) * s.width + j) * N;
        auto* y = static_cast<T*>(s.y) + offset;
        const auto* skip = static_cast<const T*>(s.skip);
        for (int64_t k = 0; k < pixels * N; k += LANES) {
          const vec sum = load(sums.get() + k);
          store(y + k, skip ? sum + load(skip + offset + k) : sum);
        }
      }
    }
  });
}

constexpr int64_t TAIL_ROWS = 16;  // of a task: each repeats the products of two rows of its neighbours

// A 3×3 convolution to 3 channels: what a pixel gives to each of its 9 neighbours is one product, then they are summed.
template <class T>
bool tail(const Step& s) {
  const int64_t K = s.fine, N = neighbourhood(3), stride = (s.width + 2) * N;
  const auto B = packed<T>(s.weight, N, K);
  const auto* x = static_cast<const T*>(s.x);
  const auto* skip = static_cast<const float*>(s.skip);
  return run<T>((s.height + TAIL_ROWS - 1) / TAIL_ROWS, [&](int64_t index) {
    const int64_t top = index * TAIL_ROWS, bottom = std::min(top + TAIL_ROWS, s.height);
    auto given = buffer<float>(3 * stride);  // rows by turns, with a pixel of zeros on either side
    std::memset(given.get(), 0, 3 * stride * sizeof(float));
    auto advance = [&](int64_t row) {
      float* out = given.get() + (row + 3) % 3 * stride;
      if (row < 0 || row >= s.height) return void(std::memset(out, 0, stride * sizeof(float)));
      for (int64_t j = 0; j < s.width; j += ROW_PIXELS)
        product<T>(std::min(ROW_PIXELS, s.width - j), N, K, x + (row * s.width + j) * K, K, B.get(), N,
                   out + (j + 1) * N, N);
    };
    advance(top - 1);
    advance(top);
    const vec4 bias = {s.bias[0], s.bias[1], s.bias[2], 0};
    for (int64_t row = top; row < bottom; ++row) {
      advance(row + 1);
      for (int64_t j = 0; j < s.width; ++j) {
        vec4 sum = bias;
        for (int64_t u = 0; u < 3; ++u)
          for (int64_t v = 0; v < 3; ++v)
            sum += *reinterpret_cast<const vec4*>(given.get() + (row + u + 2) % 3 * stride + (j + v) * N +
                                                  (u * 3 + v) * 3);
        const int64_t pixel = (row * s.width + j) * 3;
        for (int64_t c = 0; c < 3; ++c) static_cast<float*>(s.y)[pixel + c] = sum[c] + skip[pixel + c];
      }
    }
  });
}

}  // namespace

extern "C" {
int tail_float32(const Step* s) { return !tail<float>(*s); }
int tail_bfloat16(const Step* s) { return !tail<bf16>(*s); }
int head_float32(const Step* s) { return !head<float>(*s); }
int head_bfloat16(const Step* s) { return !head<bf16>(*s); }
int down_float32(const Step* s) { return !downsample<float>(*s); }
int down_bfloat16(const Step* s) { return !downsample<bf16>(*s); }
int up_float32(const Step* s) { return !upsample<float>(*s); }
int up_bfloat16(const Step* s) { return !upsample<bf16>(*s); }
int dsga_float32(const Dsga* d) { return !block<float>(*d); }
int dsga_bfloat16(const Dsga* d) { return !block<bf16>(*d); }
}
