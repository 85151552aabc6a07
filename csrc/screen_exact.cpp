#include "screen_exact.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace refinelens {

namespace {

// A sum of doubles without rounding: parts that do not overlap, in the order of magnitude (Shewchuk 1997, section 2.4).
// Exact as long as nothing overflows, and no product of add_product() lies below 2^-960, where its rounding would.
class ExactSum {
 public:
  void add(double x) {
    size_t kept = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const double sum = x + parts_[i], y = sum - x;
      const double error = (x - (sum - y)) + (parts_[i] - y);
      if (error != 0.0) parts_[kept++] = error;
      x = sum;
    }
    parts_.resize(kept);
    if (x != 0.0) parts_.push_back(x);
  }

  void add_product(double a, double b) {
    const double product = a * b;
    add(product);
    add(std::fma(a, b, -product));
  }

  int sign() const { return parts_.empty() ? 0 : parts_.back() > 0.0 ? 1 : -1; }

 private:
  std::vector<double> parts_;
};

}  // namespace

ExactRow::ExactRow(const double* x, const Matrix& weights, const double* bias, const ScreenIndex& index)
    : x_(x), weights_(weights), kernels_(index.kernels()), bias_(bias) {
  double squares = 0.0, largest = 0.0;
  for (int64_t k = 0; k < weights.columns; ++k) {
    squares += x[k] * x[k];
    largest = std::max(largest, std::fabs(x[k]));  // for the case that all squares underflow
  }
  const double norm = std::max(std::sqrt(squares), largest) * 1.000001;
  product_doubt_ = (weights.columns + 4) * 0x1p-53 * norm * index.largest_norm();
}

double ExactRow::z(int64_t token) const {
  const double dot = kernels_.dot_product(row_of(weights_, token), weights_.element, x_, weights_.columns);
  return bias_ ? dot + bias_[token] : dot;
}

double ExactRow::doubt(int64_t token) const {
  return product_doubt_ + (bias_ && bias_[token] != -INFINITY ? 0x1p-52 * std::fabs(bias_[token]) : 0.0);
}

bool ExactRow::beats(int64_t a, double z_a, int64_t b, double z_b) const {
  if (std::fabs(z_a - z_b) > doubt(a) + doubt(b)) return z_a > z_b;
  const int order = compare(a, b);
  return order > 0 || (order == 0 && a < b);
}

int ExactRow::compare(int64_t a, int64_t b) const {
  const double bias_a = bias_ ? bias_[a] : 0.0, bias_b = bias_ ? bias_[b] : 0.0;
  if (std::isinf(bias_a) || std::isinf(bias_b)) return (bias_a > bias_b) - (bias_a < bias_b);
  const size_t row_bytes = weights_.columns * bytes_of(weights_.element);
  if (product_doubt_ == 0.0 || std::memcmp(row_of(weights_, a), row_of(weights_, b), row_bytes) == 0)
    return (bias_a > bias_b) - (bias_a < bias_b);
  std::vector<double> w_a(weights_.columns), w_b(weights_.columns);
  kernels_.widen(row_of(weights_, a), weights_.element, w_a.data(), weights_.columns);
  kernels_.widen(row_of(weights_, b), weights_.element, w_b.data(), weights_.columns);
  ExactSum difference;
  for (int64_t k = 0; k < weights_.columns; ++k) {
    difference.add_product(x_[k], w_a[k]);
    difference.add_product(x_[k], -w_b[k]);
  }
  difference.add(bias_a);
  difference.add(-bias_b);
  return difference.sign();
}

}  // namespace refinelens
