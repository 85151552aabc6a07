// All hidden rows of a call, quantised, in panels, with what the kernels and the bound need of each.
#pragma once

#include <cstdint>

#include "screen.hpp"
#include "screen_index.hpp"

namespace refinelens {

class HiddenRows {
 public:
  HiddenRows(const ScreenIndex& index, const CertifiedProblem& problem, int n_threads);

  int64_t panels() const { return panels_; }
  int64_t padded() const { return panels_ * format_.row_panel; }
  bool live(int64_t row) const { return live_[row]; }  // whether it is screened
  double shift(int64_t row) const { return exact_shift_[row]; }  // x.m
  ScreenRows panel(int64_t i) const;

  // The bound of a row where the tile's terms are `terms`.
  double bound(int64_t row, const float* terms) const;

 private:
  void fill(const ScreenIndex& index, double largest_bias, int64_t panel, int i, Quantiser& quantiser);

  const CertifiedProblem& problem_;
  const ScreenFormat format_;
  const int64_t panels_;
  Aligned<char> digits_;
  Aligned<double> exact_shift_;
  Aligned<float> bound_, scale_, slack_, shift_, target_z_;
  Aligned<int32_t> live_;
};

}  // namespace refinelens
