// The element types of matrices, widened to fp32. See vectors.inl for how it is included.

namespace refinelens::REFINELENS_KERNELS {

template <typename T>
inline T read(const char* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

inline float with_bits(uint32_t bits) { return read<float>(reinterpret_cast<const char*>(&bits)); }

struct Fp32 {
  static constexpr int kBytes = 4;
  static float widen(const char* p) { return read<float>(p); }
};

struct Bf16 {
  static constexpr int kBytes = 2;
  static float widen(const char* p) { return with_bits(static_cast<uint32_t>(read<uint16_t>(p)) << 16); }
};

struct Fp16 {
  static constexpr int kBytes = 2;
  // Never by way of an fp32 subnormal, which the processor may be told to flush.
  static float widen(const char* p) {
    const uint32_t half = read<uint16_t>(p), magnitude = half & 0x7fffu;
    const uint32_t exponent_shift = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // infinity and NaN keep theirs
    const float normal = with_bits((magnitude << 13) + exponent_shift);
    const float f = magnitude < 0x400u ? static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f : normal;
    return half & 0x8000u ? -f : f;
  }
};

// Calls f with the element type of a matrix.
template <typename F>
inline auto with_element(Element element, F f) {
  if (element == Element::fp32) return f(Fp32{});
  if (element == Element::bf16) return f(Bf16{});
  return f(Fp16{});
}

}  // namespace refinelens::REFINELENS_KERNELS
