// Steps outside the levels: downsampling, upsampling with the skip connection, and the tail.
#pragma once

#include <algorithm>
#include <cstring>

#include "arguments.h"
#include "block.h"
#include "gemm.h"
#include "parallel.h"
#include "simd.h"

namespace dsgformer {
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

// A row of the finer image is a matrix of pairs of pixels, (width, 2 fine).
template <class T>
void downsample(const Step& s) {
  const int64_t K = 2 * s.fine, N = s.coarse;
  const Buffer<T> B[2] = {packed<T>(s.weight, N, K), packed<T>(s.weight + N * K, N, K)};
  use_large_pages(s.y, s.height * s.width * N * sizeof(T));
  run_products<T>(s.height, [&](int64_t row) {
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
void upsample(const Step& s) {
  const int64_t K = s.coarse, N = 2 * s.fine;
  const Buffer<T> B[2] = {packed<T>(s.weight, N, K), packed<T>(s.weight + N * K, N, K)};
  use_large_pages(s.y, 2 * s.height * s.width * N * sizeof(T));
  run_products<T>(s.height, [&](int64_t row) {
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
void tail(const Step& s) {
  const int64_t K = s.fine, N = neighbourhood(3), stride = (s.width + 2) * N;
  const auto B = packed<T>(s.weight, N, K);
  const auto* x = static_cast<const T*>(s.x);
  const auto* skip = static_cast<const float*>(s.skip);
  run_products<T>((s.height + TAIL_ROWS - 1) / TAIL_ROWS, [&](int64_t index) {
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
}  // namespace dsgformer
