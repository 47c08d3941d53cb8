// Matrix products: oneDNN's small ones ("brgemm"), which PyTorch exports, and outer products in registers.
#pragma once

#include <algorithm>
#include <type_traits>

#include "parallel.h"
#include "simd.h"

namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const float* A, const float* B, float* C, bool vnni);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool vnni);
void brgemm_release(bool vnni);
}  // namespace at::native::cpublas

namespace dsgformer {
namespace {

// Half a stage of a 16×16 transposition: the rows of x and y change places where bit `D` of the column is set.
template <int D>
inline void exchange(vec& x, vec& y) {
  const vec low = x, high = y;
  if constexpr (D == 8) {
    x = DSGFORMER_SHUFFLE(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    y = DSGFORMER_SHUFFLE(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  } else if constexpr (D == 4) {
    x = DSGFORMER_SHUFFLE(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    y = DSGFORMER_SHUFFLE(low, high, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  } else if constexpr (D == 2) {
    x = DSGFORMER_SHUFFLE(low, high, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    y = DSGFORMER_SHUFFLE(low, high, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else {
    x = DSGFORMER_SHUFFLE(low, high, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    y = DSGFORMER_SHUFFLE(low, high, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
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
  parallel_for( N / LANES, std::max<int64_t>(1, (1 << 15) / (LANES * K)), [&](int64_t begin, int64_t end) {
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

// C = A B, or C += A B; B from transpose_into.  Throws where oneDNN has no such product for this processor.
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

// The matrix of transpose_into.
template <class T>
Buffer<T> packed(const float* W, int64_t N, int64_t K) {
  auto B = buffer<T>(N * K);
  transpose_into(B.get(), W, N, K);
  return B;
}

}  // namespace
}  // namespace dsgformer
