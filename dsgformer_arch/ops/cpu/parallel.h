// The tiles of an image and the threads that work on them.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dfgb.h"
#include "gemm.h"

namespace dsgformer {
namespace {

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

// Runs `work(i)` for i from 0 to count - 1, in any order; false if a matrix product is missing.
template <class T, class Work>
bool run(int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> sound{true};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      try {
        for (int64_t i; (i = next++) < count;) work(i);
        at::native::cpublas::brgemm_release(std::is_same_v<T, bf16>);
      } catch (...) {
        sound = false;
      }
  });
  return sound;
}

// Y is often fresh memory: a page fault each 4096 bytes would cost as much as computing them.
void use_large_pages([[maybe_unused]] void* start, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(start) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a wish
#endif
}

}  // namespace
}  // namespace dsgformer
