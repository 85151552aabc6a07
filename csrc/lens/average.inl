// The softmax averages of mean_unembedding over a range of tokens: probabilities take the place of a tile of logits and
// are multiplied with the block of tokens that made them, which is still in cache.

namespace refinelens::REFINELENS_KERNELS {

// Weights of a block of tokens as fp32: [count][columns], `stride` elements from token to token.
struct Block {
  const float* start;
  int64_t stride, count;
};

// to[i][lane] = to[i][lane] * factor[lane] + sum over tokens of w_token[i] * p[token][lane], of kColumns columns of the
// block and a panel of N vectors; one chain of multiply-adds in the order of tokens.
template <int N, int kColumns>
__attribute__((noinline)) static void add_columns(Block block, const float* p, const float* factor, float* to) {
  Floats sums[kColumns][N] = {};
  const float* w = block.start;
#pragma GCC unroll 4
  for (int64_t token = 0; token < block.count; ++token) {
    Floats x[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) x[j] = load(p + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kColumns; ++i) {
      const Floats own = broadcast(w[i]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[i][j] += own * x[j];
    }
    w += block.stride;
    p += N * kLanes;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kColumns; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* sum = to + (i * N + j) * kLanes;
      store(sum, load(sum) * load(factor + j * kLanes) + sums[i][j]);
    }
}

// All columns of a block.
template <int N>
inline void add_block(Block block, int64_t d_model, const float* p, const float* factor, float* to) {
  int64_t column = 0;
  for (; column + kGroup <= d_model; column += kGroup, block.start += kGroup, to += kGroup * N * kLanes)
    add_columns<N, kGroup>(block, p, factor, to);
  for (; column < d_model; ++column, ++block.start, to += N * kLanes) add_columns<N, 1>(block, p, factor, to);
}

typedef float UnalignedFloats __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));

// The same sums with vectors along the columns, of kRows rows of a panel of one vector and M vectors of columns: where
// the panel has fewer rows than lanes, no lane is idle.
template <int kRows, int M>
__attribute__((noinline)) static void add_rows(Block block, const float* p, const float* factor, float* to) {
  Floats sums[kRows][M] = {};
  const float* w = block.start;
  for (int64_t token = 0; token < block.count; ++token) {
    Floats own[kRows];
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) own[i] = broadcast(p[i]);
#pragma GCC unroll 12
    for (int j = 0; j < M; ++j) {
      const Floats x = *reinterpret_cast<const UnalignedFloats*>(w + j * kLanes);
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) sums[i][j] += x * own[i];
    }
    w += block.stride;
    p += kLanes;
  }
  alignas(64) float found[kRows][M * kLanes];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < M; ++j) store(found[i] + j * kLanes, sums[i][j]);
  for (int64_t k = 0; k < M * kLanes; ++k)
    for (int i = 0; i < kRows; ++i) to[k * kLanes + i] = to[k * kLanes + i] * factor[i] + found[i][k];
}

constexpr int64_t kFewRows = 5;  // of a panel of one vector; from 6 on its idle lanes cost less

// All columns of a block for a panel of one vector with `n_rows` rows.
inline void add_block_to_few(Block block, int64_t d_model, int64_t n_rows, const float* p, const float* factor,
                             float* to) {
  constexpr int kPair = 6, kOne = 12;  // vectors of columns for two rows at a time, and for one
  const auto of_rows = [&](auto rows, auto width, int64_t row) {
    constexpr int64_t kStep = width.count * kLanes;
    Block own = block;
    float* sums = to + row;
    int64_t column = 0;
    for (; column + kStep <= d_model; column += kStep, own.start += kStep, sums += kStep * kLanes)
      add_rows<rows.count, width.count>(own, p + row, factor + row, sums);
    for (; column + kLanes <= d_model; column += kLanes, own.start += kLanes, sums += kLanes * kLanes)
      add_rows<rows.count, 1>(own, p + row, factor + row, sums);
  };
  int64_t row = 0;
  for (; row + 2 <= n_rows; row += 2) of_rows(Vectors<2>{}, Vectors<kPair>{}, row);
  if (row < n_rows) of_rows(Vectors<1>{}, Vectors<kOne>{}, row);
  const int64_t done = d_model / kLanes * kLanes;
  block.start += done;
  for (int64_t column = done; column < d_model; ++column, ++block.start)
    add_columns<1, 1>(block, p, factor, to + column * kLanes);
}

// Turns the logits of kLanes rows into exp(l - peak), folds them into the running sums, and gives what the sums of
// earlier tokens are multiplied with.
inline Floats average_lanes(const Lanes& lanes, const float* bias, const AverageState& state, int64_t row) {
  const Floats old_peak = load(state.peak + row), peak = larger(largest_of(lanes), old_peak);
  store(state.peak + row, peak);
  // Rows that have seen nothing but -inf have sums of 0, for which any finite base and factor will do.
  const Floats base = peak == -kInfinity ? Floats{} : peak;
  const Floats factor = exp_nonpositive(clamp_exponent(old_peak == -kInfinity ? Floats{} : old_peak - base));
  const Floats floor = opaque(kExpFloor);
  Floats sums[2] = {}, biases[2] = {};
  for_tokens(lanes.count, [&](int64_t token, int i) {
    float* place = lanes.z + token * lanes.stride;
    const Floats d = load(place) - base, e = exp_nonpositive(clamp_exponent(d, floor));
    const Floats p = d < floor ? Floats{} : e;
    store(place, p);
    sums[i] += p;
    biases[i] += p * bias[token];
  });
  const Floats sum = sums[0] + sums[1], average = biases[0] + biases[1];
  double* total = state.total + row;
  double* total_bias = state.bias + row;
  for (int i = 0; i < kLanes; ++i) {
    total[i] = total[i] * factor[i] + sum[i];
    total_bias[i] = total_bias[i] * factor[i] + average[i];
  }
  return factor;
}

static void average_range(const LensProblem& problem, const PackedRows& rows, int64_t first_panel, int64_t last_panel,
                          int64_t first, int64_t last, const AverageState& state, float* memory) {
  const Scratch scratch(memory);
  const Matrix& tokens = problem.unembedding;
  const int64_t d_model = tokens.columns;
  const bool in_place = tokens.element == Element::fp32 && tokens.column_stride == 1;
  for_tiles(problem, rows, {first_panel, last_panel}, first, last, scratch,
            [&](const Panel& panel, int64_t token, int64_t count) {
              alignas(64) float factor[kWide];
              float bias[kMaxTokens];
              // A token that cannot occur (bias -inf) has probability 0 and adds nothing.
              for (int64_t i = 0; i < count; ++i) bias[i] = scratch.bias[i] == -kInfinity ? 0.0f : scratch.bias[i];
              for (int64_t lane = 0; lane < panel.width(); lane += kLanes)
                store(factor + lane,
                      average_lanes({scratch.tile + lane, panel.width(), count}, bias, state, panel.row + lane));
              const Block block = in_place ? Block{reinterpret_cast<const float*>(row_of(tokens, token)),
                                                   tokens.row_stride, count}
                                           : Block{scratch.block, staged_stride(d_model), count};
              float* sums = state.sums + panel.row * d_model;
              if (kMaxVectors == 1 && panel.count <= kFewRows)
                return add_block_to_few(block, d_model, panel.count, scratch.tile, factor, sums);
              with_vectors(panel.vectors,
                           [&](auto vectors) { add_block<vectors.count>(block, d_model, scratch.tile, factor, sums); });
            });
}

static void merge_averages(const PackedRows& rows, int64_t index, const AverageState* ranges, int64_t n,
                           int64_t first_row, const Averages& out) {
  const Panel panel(rows, index, out.d_model);
  double peak[kWide], total[kWide] = {}, bias[kWide] = {};
  const auto factor = [&](int64_t range, int64_t lane) {
    const float own = ranges[range].peak[panel.row + lane];
    return own == -kInfinity ? 1.0 : __builtin_exp(own - peak[lane]);  // a range of no logit but -inf has sums of 0
  };
  for (int64_t lane = 0; lane < panel.count; ++lane) {
    const int64_t row = panel.row + lane;
    peak[lane] = -kInfinity;
    for (int64_t i = 0; i < n; ++i)
      if (ranges[i].peak[row] > peak[lane]) peak[lane] = ranges[i].peak[row];
    for (int64_t i = 0; i < n; ++i) {
      total[lane] += ranges[i].total[row] * factor(i, lane);
      bias[lane] += ranges[i].bias[row] * factor(i, lane);
    }
    out.bias[first_row + row] = static_cast<float>(bias[lane] / total[lane]);
    out.logsumexp[first_row + row] = static_cast<float>(peak[lane] + __builtin_log(total[lane]));
  }
  for (int64_t lane = 0; lane < panel.count; ++lane) {
    float* to = out.weights + (first_row + panel.row + lane) * out.d_model;
    for (int64_t k = 0; k < out.d_model; ++k) to[k] = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float share = static_cast<float>(factor(i, lane) / total[lane]);
      const float* from = ranges[i].sums + panel.row * out.d_model + lane;
      for (int64_t k = 0; k < out.d_model; ++k) to[k] += share * from[k * panel.width()];
    }
  }
}

}  // namespace refinelens::REFINELENS_KERNELS
