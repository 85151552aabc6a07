// What the drivers of the lens share: where the vocabulary is cut for threads, and how a block of rows is packed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.hpp"
#include "lens/fused_lens.hpp"

namespace refinelens {

constexpr int64_t kPackedBytes = 12 << 20;  // packed rows held at a time
constexpr int64_t kMaxRanges = 64;          // of the vocabulary: what threads share, and what is merged in order

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Rows held at a time: whole panels, at least one.
inline int64_t block_rows(const LensProblem& problem, const LensKernels& kernels, int64_t bytes_of_row, int64_t bytes) {
  const int64_t wide = kernels.wide_panel, rows = round_up(std::max<int64_t>(problem.hidden.rows, 1), wide);
  return std::min(rows, std::max<int64_t>(bytes / bytes_of_row / wide, 1) * wide);
}

// At most `most` ranges of whole blocks, the same for any number of threads.
struct Ranges {
  int64_t vocab_size, block, n_blocks, count;

  Ranges(int64_t vocab_size, int64_t block, int64_t most)
      : vocab_size(vocab_size), block(block), n_blocks((vocab_size + block - 1) / block),
        count(std::min(n_blocks, most)) {}
  int64_t start(int64_t i) const { return std::min(n_blocks * i / count * block, vocab_size); }
};

inline int64_t panels_of(const PackedRows& rows, const LensKernels& kernels) {
  return (rows.count + kernels.wide_panel - 1) / kernels.wide_panel;
}

// What packing a row's element, or merging it, takes compared with multiplying.
constexpr double kFlopsPerElement = 64;

// Norm and pack rows.count rows from first_row on; scratch(worker) is memory of scratch_floats.
template <typename Scratch>
void pack_rows(const LensProblem& problem, const LensKernels& kernels, const PackedRows& rows, int64_t first_row,
               int n_threads, Scratch scratch) {
  const double flops = kFlopsPerElement * static_cast<double>(rows.count * problem.hidden.columns);
  parallel_for(panels_of(rows, kernels), useful_threads(flops, n_threads), [&](int64_t panel, int worker) {
    kernels.pack_panel(problem, first_row, rows, panel, scratch(worker));
  });
}

}  // namespace refinelens
