// Divergences between rows' predictions, from their logits side by side. No Python types.
#pragma once

#include <cstdint>

#include "lens/fused_lens.hpp"

namespace refinelens {

enum class Divergence { kullback_leibler, jensen_shannon };

// Rows in groups of `group` neighbours; each is compared with the first one of its group, q: KL(q || p) or the
// Jensen-Shannon divergence of p and q, in nats.
struct DivergenceSpec {
  Divergence kind;
  int64_t group;           // at least 1, a divisor of the number of rows
  const float* logsumexp;  // [rows], of the logits
};

// Sums of a block of rows over a range of the vocabulary.
struct DivergenceState {
  double* value;  // of the divergence
  double* mass;   // of q, by which the KL is divided: it carries the same rounding
};

// One entry for every row, 0 for the first of a group; rounding may leave one a little below 0. The same bits for any
// number of threads, and for a row whatever groups are beside its own. The targets of `problem` are not read.
void divergence_from_first(const LensProblem& problem, const DivergenceSpec& spec, const LensKernels& kernels,
                           int n_threads, float* out);

}  // namespace refinelens
