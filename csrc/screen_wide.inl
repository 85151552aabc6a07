// Weights widened to fp64, and their products with a hidden row. See vectors.inl for how it is included.

namespace refinelens::REFINELENS_KERNELS {

constexpr int kDoubles = 16;  // separate sums, which the compiler may vectorise

template <typename T>
inline double widen_value(const void* w, int64_t k) {
  return T::widen(static_cast<const char*>(w) + k * T::kBytes);
}

static double dot_product(const void* w, Element element, const double* x, int64_t n) {
  return with_element(element, [=](auto type) {
    using T = decltype(type);
    double sums[kDoubles] = {};
    int64_t k = 0;
    for (; k + kDoubles <= n; k += kDoubles)
      for (int i = 0; i < kDoubles; ++i) sums[i] += widen_value<T>(w, k + i) * x[k + i];
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

}  // namespace refinelens::REFINELENS_KERNELS
