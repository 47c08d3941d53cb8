// Training: the block on the 8×8 blocks of one image, forward and backward.
#pragma once

#include "training_map.h"

namespace {

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

}  // namespace
