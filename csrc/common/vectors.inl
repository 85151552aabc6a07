// Vectors of fp32 for one instruction set, the functions of a logit, and the elements of matrices, widened to fp32.
// lens/lens_kernels.cpp and screen/screen_kernels.cpp say how it is included.

namespace refinelens::REFINELENS_KERNELS {

typedef float Floats __attribute__((vector_size(kVectorBytes), may_alias));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes), may_alias));
constexpr int kLanes = kVectorBytes / sizeof(float);
constexpr float kInfinity = __builtin_inff();

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline Floats broadcast(float x) { return x - Floats{}; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // b where a is NaN
inline Floats magnitude(Floats x) { return x < 0.0f ? -x : x; }

inline bool any(Ints mask) {
  int32_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= mask[i];
  return lanes != 0;
}

// exp(x) for kExpFloor <= x <= 0 with a relative error of 2e-7; NaN stays NaN. 2^n * e^r with |r| <= ln(2)/2 and the
// polynomial of degree 5 whose largest relative error there is smallest (7.5e-8, by Remez's algorithm).
constexpr float kExpFloor = -87.0f;

inline Floats exp_nonpositive(Floats x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; with 127 added they are the exponent of 2^n.
  constexpr float kRound = 12582912.0f + 127.0f;
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts, the first times n is exact
  Floats p = r * 8.2976550e-3f + 4.1915382e-2f;
  p = p * r + 1.6667575e-1f;
  p = p * r + 4.9998895e-1f;
  p = p * r + 9.9999969e-1f;
  p = p * r + 1.0f;
  const Ints power = reinterpret_cast<const Ints&>(shifted) << 23;
  return p * reinterpret_cast<const Floats&>(power);
}

// A constant that the compiler cannot see: with one that it sees, GCC makes two instructions of a maximum.
inline Floats opaque(float x) {
  volatile float value = x;
  return broadcast(value);
}

// e^kExpFloor = 1.6e-38 is nothing beside the 1 of the peak; also for -inf. NaN stays NaN.
inline Floats clamp_exponent(Floats x, Floats floor = broadcast(kExpFloor)) { return larger(floor, x); }

// z * tanh(y) / y for |y| <= 1, with t = y^2: the odd polynomial of degree 13 with the term y whose largest relative
// error there is smallest (5.5e-8, by Remez's algorithm).
inline Floats small_tanh(Floats z, Floats t) {
  Floats p = t * 1.0582648e-3f - 6.2593398e-3f;
  p = p * t + 2.0359760e-2f;
  p = p * t - 5.3498708e-2f;
  p = p * t + 1.3326409e-1f;
  p = p * t - 3.3332987e-1f;
  return z + z * (t * p);
}

// cap * tanh(z / cap) of n floats, with a relative error of 3e-7 whatever the cap: small_tanh where |z| < cap, beyond
// it from tanh(y) = sign(y) * (1 - e) / (1 + e) with e = exp(-2|y|), whose difference loses digits before. Not inlined,
// so that equal z have equal logits wherever they are computed. n is a multiple of kLanes.
__attribute__((noinline)) static void soft_cap(float* z, int64_t n, float cap) {
  const float inverse = 1.0f / cap;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats v = load(z + i);
    const Floats y = magnitude(v) * inverse;
    const Floats e = exp_nonpositive(clamp_exponent(y * -2.0f));
    const Floats tanh = (1.0f - e) / (1.0f + e);
    store(z + i, y < 1.0f ? small_tanh(v, y * y) : cap * (v < 0.0f ? -tanh : tanh));
  }
}

template <typename T>
inline T read(const char* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

inline float float_of_bits(uint32_t bits) { return read<float>(reinterpret_cast<const char*>(&bits)); }

struct Fp32 {
  static constexpr int kBytes = 4;
  static float widen(const char* p) { return read<float>(p); }
};

struct Bf16 {
  static constexpr int kBytes = 2;
  static float widen(const char* p) { return float_of_bits(static_cast<uint32_t>(read<uint16_t>(p)) << 16); }
};

struct Fp16 {
  static constexpr int kBytes = 2;
  // Never by way of an fp32 subnormal, which the processor may be told to flush.
  static float widen(const char* p) {
    const uint32_t half = read<uint16_t>(p), magnitude = half & 0x7fffu;
    const uint32_t exponent_shift = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // infinity and NaN keep theirs
    const float normal = float_of_bits((magnitude << 13) + exponent_shift);
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
