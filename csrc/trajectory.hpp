// First-correct, settle, flips and censoring of rank trajectories. No Python types here.
#pragma once

#include <cstdint>

namespace refinelens {

// Writes -1 where a value does not exist. `ranks` is [n, n_layers + 1], row-major; a layer is correct when
// its rank is below k. All outputs are [n].
inline void summarise_trajectories(const int64_t* ranks, int64_t n, int64_t n_points, int64_t k,
                                   int64_t* first_correct, int64_t* settle, int64_t* flips) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* rank = ranks + i * n_points;
    int64_t first = -1, last_wrong = -1, changes = 0;
    for (int64_t l = 0; l < n_points; ++l) {
      const bool correct = rank[l] < k;
      if (first >= 0 && correct != (rank[l - 1] < k)) ++changes;
      if (correct && first < 0) first = l;
      if (!correct) last_wrong = l;
    }
    first_correct[i] = first;
    settle[i] = last_wrong + 1 < n_points ? last_wrong + 1 : -1;
    flips[i] = first < 0 ? -1 : changes;
  }
}

}  // namespace refinelens
