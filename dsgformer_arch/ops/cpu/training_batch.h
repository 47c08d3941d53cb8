// Training: a batch, shared out among threads.
#pragma once

#include "training_image.h"

namespace {

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

}  // namespace
