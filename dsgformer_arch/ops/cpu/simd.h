// Vectors of 16 channels, loads and stores of float32 and bfloat16, and aligned buffers.
//
// No header of PyTorch is included: those of a release need its newest compilers.  What is used of PyTorch is
// declared in gemm.h and parallel.h.  GCC 9 to 14 and clang compile this as C++17.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "bfloat16.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace dsgformer {
namespace {

using bf16 = c10::BFloat16;
constexpr int64_t LANES = 16;

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

// The elements of x (0 … 15) and y (16 … 31) at 16 indices.
#if defined(__clang__) || __GNUC__ >= 12
#define DSGFORMER_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define DSGFORMER_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (vec_i){__VA_ARGS__})
#endif

// The sums of four vectors.
inline vec4 sums(vec a, vec b, vec c, vec d) {
  auto fold = [](vec x, vec y) {  // of each quarter: x0+x2, y0+y2, x1+x3, y1+y3
    return DSGFORMER_SHUFFLE(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           DSGFORMER_SHUFFLE(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const vec ab = fold(a, b), cd = fold(c, d);
  vec all = DSGFORMER_SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
            DSGFORMER_SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  all += DSGFORMER_SHUFFLE(all, all, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  all += DSGFORMER_SHUFFLE(all, all, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  vec4 first;
  std::memcpy(&first, &all, sizeof(first));
  return first;
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

// Room for `count` values, aligned to 64 bytes and padded by a vector; throws std::bad_alloc.
template <class T>
Buffer<T> buffer(int64_t count) {
  const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes);
  if (!memory) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

}  // namespace
}  // namespace dsgformer
