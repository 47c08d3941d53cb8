// The block DSGA in two passes over an image: the c×c maps first, then Y.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "dfgb.h"
#include "gemm.h"
#include "parallel.h"
#include "simd.h"

namespace dsgformer {
namespace {

constexpr float NORM_EPSILON = 1e-5f;    // LN's
constexpr float LEAST_SQUARES = 1e-24f;  // of a row of Q or K

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

// run() of work that multiplies matrices of T.
template <class T, class Work>
void run_products(int64_t count, const Work& work) {
  run(count, work, [] { at::native::cpublas::brgemm_release(std::is_same_v<T, bf16>); });
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
void gram(const Dsga& d, float* result) {
  const int64_t C = d.channels, c = C / d.heads, size = C * c + 2 * C;
  const auto list = tasks(d.height, d.width, tile_width(C));
  const Half<T> half(d, 0);
  // One sum a task, added in order: the result does not depend on which thread was faster.
  std::vector<float> sums(list.size() * size, 0.0f);
  run_products<T>(list.size(), [&](int64_t index) {
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
}

// A row of Σ_n W_n ReLU²(T_{k_n}(A)), in place.  T_k keeps an entry that fewer than k others exceed.
void sparse_row(float* A, float* rank, const Dsga& d, int64_t c) {
  for (int64_t j = 0; j < c; j += LANES) {
    const vec own = load(A + j);
    vec_i above = {};
    for (int64_t i = 0; i < c; ++i) above -= A[i] > own;
    store(rank + j, __builtin_convertvector(above, vec));
  }
  for (int64_t j = 0; j < c; ++j) {
    float total = 0;
    for (int64_t n = 0; n < d.thresholds; ++n) total += rank[j] < d.top_k[n] ? d.step[n] : 0;
    const float relu = A[j] < 0 ? 0 : A[j];
    A[j] = relu * relu * total;
  }
}

// The maps of the heads from `gram`, in place; the scores A go to `d.scores` where that is given.
void sparse_maps(const Dsga& d, float* gram) {
  const int64_t C = d.channels, c = C / d.heads;
  const float* q_squares = gram + C * c;
  const float* k_squares = q_squares + C;
  parallel_for(C, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(c);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / c;
      const float scale = std::sqrt(std::max(q_squares[i], LEAST_SQUARES)) * d.temperature[head];
      for (int64_t j = 0; j < c; ++j)
        gram[i * c + j] /= scale * std::sqrt(std::max(k_squares[head * c + j], LEAST_SQUARES));
      if (d.scores) std::memcpy(d.scores + i * c, gram + i * c, c * sizeof(float));
      sparse_row(gram + i * c, scratch.data(), d, c);
    }
  });
}

// Y, given the maps.
template <class T>
void restore(const Dsga& d, const float* maps) {
  const int64_t C = d.channels, c = C / d.heads;
  const auto list = tasks(d.height, d.width, tile_width(C));
  const Half<T> half(d, 1);
  const auto B_out = packed<T>(d.project_out, C, C);
  auto B_map = buffer<T>(C * c);
  for (int64_t h = 0; h < d.heads; ++h) transpose_into(B_map.get() + h * c * c, maps + h * c * c, c, c);
  const auto mask = filter_mask(d.mask, C);
  const auto* x = static_cast<const T*>(d.x);
  auto* y = static_cast<T*>(d.y);
  use_large_pages(y, d.height * d.width * C * sizeof(T));
  run_products<T>(list.size(), [&](int64_t index) {
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
        replicate(U.get(), rows, columns, width, C);
        for (int64_t b = 0; b < width; b += BLOCK)
          for (int64_t k = 0; k < C; k += LANES) filter_block(U.get() + b * C + k, width * C, C, mask.get() + k, C);
        const int64_t pixels = (rows - 1) * width + columns;
        for (int64_t h = 0; h < d.heads; ++h)
          product<T>(BLOCK * width, c, c, V.get() + h * c, C, B_map.get() + h * c * c, c, AV.get() + h * c, C);
        for (int64_t i = 0; i < pixels * C; i += LANES)
          store(V.get() + i, gelu(load(U.get() + i)) * load(AV.get() + i));
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
void block(const Dsga& d) {
  const int64_t C = d.channels;
  auto maps = buffer<float>(C * C / d.heads + 2 * C);
  gram<T>(d, maps.get());
  sparse_maps(d, maps.get());
  restore<T>(d, maps.get());
}

}  // namespace
}  // namespace dsgformer
