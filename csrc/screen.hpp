// The certified lens: argmax and rank those of exact logits, found by a screen in integers. screen_kernels.hpp has the
// proof, screen_exact.hpp the exact side.
#pragma once

#include <cstdint>
#include <string>

#include "screen_index.hpp"

namespace refinelens {

// z = scale * (x . w_v + bias_v) decides argmax and rank; l = softcap * tanh(z / softcap) enters the sums, or z itself
// where softcap is 0.
struct CertifiedProblem {
  const double* x;         // [rows, depth], normed
  int64_t rows;
  Matrix weights;         // those of the index
  const double* bias;      // [tokens], or null
  double scale, softcap;
  const int64_t* targets;  // [rows], or null
};

// Each [rows]; the last two of the targets, or null.
struct CertifiedStats {
  int64_t* argmax;
  double* best;       // z of argmax
  double* logsumexp;
  double* entropy;
  float* logsumexp_bound;  // |logsumexp - that of exact logits| is at most this
  bool* fell_back;         // all logits of the row were computed in fp64
  double* target_z;
  int64_t* rank;
};

// The kernels for an unembedding: those of picked_isa(), or the next ones that can do it.
const ScreenKernels& screen_kernels(int64_t depth);

// Rows that the screen cannot decide get all logits in fp64, or, unless `exhaustive`, a logsumexp of NaN, as rows with
// NaN or infinity do; both have fell_back set. Results do not depend on n_threads.
void certified_lens(const ScreenIndex& index, const CertifiedProblem& problem, const CertifiedStats& stats,
                    bool exhaustive, int n_threads);

}  // namespace refinelens
