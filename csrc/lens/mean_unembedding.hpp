// The average of the unembedding's rows under each row's softmax, and of the biases: attention whose keys and values
// are both the unembedding. No Python types.
//
// Source of the running sums: Dao et al. 2022, FlashAttention, arXiv 2205.14135, algorithm 1.
#pragma once

#include <cstdint>

#include "lens/fused_lens.hpp"

namespace refinelens {

// One entry for every row.
struct Averages {
  int64_t d_model;
  float* weights;    // [rows, d_model], sum of p_v w_v
  float* bias;       // sum of p_v b_v, zeros without a bias
  float* logsumexp;  // of the logits
};

// Running sums of a block of rows over a range of the vocabulary, laid out like the rows of PackedRows. A token of
// logit -inf adds nothing to any.
struct AverageState {
  float* peak;    // largest logit, -inf at first; the sums are relative to it
  float* sums;    // panels [d_model][rows], sum of exp(l - peak) w
  double* total;  // sum of exp(l - peak)
  double* bias;   // sum of exp(l - peak) b
};

// The same bits for any number of threads, and for a row whatever rows are beside it. `problem` has no softcap; its
// norm is applied and its targets are not read.
void mean_unembedding(const LensProblem& problem, const LensKernels& kernels, int n_threads, const Averages& out);

}  // namespace refinelens
