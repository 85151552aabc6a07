// Quantised vectors, and the index: an unembedding quantised once for the screen of the certified lens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "lens_kernels.hpp"
#include "screen_kernels.hpp"

namespace refinelens {

// The unembedding as it is: [tokens, depth] with a column_stride of 1.
const void* row_of(const Matrix& weights, int64_t token);

// The values of one token, in fp64.
void widen(const Matrix& weights, int64_t token, double* out);

// x . w of one token, in fp64.
double dot_product(const Matrix& weights, int64_t token, const double* x);

// A vector of quantised values and the norms of the proof in screen_kernels.hpp, rounded up.
struct Norms {
  float scale;
  double norm;      // |x|
  double residual;  // |x - s q|
  double digits;    // T
  double middle;    // M, 0 for one digit
  double low;       // L, 0 for one digit
};

// Writes q. x is finite.
Norms quantise(const double* x, int64_t depth, int digits, int32_t* q);

// Where the values of a vector go in the layout of a format: vector `i` of `count` that are packed together, where a
// unit of a token, or of a row, is followed by its next unit or by that of the next vector.
void pack_token(const ScreenFormat&, const int32_t* q, int64_t depth, int i, void* group);
void pack_row(const ScreenFormat&, const int32_t* q, int64_t depth, int i, void* panel);

// The factor of integer products that the kernels leave out of them: 2^8 of each side of three digits.
inline float kept_scale(const Norms& norms, int digits) { return digits == 1 ? norms.scale : norms.scale * 0x1p8f; }

struct AlignedDelete {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Aligned = std::unique_ptr<T[], AlignedDelete>;

// Zeros, aligned to a cache line.
template <typename T>
Aligned<T> aligned_zeros(int64_t count);

class ScreenIndex {
 public:
  ScreenIndex(const Matrix& weights, const ScreenKernels& kernels, int n_threads);

  const ScreenKernels& kernels() const { return kernels_; }
  int64_t tokens() const { return tokens_; }
  int64_t depth() const { return depth_; }
  int64_t tiles() const { return (tokens_ + kTileTokens - 1) / kTileTokens; }
  bool finite() const { return finite_; }           // whether all weights are; if not, nothing else holds
  double largest_norm() const { return largest_; }  // of a token's weights
  const std::vector<double>& mean() const { return mean_; }
  int64_t bytes() const;

  // A tile; offsets are those of the whole padded vocabulary, [tiles() * kTileTokens]; bounds are those of bound_terms.
  ScreenTile tile(int64_t i, const float* offsets, const float* bounds) const;

  // [tiles()][kTerms] of the bound: of the weights, with the largest |bias| of each tile.
  std::vector<float> bound_terms(const double* bias) const;

 private:
  void measure_mean(const Matrix& weights, int n_threads);
  void quantise_tile(const Matrix& weights, int64_t tile);

  const ScreenKernels& kernels_;
  int64_t tokens_, depth_;
  bool finite_ = true;
  double largest_ = 0.0;
  std::vector<double> mean_;
  Aligned<char> digits_;
  std::vector<float> scales_;
  std::vector<float> bounds_;  // [tiles()][kTerms - 1]
};

}  // namespace refinelens
