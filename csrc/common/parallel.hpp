// One fork and join of worker threads that take items in ascending order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

namespace refinelens {

// Threads worth starting for so many floating-point operations: one takes about 20 us to start.
inline int useful_threads(double flops, int n_threads) {
  constexpr double kFlopsPerThread = 1 << 24;
  return static_cast<int>(std::clamp(flops / kFlopsPerThread, 1.0, static_cast<double>(std::max(n_threads, 1))));
}

// Whether there is memory for exceptions of this thread. The first one takes a little, without which the C library ends
// the process; so it is taken here, ahead of all others.
inline bool may_throw() {
  constexpr size_t kAtLeast = 1024;
  void* volatile memory = std::malloc(kAtLeast);  // else the compiler may drop it
  std::free(memory);
  if (memory) (void)std::current_exception();
  return memory != nullptr;
}

// Calls f(item, worker) for every item, worker below n_threads; the caller is worker 0. Once f has thrown, no further
// item is begun, and when all workers have stopped the first exception is thrown again.
template <typename F>
void parallel_for(int64_t items, int n_threads, F f) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto work = [&](int worker) noexcept {
    try {
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(item, worker);
    } catch (...) {
      next.store(items, std::memory_order_relaxed);
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  const auto start = [&](int worker) {
    if (may_throw()) work(worker);
  };
  std::vector<std::thread> workers;
  try {
    workers.reserve(std::max(n_threads, 0));
    for (int i = 1; i < std::min<int64_t>(n_threads, items); ++i) workers.emplace_back(start, i);
  } catch (const std::exception&) {
    // The system has no more threads to give, or no memory for them: those that there are do the work.
  }
  work(0);
  for (auto& worker : workers) worker.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace refinelens
