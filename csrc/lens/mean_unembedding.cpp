// A block of rows is packed, threads take panels of it over ranges of the vocabulary, and the ranges are merged in
// ascending order.
#include "lens/mean_unembedding.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "common/parallel.hpp"
#include "lens/row_blocks.hpp"

namespace refinelens {

namespace {

constexpr int64_t kSumRanges = 8;        // each has sums of its own, as large as the rows
constexpr int64_t kSumBytes = 16 << 20;  // of all ranges, for the rows that are taken at a time

class AverageDriver {
 public:
  AverageDriver(const LensProblem& problem, const LensKernels& kernels, int n_threads)
      : problem_(problem), kernels_(kernels), n_threads_(std::max(n_threads, 1)), d_model_(problem.hidden.columns),
        ranges_(problem.unembedding.rows, kernels.block_tokens(d_model_), kSumRanges),
        block_rows_(block_rows(problem, kernels, 4 * d_model_ * ranges_.count, kSumBytes)),
        scratch_floats_(kernels.scratch_floats(d_model_)), panels_(aligned<float>(block_rows_ * d_model_)),
        sums_(aligned<float>(ranges_.count * block_rows_ * d_model_)),
        peaks_(aligned<float>(ranges_.count * block_rows_)), totals_(aligned<double>(2 * ranges_.count * block_rows_)),
        scratch_(aligned<float>(scratch_floats_ * n_threads_)) {
    for (int64_t i = 0; i < ranges_.count; ++i) {
      double* totals = totals_.get() + 2 * i * block_rows_;
      states_.push_back({peaks_.get() + i * block_rows_, sums_.get() + i * block_rows_ * d_model_, totals,
                         totals + block_rows_});
    }
  }

  void run(const Averages& out) const {
    for (int64_t first = 0; first < problem_.hidden.rows; first += block_rows_) {
      const PackedRows rows{std::min(block_rows_, problem_.hidden.rows - first), panels_.get(), {}};
      const int64_t n_panels = panels_of(rows, kernels_);
      pack_rows(problem_, kernels_, rows, first, n_threads_, [&](int worker) { return scratch(worker); });
      average(rows, n_panels);
      const double elements = static_cast<double>(rows.count * d_model_);
      parallel_for(n_panels, useful_threads(kFlopsPerElement * elements * ranges_.count, n_threads_),
                   [&](int64_t panel, int) {
                     kernels_.merge_averages(rows, panel, states_.data(), ranges_.count, first, out);
                   });
    }
  }

 private:
  float* scratch(int worker) const { return scratch_.get() + worker * scratch_floats_; }

  // Where there are more threads than ranges, panels are shared out too; no bit depends on how.
  void average(const PackedRows& rows, int64_t n_panels) const {
    std::fill_n(peaks_.get(), ranges_.count * block_rows_, -std::numeric_limits<float>::infinity());
    std::fill_n(totals_.get(), 2 * ranges_.count * block_rows_, 0.0);
    std::fill_n(sums_.get(), ranges_.count * block_rows_ * d_model_, 0.0f);
    const int64_t parts = std::min(n_panels, (n_threads_ + ranges_.count - 1) / ranges_.count);
    const double flops = 4.0 * rows.count * d_model_ * problem_.unembedding.rows;
    parallel_for(ranges_.count * parts, useful_threads(flops, n_threads_), [&](int64_t item, int worker) {
      const int64_t range = item / parts, part = item % parts;
      kernels_.average_range(problem_, rows, n_panels * part / parts, n_panels * (part + 1) / parts,
                             ranges_.start(range), ranges_.start(range + 1), states_[range], scratch(worker));
    });
  }

  const LensProblem& problem_;
  const LensKernels& kernels_;
  const int n_threads_;
  const int64_t d_model_;
  const Ranges ranges_;
  const int64_t block_rows_, scratch_floats_;
  const Aligned<float> panels_, sums_, peaks_;
  const Aligned<double> totals_;
  const Aligned<float> scratch_;
  std::vector<AverageState> states_;
};

}  // namespace

void mean_unembedding(const LensProblem& problem, const LensKernels& kernels, int n_threads, const Averages& out) {
  AverageDriver(problem, kernels, n_threads).run(out);
}

}  // namespace refinelens
