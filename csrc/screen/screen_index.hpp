// Vectors and a whole unembedding quantised for the screen; screen_kernels.hpp has the layout and the proof.
#pragma once

#include <cstdint>
#include <vector>

#include "common/matrix.hpp"
#include "screen/screen_kernels.hpp"

namespace refinelens {

// Quantises vectors, one after the other, into the layout of the kernels.
class Quantiser {
 public:
  Quantiser(const ScreenKernels& kernels, int64_t depth);

  // Vector `i` of those that are packed together in a group of tokens, or a panel of rows.
  Norms pack_token(const double* x, int64_t i, void* group);
  Norms pack_row(const double* x, int64_t i, void* panel);

 private:
  Norms pack(const double* x, int64_t unit_stride, int64_t plane_stride, uint32_t* out);

  const ScreenKernels& kernels_;
  const int64_t depth_;
  std::vector<int32_t> q_;
  std::vector<uint32_t> planes_;
};

// An unembedding quantised once for the screen. Here and below the weights have a column_stride of 1.
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
