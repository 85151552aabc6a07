// The certified lens: argmax and rank those of exact logits, found by a screen in integers. screen_kernels.hpp has the
// proof, exact.hpp the exact side, and what goes in and comes out.
#pragma once

#include "screen/exact.hpp"

namespace refinelens {

// Rows that the screen cannot decide get all logits in fp64, or, unless `exhaustive`, a logsumexp of NaN, as rows with
// NaN or infinity do; both have fell_back set. Results do not depend on n_threads.
void certified_lens(const ScreenIndex& index, const CertifiedProblem& problem, const CertifiedStats& stats,
                    bool exhaustive, int n_threads);

}  // namespace refinelens
