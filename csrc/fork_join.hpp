// One fork and one join over independent pieces of work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace refinelens {

// Calls work(next) on up to n_threads threads, where next() gives pieces 0 to count - 1, each once, and then count. What
// a piece computes must not depend on the thread. The first exception is thrown again here.
template <typename Work>
void fork_join(int64_t count, int n_threads, const Work& work) {
  std::atomic<int64_t> taken{0};
  std::exception_ptr error;
  std::mutex guard;
  const auto next = [&] { return std::min(taken.fetch_add(1), count); };
  const auto run = [&] {
    try {
      work(next);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!error) error = std::current_exception();
      taken = count;
    }
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < std::min<int64_t>(n_threads, count); ++i) threads.emplace_back(run);
  run();
  for (auto& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

template <typename Piece>
void for_each_piece(int64_t count, int n_threads, const Piece& piece) {
  fork_join(count, n_threads, [&](const auto& next) {
    for (int64_t i = next(); i < count; i = next()) piece(i);
  });
}

}  // namespace refinelens
