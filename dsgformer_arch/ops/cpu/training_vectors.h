// Training: the arguments of the entry points, vectors of several lengths and types, and memory.
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

}  // namespace
