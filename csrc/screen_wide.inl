// Weights widened to fp64, and their products with a hidden row. See vectors.inl for how it is included.

namespace refinelens::REFINELENS_KERNELS {

constexpr int kDoubles = 16;  // separate sums, which the compiler may vectorise

inline float to_float(float value) { return value; }

struct Bf16 {
  uint16_t bits;
};
inline float to_float(Bf16 value) { return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16); }

struct Fp16 {
  uint16_t bits;
};
inline float to_float(Fp16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t exponent_shift = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // infinity and NaN keep theirs
  const float normal = __builtin_bit_cast(float, (magnitude << 13) + exponent_shift);
  const float f = magnitude < 0x400u ? static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f : normal;
  return value.bits & 0x8000u ? -f : f;
}

template <typename Value>
inline double dot_of(const Value* w, const double* x, int64_t n) {
  double sums[kDoubles] = {};
  int64_t k = 0;
  for (; k + kDoubles <= n; k += kDoubles)
    for (int i = 0; i < kDoubles; ++i) sums[i] += static_cast<double>(to_float(w[k + i])) * x[k + i];
  for (; k < n; ++k) sums[0] += static_cast<double>(to_float(w[k])) * x[k];
  double sum = 0.0;
  for (double part : sums) sum += part;
  return sum;
}

static double dot_product(const void* w, Element element, const double* x, int64_t n) {
  if (element == Element::fp32) return dot_of(static_cast<const float*>(w), x, n);
  if (element == Element::bf16) return dot_of(static_cast<const Bf16*>(w), x, n);
  return dot_of(static_cast<const Fp16*>(w), x, n);
}

template <typename Value>
inline void widen_values(const Value* w, double* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = to_float(w[k]);
}

static void widen(const void* w, Element element, double* out, int64_t n) {
  if (element == Element::fp32) return widen_values(static_cast<const float*>(w), out, n);
  if (element == Element::bf16) return widen_values(static_cast<const Bf16*>(w), out, n);
  widen_values(static_cast<const Fp16*>(w), out, n);
}

}  // namespace refinelens::REFINELENS_KERNELS
