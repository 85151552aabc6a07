// Kernels of the screen that are the same for every integer product, and their table: folding (fold.inl); in fp64, a
// vector quantised to kDigits digits, with the norms of the proof in screen_kernels.hpp, and the weights and their
// products with a hidden row. Included after the product, whose layout it takes.
#include "screen/fold.inl"

namespace refinelens::REFINELENS_KERNELS {

constexpr double kMaxNorm16 = 46339.0;  // 46340^2 < 2^31
constexpr double kMaxValue16 = 32766.0;
constexpr double kMaxValue24 = 8355000.0;  // 127 * (2^16 + 2^8 + 1) = 8355711
constexpr int kSums = 8;      // separate sums of squares, which the compiler may vectorise
constexpr int kDotSums = 16;  // of products

// The root of the sum of term(k)^2, rounded up.
template <typename Term>
inline double norm_of(int64_t depth, const Term& term) {
  double sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= depth; k += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += static_cast<double>(term(k + i)) * static_cast<double>(term(k + i));
  for (; k < depth; ++k) sums[0] += static_cast<double>(term(k)) * static_cast<double>(term(k));
  double sum = 0.0;
  for (double part : sums) sum += part;
  return __builtin_sqrt(sum) * kInflate;
}

inline float scale_of(double norm, double largest, int64_t depth) {
  // Rounding moves each value by at most 1/2, and so the norm by at most sqrt(depth) / 2.
  const double by_norm = norm / (kMaxNorm16 - 0.5 * __builtin_sqrt(static_cast<double>(depth)));
  const double by_value = largest / (kDigits == 1 ? kMaxValue16 : kMaxValue24);
  double scale = kDigits == 1 && by_norm > by_value ? by_norm : by_value;
  scale = scale > kSmallestScale ? scale : kSmallestScale;
  const float rounded = static_cast<float>(scale);
  return rounded < scale ? rounded * (1.0f + 0x1p-23f) : rounded;
}

// q = 2^16 d0 + 2^8 d1 + d2, each digit from -128 to 127, plane by plane.
static void split_digits(const int32_t* q, int64_t depth, int64_t plane_bytes, int8_t* planes) {
  for (int64_t k = 0; k < depth; ++k) {
    const int32_t low = static_cast<int8_t>(q[k]), rest = (q[k] - low) >> 8, middle = static_cast<int8_t>(rest);
    planes[2 * plane_bytes + k] = static_cast<int8_t>(low);
    planes[plane_bytes + k] = static_cast<int8_t>(middle);
    planes[k] = static_cast<int8_t>((rest - middle) >> 8);
  }
}

static Norms quantise(const double* x, int64_t depth, int64_t plane_bytes, int32_t* q, void* planes) {
  const double norm = norm_of(depth, [=](int64_t k) { return x[k]; });
  double largest = 0.0;
  for (int64_t k = 0; k < depth; ++k) {
    const double magnitude = x[k] < 0.0 ? -x[k] : x[k];
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = scale_of(norm, largest, depth);
  const double exact_scale = scale, inverse = 1.0 / exact_scale;
  constexpr double kToInteger = 0x1.8p52;  // adding 1.5 * 2^52 rounds to an integer
  for (int64_t k = 0; k < depth; ++k) q[k] = static_cast<int32_t>((x[k] * inverse + kToInteger) - kToInteger);
  // The product is exact: 24 bits by 24.
  Norms norms = {scale, norm, norm_of(depth, [=](int64_t k) { return x[k] - exact_scale * q[k]; }), 0.0, 0.0, 0.0};
  if (kDigits == 1) {
    int16_t* plane = static_cast<int16_t*>(planes);
    for (int64_t k = 0; k < depth; ++k) plane[k] = static_cast<int16_t>(q[k]);
    norms.digits = exact_scale * norm_of(depth, [=](int64_t k) { return q[k]; }) * kInflate;
    return norms;
  }
  int8_t* digits = static_cast<int8_t*>(planes);
  split_digits(q, depth, plane_bytes, digits);
  const auto norm_of_plane = [=](int plane) {
    return norm_of(depth, [=](int64_t k) { return digits[plane * plane_bytes + k]; });
  };
  norms.low = exact_scale * norm_of_plane(2) * kInflate;
  norms.middle = exact_scale * 0x1p8 * norm_of_plane(1) * kInflate;
  norms.digits = (exact_scale * 0x1p16 * norm_of_plane(0) + norms.middle + norms.low) * kInflate;
  norms.scale = scale * 0x1p8f;
  return norms;
}

template <typename T>
inline double widen_value(const void* w, int64_t k) {
  return T::widen(static_cast<const char*>(w) + k * T::kBytes);
}

static double dot_product(const void* w, Element element, const double* x, int64_t n) {
  return with_element(element, [=](auto type) {
    using T = decltype(type);
    double sums[kDotSums] = {};
    int64_t k = 0;
    for (; k + kDotSums <= n; k += kDotSums)
      for (int i = 0; i < kDotSums; ++i) sums[i] += widen_value<T>(w, k + i) * x[k + i];
    for (; k < n; ++k) sums[0] += widen_value<T>(w, k) * x[k];
    double sum = 0.0;
    for (double part : sums) sum += part;
    return sum;
  });
}

static void widen(const void* w, Element element, double* out, int64_t n) {
  with_element(element, [=](auto type) {
    for (int64_t k = 0; k < n; ++k) out[k] = widen_value<decltype(type)>(w, k);
  });
}

static const ScreenKernels kScreenKernels = {
    kName, {kDigits, kUnits, kGroup, kPanel}, widen, dot_product, quantise, enter, leave, multiply_tile, fold_tile,
};

}  // namespace refinelens::REFINELENS_KERNELS
