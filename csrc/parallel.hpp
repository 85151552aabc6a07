// One fork and join of worker threads that take items in ascending order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace refinelens {

// Threads worth starting for so many floating-point operations: one takes about 20 us to start.
inline int worth_starting(double flops, int n_threads) {
  constexpr double kFlopsPerThread = 1 << 24;
  return static_cast<int>(std::clamp(flops / kFlopsPerThread, 1.0, static_cast<double>(std::max(n_threads, 1))));
}

// Calls f(item, worker) for every item, worker below n_threads; the caller is worker 0. f does not throw.
template <typename F>
void parallel_for(int64_t items, int n_threads, F f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(item, worker);
  };
  std::vector<std::thread> workers;
  workers.reserve(n_threads);
  try {
    for (int i = 1; i < std::min<int64_t>(n_threads, items); ++i) workers.emplace_back(work, i);
  } catch (const std::system_error&) {
    // The system has no more threads to give: those that there are do the work.
  }
  work(0);
  for (auto& worker : workers) worker.join();
}

}  // namespace refinelens
