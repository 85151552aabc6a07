// From the candidates of a row to its statistics.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "screen.hpp"
#include "screen_exact.hpp"

namespace refinelens {

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

void finish_broken(int64_t row, const CertifiedStats& stats);

}  // namespace refinelens
