// A block of whole groups is packed, threads scan ranges of the vocabulary, and sums are added in ascending order.
#include "lens/divergence.hpp"

#include <algorithm>

#include "common/parallel.hpp"
#include "lens/row_blocks.hpp"

namespace refinelens {

namespace {

class DivergenceDriver {
 public:
  DivergenceDriver(const LensProblem& problem, const DivergenceSpec& spec, const LensKernels& kernels, int n_threads)
      : problem_(problem), spec_(spec), kernels_(kernels), n_threads_(std::max(n_threads, 1)),
        ranges_(problem.unembedding.rows, kernels.block_tokens(problem.hidden.columns), kMaxRanges),
        rows_(std::max(block_rows(problem, kernels, 4 * problem.hidden.columns, kPackedBytes) / spec.group,
                       int64_t{1}) *
              spec.group),
        stride_(round_up(rows_, kernels.wide_panel)), scratch_floats_(kernels.scratch_floats(problem.hidden.columns)),
        panels_(aligned<float>(stride_ * problem.hidden.columns)), sums_(aligned<double>(2 * ranges_.count * stride_)),
        scratch_(aligned<float>(scratch_floats_ * n_threads_)) {}

  void run(float* out) const {
    for (int64_t first = 0; first < problem_.hidden.rows; first += rows_) {
      const PackedRows rows{std::min(rows_, problem_.hidden.rows - first), panels_.get(), {}};
      pack_rows(problem_, kernels_, rows, first, n_threads_, [&](int worker) { return scratch(worker); });
      scan(rows, first);
      for (int64_t row = 0; row < rows.count; ++row) out[first + row] = merged(row);
    }
  }

 private:
  float* scratch(int worker) const { return scratch_.get() + worker * scratch_floats_; }
  DivergenceState of(int64_t range) const {
    double* sums = sums_.get() + 2 * range * stride_;
    return {sums, sums + stride_};
  }

  void scan(const PackedRows& rows, int64_t first) const {
    std::fill_n(sums_.get(), 2 * ranges_.count * stride_, 0.0);
    const DivergenceSpec own{spec_.kind, spec_.group, spec_.logsumexp + first};
    const double flops = 2.0 * rows.count * problem_.hidden.columns * problem_.unembedding.rows;
    parallel_for(ranges_.count, useful_threads(flops, n_threads_), [&](int64_t range, int worker) {
      kernels_.divergence_range(problem_, rows, own, ranges_.start(range), ranges_.start(range + 1), of(range),
                                scratch(worker));
    });
  }

  float merged(int64_t row) const {
    double value = 0.0, mass = 0.0;
    for (int64_t i = 0; i < ranges_.count; ++i) {
      value += of(i).value[row];
      mass += of(i).mass[row];
    }
    return static_cast<float>(spec_.kind == Divergence::kullback_leibler ? value / mass : value);
  }

  const LensProblem& problem_;
  const DivergenceSpec& spec_;
  const LensKernels& kernels_;
  const int n_threads_;
  const Ranges ranges_;
  const int64_t rows_, stride_, scratch_floats_;
  const Aligned<float> panels_;
  const Aligned<double> sums_;
  const Aligned<float> scratch_;
};

}  // namespace

void divergence_from_first(const LensProblem& problem, const DivergenceSpec& spec, const LensKernels& kernels,
                           int n_threads, float* out) {
  DivergenceDriver(problem, spec, kernels, n_threads).run(out);
}

}  // namespace refinelens
