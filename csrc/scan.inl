// The functions of a table of LensKernels: packing a panel of rows, scanning a range of tokens. See vectors.inl for
// how it is included; it expects kBlockBytes, the part of the second-level cache that staged tokens may fill.

namespace refinelens::REFINELENS_KERNELS {

constexpr int64_t kMaxGroups = 8;
constexpr int64_t kTileFloats = kMaxGroups * kGroup * kWide;

static int64_t block_tokens(int64_t d_model) {
  const int64_t groups = kBlockBytes / (padded_depth(d_model) * kGroup * static_cast<int64_t>(sizeof(float)));
  return (groups < 1 ? 1 : groups > kMaxGroups ? kMaxGroups : groups) * kGroup;
}

// A staged block of tokens, their biases, and a tile of logits.
struct Scratch {
  float *tile, *bias, *block;
  explicit Scratch(float* memory) : tile(memory), bias(tile + kTileFloats), block(bias + kMaxBias) {}
  static constexpr int64_t kMaxBias = (kMaxGroups * kGroup + kDepthStep) / kDepthStep * kDepthStep;
};

static int64_t scratch_floats(int64_t d_model) {
  return kTileFloats + Scratch::kMaxBias + block_tokens(d_model) * padded_depth(d_model);
}

// Rows of a panel, its first row in the arrays of PackedRows, and its values.
struct Panel {
  int64_t row, count;
  float* values;
  bool narrow;

  Panel(const PackedRows& rows, int64_t index, int64_t depth)
      : row(index * kWide), count(rows.count - row < kWide ? rows.count - row : kWide),
        values(rows.panels + row * depth), narrow(count <= kNarrow) {}
  int64_t width() const { return narrow ? kNarrow : kWide; }
};

inline void multiply(const Panel& panel, const float* group, int64_t depth, const float* bias, float scale, float* tile,
                     Prefetch next) {
  if (panel.narrow)
    multiply_group<1>(group, panel.values, depth, bias, scale, tile, next);
  else
    multiply_group<2>(group, panel.values, depth, bias, scale, tile, next);
}

// The targets' z: their tokens are multiplied with all rows of the panel, and the row's own is picked.
static void find_targets(const LensProblem& problem, int64_t first_row, const PackedRows& rows, const Panel& panel,
                         Scratch scratch) {
  const int64_t depth = padded_depth(problem.hidden.columns);
  const int64_t* wanted = problem.targets + first_row + panel.row;
  for (int64_t i = 0; i < panel.width(); ++i) {
    rows.targets[panel.row + i] = i < panel.count ? wanted[i] : -1;
    rows.target_z[panel.row + i] = 1.0f;
  }
  for (int64_t begin = 0; begin < panel.count; begin += kGroup) {
    const int64_t n = panel.count - begin < kGroup ? panel.count - begin : kGroup;
    stage_group(problem.unembedding, [&](int64_t i) { return wanted[begin + i]; }, n, scratch.block);
    for (int64_t i = 0; i < kGroup; ++i) scratch.bias[i] = i < n && problem.bias ? problem.bias[wanted[begin + i]] : 0.0f;
    multiply(panel, scratch.block, depth, scratch.bias, problem.scale, scratch.tile, {});
    for (int64_t i = 0; i < n; ++i)
      rows.target_z[panel.row + begin + i] = scratch.tile[i * panel.width() + begin + i];
  }
  __builtin_memcpy(rows.target_logit + panel.row, rows.target_z + panel.row, sizeof(float) * panel.width());
  if (problem.softcap != 0.0f) soft_cap(rows.target_logit + panel.row, panel.width(), problem.softcap);
}

static void pack_panel(const LensProblem& problem, int64_t first_row, const PackedRows& rows, int64_t index,
                       float* memory) {
  const Panel panel(rows, index, padded_depth(problem.hidden.columns));
  if (panel.narrow)
    fill_panel<1>(problem, first_row + panel.row, panel.count, panel.values);
  else
    fill_panel<2>(problem, first_row + panel.row, panel.count, panel.values);
  if (problem.targets) find_targets(problem, first_row, rows, panel, Scratch(memory));
}

static void stage_block(const LensProblem& problem, int64_t first, int64_t count, Scratch scratch) {
  const int64_t group_floats = kGroup * padded_depth(problem.unembedding.columns);
  for (int64_t begin = 0; begin < count; begin += kGroup)
    stage_group(problem.unembedding, [&](int64_t i) { return first + begin + i; },
                count - begin < kGroup ? count - begin : kGroup, scratch.block + begin / kGroup * group_floats);
  for (int64_t i = 0; i < kMaxGroups * kGroup; ++i)
    scratch.bias[i] = problem.bias && i < count ? problem.bias[first + i] : 0.0f;
}

// Multiplying one panel with one group asks memory for an equal share of the group that will take its place.
inline Prefetch share_of(const Matrix& m, int64_t token, int64_t last, int64_t panel, int64_t n_panels) {
  if (m.column_stride != 1) return {};
  const int64_t bytes = m.element == Element::fp32 ? 4 : 2;
  const int64_t each = (kGroup + n_panels - 1) / n_panels, start = panel * each;
  const int64_t group_end = last - token < kGroup ? last - token : kGroup;
  const int64_t end = start + each < group_end ? start + each : group_end;
  if (end <= start) return {};
  return {static_cast<const char*>(m.data) + (token + start) * m.row_stride * bytes, m.row_stride * bytes,
          kDepthStep * bytes, end - start};
}

static void scan_range(const LensProblem& problem, const PackedRows& rows, int64_t first, int64_t last,
                       const RangeState* state, float* memory) {
  const Scratch scratch(memory);
  const int64_t depth = padded_depth(problem.unembedding.columns), n_panels = (rows.count + kWide - 1) / kWide;
  const int64_t step = block_tokens(problem.unembedding.columns);
  for (int64_t token = first; token < last; token += step) {
    const int64_t count = last - token < step ? last - token : step;
    stage_block(problem, token, count, scratch);
    for (int64_t p = 0; p < n_panels; ++p) {
      const Panel panel(rows, p, depth);
      for (int64_t begin = 0; begin < count; begin += kGroup)
        multiply(panel, scratch.block + begin * depth, depth, scratch.bias + begin, problem.scale,
                 scratch.tile + begin * panel.width(),
                 share_of(problem.unembedding, token + step + begin, last, p, n_panels));
      if (!state) continue;
      const Tile tile{scratch.tile, panel.width(), count};
      for (int64_t lane = 0; lane < panel.width(); lane += kLanes)
        reduce_lanes(tile, lane, token, token - first, problem.softcap, *state, panel.row + lane,
                     problem.targets ? rows.targets + panel.row + lane : nullptr, rows.target_z + panel.row + lane);
    }
  }
}

}  // namespace refinelens::REFINELENS_KERNELS
