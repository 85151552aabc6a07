// The matrix product, tokens times rows, one register tile over the depth; and the rows, normed and packed for it.
//
// Vectors run along the hidden rows, which are packed once; the unembedding is the operand that is broadcast, so it
// needs no transposition and is read where it lies. Six tokens at a time: their rows stay apart in an eight-way cache
// even where d_model is a power of two. A product is the sum of chains of kChain multiply-adds, all in ascending order
// whatever tile it is in: so a logit has the same bits for any number of rows and threads, and the target's logit,
// computed ahead by this very function, equals its own column exactly.

namespace refinelens::REFINELENS_KERNELS {

constexpr int kGroup = 6;  // tokens of a register tile
constexpr int64_t kWide = kMaxVectors * kLanes;
constexpr int64_t kChain = 256;  // short enough for the rounding of a sum, long enough to hide what starting one costs
constexpr int64_t kPrefetchStep = 16;  // one cache line of fp32

template <int N>
struct Vectors {
  static constexpr int count = N;
};

template <typename T>
inline void copy_row(const Matrix& m, int64_t row, float* to, int64_t to_stride) {
  const char* from = row_of(m, row);
  if (m.column_stride == 1 && to_stride == 1) {
    for (int64_t k = 0; k < m.columns; ++k) to[k] = T::widen(from + k * T::kBytes);
    return;
  }
  const int64_t step = m.column_stride * T::kBytes;
  for (int64_t k = 0; k < m.columns; ++k) to[k * to_stride] = T::widen(from + k * step);
}

// Elements between the rows of a staged group: an odd number of cache lines, so that they never share their place.
inline int64_t staged_stride(int64_t d_model) { return ((d_model + 15) / 16 | 1) * 16; }

// Stage tokens ids(0), ids(1), ... as fp32 rows; those from `count` on become zeros.
template <typename Ids>
inline void stage_group(const Matrix& m, Ids ids, int64_t count, float* group) {
  with_element(m.element, [&](auto element) {
    using T = decltype(element);
    for (int64_t i = 0; i < kGroup; ++i) {
      float* to = group + i * staged_stride(m.columns);
      if (i < count)
        copy_row<T>(m, ids(i), to, 1);
      else
        for (int64_t k = 0; k < m.columns; ++k) to[k] = 0.0f;
    }
  });
}

// The kGroup rows that a product reads, `stride` elements apart.
struct Group {
  const float* start;
  int64_t stride;
};

// Memory that a later product reads: `lines` cache lines are prefetched at every kPrefetchStep.
struct Prefetch {
  const char* start;
  int64_t stride, step;  // bytes from line to line, and from one step's lines to the next
  int64_t lines;

  void issue() {
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(start + i * stride, 0, 2);  // into the second level
    start += step;
  }
};

// Two bases and multiples of one stride reach the six rows, which leaves the compiler registers enough.
struct TokenRows {
  const char *lower, *upper;
  int64_t stride;

  Floats value(int i, int64_t step) const {
    const char* base = i < kGroup / 2 ? lower : upper;
    return broadcast(read<float>(base + i % (kGroup / 2) * stride + step * sizeof(float)));
  }
};

// `Sums` is Floats[kGroup][N], which GCC 9 does not take for itself when it is written here.
template <int N, int kSteps, typename Sums>
inline void multiply_steps(TokenRows& rows, const float*& panel, Sums& sums) {
#pragma GCC unroll 16
  for (int step = 0; step < kSteps; ++step) {
    Floats x[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) x[j] = load(panel + (step * N + j) * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kGroup; ++i) {
      const Floats w = rows.value(i, step);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[i][j] += w * x[j];
    }
  }
  rows.lower += kSteps * sizeof(float);
  rows.upper += kSteps * sizeof(float);
  panel += kSteps * N * kLanes;
}

// What becomes of the sums: they start from zero or from the tile; the last of the depth makes them logits.
struct Epilogue {
  bool first, last;
  const float* bias;  // [kGroup]
  float scale;
};

// tile[i][lane] += w_i . x_lane for a group of tokens and a panel of N vectors; in the end scale * (tile + bias_i).
template <int N>
__attribute__((noinline)) static void multiply_group(Group group, const float* panel, int64_t depth, Epilogue epilogue,
                                                     float* tile, Prefetch tokens, Prefetch rows_ahead) {
  const char* start = reinterpret_cast<const char*>(group.start);
  const int64_t stride = group.stride * static_cast<int64_t>(sizeof(float));
  TokenRows rows{start, start + kGroup / 2 * stride, stride};
  for (; depth > 0; epilogue.first = false) {
    Floats sums[kGroup][N] = {};
    int64_t left = depth < kChain ? depth : kChain;
    depth -= left;
    for (; left >= kPrefetchStep; left -= kPrefetchStep) {
      tokens.issue();
      rows_ahead.issue();
      for (int quarter = 0; quarter < 4; ++quarter) multiply_steps<N, kPrefetchStep / 4>(rows, panel, sums);
    }
    for (; left > 0; --left) multiply_steps<N, 1>(rows, panel, sums);
#pragma GCC unroll 6
    for (int i = 0; i < kGroup; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        float* to = tile + (i * N + j) * kLanes;
        const Floats sum = epilogue.first ? sums[i][j] : load(to) + sums[i][j];
        store(to, epilogue.last && depth == 0 ? epilogue.scale * (sum + epilogue.bias[i]) : sum);
      }
  }
}

static double multiply_adds(int64_t rounds) {
  constexpr int kChains = kGroup * kMaxVectors;  // as many as the product has
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

// Norm of a panel of N vectors in place, lane by lane in fp64 and rounded once.
template <int N>
inline void norm_panel(const NormSpec& norm, int64_t d_model, float* panel) {
  constexpr int kRows = N * kLanes;
  double mean[kRows] = {}, square[kRows] = {};
  if (norm.kind == NormSpec::layer) {
    for (int64_t k = 0; k < d_model; ++k)
      for (int i = 0; i < kRows; ++i) mean[i] += panel[k * kRows + i];
    for (int i = 0; i < kRows; ++i) mean[i] /= static_cast<double>(d_model);
  }
  for (int64_t k = 0; k < d_model; ++k)
    for (int i = 0; i < kRows; ++i) {
      const double centred = panel[k * kRows + i] - mean[i];
      square[i] += centred * centred;
    }
  double scale[kRows];
  for (int i = 0; i < kRows; ++i)
    scale[i] = 1.0 / __builtin_sqrt(square[i] / static_cast<double>(d_model) + norm.eps);
  for (int64_t k = 0; k < d_model; ++k) {
    const double weight = norm.weight ? norm.weight[k] : 1.0, bias = norm.bias ? norm.bias[k] : 0.0;
    for (int i = 0; i < kRows; ++i)
      panel[k * kRows + i] = static_cast<float>((panel[k * kRows + i] - mean[i]) * scale[i] * weight + bias);
  }
}

template <int N>
inline void fill_panel(const LensProblem& problem, int64_t first_row, int64_t count, float* panel) {
  constexpr int kRows = N * kLanes;
  const int64_t d_model = problem.hidden.columns;
  if (count < kRows) __builtin_memset(panel, 0, sizeof(float) * kRows * d_model);
  with_element(problem.hidden.element, [&](auto element) {
    for (int64_t i = 0; i < count; ++i)
      copy_row<decltype(element)>(problem.hidden, first_row + i, panel + i, kRows);
  });
  if (problem.norm.kind != NormSpec::none) norm_panel<N>(problem.norm, d_model, panel);
}

}  // namespace refinelens::REFINELENS_KERNELS
