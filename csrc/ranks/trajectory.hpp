// First-correct, settle, flips, censoring and largest gain of rank trajectories. No Python types.
#pragma once

#include <cstdint>

namespace refinelens {

// All are [n]; -1 stands for a value that does not exist.
struct TrajectoryColumns {
  int64_t* first_correct;
  int64_t* settle;
  int64_t* flips;
  int64_t* largest_gain;  // layer with the largest fall of the rank from the layer before, the lowest among equals
};

// `ranks` is [n, n_points], row-major, a point per layer; a layer is correct when its rank is below k. Stops at an
// example with a negative rank and returns where in `ranks` that is; -1 if there is none.
inline int64_t summarise_trajectories(const int64_t* ranks, int64_t n, int64_t n_points, int64_t k,
                                      const TrajectoryColumns& out) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* rank = ranks + i * n_points;
    int64_t first = -1, last_wrong = -1, changes = 0, gain = 0, gain_layer = -1;
    int64_t before = rank[0];
    // Conditional moves, no branches: whether a layer is correct is hard to predict.
    for (int64_t l = 0; l < n_points; ++l) {
      const int64_t now = rank[l];
      if (now < 0) return i * n_points + l;
      const bool correct = now < k, larger = before - now > gain;
      changes += correct != (before < k);
      first = correct && first < 0 ? l : first;
      last_wrong = correct ? last_wrong : l;
      gain = larger ? before - now : gain;
      gain_layer = larger ? l : gain_layer;
      before = now;
    }
    out.first_correct[i] = first;
    out.settle[i] = last_wrong + 1 < n_points ? last_wrong + 1 : -1;
    out.flips[i] = first < 0 ? -1 : changes - (first > 0);  // the change to first-correct is none
    out.largest_gain[i] = gain_layer;
  }
  return -1;
}

}  // namespace refinelens
