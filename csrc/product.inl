// The matrix product: tokens times rows, one register tile over the whole depth. See vectors.inl for how it is included.
//
// Vectors run along the hidden rows, which are few and packed once; the unembedding is the operand that is broadcast,
// so it needs no transposition: staging it copies whole cache lines. A product is one chain of multiply-adds over the
// depth in ascending order whatever tile it is in, so a logit has the same bits for any number of rows and threads,
// and the target's logit, computed ahead by this very function, equals its own column exactly.

namespace refinelens::REFINELENS_KERNELS {

constexpr int64_t kNarrow = kLanes, kWide = 2 * kLanes;

template <typename T>
inline T read(const char* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

struct Fp32 {
  static constexpr int kBytes = 4;
  static float widen(const char* p) { return read<float>(p); }
};

struct Bf16 {
  static constexpr int kBytes = 2;
  static float widen(const char* p) {
    const uint32_t bits = static_cast<uint32_t>(read<uint16_t>(p)) << 16;
    return read<float>(reinterpret_cast<const char*>(&bits));
  }
};

struct Fp16 {
  static constexpr int kBytes = 2;
  static float widen(const char* p) {
    const uint32_t half = read<uint16_t>(p);
    uint32_t bits = (half & 0x7fff) << 13;
    const float finite = read<float>(reinterpret_cast<const char*>(&bits)) * 0x1p112f;  // moves the exponent's bias
    bits = read<uint32_t>(reinterpret_cast<const char*>(&finite));
    bits |= (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity and NaN keep the largest exponent
    bits |= (half & 0x8000) << 16;
    return read<float>(reinterpret_cast<const char*>(&bits));
  }
};

// Calls f with the element type of a matrix.
template <typename F>
inline void with_element(Element element, F f) {
  if (element == Element::fp32) return f(Fp32{});
  if (element == Element::bf16) return f(Bf16{});
  f(Fp16{});
}

template <typename T>
inline const char* row_start(const Matrix& m, int64_t row) {
  return static_cast<const char*>(m.data) + row * m.row_stride * T::kBytes;
}

// Stage token `row` of `m` as row `slot` of a group: [depth / kDepthStep][kGroup][kDepthStep], zeros after the last
// column. A negative row gives zeros.
template <typename T>
inline void stage_row(const Matrix& m, int64_t row, int64_t slot, float* group) {
  const char* from = row_start<T>(m, row);
  const int64_t whole = row < 0 ? 0 : m.columns / kDepthStep * kDepthStep, depth = padded_depth(m.columns);
  float* to = group + slot * kDepthStep;
  int64_t k = 0;
  if (m.column_stride == 1)
    for (; k < whole; k += kDepthStep, to += kGroup * kDepthStep, from += kDepthStep * T::kBytes)
      for (int i = 0; i < kDepthStep; ++i) to[i] = T::widen(from + i * T::kBytes);
  const int64_t step = m.column_stride * T::kBytes;
  for (; k < depth; k += kDepthStep, to += kGroup * kDepthStep, from += kDepthStep * step)
    for (int i = 0; i < kDepthStep; ++i) to[i] = row >= 0 && k + i < m.columns ? T::widen(from + i * step) : 0.0f;
}

// Stage up to kGroup tokens, whose ids are ids(0), ids(1), ...; slots from `count` on become zeros.
template <typename Ids>
inline void stage_group(const Matrix& m, Ids ids, int64_t count, float* group) {
  with_element(m.element, [&](auto element) {
    for (int64_t slot = 0; slot < kGroup; ++slot)
      stage_row<decltype(element)>(m, slot < count ? ids(slot) : -1, slot, group);
  });
}

// Memory that will be staged next: `lines` tokens, of which one cache line is asked for at every depth step.
struct Prefetch {
  const char* start;
  int64_t stride, step;  // bytes from token to token and from one depth step to the next
  int64_t lines;
};

// tile[i][lane] = scale * (w_i . x_lane + bias_i) for the kGroup tokens of a staged group and a panel of N vectors.
template <int N>
__attribute__((noinline)) static void multiply_group(const float* group, const float* panel, int64_t depth,
                                                     const float* bias, float scale, float* tile, Prefetch next) {
  Floats sums[kGroup][N] = {};
  for (int64_t k = 0; k < depth; k += kDepthStep) {
    for (int64_t i = 0; i < next.lines; ++i) __builtin_prefetch(next.start + i * next.stride, 0, 2);
    next.start += next.step;
#pragma GCC unroll 4
    for (int step = 0; step < kDepthStep; ++step) {
      Floats x[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) x[j] = load(panel + (step * N + j) * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sums[i][j] += group[i * kDepthStep + step] * x[j];
    }
    group += kGroup * kDepthStep;
    panel += kDepthStep * N * kLanes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kGroup; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(tile + (i * N + j) * kLanes, scale * (sums[i][j] + bias[i]));
}

static double multiply_adds(int64_t rounds) {
  constexpr int kChains = kGroup * 2;  // as many as the product has
  volatile float one = 1.0f, tiny = 1e-9f;
  const Floats a = broadcast(one), b = broadcast(tiny);
  Floats chains[kChains];
  for (int c = 0; c < kChains; ++c) chains[c] = broadcast(static_cast<float>(c));  // equal ones would be merged
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) chains[c] = chains[c] * a + b;
  }
  Floats sum = {};
  for (int c = 0; c < kChains; ++c) sum += chains[c];
  volatile float sink = sum[0];
  (void)sink;
  return 2.0 * kLanes * kChains * rounds;
}

}  // namespace refinelens::REFINELENS_KERNELS
