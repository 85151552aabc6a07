// The exact side of the certified lens: logits in fp64, comparisons that are exact, and the way from the candidates of
// a row to its statistics. Nothing is rounded but where it is said.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/matrix.hpp"
#include "screen/screen_index.hpp"

namespace refinelens {

// z = scale * (x . w_v + bias_v) decides argmax and rank; l = softcap * tanh(z / softcap) enters the sums, or z itself
// where softcap is 0.
struct CertifiedProblem {
  const double* x;  // [rows, depth], normed
  int64_t rows;
  Matrix weights;      // those of the index
  const double* bias;  // [tokens], or null
  double scale, softcap;
  const int64_t* targets;  // [rows], or null
};

// Each [rows]; the last two of the targets, or null.
struct CertifiedStats {
  int64_t* argmax;
  double* best;  // z of argmax
  double* logsumexp;
  double* entropy;
  float* logsumexp_bound;  // |logsumexp - that of exact logits| is at most this
  bool* fell_back;         // all logits of the row were computed in fp64
  double* target_z;
  int64_t* rank;
};

// z_v = x.w_v + b_v of one hidden row.
class ExactRow {
 public:
  // x is [depth]; bias is [tokens] or null; the index is that of the weights.
  ExactRow(const double* x, const Matrix& weights, const double* bias, const ScreenIndex& index);

  // z within z_error(), or more precisely: a sum of depth products and the bias in fp64.
  double z(int64_t token) const;

  // (depth + 4) 2^-53 |x| max|w| + 2^-52 |b|: any order of summation stays within it (Higham 2002, section 3.1).
  double z_error(int64_t token) const;

  // Whether a beats b: a larger z, or an equal one and a lower id. z_a and z_b are those of z().
  bool beats(int64_t a, double z_a, int64_t b, double z_b) const;

 private:
  int compare(int64_t a, int64_t b) const;

  const double* x_;
  const Matrix& weights_;
  const ScreenKernels& kernels_;
  const double* bias_;
  double product_error_;
};

// What the screen has found of a row, over the whole vocabulary.
struct ScreenedRow {
  double reached;  // the largest x.c + b is at least this
  double shift;    // x.m
  double peak, total, weighted, uncertain;
  double largest_bound;  // of any z
  int64_t above;
  std::vector<Candidate> candidates;
};

// Whether nothing needs a candidate of a row whose largest z is known to be at least `reached`: it is neither near that
// nor near the target's, and weighs little in the sums.
inline bool is_too_low(const CertifiedProblem& problem, const Candidate& candidate, double reached) {
  const double window = std::max<double>(candidate.bound, kHeavyNats / problem.scale);
  return !candidate.near_target && candidate.z + window < reached;
}

// False when the row was not screened well enough: no candidate is left, or the logsumexp has no useful bound.
bool finish_screened(const CertifiedProblem& problem, int64_t row, const ExactRow& exact, ScreenedRow& screened,
                     const CertifiedStats& stats);

// All logits in fp64.
void finish_exhaustively(const CertifiedProblem& problem, int64_t row, const ExactRow& exact,
                         const CertifiedStats& stats);

void finish_undecided(int64_t row, const CertifiedStats& stats);

}  // namespace refinelens
