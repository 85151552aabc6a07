#include "screen_rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.hpp"
#include "screen_exact.hpp"

namespace refinelens {

HiddenRows::HiddenRows(const ScreenIndex& index, const CertifiedProblem& problem, int n_threads)
    : problem_(problem),
      format_(index.kernels().format),
      panels_((problem.rows + format_.row_panel - 1) / format_.row_panel),
      digits_(aligned_zeros<char>(padded() * format_.bytes_per_vector(index.depth()))),
      exact_shift_(aligned_zeros<double>(padded())),
      bound_(aligned_zeros<float>(padded() * kTerms)),
      scale_(aligned_zeros<float>(padded())),
      slack_(aligned_zeros<float>(padded())),
      shift_(aligned_zeros<float>(padded())),
      target_z_(aligned_zeros<float>(padded())),
      live_(aligned_zeros<int32_t>(padded())) {
  double largest_bias = 0.0;
  for (int64_t v = 0; problem.bias && v < index.tokens(); ++v)
    if (problem.bias[v] != -INFINITY) largest_bias = std::max(largest_bias, std::fabs(problem.bias[v]));
  parallel_for(panels_, n_threads, [&](int64_t panel, int) {
    Quantiser quantiser(index.kernels(), index.depth());
    for (int i = 0; i < format_.row_panel; ++i) fill(index, largest_bias, panel, i, quantiser);
  });
}

ScreenRows HiddenRows::panel(int64_t i) const {
  const int64_t first = i * format_.row_panel;
  return {digits_.get() + first * format_.bytes_per_vector(problem_.weights.columns),
          scale_.get() + first,
          bound_.get() + first * kTerms,
          slack_.get() + first,
          shift_.get() + first,
          target_z_.get() + first,
          live_.get() + first,
          first};
}

double HiddenRows::bound(int64_t row, const float* terms) const {
  const float* own = bound_.get() + row / format_.row_panel * format_.row_panel * kTerms + row % format_.row_panel;
  double sum = slack_[row];
  for (int i = 0; i < kTerms; ++i) sum += static_cast<double>(own[i * format_.row_panel]) * terms[i];
  return sum * 1.00001;
}

void HiddenRows::fill(const ScreenIndex& index, double largest_bias, int64_t panel, int i, Quantiser& quantiser) {
  const int64_t row = panel * format_.row_panel + i, depth = index.depth();
  target_z_[row] = std::numeric_limits<float>::quiet_NaN();
  if (row >= problem_.rows) return;
  const double* x = problem_.x + row * depth;
  double squares = 0.0;
  for (int64_t k = 0; k < depth; ++k) squares += x[k] * x[k];
  // Negated, so that NaN is not screened either. Norms of weights beyond the limit would overflow the tiles' bounds.
  const double largest_norm = index.largest_norm();
  if (!(std::sqrt(squares) * largest_norm + largest_bias <= kLargestLogit && largest_norm <= kLargestLogit)) return;
  const ExactRow exact(x, problem_.weights, problem_.bias, index);
  double shift = 0.0;
  for (int64_t k = 0; k < depth; ++k) shift += x[k] * index.mean()[k];
  const int64_t panel_bytes = format_.row_panel * format_.bytes_per_vector(depth);
  const Norms norms = quantiser.pack_row(x, i, digits_.get() + panel * panel_bytes);
  const double rounded = norms.residual + 10 * 0x1p-24 * norms.digits;
  const double terms[kTerms] = {norms.norm, rounded, norms.middle, norms.low, 1.0};
  for (int term = 0; term < kTerms; ++term)
    bound_[(panel * kTerms + term) * format_.row_panel + i] = static_cast<float>(terms[term]) * (1.0f + 0x1p-20f);
  scale_[row] = norms.scale;
  exact_shift_[row] = shift;
  shift_[row] = static_cast<float>(shift);
  double doubt = 4 * exact.doubt(0);
  // Under a cap the kernels add the rounded shift: that, the sum and its product with the scale are rounded.
  if (problem_.softcap != 0.0) doubt += 4 * 0x1p-24 * std::fabs(shift);
  live_[row] = 1;
  if (problem_.targets) {
    const double target_z = exact.z(problem_.targets[row]) - shift;
    target_z_[row] = static_cast<float>(target_z);
    doubt += 4 * exact.doubt(problem_.targets[row]) + 0x1p-24 * std::fabs(target_z);
    live_[row] = std::isfinite(target_z);
  }
  slack_[row] = static_cast<float>(doubt) * (1.0f + 0x1p-20f) + 0x1p-124f;
}

}  // namespace refinelens
