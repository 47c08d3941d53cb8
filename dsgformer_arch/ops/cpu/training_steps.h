// Training outside the levels: 3×3 convolutions of few channels, and the products that are gradients of kernels.
#pragma once

#include "training_batch.h"

namespace {

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
