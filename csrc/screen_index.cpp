#include "screen_index.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "parallel.hpp"

namespace refinelens {

namespace {

constexpr double kMaxNorm16 = 46339.0;        // 46340^2 < 2^31
constexpr double kMaxValue16 = 32766.0;
constexpr double kMaxValue24 = 8355000.0;     // 127 * (2^16 + 2^8 + 1) = 8355711
constexpr double kInflate = 1.0 + 0x1p-26;    // more than the roundings of a sum of 2^24 squares, and a root
constexpr int kSums = 8;                      // separate sums that the compiler may vectorise

float half_to_float(uint16_t bits) {
  const uint32_t exponent = bits & 0x7c00u, magnitude = bits & 0x7fffu;
  uint32_t wide = (magnitude << 13) + (exponent == 0x7c00u ? 0x70000000u : 0x38000000u);
  float value;
  std::memcpy(&value, &wide, sizeof value);
  if (exponent == 0) value = static_cast<float>(magnitude) * 0x1p-24f;
  return bits & 0x8000u ? -value : value;
}

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

float round_up(double x) {
  const float f = static_cast<float>(x);
  return f < x ? std::nextafter(f, INFINITY) : f;
}

// The sum of term(k) for all k.
template <typename Term>
double sum_over(int64_t depth, const Term& term) {
  double sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= depth; k += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += term(k + i);
  for (; k < depth; ++k) sums[0] += term(k);
  double sum = 0.0;
  for (double part : sums) sum += part;
  return sum;
}

// q as digits of 8 bits, the lowest first, each from -128 to 127.
void split(int32_t q, int32_t digits[3]) {
  for (int i = 0; i < 2; ++i) {
    digits[i] = static_cast<int8_t>(q & 0xff);
    q = (q - digits[i]) >> 8;
  }
  digits[2] = q;
}

// Calls put(step, digit, unit, bytes) for all units of a vector.
template <typename Put>
void for_each_unit(const ScreenFormat& format, const int32_t* q, int64_t depth, const Put& put) {
  const int per_unit = format.digits == 1 ? 2 : 4;
  for (int64_t first = 0; first < format.steps(depth) * format.values_per_step(); first += per_unit) {
    const int64_t step = first / format.values_per_step(), unit = first % format.values_per_step() / per_unit;
    uint32_t bits[3] = {};  // of the highest digit first
    for (int i = 0; i < per_unit && first + i < depth; ++i) {
      if (format.digits == 1) {
        bits[0] |= (static_cast<uint32_t>(q[first + i]) & 0xffffu) << (16 * i);
        continue;
      }
      int32_t digits[3];
      split(q[first + i], digits);
      for (int d = 0; d < 3; ++d) bits[d] |= (static_cast<uint32_t>(digits[2 - d]) & 0xffu) << (8 * i);
    }
    for (int d = 0; d < format.digits; ++d) put(step, d, unit, bits[d]);
  }
}

}  // namespace

const void* row_of(const Matrix& weights, int64_t token) {
  return static_cast<const char*>(weights.data) + token * weights.row_stride * (weights.element == Element::fp32 ? 4 : 2);
}

void widen(const Matrix& weights, int64_t token, double* out) {
  if (weights.element == Element::fp32) {
    const float* row = static_cast<const float*>(row_of(weights, token));
    for (int64_t k = 0; k < weights.columns; ++k) out[k] = row[k];
    return;
  }
  const uint16_t* row = static_cast<const uint16_t*>(row_of(weights, token));
  if (weights.element == Element::bf16)
    for (int64_t k = 0; k < weights.columns; ++k) out[k] = bf16_to_float(row[k]);
  else
    for (int64_t k = 0; k < weights.columns; ++k) out[k] = half_to_float(row[k]);
}

double dot_product(const Matrix& weights, int64_t token, const double* x) {
  if (weights.element == Element::fp32) {
    const float* w = static_cast<const float*>(row_of(weights, token));
    return sum_over(weights.columns, [&](int64_t k) { return x[k] * w[k]; });
  }
  const uint16_t* w = static_cast<const uint16_t*>(row_of(weights, token));
  if (weights.element == Element::bf16)
    return sum_over(weights.columns, [&](int64_t k) { return x[k] * bf16_to_float(w[k]); });
  return sum_over(weights.columns, [&](int64_t k) { return x[k] * half_to_float(w[k]); });
}

Norms quantise(const double* x, int64_t depth, int digits, int32_t* q) {
  const double norm = std::sqrt(sum_over(depth, [&](int64_t k) { return x[k] * x[k]; })) * kInflate;
  double largest = 0.0;
  for (int64_t k = 0; k < depth; ++k) largest = std::max(largest, std::fabs(x[k]));
  // Rounding moves each value by at most 1/2, and so the norm by at most sqrt(depth) / 2.
  const double wanted = digits == 1 ? std::max(norm / (kMaxNorm16 - 0.5 * std::sqrt(depth)), largest / kMaxValue16)
                                    : largest / kMaxValue24;
  const float scale = round_up(std::max(wanted, kSmallestScale));
  const double inverse = 1.0 / scale;
  constexpr double kToInteger = 0x1.8p52;  // adding 1.5 * 2^52 rounds to an integer
  for (int64_t k = 0; k < depth; ++k) q[k] = static_cast<int32_t>((x[k] * inverse + kToInteger) - kToInteger);
  const auto residual = [&](int64_t k) {
    const double r = x[k] - static_cast<double>(scale) * q[k];  // the product is exact
    return r * r;
  };
  Norms norms{scale, norm, std::sqrt(sum_over(depth, residual)) * kInflate, 0.0, 0.0, 0.0};
  if (digits == 1) {
    const auto square = [&](int64_t k) { return static_cast<double>(q[k]) * q[k]; };
    norms.digits = scale * std::sqrt(sum_over(depth, square)) * kInflate;
    return norms;
  }
  int64_t squares[3] = {};
  for (int64_t k = 0; k < depth; ++k) {
    int32_t parts[3];
    split(q[k], parts);
    for (int i = 0; i < 3; ++i) squares[i] += static_cast<int64_t>(parts[i]) * parts[i];
  }
  norms.low = scale * std::sqrt(squares[0]) * kInflate;
  norms.middle = scale * 0x1p8 * std::sqrt(squares[1]) * kInflate;
  norms.digits = (scale * 0x1p16 * std::sqrt(squares[2]) + norms.middle + norms.low) * kInflate;
  return norms;
}

void pack_token(const ScreenFormat& format, const int32_t* q, int64_t depth, int i, void* group) {
  uint32_t* out = static_cast<uint32_t*>(group);
  for_each_unit(format, q, depth, [&](int64_t step, int64_t digit, int64_t unit, uint32_t bits) {
    out[((step * format.digits + digit) * format.token_group + i) * format.units + unit] = bits;
  });
}

void pack_row(const ScreenFormat& format, const int32_t* q, int64_t depth, int i, void* panel) {
  uint32_t* out = static_cast<uint32_t*>(panel);
  for_each_unit(format, q, depth, [&](int64_t step, int64_t digit, int64_t unit, uint32_t bits) {
    out[((step * format.digits + digit) * format.units + unit) * format.row_panel + i] = bits;
  });
}

template <typename T>
Aligned<T> aligned_zeros(int64_t count) {
  const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (!p) throw std::bad_alloc();
  std::memset(p, 0, bytes);
  return Aligned<T>(static_cast<T*>(p));
}
template Aligned<char> aligned_zeros(int64_t);
template Aligned<float> aligned_zeros(int64_t);
template Aligned<double> aligned_zeros(int64_t);
template Aligned<int32_t> aligned_zeros(int64_t);

ScreenIndex::ScreenIndex(const Matrix& weights, const ScreenKernels& kernels, int n_threads)
    : kernels_(kernels),
      tokens_(weights.rows),
      depth_(weights.columns),
      mean_(depth_, 0.0),
      digits_(aligned_zeros<char>(tiles() * kTileTokens * kernels.format.bytes_per_vector(depth_))),
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
      widen(weights, v, w.data());
      const double norm = std::sqrt(sum_over(depth_, [&](int64_t k) { return w[k] * w[k]; })) * kInflate;
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
  std::vector<int32_t> q(depth_);
  float* bounds = bounds_.data() + tile * (kTerms - 1);
  for (int64_t v = tile * kTileTokens; v < std::min(tokens_, (tile + 1) * kTileTokens); ++v) {
    widen(weights, v, c.data());
    for (int64_t k = 0; k < depth_; ++k) c[k] -= mean_[k];
    Norms norms = quantise(c.data(), depth_, format.digits, q.data());
    norms.residual += norms.norm * 0x1p-52;  // the subtraction of the mean was rounded
    const double terms[kTerms - 1] = {norms.residual, norms.digits, norms.low, norms.middle + norms.low};
    for (int i = 0; i < kTerms - 1; ++i) bounds[i] = std::max(bounds[i], round_up(terms[i] * kInflate));
    scales_[v] = kept_scale(norms, format.digits);
    const int64_t group = v / format.token_group;
    char* packed = digits_.get() + group * format.token_group * format.bytes_per_vector(depth_);
    pack_token(format, q.data(), depth_, static_cast<int>(v % format.token_group), packed);
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
    terms[tile * kTerms + kTerms - 1] = round_up(5 * 0x1p-24 * largest);
  }
  return terms;
}

}  // namespace refinelens
