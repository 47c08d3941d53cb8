// The block DSGA on a CPU for training: Y with what the backward pass needs, and every gradient.
//
// Types: T of the images (float, bfloat16, double), S of sums, parameters and their gradients (float; double for
// double).  Kept between the passes are W_p LN(X), with a border of zeros, and Q Kᵀ with the rows' sums of squares;
// everything else is computed again.  An image is cut into DFGB's 8×8 blocks: what belongs to a block stays in the
// level-1 and level-2 caches.  Images of a batch are shared out among the threads, or, where there are fewer images
// than threads, rows of blocks of one image.
//
// Outside the levels: 3×3 convolutions of few channels, and the products that are gradients of kernels.
//
// backward.cpp and backward_float64.cpp have the entry points, which return 0, or 1 on a lack of memory.  training.py
// mirrors the structures.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "bfloat16.h"
#include "parallel.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

extern "C" {

// A batch and a block's parameters; images are channels last and contiguous, of T; everything else is of S.
struct Training {
  int64_t images, height, width, channels, heads, gate, score, thresholds;
  const void* x;  // (images, height, width, C)
  void* y;        // the same; for the forward pass
  void* p;        // W_p LN(X): (images, 2, height + 2, width + 2, 2C), Q and K, then V and U; null: computed again
  void* gram;     // (images, C·c + 2C): Q Kᵀ of each head, sums of squares of Q, then of K; c = C / heads
  const void* norm_weight;  // (C,)
  const void* norm_bias;    // (C,)
  const void* project_in;   // W_p, (4C, C)
  const void* depthwise;    // W_d, (4C, 9)
  const void* project_out;  // W_p', (C, C)
  const void* temperature;  // α, (heads,)
  const void* weights;      // W_n, (thresholds,)
  const int64_t* top_k;     // k_n, (thresholds,)
  const void* mask;         // M, (C, 8, 5); for gate DFGB
  const void* dy;           // gradients from here on: of y, given
  void* dx;
  void *d_norm_weight, *d_norm_bias, *d_project_in, *d_depthwise, *d_project_out, *d_temperature, *d_weights, *d_mask;
};

// A step outside the levels.  Rows of all images follow each other.
struct Step {
  int64_t rows, pixels;    // of a row
  int64_t a_width, b_width;  // channels of a (or of y where a convolution is computed) and of b
  int64_t height, channels;  // b is of images so high with so few channels, taken by 3×3 neighbourhoods; or 0
  int64_t a_row, b_row;      // from a row to the next
  const void *a, *b;
  const void *weight, *bias;  // of a convolution: (a_width, neighbourhood filled up to a multiple of 8), (a_width,)
  void* y;                    // of a convolution: (rows, pixels, a_width); else Σ aᵀ b, (a_width, b_width)
  void* sums;                 // Σ a, or null
};
}

namespace {

using bf16 = c10::BFloat16;

enum Gate : int64_t { DFGB = 0, GELU = 1, IDENTITY = 2 };
enum Score : int64_t { RELU2 = 0, RELU = 1, SOFTMAX = 2 };

constexpr int64_t BLOCK = 8;
constexpr int64_t PIXELS = BLOCK * BLOCK;
constexpr int64_t HALF = BLOCK / 2 + 1;
constexpr int64_t HALO = BLOCK + 2;
constexpr int64_t LINE = 64;  // bytes of a cache line

// ---------------------------------------------------------------- vectors

// L numbers of S: V as a value, U in memory; H the same count of bfloat16.
struct F16 {
  using S = float;
  static constexpr int L = 16;
  typedef float V __attribute__((vector_size(64)));
  typedef float U __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint32_t B __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef uint16_t H __attribute__((vector_size(32), aligned(2), may_alias));
};

struct F8 {
  using S = float;
  static constexpr int L = 8;
  typedef float V __attribute__((vector_size(32)));
  typedef float U __attribute__((vector_size(32), aligned(4), may_alias));
  typedef uint32_t B __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint16_t H __attribute__((vector_size(16), aligned(2), may_alias));
};

struct D8 {
  using S = double;
  static constexpr int L = 8;
  typedef double V __attribute__((vector_size(64)));
  typedef double U __attribute__((vector_size(64), aligned(8), may_alias));
};

template <class W>
inline typename W::V load(const typename W::S* p) {
  return *reinterpret_cast<const typename W::U*>(p);
}

template <class W>
inline typename W::V load(const bf16* p) {
#if defined(__AVX512F__)
  if constexpr (W::L == 16)
    return (typename W::V)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#endif
  return (typename W::V)(__builtin_convertvector(*reinterpret_cast<const typename W::H*>(p), typename W::B) << 16);
}

template <class W>
inline void store(typename W::S* p, typename W::V v) {
  *reinterpret_cast<typename W::U*>(p) = v;
}

template <class W>
inline void store(bf16* p, typename W::V v) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  if constexpr (W::L == 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
  else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), (__m128i)_mm256_cvtneps_pbh((__m256)v));
#else
  using B = typename W::B;
  const B bits = (B)v;
  B rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = v == v ? rounded : 0x7fc0u - (B){};
  *reinterpret_cast<typename W::H*>(p) = __builtin_convertvector(rounded, typename W::H);
#endif
}

template <class W>
inline typename W::V splat(typename W::S a) {
  return a - (typename W::V){};
}

template <class W>
inline typename W::S sum(typename W::V v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<W, F16>) return _mm512_reduce_add_ps((__m512)v);
  if constexpr (std::is_same_v<W, D8>) return _mm512_reduce_add_pd((__m512d)v);
#endif
  typename W::S total = 0;
  for (int i = 0; i < W::L; ++i) total += v[i];
  return total;
}

// ---------------------------------------------------------------- memory

// Memory that a thread uses again at the next call; what a `Scratch` has taken is free when it ends.
class Scratch {
 public:
  Scratch() : mark_(next()) {}
  ~Scratch() {
    for (size_t i = mark_; i < next(); ++i)
      if (slots()[i].bytes > LARGE) slots()[i].resize(0);
    next() = mark_;
  }

  template <class A>
  A* take(int64_t count) {
    if (next() == slots().size()) slots().emplace_back();
    Slot& slot = slots()[next()];
    const size_t bytes = (count * sizeof(A) + 63) / 64 * 64 + 64;
    if (slot.bytes < bytes) slot.resize(bytes);
    ++next();
    return static_cast<A*>(slot.memory);
  }

  template <class A>
  A* zeros(int64_t count) {
    A* memory = take<A>(count);
    std::memset(static_cast<void*>(memory), 0, count * sizeof(A));
    return memory;
  }

 private:
  static constexpr size_t LARGE = 64 << 20;

  struct Slot {
    void* memory = nullptr;
    size_t bytes = 0;

    Slot() = default;
    Slot(Slot&& other) noexcept : memory(other.memory), bytes(other.bytes) { other.memory = nullptr; }
    ~Slot() { std::free(memory); }

    void resize(size_t wanted) {
      std::free(memory);
      memory = wanted ? std::aligned_alloc(64, wanted) : nullptr;
      bytes = memory ? wanted : 0;
      if (wanted && !memory) throw std::bad_alloc();
    }
  };

  static std::vector<Slot>& slots() {
    thread_local std::vector<Slot> value;
    return value;
  }
  static size_t& next() {
    thread_local size_t value = 0;
    return value;
  }

  size_t mark_;
};

// ---------------------------------------------------------------- matrix products

// bfloat16 is multiplied in pairs: two neighbours of the dimension that is summed over lie side by side.
template <class T>
constexpr int64_t PAIR = std::is_same_v<T, bf16> ? 2 : 1;

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8, TILE_VECTORS = 3;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 1;
#endif

template <class W>
inline typename W::V multiply_add(const bf16* a, typename W::V b, typename W::V total) {
  int32_t pair;
  std::memcpy(&pair, a, sizeof pair);
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  if constexpr (W::L == 16)
    return (typename W::V)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  else
    return (typename W::V)_mm256_dpbf16_ps((__m256)total, (__m256bh)_mm256_set1_epi32(pair), (__m256bh)b);
#else
  using B = typename W::B;
  const B bits = (B)b;
  const auto low = (typename W::V)(bits << 16), high = (typename W::V)(bits & 0xffff0000u);
  return total + float(a[0]) * low + float(a[1]) * high;
#endif
}

template <class W>
inline typename W::V multiply_add(const typename W::S* a, typename W::V b, typename W::V total) {
  return total + *a * b;
}

// ROWS × VECTORS·L numbers of C = A B, or of C += A B, in registers.  `steps` numbers, or pairs, are summed over.
// The step k of row m of A is at A + m·am + k·ak, that of B at B + k·bk.
template <class W, class T, int ROWS, int VECTORS, class O>
inline void tile(int64_t steps, const T* A, int64_t am, int64_t ak, const T* B, int64_t bk, O* C, int64_t ldc,
                 bool add) {
  typename W::V total[ROWS][VECTORS];
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < VECTORS; ++n)
      total[m][n] = add ? load<W>(C + m * ldc + n * W::L) : typename W::V{};
  for (int64_t k = 0; k < steps; ++k, A += ak, B += bk) {
    typename W::V b[VECTORS];
#pragma GCC unroll 3
    for (int n = 0; n < VECTORS; ++n)
      b[n] = load<W>(reinterpret_cast<const typename W::S*>(B + n * W::L * PAIR<T>));
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 3
      for (int n = 0; n < VECTORS; ++n) total[m][n] = multiply_add<W>(A + m * am, b[n], total[m][n]);
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < VECTORS; ++n) store<W>(C + m * ldc + n * W::L, total[m][n]);
}

template <class W, class T, int VECTORS, class O>
void panel(int64_t M, int64_t steps, const T* A, int64_t am, int64_t ak, const T* B, int64_t bk, O* C, int64_t ldc,
           bool add) {
  int64_t m = 0;
  for (; m + TILE_ROWS <= M; m += TILE_ROWS)
    tile<W, T, TILE_ROWS, VECTORS>(steps, A + m * am, am, ak, B, bk, C + m * ldc, ldc, add);
  if (m + 4 <= M) tile<W, T, 4, VECTORS>(steps, A + m * am, am, ak, B, bk, C + m * ldc, ldc, add), m += 4;
  for (; m < M; ++m) tile<W, T, 1, VECTORS>(steps, A + m * am, am, ak, B, bk, C + m * ldc, ldc, add);
}

// N is a multiple of 8; ldb counts numbers of B a step.
template <class T, class O>
void matrix_product(int64_t M, int64_t N, int64_t steps, const T* A, int64_t am, int64_t ak, const T* B, int64_t ldb,
                    O* C, int64_t ldc, bool add) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, D8, F16>;
  using Narrow = std::conditional_t<std::is_same_v<T, double>, D8, F8>;
  const int64_t bk = ldb * PAIR<T>;
  int64_t n = 0, left = N / Wide::L;
  while (left) {
    const int64_t groups = (left + TILE_VECTORS - 1) / TILE_VECTORS, vectors = (left + groups - 1) / groups;
    const T* b = B + n * PAIR<T>;
    if (vectors == 1)
      panel<Wide, T, 1>(M, steps, A, am, ak, b, bk, C + n, ldc, add);
    else if (vectors == 2)
      panel<Wide, T, std::min(2, TILE_VECTORS)>(M, steps, A, am, ak, b, bk, C + n, ldc, add);
    else
      panel<Wide, T, TILE_VECTORS>(M, steps, A, am, ak, b, bk, C + n, ldc, add);
    left -= vectors;
    n += vectors * Wide::L;
  }
  if (n < N) panel<Narrow, T, 1>(M, steps, A, am, ak, B + n * PAIR<T>, bk, C + n, ldc, add);
}

// C = A B: A is (M, K) with row stride lda, B from `packed`.
template <class T, class O>
void rows_product(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, O* C, int64_t ldc) {
  matrix_product(M, N, K / PAIR<T>, A, lda, PAIR<T>, B, N, C, ldc, false);
}

// G += Aᵀ B, summed over pixels; A and B are what `paired` gives of (pixels, lda) and (pixels, ldb).
template <class T, class S>
void outer_product(int64_t M, int64_t N, int64_t pixels, const T* A, int64_t lda, const T* B, int64_t ldb, S* G,
                   int64_t ldg) {
  matrix_product(M, N, (pixels + PAIR<T> - 1) / PAIR<T>, A, PAIR<T>, lda * PAIR<T>, B, ldb, G, ldg, true);
}

// Rows of n numbers as `outer_product` takes them; channel i of a row is then at PAIR·i.  `scratch` holds a row more.
template <class T>
const T* paired(const T* rows, int64_t pixels, int64_t n, T* scratch) {
  if constexpr (PAIR<T> == 1) {
    return rows;
  } else {
    typedef uint16_t H __attribute__((vector_size(16), aligned(2), may_alias));
    typedef uint16_t H2 __attribute__((vector_size(32), aligned(2), may_alias));
    for (int64_t p = 0; p < pixels; p += 2)
      for (int64_t i = 0; i < n; i += 8) {
        const H a = *reinterpret_cast<const H*>(rows + p * n + i);
        const H b = p + 1 < pixels ? *reinterpret_cast<const H*>(rows + (p + 1) * n + i) : H{};
        *reinterpret_cast<H2*>(scratch + p * n + 2 * i) =
#if defined(__clang__) || __GNUC__ >= 12
            __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
#else
            H2{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3], a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
#endif
      }
    return scratch;
  }
}

template <class T, class S>
inline T converted(S value) {
  if constexpr (std::is_same_v<T, bf16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return {static_cast<uint16_t>(value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0)};
  } else {
    return static_cast<T>(value);
  }
}

// B of `rows_product`, (K, N), from W, (K, N) or, `transposed`, (N, K).  K and N are multiples of 8.
template <class T, class S>
void pack(T* B, const S* W, int64_t K, int64_t N, bool transposed) {
  constexpr int64_t P = PAIR<T>;
  for (int64_t first = 0; first < N; first += 8)
    for (int64_t k = 0; k < K; k += P)
      for (int64_t n = first; n < first + 8; ++n)
        for (int64_t i = 0; i < P; ++i) {
          const S value = transposed ? W[n * K + k + i] : W[(k + i) * N + n];
          B[(k / P * N + n) * P + i] = converted<T>(value);
        }
}

// ---------------------------------------------------------------- DFGB

// Real transform of 8 values; out = Re 0, Re 4, Re 1, Im 1, Re 2, Im 2, Re 3, Im 3.
template <class W, class V = typename W::V>
inline void real_fft(const V x[8], V out[8]) {
  constexpr typename W::S root_half = 0.70710678118654752440;
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
template <class W, class V = typename W::V>
inline void real_inverse(const V in[8], V x[8]) {
  constexpr typename W::S root = 1.41421356237309504880;
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

// Complex transform of 8 values in place; e^(-2πi/8·jk), or its conjugate for SIGN = -1.
template <class W, int SIGN, class V = typename W::V>
inline void complex_fft(V re[8], V im[8]) {
  constexpr typename W::S root_half = 0.70710678118654752440, g = SIGN;
  V er[4], ei[4], dr[4], di[4];
  for (int j = 0; j < 4; ++j) {
    er[j] = re[j] + re[j + 4], ei[j] = im[j] + im[j + 4];
    dr[j] = re[j] - re[j + 4], di[j] = im[j] - im[j + 4];
  }
  // odd outputs: d_j turned by j eighths of a turn
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

// rfft2 of an 8×8 block: the columns 0 and 4 as real_fft orders them, the others as complex numbers.
template <class W>
struct Spectrum {
  typename W::V real[2][8], re[3][8], im[3][8];
};

template <class W, class V = typename W::V>
void transform(const V block[PIXELS], Spectrum<W>& s) {
  for (int y = 0; y < 8; ++y) {
    V row[8];
    real_fft<W>(block + 8 * y, row);
    s.real[0][y] = row[0], s.real[1][y] = row[1];
    for (int v = 0; v < 3; ++v) s.re[v][y] = row[2 + 2 * v], s.im[v][y] = row[3 + 2 * v];
  }
  for (int j = 0; j < 2; ++j) {
    V x[8];
    for (int y = 0; y < 8; ++y) x[y] = s.real[j][y];
    real_fft<W>(x, s.real[j]);
  }
  for (int v = 0; v < 3; ++v) complex_fft<W, 1>(s.re[v], s.im[v]);
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
    real_inverse<W>(in, x);
    for (int y = 0; y < 8; ++y) rows[y][j] = x[y];
  }
  for (int v = 0; v < 3; ++v) {
    V re[8], im[8];
    for (int u = 0; u < 8; ++u) {
      const V mask_uv = m(u, v + 1);
      re[u] = s.re[v][u] * mask_uv, im[u] = s.im[v][u] * mask_uv;
    }
    complex_fft<W, -1>(re, im);
    for (int y = 0; y < 8; ++y) rows[y][2 + 2 * v] = re[y], rows[y][3 + 2 * v] = im[y];
  }
  for (int y = 0; y < 8; ++y) real_inverse<W>(rows[y], block + 8 * y);
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

// ---------------------------------------------------------------- the c×c map

// What the map of a head and its gradient need of a row of c scores; c is a multiple of 8.
template <class N>
class MapRow {
 public:
  using S = typename N::S;
  using V = typename N::V;

  MapRow(const Training& t, int64_t c)
      : c_(c), score_(t.score), thresholds_(t.thresholds), weights_(static_cast<const S*>(t.weights)), above_(c),
        positive_(c), step_(c), share_(t.thresholds) {
    for (int64_t n = 0; n < thresholds_; ++n) top_k_.push_back(S(t.top_k[n]));
  }

  // Σ_n W_n φ(T_{k_n}(A)).
  void map(const S* A, S* out) {
    prepare(A);
    for (int64_t j = 0; j < c_; j += N::L) store<N>(out + j, load<N>(&positive_[j]) * load<N>(&step_[j]));
  }

  // dA from the gradient of the map; adds to that of W_n.
  void gradient(const S* A, const S* d, S* dA, S* d_weights) {
    prepare(A);
    // with softmax over some entries, the share of each set and the mean of d over it
    const int64_t sets = std::max<int64_t>(thresholds_, 1);
    for (int64_t j = 0; j < c_; j += N::L) {
      const V a = load<N>(A + j), slope = score_ == RELU2 ? 2 * a : splat<N>(1);
      const V value = score_ == SOFTMAX ? load<N>(&positive_[j]) : a > 0 ? slope : splat<N>(0);
      store<N>(dA + j, load<N>(d + j) * value * load<N>(&step_[j]));
    }
    for (int64_t n = 0; n < sets; ++n) {
      if (!thresholds_ && score_ != SOFTMAX) break;
      V total = {};
      for (int64_t j = 0; j < c_; j += N::L)
        total += kept(n, j, load<N>(d + j) * load<N>(&positive_[j]));
      const S share = thresholds_ ? share_[n] : whole_, mean = sum<N>(total) * share;
      if (thresholds_) d_weights[n] += mean;
      if (score_ != SOFTMAX) continue;
      const S part = mean * share * (thresholds_ ? weights_[n] : 1);
      for (int64_t j = 0; j < c_; j += N::L)
        store<N>(dA + j, load<N>(dA + j) - kept(n, j, load<N>(&positive_[j]) * part));
    }
  }

 private:
  // v where the n-th threshold keeps an entry, which fewer than k others exceed.
  V kept(int64_t n, int64_t j, V v) const {
    return thresholds_ ? load<N>(&above_[j]) < top_k_[n] ? v : V{} : v;
  }

  void prepare(const S* A) {
    const S largest = score_ == SOFTMAX ? *std::max_element(A, A + c_) : 0;
    V total = {};
    for (int64_t j = 0; j < c_; j += N::L) {
      const V a = load<N>(A + j), relu = a < 0 ? V{} : a;
      V positive = score_ == RELU2 ? relu * relu : relu;
      if (score_ == SOFTMAX)
        for (int i = 0; i < N::L; ++i) positive[i] = std::exp(a[i] - largest);
      store<N>(&positive_[j], positive);
      total += positive;
    }
    whole_ = 1 / sum<N>(total);
    for (int64_t j = 0; j < c_; j += N::L) {
      const V own = load<N>(A + j);
      V above = {};
      if (thresholds_)
        for (int64_t i = 0; i < c_; ++i) above += A[i] > own ? splat<N>(1) : V{};
      store<N>(&above_[j], above);
      store<N>(&step_[j], thresholds_ ? V{} : splat<N>(score_ == SOFTMAX ? whole_ : 1));
    }
    for (int64_t n = 0; n < thresholds_; ++n) {
      share_[n] = 1;
      if (score_ == SOFTMAX) {
        V sums = {};
        for (int64_t j = 0; j < c_; j += N::L) sums += kept(n, j, load<N>(&positive_[j]));
        share_[n] = 1 / sum<N>(sums);
      }
      const V weight = splat<N>(weights_[n] * share_[n]);
      for (int64_t j = 0; j < c_; j += N::L) store<N>(&step_[j], load<N>(&step_[j]) + kept(n, j, weight));
    }
  }

  const int64_t c_, score_, thresholds_;
  const S* weights_;
  std::vector<S> above_, positive_, step_, share_, top_k_;
  S whole_ = 0;  // 1 / Σ positive
};

template <class S>
using Narrow = std::conditional_t<std::is_same_v<S, double>, D8, F8>;

template <class S>
constexpr S LEAST_SQUARES = S(1e-24);  // of a row of Q or K

// 1/norm of the rows of Q and of K.
template <class S>
std::vector<S> inverse_norms(const Training& t, const S* gram) {
  const int64_t C = t.channels;
  std::vector<S> result(2 * C);
  for (int64_t i = 0; i < 2 * C; ++i)
    result[i] = 1 / std::sqrt(std::max(gram[C * C / t.heads + i], LEAST_SQUARES<S>));
  return result;
}

// A = Q Kᵀ / α of row i of all heads, from `gram`.
template <class S>
void score_row(const Training& t, const S* gram, const std::vector<S>& inverse, int64_t i, S* A) {
  const int64_t C = t.channels, c = C / t.heads, head = i / c;
  const S scale = inverse[i] / static_cast<const S*>(t.temperature)[head];
  const S* k = inverse.data() + C + head * c;
  for (int64_t j = 0; j < c; ++j) A[j] = gram[i * c + j] * k[j] * scale;
}

// The maps, (C, c), of an image.
template <class S>
void sparse_maps(const Training& t, const S* gram, S* maps) {
  const int64_t c = t.channels / t.heads;
  const auto inverse = inverse_norms(t, gram);
  MapRow<Narrow<S>> row(t, c);
  std::vector<S> A(c);
  for (int64_t i = 0; i < t.channels; ++i) {
    score_row(t, gram, inverse, i, A.data());
    row.map(A.data(), maps + i * c);
  }
}

// The gradients of Q Kᵀ and of the sums of squares, laid out as `gram`, from those of the maps.
template <class S>
void maps_gradient(const Training& t, const S* gram, const S* d_maps, S* d_gram, S* d_temperature, S* d_weights) {
  const int64_t C = t.channels, c = C / t.heads;
  const S *q_squares = gram + C * c, *k_squares = q_squares + C;
  S *dq = d_gram + C * c, *dk = dq + C;
  std::fill(dq, dk + C, S(0));
  const auto inverse = inverse_norms(t, gram);
  MapRow<Narrow<S>> row(t, c);
  std::vector<S> A(c), dA(c);
  for (int64_t i = 0; i < C; ++i) {
    const int64_t head = i / c;
    const S alpha = static_cast<const S*>(t.temperature)[head], scale = inverse[i] / alpha;
    score_row(t, gram, inverse, i, A.data());
    row.gradient(A.data(), d_maps + i * c, dA.data(), d_weights);
    S along = 0;
    for (int64_t j = 0; j < c; ++j) {
      const S product = dA[j] * A[j];
      d_gram[i * c + j] = dA[j] * inverse[C + head * c + j] * scale;
      dk[head * c + j] -= product;
      along += product;
    }
    dq[i] = q_squares[i] >= LEAST_SQUARES<S> ? -along / (2 * q_squares[i]) : 0;
    d_temperature[head] -= along / alpha;
  }
  for (int64_t j = 0; j < C; ++j) dk[j] = k_squares[j] >= LEAST_SQUARES<S> ? dk[j] / (2 * k_squares[j]) : 0;
}

// ---------------------------------------------------------------- parameters and sums

template <class S, class T>
struct Parameters {
  const T *in, *in_back;    // W_p for C → 4C and for 4C → C
  const T *out, *out_back;  // W_p'
  const S *norm_weight, *norm_bias;
  const S* depthwise;  // (9, 4C)
  const S* mask;       // (8, 5, C), as `inverse` takes it

  Parameters(const Training& t, Scratch& scratch) {
    const int64_t C = t.channels;
    const auto* W_in = static_cast<const S*>(t.project_in);
    const auto* W_out = static_cast<const S*>(t.project_out);
    T* packs = scratch.take<T>(10 * C * C);
    // Q and K, then V and U: a product each
    pack(packs, W_in, C, 2 * C, true);
    pack(packs + 2 * C * C, W_in + 2 * C * C, C, 2 * C, true);
    pack(packs + 4 * C * C, W_in, 4 * C, C, false);
    pack(packs + 8 * C * C, W_out, C, C, true);
    pack(packs + 9 * C * C, W_out, C, C, false);
    in = packs, in_back = packs + 4 * C * C, out = packs + 8 * C * C, out_back = packs + 9 * C * C;
    norm_weight = static_cast<const S*>(t.norm_weight);
    norm_bias = static_cast<const S*>(t.norm_bias);
    S* kernels = scratch.take<S>(9 * 4 * C);
    for (int64_t c = 0; c < 4 * C; ++c)
      for (int64_t i = 0; i < 9; ++i) kernels[i * 4 * C + c] = static_cast<const S*>(t.depthwise)[c * 9 + i];
    depthwise = kernels;
    mask = nullptr;
    if (t.gate != DFGB) return;
    // `irfft2` leaves the mean of ±u in the columns 0 and 4, and divides by 64.
    const auto* M = static_cast<const S*>(t.mask);
    S* folded = scratch.take<S>(BLOCK * HALF * C);
    for (int64_t c = 0; c < C; ++c)
      for (int64_t u = 0; u < BLOCK; ++u)
        for (int64_t v = 0; v < HALF; ++v) {
          const int64_t other = v % 4 == 0 ? (BLOCK - u) % BLOCK : u;
          folded[(u * HALF + v) * C + c] =
              (M[(c * BLOCK + u) * HALF + v] + M[(c * BLOCK + other) * HALF + v]) / (2 * PIXELS);
        }
    mask = folded;
  }
};

// A thread's sums of the parameters' gradients.
template <class S>
struct Sums {
  S *project_in, *depthwise, *project_out, *norm, *mask, *temperature, *weights;
  int64_t size;

  Sums(const Training& t, Scratch& scratch) {
    const int64_t C = t.channels;
    const int64_t sizes[] = {4 * C * C, 9 * 4 * C, C * C, 2 * C, BLOCK * HALF * C, t.heads, t.thresholds};
    size = 0;
    for (const int64_t s : sizes) size += s;
    S* at = scratch.zeros<S>(size);
    S** parts[] = {&project_in, &depthwise, &project_out, &norm, &mask, &temperature, &weights};
    for (int i = 0; i < 7; ++i) *parts[i] = at, at += sizes[i];
  }
};

// ---------------------------------------------------------------- an image

#define DSGFORMER_INLINE inline __attribute__((always_inline))

// A block of 8×8 pixels, and what an image has of one at its end.
struct Whole {
  static constexpr bool whole = true;
  static constexpr int64_t rows = BLOCK, columns = BLOCK, pixels = PIXELS;
  int64_t top, left;
};

struct Part {
  static constexpr bool whole = false;
  int64_t top, left, rows, columns, pixels;
};

template <class W, class T>
class Image {
 public:
  using S = typename W::S;
  using V = typename W::V;
  static constexpr int64_t L = W::L;
  static constexpr S EPSILON = S(1e-5);  // LN's

  Image(const Training& t, const Parameters<S, T>& parameters)
      : t_(t), w_(parameters), C_(t.channels), c_(C_ / t.heads), height_(t.height), width_(t.width),
        stride_(t.width + 2) {}

  int64_t block_rows() const { return (height_ + BLOCK - 1) / BLOCK; }
  int64_t plane() const { return (height_ + 2) * stride_ * 2 * C_; }
  int64_t gram_size() const { return C_ * c_ + 2 * C_; }

  // Zeros around the two planes of an image of 2C channels.
  void clear_border(T* p) const {
    const int64_t row = stride_ * 2 * C_;
    for (int64_t half = 0; half < 2; ++half, p += plane()) {
      std::memset(static_cast<void*>(p), 0, row * sizeof(T));
      std::memset(static_cast<void*>(p + (height_ + 1) * row), 0, row * sizeof(T));
      for (int64_t y = 1; y <= height_; ++y) {
        std::memset(static_cast<void*>(p + y * row), 0, 2 * C_ * sizeof(T));
        std::memset(static_cast<void*>(p + (y + 1) * row - 2 * C_), 0, 2 * C_ * sizeof(T));
      }
    }
  }

  // W_p LN(X) of the rows of pixels from `top` to `bottom`.
  void project(const T* x, T* p, int64_t top, int64_t bottom) const {
    Scratch scratch;
    T* normal = scratch.take<T>(PIXELS * C_);
    S* mean = scratch.take<S>(2 * PIXELS);
    for (int64_t y = top; y < std::min(bottom, height_); ++y)
      for (int64_t j = 0; j < width_; j += PIXELS) {
        const int64_t pixels = std::min(PIXELS, width_ - j);
        normalise(x + (y * width_ + j) * C_, pixels, normal, mean, mean + PIXELS);
        for (int64_t half = 0; half < 2; ++half) {
          T* out = p + half * plane() + ((y + 1) * stride_ + j + 1) * 2 * C_;
          const T* next = out + stride_ * 2 * C_;
          for (int64_t i = 0; i < pixels * 2 * C_; i += LINE / sizeof(T)) __builtin_prefetch(next + i, 1);
          rows_product(pixels, 2 * C_, C_, normal, C_, w_.in + half * 2 * C_ * C_, out, 2 * C_);
        }
      }
  }

  // Adds Q Kᵀ and the rows' sums of squares of some rows of blocks.
  void gram(const T* p, S* sums, int64_t first, int64_t last) const {
    Scratch scratch;
    T* qk = scratch.take<T>(PIXELS * 2 * C_);
    T* pairs = scratch.take<T>((PIXELS + 1) * 2 * C_);
    S* squares = sums + C_ * c_;
    each_block(first, last, [&](const auto& b) {
      const int64_t C = C_;
      T* out = qk;
      for (int64_t k = 0; k < 2 * C; k += L) {
        V total = load<W>(squares + k);
        convolve(p, b, k, k, [&](int64_t pixel, int64_t, V v) {
          total += v * v;
          store<W>(out + pixel * 2 * C + k, v);
        });
        store<W>(squares + k, total);
      }
      const T* both = paired(qk, b.pixels, 2 * C, pairs);
      for (int64_t h = 0; h < t_.heads; ++h)
        outer_product(c_, c_, b.pixels, both + h * c_ * PAIR<T>, 2 * C, both + (C + h * c_) * PAIR<T>, 2 * C,
                      sums + h * c_ * c_, c_);
    });
  }

  // Y of some rows of blocks, given the maps as `pack_maps` gives them.
  void restore(const T* x, const T* p, const T* maps, T* y, int64_t first, int64_t last) const {
    Scratch scratch;
    T* v = scratch.take<T>(PIXELS * C_);
    T* gated = scratch.take<T>(PIXELS * C_);
    S* av = scratch.take<S>(PIXELS * C_);
    const T* vu = p + plane();
    each_block(first, last, [&](const auto& b) {
      const int64_t C = C_, gate = t_.gate;
      const S* attended = av;
      T* out = gated;
      ask_for_next<false>(x, b);
      ask_for_next<true>(y, b);
      attend(vu, b, maps, v, av);
      for (int64_t k = 0; k < C; k += L) {
        V block[PIXELS];
        gate_input(vu, b, k, block);
        if (w_.mask) {
          Spectrum<W> spectrum;
          transform<W>(block, spectrum);
          inverse<W>(spectrum, w_.mask + k, C, block);
        }
        each_pixel(b, [&](int64_t pixel, int64_t at) {
          V slope;
          const V u = gate == IDENTITY ? block[at] : gelu<W, false>(block[at], slope);
          store<W>(out + pixel * C + k, u * load<W>(attended + pixel * C + k));
        });
      }
      rows_product(b.pixels, C, C, gated, C, w_.out, av, C);
      for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t offset = ((b.top + r) * width_ + b.left) * C, count = b.columns * C;
        const S* sums = av + r * count;
        for (int64_t i = 0; i < count; i += L)
          store<W>(y + offset + i, load<W>(x + offset + i) + load<W>(sums + i));
      }
    });
  }

  // The maps as matrices that V is multiplied with (Aᵀ), or the gradient of A V.
  void pack_maps(const S* maps, T* packed, bool transposed) const {
    for (int64_t h = 0; h < t_.heads; ++h)
      pack(packed + h * c_ * c_, maps + h * c_ * c_, c_, c_, transposed);
  }

  // From the gradient of Y those of V and U (the second plane of d), of the maps, of M and of W_p'.
  void gate_gradient(const T* dy, const T* p, const T* maps, const T* maps_back, T* d, S* d_maps, const Sums<S>& sums,
                     int64_t first, int64_t last) const {
    Scratch scratch;
    T* v = scratch.take<T>(PIXELS * C_);
    T* given = scratch.take<T>(PIXELS * C_);
    T* gated = scratch.take<T>(PIXELS * C_);
    T* d_av = scratch.take<T>(PIXELS * C_);
    S* av = scratch.take<S>(PIXELS * C_);
    S* d_gated = scratch.take<S>(PIXELS * C_);
    T* pairs[2] = {scratch.take<T>((PIXELS + 1) * C_), scratch.take<T>((PIXELS + 1) * C_)};
    const T* vu = p + plane();
    T* d_vu = d + plane();
    each_block(first, last, [&](const auto& b) {
      const int64_t C = C_, c = c_, gate = t_.gate, stride = stride_;
      T *out = gated, *d_out = d_av, *d_u = d_vu + ((b.top + 1) * stride + b.left + 1) * 2 * C + C;
      const S *attended = av, *outer = d_gated;
      ask_for_next<false>(dy, b);
      attend(vu, b, maps, v, av);
      copy_block(dy, b, given);
      rows_product(b.pixels, C, C, given, C, w_.out_back, d_gated, C);
      for (int64_t k = 0; k < C; k += L) {
        V block[PIXELS];
        Spectrum<W> spectrum;
        gate_input(vu, b, k, block);
        if (w_.mask) {
          transform<W>(block, spectrum);
          inverse<W>(spectrum, w_.mask + k, C, block);
        }
        each_pixel(b, [&](int64_t pixel, int64_t at) {
          V slope = splat<W>(1);
          const V u = gate == IDENTITY ? block[at] : gelu<W, true>(block[at], slope);
          const V a = load<W>(attended + pixel * C + k), g = load<W>(outer + pixel * C + k);
          store<W>(out + pixel * C + k, u * a);
          store<W>(d_out + pixel * C + k, u * g);
          block[at] = slope * g * a;
        });
        if (w_.mask) {
          if constexpr (!std::decay_t<decltype(b)>::whole)
            for (int64_t y = 0; y < BLOCK; ++y)
              for (int64_t x = 0; x < BLOCK; ++x)
                if (y >= b.rows || x >= b.columns) block[y * BLOCK + x] = V{};
          Spectrum<W> of_gradient;
          transform<W>(block, of_gradient);
          mask_gradient<W>(spectrum, of_gradient, sums.mask + k, C);
          inverse<W>(of_gradient, w_.mask + k, C, block);
          if constexpr (!std::decay_t<decltype(b)>::whole) {
            // the repeated border hands its gradient to what it repeats
            for (int64_t y = 0; y < BLOCK; ++y)
              for (int64_t x = b.columns; x < BLOCK; ++x) block[y * BLOCK + b.columns - 1] += block[y * BLOCK + x];
            for (int64_t y = b.rows; y < BLOCK; ++y)
              for (int64_t x = 0; x < b.columns; ++x) block[(b.rows - 1) * BLOCK + x] += block[y * BLOCK + x];
          }
        }
        for (int64_t y = 0; y < b.rows; ++y)
          for (int64_t x = 0; x < b.columns; ++x)
            store<W>(d_u + (y * stride + x) * 2 * C + k, block[y * BLOCK + x]);
      }
      // dV, in rows of the block
      for (int64_t h = 0; h < t_.heads; ++h)
        for (int64_t r = 0; r < b.rows; ++r)
          rows_product(b.columns, c, c, d_av + r * b.columns * C + h * c, C, maps_back + h * c * c,
                       d_vu + ((b.top + 1 + r) * stride + b.left + 1) * 2 * C + h * c, 2 * C);
      const T* a = paired(d_av, b.pixels, C, pairs[0]);
      const T* other = paired(v, b.pixels, C, pairs[1]);
      for (int64_t h = 0; h < t_.heads; ++h)
        outer_product(c, c, b.pixels, a + h * c * PAIR<T>, C, other + h * c * PAIR<T>, C, d_maps + h * c * c, c);
      a = paired(given, b.pixels, C, pairs[0]);
      other = paired(gated, b.pixels, C, pairs[1]);
      outer_product(C, C, b.pixels, a, C, other, C, sums.project_out, C);
    });
  }

  // The gradients of Q and K (the first plane of d) from that of `gram`; dg and dg_t are its heads, packed.
  void score_gradient(const T* p, const S* d_squares, const T* dg, const T* dg_t, T* d, int64_t first,
                      int64_t last) const {
    Scratch scratch;
    T* qk = scratch.take<T>(PIXELS * 2 * C_);
    S* out = scratch.take<S>(PIXELS * 2 * C_);
    each_block(first, last, [&](const auto& b) {
      const int64_t C = C_, c = c_, stride = stride_;
      T *values = qk, *to = d + ((b.top + 1) * stride + b.left + 1) * 2 * C;
      const S* sums = out;
      for (int64_t k = 0; k < 2 * C; k += L)
        convolve(p, b, k, k, [&](int64_t pixel, int64_t, V v) { store<W>(values + pixel * 2 * C + k, v); });
      for (int64_t h = 0; h < t_.heads; ++h) {
        rows_product(b.pixels, c, c, qk + C + h * c, 2 * C, dg_t + h * c * c, out + h * c, 2 * C);
        rows_product(b.pixels, c, c, qk + h * c, 2 * C, dg + h * c * c, out + C + h * c, 2 * C);
      }
      for (int64_t k = 0; k < 2 * C; k += L) {
        const V twice = 2 * load<W>(d_squares + k);
        for (int64_t y = 0; y < b.rows; ++y)
          for (int64_t x = 0; x < b.columns; ++x) {
            const int64_t at = (y * b.columns + x) * 2 * C + k;
            store<W>(to + (y * stride + x) * 2 * C + k, load<W>(sums + at) + twice * load<W>(values + at));
          }
      }
    });
  }

  // From the gradients of Q, K, V and U those of X, W_d, W_p and LN's weight and bias.
  void input_gradient(const T* x, const T* dy, const T* p, const T* d, T* dx, const Sums<S>& sums, int64_t first,
                      int64_t last) const {
    Scratch scratch;
    T* in = scratch.take<T>(PIXELS * C_);
    T* normal = scratch.take<T>(PIXELS * C_);
    T* dp = scratch.take<T>(PIXELS * 4 * C_);
    S* mean = scratch.take<S>(2 * PIXELS);
    S* scale = mean + PIXELS;
    S* dn = scratch.take<S>(PIXELS * C_);
    T* pairs[2] = {scratch.take<T>((PIXELS + 1) * 4 * C_), scratch.take<T>((PIXELS + 1) * C_)};
    each_block(first, last, [&](const auto& b) {
      const int64_t C = C_, width = width_;
      ask_for_next<false>(x, b);
      ask_for_next<false>(dy, b);
      ask_for_next<true>(dx, b);
      for (int64_t k = 0; k < 4 * C; k += L) depthwise_gradient(p, d, b, k, dp, sums.depthwise);
      copy_block(x, b, in);
      normalise(in, b.pixels, normal, mean, scale);
      const T* a = paired(dp, b.pixels, 4 * C, pairs[0]);
      outer_product(4 * C, C, b.pixels, a, 4 * C, paired(normal, b.pixels, C, pairs[1]), C, sums.project_in, C);
      rows_product(b.pixels, C, 4 * C, dp, 4 * C, w_.in_back, dn, C);
      V along[PIXELS], whole[PIXELS];
      for (int64_t pixel = 0; pixel < b.pixels; ++pixel) along[pixel] = whole[pixel] = V{};
      const T* own = in;
      const S *g_in = dn, *means = mean, *scales = scale, *weights = w_.norm_weight;
      for (int64_t k = 0; k < C; k += L) {
        const V weight = load<W>(weights + k);
        V d_weight = load<W>(sums.norm + k), d_bias = load<W>(sums.norm + C + k);
        for (int64_t pixel = 0; pixel < b.pixels; ++pixel) {
          const V g = load<W>(g_in + pixel * C + k);
          const V unit = (load<W>(own + pixel * C + k) - means[pixel]) * scales[pixel];
          const V product = g * unit;
          d_bias += g;
          d_weight += product;
          whole[pixel] += g * weight;
          along[pixel] += product * weight;
        }
        store<W>(sums.norm + k, d_weight);
        store<W>(sums.norm + C + k, d_bias);
      }
      const S share = S(1) / C;
      for (int64_t y = 0; y < b.rows; ++y) {
        const int64_t row = ((b.top + y) * width + b.left) * C;
        for (int64_t j = 0; j < b.columns; ++j) {
          const int64_t pixel = y * b.columns + j, at = row + j * C;
          const S m = sum<W>(whole[pixel]) * share, n = sum<W>(along[pixel]) * share;
          const S r = scales[pixel], mu = means[pixel];
          for (int64_t k = 0; k < C; k += L) {
            const V unit = (load<W>(own + pixel * C + k) - mu) * r;
            const V g = load<W>(g_in + pixel * C + k) * load<W>(weights + k);
            store<W>(dx + at + k, load<W>(dy + at + k) + (g - m - unit * n) * r);
          }
        }
      }
    });
  }

 private:
  template <class F>
  void each_block(int64_t first, int64_t last, const F& f) const {
    for (int64_t top = first * BLOCK; top < std::min(last * BLOCK, height_); top += BLOCK)
      for (int64_t left = 0; left < width_; left += BLOCK) {
        const int64_t rows = std::min(BLOCK, height_ - top), columns = std::min(BLOCK, width_ - left);
        if (rows * columns == PIXELS)
          f(Whole{top, left});
        else
          f(Part{top, left, rows, columns, rows * columns});
      }
  }

  // f(pixel of those that the image has, the same in the whole block).
  template <class B, class F>
  static DSGFORMER_INLINE void each_pixel(const B& b, const F& f) {
    if constexpr (std::decay_t<decltype(b)>::whole) {
      for (int64_t pixel = 0; pixel < PIXELS; ++pixel) f(pixel, pixel);
    } else {
      for (int64_t y = 0; y < b.rows; ++y)
        for (int64_t x = 0; x < b.columns; ++x) f(y * b.columns + x, y * BLOCK + x);
    }
  }

  template <class B>
  void copy_block(const T* image, const B& b, T* out) const {
    for (int64_t r = 0; r < b.rows; ++r)
      std::memcpy(static_cast<void*>(out + r * b.columns * C_), image + ((b.top + r) * width_ + b.left) * C_,
                  b.columns * C_ * sizeof(T));
  }

  void normalise(const T* x, int64_t pixels, T* out, S* mean, S* scale) const {
    const int64_t C = C_;
    const S *weight = w_.norm_weight, *bias = w_.norm_bias, share = S(1) / C;
    for (int64_t p = 0; p < pixels; ++p) {
      V total = {}, squares = {};
      for (int64_t k = 0; k < C; k += L) total += load<W>(x + p * C + k);
      const S m = sum<W>(total) * share;
      for (int64_t k = 0; k < C; k += L) {
        const V d = load<W>(x + p * C + k) - m;
        squares += d * d;
      }
      const S r = 1 / std::sqrt(sum<W>(squares) * share + EPSILON);
      mean[p] = m, scale[p] = r;
      for (int64_t k = 0; k < C; k += L)
        store<W>(out + p * C + k, (load<W>(x + p * C + k) - m) * (r * load<W>(weight + k)) + load<W>(bias + k));
    }
  }

  // Asks for the columns of a plane that the block on the right of b needs more than b.
  template <class B>
  DSGFORMER_INLINE void ask_for_columns(const T* from, int64_t k, int64_t step, int64_t row) const {
    if constexpr (B::whole)
      if (k * sizeof(T) % LINE == 0)
        for (int64_t y = 0; y < HALO; ++y) {
          const T* at = from + y * row + HALO * step;
#pragma GCC unroll 8
          for (int64_t x = 0; x < BLOCK; ++x, at += step) __builtin_prefetch(at);
        }
  }

  // f(0), f(1), … with numbers that the compiler knows.
  template <class F, int... I>
  static DSGFORMER_INLINE void unrolled(std::integer_sequence<int, I...>, const F& f) {
    (f(std::integral_constant<int, I>{}), ...);
  }

  // Three neighbouring columns of ROWS rows, moving to the right.
  template <int ROWS>
  struct Window {
    V at[ROWS][3];

    DSGFORMER_INLINE void load_column(const T* from, int64_t step, int64_t row, int column) {
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) at[i][column % 3] = load<W>(from + i * row + column * step);
    }

    // Σ w over rows first … first + 2 and columns x … x + 2.
    DSGFORMER_INLINE V sum(const V w[9], int first, int x) const {
      const int j = x % 3, k = (x + 1) % 3, l = (x + 2) % 3;
      V s = w[0] * at[first][j], t = w[3] * at[first + 1][j], u = w[6] * at[first + 2][j];
      s += w[1] * at[first][k], t += w[4] * at[first + 1][k], u += w[7] * at[first + 2][k];
      s += w[2] * at[first][l], t += w[5] * at[first + 1][l], u += w[8] * at[first + 2][l];
      return s + t + u;
    }
  };

  // Asks for the block on the right of b of an image of C channels.
  template <bool WRITE, class B>
  DSGFORMER_INLINE void ask_for_next(const T* image, const B& b) const {
    if constexpr (std::decay_t<decltype(b)>::whole)
      for (int64_t y = 0; y < BLOCK; ++y) {
        const T* at = image + ((b.top + y) * width_ + b.left + BLOCK) * C_;
        for (int64_t i = 0; i < BLOCK * C_; i += LINE / sizeof(T)) __builtin_prefetch(at + i, WRITE);
      }
  }

  // f(pixel, the same in the whole block, W_d P there) of L channels: from k of the plane, from `kernel` of the 4C.
  template <class B, class F>
  DSGFORMER_INLINE void convolve(const T* plane, const B& b, int64_t k, int64_t kernel, const F& f) const {
    const int64_t step = 2 * C_, row = stride_ * step;
    const T* from = plane + b.top * row + b.left * step + k;
    V w[9];
    for (int i = 0; i < 9; ++i) w[i] = load<W>(w_.depthwise + i * 4 * C_ + kernel);
    ask_for_columns<B>(from, k, step, row);
    if constexpr (std::decay_t<decltype(b)>::whole) {
      for (int64_t y = 0; y < BLOCK; y += 2, from += 2 * row) {
        Window<4> window;
        window.load_column(from, step, row, 0);
        window.load_column(from, step, row, 1);
        unrolled(std::make_integer_sequence<int, BLOCK>(), [&](auto x) __attribute__((always_inline)) {
          window.load_column(from, step, row, x + 2);
          f(y * BLOCK + x, y * BLOCK + x, window.sum(w, 0, x));
          f((y + 1) * BLOCK + x, (y + 1) * BLOCK + x, window.sum(w, 1, x));
        });
      }
    } else {
      for (int64_t y = 0; y < b.rows; ++y, from += row)
        for (int64_t x = 0; x < b.columns; ++x) {
          Window<3> window;
          for (int i = 0; i < 3; ++i) window.load_column(from + x * step, step, row, i);
          f(y * b.columns + x, y * BLOCK + x, window.sum(w, 0, 0));
        }
    }
  }

  // V of a block, and A V.
  template <class B>
  void attend(const T* vu, const B& b, const T* maps, T* v, S* av) const {
    const int64_t C = C_;
    for (int64_t k = 0; k < C; k += L)
      convolve(vu, b, k, 2 * C + k, [&](int64_t pixel, int64_t, V value) { store<W>(v + pixel * C + k, value); });
    for (int64_t h = 0; h < t_.heads; ++h)
      rows_product(b.pixels, c_, c_, v + h * c_, C, maps + h * c_ * c_, av + h * c_, C);
  }

  // U of a whole block, its border repeated where the image ends within it.
  template <class B>
  DSGFORMER_INLINE void gate_input(const T* vu, const B& b, int64_t k, V block[PIXELS]) const {
    convolve(vu, b, C_ + k, 3 * C_ + k, [&](int64_t, int64_t at, V v) { block[at] = v; });
    if constexpr (!std::decay_t<decltype(b)>::whole) {
      for (int64_t y = 0; y < b.rows; ++y)
        for (int64_t x = b.columns; x < BLOCK; ++x) block[y * BLOCK + x] = block[y * BLOCK + b.columns - 1];
      for (int64_t y = b.rows; y < BLOCK; ++y)
        for (int64_t x = 0; x < BLOCK; ++x) block[y * BLOCK + x] = block[(b.rows - 1) * BLOCK + x];
    }
  }

  // dP of L of the 4C channels, and what the block adds to the gradient of their kernels: a neighbourhood of the
  // gradient of W_d P is used twice, multiplied with the kernel and with P in its middle.
  template <class B>
  DSGFORMER_INLINE void depthwise_gradient(const T* p, const T* d, const B& b, int64_t k, T* dp, S* d_kernels) const {
    const int64_t C = C_, step = 2 * C, row = stride_ * step;
    const int64_t offset = k / step * plane() + b.top * row + b.left * step + k % step;
    const T *from = d + offset, *middle = p + offset + row + step;
    V w[9], total[9];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) {
      w[i] = load<W>(w_.depthwise + (8 - i) * 4 * C + k);
      total[i] = load<W>(d_kernels + (8 - i) * 4 * C + k);
    }
    ask_for_columns<B>(from, k, step, row);
    ask_for_columns<B>(p + offset, k, step, row);
    auto pixel = [&](const Window<3>& window, int x, const T* of_p, T* out) __attribute__((always_inline)) {
      const V value = load<W>(of_p);
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) total[i] += value * window.at[i / 3][(x + i % 3) % 3];
      store<W>(out, window.sum(w, 0, x));
    };
    for (int64_t y = 0; y < b.rows; ++y, from += row, middle += row) {
      T* out = dp + y * b.columns * 4 * C + k;
      Window<3> window;
      if constexpr (std::decay_t<decltype(b)>::whole) {
        window.load_column(from, step, row, 0);
        window.load_column(from, step, row, 1);
        unrolled(std::make_integer_sequence<int, BLOCK>(), [&](auto x) __attribute__((always_inline)) {
          window.load_column(from, step, row, x + 2);
          pixel(window, x, middle + x * step, out + x * 4 * C);
        });
      } else {
        for (int64_t x = 0; x < b.columns; ++x) {
          for (int i = 0; i < 3; ++i) window.load_column(from + x * step, step, row, i);
          pixel(window, 0, middle + x * step, out + x * 4 * C);
        }
      }
    }
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) store<W>(d_kernels + (8 - i) * 4 * C + k, total[i]);
  }

  const Training& t_;
  const Parameters<S, T>& w_;
  const int64_t C_, c_, height_, width_, stride_;
};

// ---------------------------------------------------------------- a batch

// How a batch is shared out: `slots` threads take images, or `parts` threads take parts of each image.
struct Plan {
  int64_t slots, parts;

  explicit Plan(const Training& t) {
    const int64_t threads = at::get_num_threads();
    const bool by_image = t.images % threads == 0 || t.images >= 4 * threads;
    slots = by_image ? std::min(threads, t.images) : 1;
    parts = by_image ? 1 : threads;
  }
};

// work(i) for i from 0 to count - 1, in parallel; false if memory ran out.
template <class Work>
bool parallel(int64_t count, const Work& work) {
  if (count == 1) {
    try {
      work(0);
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  }
  std::atomic<bool> sound{true};
  dsgformer::parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      try {
        work(begin);
      } catch (const std::bad_alloc&) {
        sound = false;
      }
  });
  return sound;
}

void expect(bool sound) {
  if (!sound) throw std::bad_alloc();
}

// Two passes over the rows of blocks, where the second needs of the first its own row and its neighbours.
// A thread alone lets the second follow one row behind the first: what it reads is still in the cache.
template <class Parts, class First, class Second>
void in_turn(const Parts& parts, const Plan& plan, int64_t rows, const First& first, const Second& second) {
  if (plan.parts > 1) {
    parts(first);
    parts(second);
    return;
  }
  for (int64_t i = 0; i <= rows; ++i) {
    if (i < rows) first(0, i, i + 1);
    if (i > 0) second(0, i - 1, i);
  }
}

template <class W, class T>
void forward(const Training& t) {
  using S = typename W::S;
  Scratch outside;
  const Parameters<S, T> parameters(t, outside);
  const Image<W, T> image(t, parameters);
  const Plan plan(t);
  const int64_t rows = image.block_rows(), values = t.height * t.width * t.channels;
  expect(parallel(plan.slots, [&](int64_t slot) {
    Scratch scratch;
    S* maps = scratch.take<S>(t.channels * t.channels / t.heads);
    T* packed = scratch.take<T>(t.channels * t.channels / t.heads);
    S* sums = scratch.take<S>(plan.parts * image.gram_size());
    T* own = t.p ? nullptr : scratch.take<T>(2 * image.plane());
    for (int64_t i = t.images * slot / plan.slots; i < t.images * (slot + 1) / plan.slots; ++i) {
      const T* x = static_cast<const T*>(t.x) + i * values;
      T* p = t.p ? static_cast<T*>(t.p) + i * 2 * image.plane() : own;
      S* gram = static_cast<S*>(t.gram) + i * image.gram_size();
      auto parts = [&](const auto& work) {
        expect(parallel(plan.parts, [&](int64_t part) {
          work(part, rows * part / plan.parts, rows * (part + 1) / plan.parts);
        }));
      };
      image.clear_border(p);
      std::fill_n(sums, plan.parts * image.gram_size(), S(0));
      in_turn(parts, plan, rows,
              [&](int64_t, int64_t first, int64_t last) {
                image.project(x, p, first * BLOCK, last * BLOCK);
              },
              [&](int64_t part, int64_t first, int64_t last) {
                image.gram(p, sums + part * image.gram_size(), first, last);
              });
      std::fill_n(gram, image.gram_size(), S(0));
      for (int64_t part = 0; part < plan.parts; ++part)
        for (int64_t j = 0; j < image.gram_size(); ++j) gram[j] += sums[part * image.gram_size() + j];
      sparse_maps(t, gram, maps);
      image.pack_maps(maps, packed, true);
      T* y = static_cast<T*>(t.y) + i * values;
      parts([&](int64_t, int64_t first, int64_t last) { image.restore(x, p, packed, y, first, last); });
    }
  }));
}

template <class W, class T>
void backward(const Training& t) {
  using S = typename W::S;
  Scratch outside;
  const Parameters<S, T> parameters(t, outside);
  const Image<W, T> image(t, parameters);
  const Plan plan(t);
  const int64_t C = t.channels, maps_size = C * C / t.heads;
  const int64_t rows = image.block_rows(), values = t.height * t.width * C;
  std::vector<Sums<S>> sums;
  for (int64_t i = 0; i < plan.slots * plan.parts; ++i) sums.emplace_back(t, outside);
  expect(parallel(plan.slots, [&](int64_t slot) {
    Scratch scratch;
    S* maps = scratch.take<S>(maps_size);
    S* d_maps = scratch.take<S>(plan.parts * maps_size);
    S* d_gram = scratch.take<S>(image.gram_size());
    T* packed[2] = {scratch.take<T>(maps_size), scratch.take<T>(maps_size)};
    T* d = scratch.take<T>(2 * image.plane());
    T* own = t.p ? nullptr : scratch.take<T>(2 * image.plane());
    image.clear_border(d);
    const Sums<S>* mine = sums.data() + slot * plan.parts;
    for (int64_t i = t.images * slot / plan.slots; i < t.images * (slot + 1) / plan.slots; ++i) {
      const T* x = static_cast<const T*>(t.x) + i * values;
      const T* dy = static_cast<const T*>(t.dy) + i * values;
      const T* p = t.p ? static_cast<const T*>(t.p) + i * 2 * image.plane() : own;
      const S* gram = static_cast<const S*>(t.gram) + i * image.gram_size();
      auto parts = [&](const auto& work) {
        expect(parallel(plan.parts, [&](int64_t part) {
          work(part, rows * part / plan.parts, rows * (part + 1) / plan.parts);
        }));
      };
      if (own) {
        image.clear_border(own);
        parts([&](int64_t, int64_t first, int64_t last) { image.project(x, own, first * BLOCK, last * BLOCK); });
      }
      sparse_maps(t, gram, maps);
      image.pack_maps(maps, packed[0], true);
      image.pack_maps(maps, packed[1], false);
      std::fill_n(d_maps, plan.parts * maps_size, S(0));
      parts([&](int64_t part, int64_t first, int64_t last) {
        image.gate_gradient(dy, p, packed[0], packed[1], d, d_maps + part * maps_size, mine[part], first, last);
      });
      for (int64_t part = 1; part < plan.parts; ++part)
        for (int64_t j = 0; j < maps_size; ++j) d_maps[j] += d_maps[part * maps_size + j];
      maps_gradient(t, gram, d_maps, d_gram, mine[0].temperature, mine[0].weights);
      image.pack_maps(d_gram, packed[0], false);
      image.pack_maps(d_gram, packed[1], true);
      T* dx = static_cast<T*>(t.dx) + i * values;
      in_turn(parts, plan, rows,
              [&](int64_t, int64_t first, int64_t last) {
                image.score_gradient(p, d_gram + maps_size, packed[0], packed[1], d, first, last);
              },
              [&](int64_t part, int64_t first, int64_t last) {
                image.input_gradient(x, dy, p, d, dx, mine[part], first, last);
              });
    }
  }));
  S* total = sums[0].project_in;
  for (size_t i = 1; i < sums.size(); ++i)
    for (int64_t j = 0; j < sums[0].size; ++j) total[j] += sums[i].project_in[j];
  const Sums<S>& s = sums[0];
  std::copy_n(s.project_in, 4 * C * C, static_cast<S*>(t.d_project_in));
  std::copy_n(s.project_out, C * C, static_cast<S*>(t.d_project_out));
  std::copy_n(s.norm, C, static_cast<S*>(t.d_norm_weight));
  std::copy_n(s.norm + C, C, static_cast<S*>(t.d_norm_bias));
  std::copy_n(s.temperature, t.heads, static_cast<S*>(t.d_temperature));
  if (t.thresholds) std::copy_n(s.weights, t.thresholds, static_cast<S*>(t.d_weights));
  for (int64_t c = 0; c < 4 * C; ++c)
    for (int64_t i = 0; i < 9; ++i) static_cast<S*>(t.d_depthwise)[c * 9 + i] = s.depthwise[i * 4 * C + c];
  if (t.gate != DFGB) return;
  for (int64_t c = 0; c < C; ++c)
    for (int64_t u = 0; u < BLOCK; ++u)
      for (int64_t v = 0; v < HALF; ++v) {
        const bool folded = v % 4 == 0;
        const int64_t from = folded ? std::min(u, BLOCK - u) : u;
        const S value = s.mask[(from * HALF + v) * C + c] / PIXELS;
        static_cast<S*>(t.d_mask)[(c * BLOCK + u) * HALF + v] = folded ? value : 2 * value;
      }
}

// ---------------------------------------------------------------- outside the levels

int64_t taps_of(int64_t channels) { return (9 * channels + 7) / 8 * 8; }

// The 3×3 neighbourhoods of pixels of an image row, (pixels, taps), of rows, columns and channels; zeros beyond.
template <class T>
class Neighbourhoods {
 public:
  Neighbourhoods(int64_t height, int64_t width, int64_t channels, Scratch& scratch)
      : height_(height), width_(width), channels_(channels), taps_(taps_of(channels)),
        stride_((width + 2) * channels), rows_(scratch.zeros<T>(3 * stride_)), out_(scratch.zeros<T>(PIXELS * taps_)) {}

  // Row y of the image comes next.
  void enter(const T* image, int64_t y) {
    const int64_t row = width_ * channels_;
    for (int64_t i = 0; i < 3; ++i) {
      T* to = rows_ + i * stride_ + channels_;
      if (const int64_t from = y + i - 1; 0 <= from && from < height_)
        std::memcpy(static_cast<void*>(to), image + from * row, row * sizeof(T));
      else
        std::memset(static_cast<void*>(to), 0, row * sizeof(T));
    }
  }

  const T* at(int64_t column, int64_t pixels) const {
    const int64_t run = 3 * channels_;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t i = 0; i < 3; ++i)
        for (int64_t j = 0; j < run; ++j) out_[p * taps_ + i * run + j] = rows_[i * stride_ + (column + p) * channels_ + j];
    return out_;
  }

 private:
  const int64_t height_, width_, channels_, taps_, stride_;
  T *rows_, *out_;
};

// work(first row, last row, part) of the rows of all images, in `parts` equal parts.
template <class Work>
void share_rows(int64_t rows, int64_t parts, const Work& work) {
  expect(parallel(parts, [&](int64_t part) { work(rows * part / parts, rows * (part + 1) / parts, part); }));
}

template <class W, class T>
void convolve(const Step& s) {
  using S = typename W::S;
  Scratch outside;
  const int64_t K = taps_of(s.channels), N = s.a_width;
  T* B = outside.take<T>(K * N);
  pack(B, static_cast<const S*>(s.weight), K, N, true);
  share_rows(s.rows, std::min<int64_t>(at::get_num_threads(), s.rows), [&](int64_t first, int64_t last, int64_t) {
    Scratch scratch;
    Neighbourhoods<T> around(s.height, s.pixels, s.channels, scratch);
    S* sums = scratch.take<S>(PIXELS * N);
    for (int64_t row = first; row < last; ++row) {
      around.enter(static_cast<const T*>(s.b) + row / s.height * s.height * s.pixels * s.channels, row % s.height);
      for (int64_t j = 0; j < s.pixels; j += PIXELS) {
        const int64_t pixels = std::min(PIXELS, s.pixels - j);
        rows_product(pixels, N, K, around.at(j, pixels), K, B, sums, N);
        T* y = static_cast<T*>(s.y) + (row * s.pixels + j) * N;
        for (int64_t p = 0; p < pixels; ++p)
          for (int64_t n = 0; n < N; n += W::L) {
            auto v = load<W>(sums + p * N + n);
            if (s.bias) v += load<W>(static_cast<const S*>(s.bias) + n);
            store<W>(y + p * N + n, v);
          }
      }
    }
  });
}

template <class W, class T>
void correlate(const Step& s) {
  using S = typename W::S;
  Scratch outside;
  const int64_t M = s.a_width, N = s.channels ? taps_of(s.channels) : s.b_width, size = M * N + M;
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), s.rows);
  S* partial = outside.zeros<S>(parts * size);
  share_rows(s.rows, parts, [&](int64_t first, int64_t last, int64_t part) {
    Scratch scratch;
    S *products = partial + part * size, *sums = products + M * N;
    Neighbourhoods<T> around(s.height, s.pixels, s.channels, scratch);
    T* pairs[2] = {scratch.take<T>((PIXELS + 1) * M), scratch.take<T>((PIXELS + 1) * N)};
    for (int64_t row = first; row < last; ++row) {
      if (s.channels)
        around.enter(static_cast<const T*>(s.b) + row / s.height * s.height * s.pixels * s.channels, row % s.height);
      for (int64_t j = 0; j < s.pixels; j += PIXELS) {
        const int64_t pixels = std::min(PIXELS, s.pixels - j);
        const T* a = static_cast<const T*>(s.a) + row * s.a_row + j * M;
        const T* b = s.channels ? around.at(j, pixels) : static_cast<const T*>(s.b) + row * s.b_row + j * N;
        outer_product(M, N, pixels, paired(a, pixels, M, pairs[0]), M, paired(b, pixels, N, pairs[1]), N, products, N);
        if (!s.sums) continue;
        for (int64_t m = 0; m < M; m += W::L) {
          auto total = load<W>(sums + m);
          for (int64_t p = 0; p < pixels; ++p) total += load<W>(a + p * M + m);
          store<W>(sums + m, total);
        }
      }
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) partial[i] += partial[part * size + i];
  std::copy_n(partial, M * N, static_cast<S*>(s.y));
  if (s.sums) std::copy_n(partial + M * N, M, static_cast<S*>(s.sums));
}

template <class Wide, class Narrow_, class T, template <class, class> class F, class Call>
int enter(const Call* call, int64_t width) {
  try {
    width % Wide::L ? F<Narrow_, T>::run(*call) : F<Wide, T>::run(*call);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

template <class W, class T>
struct Forward {
  static void run(const Training& t) { forward<W, T>(t); }
};
template <class W, class T>
struct Backward {
  static void run(const Training& t) { backward<W, T>(t); }
};
template <class W, class T>
struct Convolve {
  static void run(const Step& s) { convolve<W, T>(s); }
};
template <class W, class T>
struct Correlate {
  static void run(const Step& s) { correlate<W, T>(s); }
};

}  // namespace
