// Work shared out among the threads of PyTorch's OpenMP runtime.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace at {
int get_num_threads();
}  // namespace at

// The runtime that PyTorch has loaded, GNU's, or LLVM's and Intel's under GNU's name.  A pragma would make clang ask
// for LLVM's own, and so for a second set of threads.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);

namespace dsgformer {
namespace {

// Calls `work(i)` for i from 0 to count - 1 in any order, then `done()` once a thread.  Throws what the first of them
// that failed threw, when all threads have ended.
template <class Work, class Done>
void run(int64_t count, const Work& work, const Done& done) {
  struct Shared {
    const Work& work;
    const Done& done;
    const int64_t count;
    std::atomic<int64_t> next{0};
    std::mutex lock;
    std::exception_ptr failure;
  } shared{work, done, count, {}, {}, {}};
  const auto thread = [](void* data) {
    auto& mine = *static_cast<Shared*>(data);
    try {
      for (int64_t i; (i = mine.next++) < mine.count;) mine.work(i);
      mine.done();
    } catch (...) {
      mine.next = mine.count;
      const std::lock_guard<std::mutex> guard(mine.lock);
      if (!mine.failure) mine.failure = std::current_exception();
    }
  };
  const auto threads = std::min<int64_t>(at::get_num_threads(), count);
  if (threads > 1)
    GOMP_parallel(thread, &shared, threads, 0);
  else
    thread(&shared);
  if (shared.failure) std::rethrow_exception(shared.failure);
}

// Calls `work(begin, end)` for pieces of 0 … count - 1 of at least `grain`, one a thread at most.
template <class Work>
void parallel_for(int64_t count, int64_t grain, const Work& work) {
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), count / grain));
  run(pieces, [&](int64_t i) { work(count * i / pieces, count * (i + 1) / pieces); }, [] {});
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
