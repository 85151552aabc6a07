// A block of rows is packed, threads scan ranges of the vocabulary, and the ranges are merged in ascending order.
#include "lens/fused_lens.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/parallel.hpp"
#include "lens/row_blocks.hpp"

namespace refinelens {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class Accumulators {
 public:
  Accumulators(int64_t n_ranges, int64_t n_rows, int n_workers, int64_t n_targets, int64_t top_k)
      : n_rows_(n_rows), n_workers_(n_workers), n_ints_(1 + n_targets), top_k_(top_k),
        last_(aligned<float>(top_k ? n_workers * n_rows : 0)), top_z_(aligned<float>(n_workers * n_rows * top_k)),
        top_id_(aligned<int32_t>(n_workers * n_rows * top_k)), floats_(aligned<float>(2 * n_ranges * n_rows_)),
        ints_(aligned<int32_t>(n_ints_ * n_ranges * n_rows_)), doubles_(aligned<double>(2 * n_ranges * n_rows_)),
        seen_(aligned<float>(n_workers * n_rows_)) {}

  RangeState of(int64_t range, int worker = 0) const {
    float* floats = floats_.get() + 2 * range * n_rows_;
    int32_t* ints = ints_.get() + n_ints_ * range * n_rows_;
    double* doubles = doubles_.get() + 2 * range * n_rows_;
    return {floats,  floats + n_rows_,  ints, ints + n_rows_,
            doubles, doubles + n_rows_, seen_.get() + worker * n_rows_, top_of(worker)};
  }

  TopState top_of(int worker) const {
    const int64_t first = worker * n_rows_;
    return {top_k_, last_.get() + (top_k_ ? first : 0), top_z_.get() + first * top_k_, top_id_.get() + first * top_k_};
  }

  // Before a block of rows: what threads know of them, and have listed.
  void reset_workers() const {
    std::fill_n(seen_.get(), n_workers_ * n_rows_, -kInfinity);
    if (top_k_) std::fill_n(last_.get(), n_workers_ * n_rows_, -kInfinity);
    std::fill_n(top_z_.get(), n_workers_ * n_rows_ * top_k_, -kInfinity);
    std::fill_n(top_id_.get(), n_workers_ * n_rows_ * top_k_, std::numeric_limits<int32_t>::max());
  }

  RangeState cleared(int64_t range, int worker) const {
    const RangeState state = of(range, worker);
    std::fill_n(state.best, 2 * n_rows_, -kInfinity);
    std::fill_n(state.argmax, n_ints_ * n_rows_, 0);
    std::fill_n(state.total, 2 * n_rows_, 0.0);
    return state;
  }

 private:
  int64_t n_rows_, n_workers_, n_ints_, top_k_;
  Aligned<float> last_, top_z_;  // of each worker
  Aligned<int32_t> top_id_;
  Aligned<float> floats_;
  Aligned<int32_t> ints_;
  Aligned<double> doubles_;
  Aligned<float> seen_;  // [worker][row]
};

// Merge the ranges of one row in ascending order and write its statistics.
void finish_row(const Accumulators& accumulators, const Ranges& ranges, int64_t row, const LensStats& stats,
                int64_t out) {
  float best = -kInfinity, peak = -kInfinity;
  int64_t argmax = 0;
  for (int64_t i = 0; i < ranges.count; ++i) {
    const RangeState state = accumulators.of(i);
    peak = std::max(peak, state.peak[row]);  // a softcap leaves one where all z are -inf
    if (state.best[row] > best) {
      best = state.best[row];
      argmax = ranges.start(i) + state.argmax[row];
    }
  }
  double total = 0.0, weighted = 0.0;
  for (int64_t i = 0; i < ranges.count; ++i) {
    const RangeState state = accumulators.of(i);
    // A range that has seen no logit but -inf has sums of 0 (or NaN, which must come through).
    const double shift = state.peak[row] == -kInfinity ? 0.0 : static_cast<double>(state.peak[row]) - peak;
    const double factor = std::exp(shift);
    total += state.total[row] * factor;
    weighted += (state.weighted[row] + shift * state.total[row]) * factor;
  }
  stats.argmax[out] = argmax;
  stats.max_logit[out] = peak;
  stats.logsumexp[out] = static_cast<float>(peak + std::log(total));
  stats.entropy[out] = static_cast<float>(std::log(total) - weighted / total);
}

// The same of its targets.
void finish_targets(const Accumulators& accumulators, const Ranges& ranges, const PackedTargets& targets, int64_t row,
                    const LensStats& stats, int64_t out) {
  for (int64_t i = 0; i < targets.count; ++i) {
    const int64_t from = i * targets.stride + row, to = out * targets.count + i;
    int64_t rank = 0;
    for (int64_t range = 0; range < ranges.count; ++range) rank += accumulators.of(range).rank[from];
    stats.target_rank[to] = rank;
    stats.target_logit[to] = targets.logit[from];
  }
}

// The best of all threads' lists of one row: the same whatever tokens each thread had.
void finish_list(const Accumulators& accumulators, int n_workers, int64_t row, const LensStats& stats, int64_t out) {
  std::vector<std::pair<float, int32_t>> all;
  for (int worker = 0; worker < n_workers; ++worker) {
    const TopState top = accumulators.top_of(worker);
    for (int64_t i = row * top.k; i < (row + 1) * top.k; ++i) all.emplace_back(-top.z[i], top.id[i]);
  }
  std::partial_sort(all.begin(), all.begin() + stats.top_k, all.end());
  for (int64_t i = 0; i < stats.top_k; ++i) {
    stats.top_z[out * stats.top_k + i] = -all[i].first;
    stats.top_id[out * stats.top_k + i] = all[i].second;
  }
}

class Driver {
 public:
  Driver(const LensProblem& problem, const LensKernels& kernels, int n_threads)
      : problem_(problem), kernels_(kernels), n_threads_(n_threads), d_model_(problem.hidden.columns),
        ranges_(problem.unembedding.rows, kernels.block_tokens(d_model_), kMaxRanges),
        block_rows_(block_rows(problem, kernels, 4 * d_model_, kPackedBytes)),
        scratch_floats_(kernels.scratch_floats(d_model_)), panels_(aligned<float>(block_rows_ * d_model_)),
        target_ids_(aligned<int32_t>(problem.n_targets * block_rows_)),
        target_z_(aligned<float>(problem.n_targets * block_rows_)),
        target_logit_(aligned<float>(problem.n_targets * block_rows_)),
        scratch_(aligned<float>(scratch_floats_ * std::max(n_threads, 1))) {}

  void run(const LensStats* stats) const {
    const Accumulators accumulators(stats ? ranges_.count : 0, block_rows_, std::max(n_threads_, 1),
                                    problem_.n_targets, stats ? stats->top_k : 0);
    for (int64_t first = 0; first < problem_.hidden.rows; first += block_rows_) {
      const PackedRows rows = pack(first);
      scan(rows, stats ? &accumulators : nullptr);
      if (stats) finish(rows, accumulators, *stats, first);
    }
  }

 private:
  float* scratch(int worker) const { return scratch_.get() + worker * scratch_floats_; }

  PackedRows pack(int64_t first_row) const {
    const PackedTargets targets{problem_.n_targets, block_rows_, target_ids_.get(), target_z_.get(),
                                target_logit_.get()};
    const PackedRows rows{std::min(block_rows_, problem_.hidden.rows - first_row), panels_.get(), targets};
    pack_rows(problem_, kernels_, rows, first_row, n_threads_, [&](int worker) { return scratch(worker); });
    return rows;
  }

  void scan(const PackedRows& rows, const Accumulators* accumulators) const {
    if (accumulators) accumulators->reset_workers();
    const double flops = 2.0 * rows.count * d_model_ * problem_.unembedding.rows;
    parallel_for(ranges_.count, useful_threads(flops, n_threads_), [&](int64_t range, int worker) {
      const RangeState state = accumulators ? accumulators->cleared(range, worker) : RangeState{};
      kernels_.scan_range(problem_, rows, ranges_.start(range), ranges_.start(range + 1),
                          accumulators ? &state : nullptr, scratch(worker));
    });
  }

  void finish(const PackedRows& rows, const Accumulators& accumulators, const LensStats& stats, int64_t first) const {
    constexpr double kFlopsPerRange = 4096;  // what merging a range takes compared with multiplying
    parallel_for(rows.count, useful_threads(kFlopsPerRange * rows.count * ranges_.count, n_threads_),
                 [&](int64_t row, int) {
                   finish_row(accumulators, ranges_, row, stats, first + row);
                   finish_targets(accumulators, ranges_, rows.targets, row, stats, first + row);
                   if (stats.top_k) finish_list(accumulators, std::max(n_threads_, 1), row, stats, first + row);
                 });
  }

  const LensProblem& problem_;
  const LensKernels& kernels_;
  const int n_threads_;
  const int64_t d_model_;
  const Ranges ranges_;
  const int64_t block_rows_, scratch_floats_;
  const Aligned<float> panels_;
  const Aligned<int32_t> target_ids_;
  const Aligned<float> target_z_, target_logit_, scratch_;
};

}  // namespace

void fused_lens(const LensProblem& problem, const LensKernels& kernels, int n_threads, const LensStats& stats) {
  Driver(problem, kernels, n_threads).run(&stats);
}

void product_only(const LensProblem& problem, const LensKernels& kernels, int n_threads) {
  Driver(problem, kernels, n_threads).run(nullptr);
}

double fma_peak(const LensKernels& kernels, double milliseconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 1 << 15;  // about half a millisecond: shorter than a time slice
  const auto begin = Clock::now();
  double best = 0.0;
  do {
    const auto start = Clock::now();
    const double flops = kernels.multiply_adds(kRounds);
    best = std::max(best, flops / std::chrono::duration<double>(Clock::now() - start).count());
  } while (std::chrono::duration<double, std::milli>(Clock::now() - begin).count() < milliseconds);
  return best;
}

}  // namespace refinelens
