// Quantises vectors into the layout of the kernels, and a whole unembedding into the index.
#include "screen/screen_index.hpp"

#include <algorithm>
#include <cmath>

#include "common/parallel.hpp"

namespace refinelens {

namespace {

float round_up(double x) {
  const float f = static_cast<float>(x);
  return f < x ? std::nextafter(f, INFINITY) : f;
}

}  // namespace

Quantiser::Quantiser(const ScreenKernels& kernels, int64_t depth)
    : kernels_(kernels), depth_(depth), q_(depth), planes_(kernels.format.bytes_per_vector(depth) / 4, 0) {}

Norms Quantiser::pack_token(const double* x, int64_t i, void* group) {
  const ScreenFormat& format = kernels_.format;
  const int64_t plane_stride = format.token_group * format.units;
  return pack(x, 1, plane_stride, static_cast<uint32_t*>(group) + i * format.units);
}

Norms Quantiser::pack_row(const double* x, int64_t i, void* panel) {
  const ScreenFormat& format = kernels_.format;
  return pack(x, format.row_panel, format.row_panel * format.units, static_cast<uint32_t*>(panel) + i);
}

Norms Quantiser::pack(const double* x, int64_t unit_stride, int64_t plane_stride, uint32_t* out) {
  const ScreenFormat& format = kernels_.format;
  const int64_t plane_bytes = format.plane_bytes(depth_), steps = format.steps(depth_);
  const Norms norms = kernels_.quantise(x, depth_, plane_bytes, q_.data(), planes_.data());
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t digit = 0; digit < format.digits; ++digit, out += plane_stride)
      for (int64_t unit = 0; unit < format.units; ++unit)
        out[unit * unit_stride] = planes_[digit * plane_bytes / 4 + step * format.units + unit];
  return norms;
}

ScreenIndex::ScreenIndex(const Matrix& weights, const ScreenKernels& kernels, int n_threads)
    : kernels_(kernels),
      tokens_(weights.rows),
      depth_(weights.columns),
      mean_(depth_, 0.0),
      digits_(aligned_filled<char>(tiles() * kTileTokens * kernels.format.bytes_per_vector(depth_))),
      scales_(tiles() * kTileTokens, 1.0f),
      bounds_(tiles() * (kTerms - 1), 0.0f) {
  measure_mean(weights, n_threads);
  if (finite_) parallel_for(tiles(), n_threads, [&](int64_t tile, int) { quantise_tile(weights, tile); });
}

// The mean of the weights, and their largest norm.
void ScreenIndex::measure_mean(const Matrix& weights, int n_threads) {
  constexpr int64_t kPieces = 64;  // the sums must not depend on the number of threads
  std::vector<double> sums(kPieces * depth_, 0.0), largest(kPieces, 0.0);
  parallel_for(kPieces, n_threads, [&](int64_t piece, int) {
    std::vector<double> w(depth_);
    double* sum = sums.data() + piece * depth_;
    for (int64_t v = tokens_ * piece / kPieces; v < tokens_ * (piece + 1) / kPieces; ++v) {
      kernels_.widen(row_of(weights, v), weights.element, w.data(), depth_);
      const double square = kernels_.dot_product(row_of(weights, v), weights.element, w.data(), depth_);
      const double norm = std::sqrt(square) * kInflate;
      // A maximum would lose NaN.
      largest[piece] = norm <= largest[piece] ? largest[piece] : norm;
      for (int64_t k = 0; k < depth_; ++k) sum[k] += w[k];
    }
  });
  for (int64_t piece = 0; piece < kPieces; ++piece) {
    finite_ = finite_ && std::isfinite(largest[piece]);
    largest_ = std::max(largest_, largest[piece]);
    for (int64_t k = 0; k < depth_; ++k) mean_[k] += sums[piece * depth_ + k] / static_cast<double>(tokens_);
  }
}

void ScreenIndex::quantise_tile(const Matrix& weights, int64_t tile) {
  const ScreenFormat& format = kernels_.format;
  std::vector<double> c(depth_);
  Quantiser quantiser(kernels_, depth_);
  float* bounds = bounds_.data() + tile * (kTerms - 1);
  for (int64_t v = tile * kTileTokens; v < std::min(tokens_, (tile + 1) * kTileTokens); ++v) {
    kernels_.widen(row_of(weights, v), weights.element, c.data(), depth_);
    for (int64_t k = 0; k < depth_; ++k) c[k] -= mean_[k];
    const int64_t group = v / format.token_group, group_bytes = format.token_group * format.bytes_per_vector(depth_);
    Norms norms = quantiser.pack_token(c.data(), v % format.token_group, digits_.get() + group * group_bytes);
    norms.residual += norms.norm * 0x1p-52;  // the subtraction of the mean was rounded
    const double terms[kTerms - 1] = {norms.residual, norms.digits, norms.low, norms.middle + norms.low};
    for (int i = 0; i < kTerms - 1; ++i) bounds[i] = std::max(bounds[i], round_up(terms[i] * kInflate));
    scales_[v] = norms.scale;
  }
}

int64_t ScreenIndex::bytes() const {
  return tiles() * kTileTokens * (kernels_.format.bytes_per_vector(depth_) + sizeof(float)) +
         (bounds_.size() * sizeof(float)) + mean_.size() * sizeof(double);
}

ScreenTile ScreenIndex::tile(int64_t i, const float* offsets, const float* bounds) const {
  const int64_t first = i * kTileTokens;
  return {digits_.get() + first * kernels_.format.bytes_per_vector(depth_), scales_.data() + first, offsets + first,
          bounds + i * kTerms, first, static_cast<int>(std::min<int64_t>(kTileTokens, tokens_ - first))};
}

std::vector<float> ScreenIndex::bound_terms(const double* bias) const {
  std::vector<float> terms(tiles() * kTerms);
  for (int64_t tile = 0; tile < tiles(); ++tile) {
    double largest = 0.0;
    for (int64_t v = tile * kTileTokens; bias && v < std::min(tokens_, (tile + 1) * kTileTokens); ++v)
      if (bias[v] != -INFINITY) largest = std::max(largest, std::fabs(bias[v]));
    std::copy_n(bounds_.data() + tile * (kTerms - 1), kTerms - 1, terms.data() + tile * kTerms);
    terms[tile * kTerms + kTerms - 1] = round_up(6 * 0x1p-24 * largest);
  }
  return terms;
}

}  // namespace refinelens
