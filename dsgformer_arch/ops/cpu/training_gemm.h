// Training: matrix products.
#pragma once

#include "training_vectors.h"

namespace {

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

}  // namespace
