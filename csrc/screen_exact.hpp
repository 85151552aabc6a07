// Logits in fp64, and comparisons of logits that are exact: nothing here is rounded but where it is said.
#pragma once

#include <cstdint>
#include <vector>

#include "screen_index.hpp"

namespace refinelens {

// z_v = x.w_v + b_v of one hidden row.
class ExactRow {
 public:
  // x is [depth]; bias is [tokens] or null; the index is that of the weights.
  ExactRow(const double* x, const Matrix& weights, const double* bias, const ScreenIndex& index);

  // z within doubt(), or more precisely: a sum of depth products and the bias in fp64.
  double z(int64_t token) const;

  // (depth + 4) 2^-53 |x| max|w| + 2^-52 |b|: any order of summation stays within it (Higham 2002, section 3.1).
  double doubt(int64_t token) const;

  // Whether a beats b: a larger z, or an equal one and a lower id. z_a and z_b are those of z().
  bool beats(int64_t a, double z_a, int64_t b, double z_b) const;

 private:
  int compare(int64_t a, int64_t b) const;

  const double* x_;
  const Matrix& weights_;
  const ScreenKernels& kernels_;
  const double* bias_;
  double product_doubt_;
};

}  // namespace refinelens
