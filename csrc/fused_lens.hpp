// The fused lens over all rows and the whole vocabulary. No Python types here.
#pragma once

#include <cstdint>

#include "lens_kernels.hpp"

namespace refinelens {

// One entry for every hidden row; the last two are null without targets.
struct LensStats {
  int64_t* argmax;
  float* max_logit;
  float* logsumexp;
  float* entropy;
  float* target_logit;
  int64_t* target_rank;
};

// The same bits for any number of threads, and for a row whatever rows are beside it.
void fused_lens(const LensProblem& problem, const LensKernels& kernels, int n_threads, const LensStats& stats);

// The matrix product of fused_lens alone, thrown away tile by tile: the floor that benchmarks compare with.
void product_only(const LensProblem& problem, const LensKernels& kernels, int n_threads);

// Floating-point operations a second of one thread in multiply-adds between registers, the best of many bursts.
double fma_peak(const LensKernels& kernels, double milliseconds);

}  // namespace refinelens
