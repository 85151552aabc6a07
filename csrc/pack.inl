// Packing of hidden rows into panels, normed on the way.

namespace refinelens::REFINELENS_KERNELS {

// Norm of a panel of N vectors in place, lane by lane in fp64 and rounded once.
template <int N>
inline void norm_panel(const NormSpec& norm, int64_t d_model, float* panel) {
  constexpr int kRows = N * kLanes;
  double mean[kRows] = {}, square[kRows] = {};
  if (norm.kind == NormSpec::layer) {
    for (int64_t k = 0; k < d_model; ++k)
      for (int i = 0; i < kRows; ++i) mean[i] += panel[k * kRows + i];
    for (int i = 0; i < kRows; ++i) mean[i] /= static_cast<double>(d_model);
  }
  for (int64_t k = 0; k < d_model; ++k)
    for (int i = 0; i < kRows; ++i) {
      const double centred = panel[k * kRows + i] - mean[i];
      square[i] += centred * centred;
    }
  double scale[kRows];
  for (int i = 0; i < kRows; ++i)
    scale[i] = 1.0 / __builtin_sqrt(square[i] / static_cast<double>(d_model) + norm.eps);
  for (int64_t k = 0; k < d_model; ++k) {
    const double weight = norm.weight ? norm.weight[k] : 1.0, bias = norm.bias ? norm.bias[k] : 0.0;
    for (int i = 0; i < kRows; ++i)
      panel[k * kRows + i] = static_cast<float>((panel[k * kRows + i] - mean[i]) * scale[i] * weight + bias);
  }
}

template <int N>
inline void fill_panel(const LensProblem& problem, int64_t first_row, int64_t count, float* panel) {
  constexpr int kRows = N * kLanes;
  const int64_t d_model = problem.hidden.columns;
  if (count < kRows) __builtin_memset(panel, 0, sizeof(float) * kRows * d_model);
  with_element(problem.hidden.element, [&](auto element) {
    for (int64_t i = 0; i < count; ++i)
      copy_row<decltype(element)>(problem.hidden, first_row + i, panel + i, kRows);
  });
  if (problem.norm.kind != NormSpec::none) norm_panel<N>(problem.norm, d_model, panel);
}

}  // namespace refinelens::REFINELENS_KERNELS
