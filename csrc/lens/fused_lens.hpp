// The fused lens over all rows and the whole vocabulary: what is computed, and the kernels of an instruction set that
// compute it. No Python types.
#pragma once

#include <cstdint>

#include "common/dispatch.hpp"
#include "common/matrix.hpp"

namespace refinelens {

struct NormSpec {
  enum Kind { none, layer, rms } kind;
  const float* weight;  // [d_model], or null for ones
  const float* bias;    // [d_model], or null for zeros
  double eps;
};

// z = scale * (norm(hidden) . unembedding_v + bias_v) decides argmax and rank; l = softcap * tanh(z / softcap) enters
// the sums, or z itself where softcap is 0.
struct LensProblem {
  Matrix hidden;  // [rows, d_model]
  NormSpec norm;
  Matrix unembedding;  // [vocab_size, d_model], fewer than 2^31 tokens
  const float* bias;   // [vocab_size], or null
  float scale;
  float softcap;
  const int64_t* targets;  // [rows, n_targets], or null
  int64_t n_targets;       // of a row, 0 for none
};

// One entry for every hidden row, but for targets and lists.
struct LensStats {
  int64_t* argmax;
  float* max_logit;
  float* logsumexp;
  float* entropy;
  float* target_logit;  // [rows, n_targets], and so the next
  int64_t* target_rank;
  int64_t top_k;   // 0 for no lists
  float* top_z;    // [rows, top_k], the largest z, best first, equal ones in the order of tokens
  int64_t* top_id;
};

// The targets of a block of hidden rows, each array [count][stride]: of every target an entry for every row of the
// panels. The rows that fill up the last vector have token -1.
struct PackedTargets {
  int64_t count;  // of a row, 0 for none
  int64_t stride;
  int32_t* token;
  float* z;
  float* logit;

  PackedTargets at(int64_t target, int64_t row) const {
    const int64_t first = target * stride + row;
    return {count - target, stride, token + first, z + first, logit + first};
  }
};

// A block of hidden rows as the product reads it: as few panels of at most `wide_panel` rows as will do, each
// [d_model][rows].
struct PackedRows {
  int64_t count;
  float* panels;
  PackedTargets targets;
};

// The largest z of a block of rows among the tokens that one thread has seen, best first.
struct TopState {
  int64_t k;    // 0 for no lists
  float* last;  // [rows], the k-th largest: what lies below it is not listed
  float* z;     // [rows, k], -inf at first
  int32_t* id;  // [rows, k]
};

// Running statistics of a block of rows over a range of the vocabulary, laid out like the rows of PackedRows.
struct RangeState {
  float* best;       // largest z, -inf at first
  float* peak;       // the logit of `best`; the sums below are relative to it
  int32_t* argmax;   // lowest id that has `best`, counted from the start of the range; any where `seen` is larger
  int32_t* rank;     // [n_targets][rows], tokens that beat the target; as far apart as those of PackedTargets
  double* total;     // sum of exp(l - peak)
  double* weighted;  // sum of (l - peak) * exp(l - peak)
  float* seen;       // a z that some token of this or another range has, or -inf: below it there is no argmax
  TopState top;
};

struct AverageState;  // mean_unembedding.hpp
struct Averages;
struct DivergenceSpec;  // divergence.hpp
struct DivergenceState;

struct LensKernels {
  int64_t wide_panel;  // rows of the widest panel

  // Tokens that are staged in cache at a time; ranges start at multiples of it.
  int64_t (*block_tokens)(int64_t d_model);

  // Floats that pack_panel and scan_range need, aligned to a cache line.
  int64_t (*scratch_floats)(int64_t d_model);

  // Norm, pack and find the targets' logits of panel `panel` of the block of rows that starts at `first_row`.
  void (*pack_panel)(const LensProblem&, int64_t first_row, const PackedRows&, int64_t panel, float* scratch);

  // Multiply all rows with tokens first to last and fold the logits into `state`; without state only multiply.
  void (*scan_range)(const LensProblem&, const PackedRows&, int64_t first, int64_t last, const RangeState* state,
                     float* scratch);

  // Multiply panels first_panel to last_panel with tokens first to last and fold the unembedding's rows into `state`.
  void (*average_range)(const LensProblem&, const PackedRows&, int64_t first_panel, int64_t last_panel, int64_t first,
                        int64_t last, const AverageState& state, float* scratch);

  // Merge n ranges of panel `panel`, in ascending order, into row `first_row` of `out` and what follows.
  void (*merge_averages)(const PackedRows&, int64_t panel, const AverageState* ranges, int64_t n, int64_t first_row,
                         const Averages& out);

  // Multiply all rows, whole groups, with tokens first to last and add to the sums of `state`.
  void (*divergence_range)(const LensProblem&, const PackedRows&, const DivergenceSpec&, int64_t first, int64_t last,
                           const DivergenceState& state, float* scratch);

  // `rounds` rounds of independent multiply-adds in registers; returns the floating-point operations they are.
  double (*multiply_adds)(int64_t rounds);
};

// Those for so many rows; a row has the same bits whichever they are.
const LensKernels& lens_kernels(Isa isa, int64_t rows);

// The same bits for any number of threads, and for a row whatever rows are beside it.
void fused_lens(const LensProblem& problem, const LensKernels& kernels, int n_threads, const LensStats& stats);

// The matrix product of fused_lens alone, thrown away tile by tile: the floor that benchmarks compare with.
void product_only(const LensProblem& problem, const LensKernels& kernels, int n_threads);

// Floating-point operations a second of one thread in multiply-adds between registers, the best of many bursts.
double fma_peak(const LensKernels& kernels, double milliseconds);

}  // namespace refinelens
