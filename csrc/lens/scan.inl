// LensKernels: packing a panel of rows, scanning a range of tokens. lens_kernels.cpp says how it is included.
#include "common/vectors.inl"
// After the vectors.
#include "lens/product.inl"
#include "lens/reduce.inl"

namespace refinelens::REFINELENS_KERNELS {

constexpr int64_t kMaxGroups = 16;  // of a block
constexpr int64_t kMaxTokens = kMaxGroups * kGroup;
constexpr int64_t kMaxDepth = 4 * kChain;  // of a panel that is multiplied with all groups of a block before the next

static int64_t block_tokens(int64_t d_model) {
  const int64_t depth = d_model < kMaxDepth ? d_model : kMaxDepth;
  const int64_t groups = kBlockBytes / (depth * kGroup * static_cast<int64_t>(sizeof(float)));
  return (groups < 1 ? 1 : groups > kMaxGroups ? kMaxGroups : groups) * kGroup;
}

// A tile of logits, the biases of a block of tokens, and the tokens themselves where they must be staged.
struct Scratch {
  float *tile, *bias, *block;
  explicit Scratch(float* memory) : tile(memory), bias(tile + kMaxTokens * kWide), block(bias + kMaxTokens) {}
};

static int64_t scratch_floats(int64_t d_model) {
  return kMaxTokens * kWide + kMaxTokens + block_tokens(d_model) * staged_stride(d_model);
}

static int64_t panels_of(const PackedRows& rows) { return (rows.count + kWide - 1) / kWide; }

// A panel: its first row in the arrays of PackedRows, how many rows it has, and its values. The vectors of rows are
// shared out evenly, since the product is the slower the narrower its panel.
struct Panel {
  int64_t row, count;
  const float* values;
  int vectors;

  Panel(const PackedRows& rows, int64_t index, int64_t d_model) {
    const int64_t n_panels = panels_of(rows), all = (rows.count + kLanes - 1) / kLanes;
    const int64_t fewest = all / n_panels, n_wider = all % n_panels;  // the wider panels come first
    vectors = static_cast<int>(fewest + (index < n_wider));
    row = (fewest * index + (index < n_wider ? index : n_wider)) * kLanes;
    count = rows.count - row < width() ? rows.count - row : width();
    values = rows.panels + row * d_model;
  }
  int64_t width() const { return vectors * kLanes; }
};

// f<N>() for the number of vectors of a panel.
template <int N = kMaxVectors, typename F>
inline void with_vectors(int vectors, F f) {
  if constexpr (N > 1)
    if (vectors < N) return with_vectors<N - 1>(vectors, f);
  f(Vectors<N>{});
}

// Multiplies `depth` dimensions from `begin` on.
inline void multiply(const Panel& panel, Group group, int64_t begin, int64_t depth, Epilogue epilogue, float* tile,
                     Prefetch tokens, Prefetch rows) {
  group.start += begin;
  with_vectors(panel.vectors, [&](auto vectors) {
    multiply_group<vectors.count>(group, panel.values + begin * panel.width(), depth, epilogue, tile, tokens,
                                  rows);
  });
}

// The z of one target of every row of a panel: their tokens are multiplied with all rows, and the row's own is picked.
// `wanted` is the first row's, `targets` are from there on.
static void find_targets(const LensProblem& problem, const int64_t* wanted, const Panel& panel,
                         const PackedTargets& targets, Scratch scratch) {
  const int64_t d_model = problem.hidden.columns;
  const auto id = [&](int64_t row) { return wanted[row * problem.n_targets]; };
  for (int64_t i = 0; i < panel.width(); ++i) {
    targets.token[i] = i < panel.count ? static_cast<int32_t>(id(i)) : -1;
    targets.z[i] = 1.0f;
  }
  for (int64_t begin = 0; begin < panel.count; begin += kGroup) {
    const int64_t n = panel.count - begin < kGroup ? panel.count - begin : kGroup;
    stage_group(problem.unembedding, [&](int64_t i) { return id(begin + i); }, n, scratch.block);
    for (int64_t i = 0; i < kGroup; ++i) scratch.bias[i] = i < n && problem.bias ? problem.bias[id(begin + i)] : 0.0f;
    multiply(panel, {scratch.block, staged_stride(d_model)}, 0, d_model, {true, true, scratch.bias, problem.scale},
             scratch.tile, {}, {});
    for (int64_t i = 0; i < n; ++i) targets.z[begin + i] = scratch.tile[i * panel.width() + begin + i];
  }
  __builtin_memcpy(targets.logit, targets.z, sizeof(float) * panel.width());
  if (problem.softcap != 0.0f) soft_cap(targets.logit, panel.width(), problem.softcap);
}

static void pack_panel(const LensProblem& problem, int64_t first_row, const PackedRows& rows, int64_t index,
                       float* memory) {
  const int64_t d_model = problem.hidden.columns;
  const Panel panel(rows, index, d_model);
  with_vectors(panel.vectors, [&](auto vectors) {
    fill_panel<vectors.count>(problem, first_row + panel.row, panel.count, rows.panels + panel.row * d_model);
  });
  for (int64_t i = 0; i < problem.n_targets; ++i)
    find_targets(problem, problem.targets + (first_row + panel.row) * problem.n_targets + i, panel,
                 rows.targets.at(i, panel.row), Scratch(memory));
}

// The group of tokens that starts at `token`: where it lies if that can be, else staged at `place`.
static Group find_group(const Matrix& m, int64_t token, int64_t last, float* place, bool is_staged) {
  if (m.element == Element::fp32 && m.column_stride == 1 && token + kGroup <= last)
    return {static_cast<const float*>(m.data) + token * m.row_stride, m.row_stride};
  if (!is_staged)
    stage_group(m, [&](int64_t i) { return token + i; }, last - token < kGroup ? last - token : kGroup, place);
  return {place, staged_stride(m.columns)};
}

// What is prefetched while a panel of a block is multiplied with the group at `token`: an equal share of the group that
// comes `distance` tokens later, a block or, where one panel leaves it at once, a group; and of the rows' next part.
struct PrefetchPlan {
  int64_t distance, each, lines;

  PrefetchPlan(int64_t n_panels, int64_t n_groups)
      : distance(n_panels > 1 ? n_groups * kGroup : kGroup), each((kGroup + n_panels - 1) / n_panels),
        lines((kMaxVectors * kPrefetchStep * kVectorBytes / 64 + n_groups - 1) / n_groups) {}

  Prefetch tokens(const Matrix& m, int64_t token, int64_t begin, int64_t panel) const {
    const int64_t group = token + distance, group_end = group + kGroup < m.rows ? group + kGroup : m.rows;
    const int64_t start = group + panel * each, end = start + each < group_end ? start + each : group_end;
    if (end <= start || m.column_stride != 1) return {};
    const int64_t bytes = bytes_of(m.element);
    return {static_cast<const char*>(m.data) + (start * m.row_stride + begin) * bytes, m.row_stride * bytes,
            kPrefetchStep * bytes, end - start};
  }

  // Panels lie one after the other, so what follows the last part of one is the first of the next.
  Prefetch rows(const Panel& panel, bool is_last, int64_t begin, int64_t depth, int64_t group) const {
    if (is_last) return {};
    const char* next = reinterpret_cast<const char*>(panel.values + (begin + depth) * panel.width());
    return {next + group * lines * (depth / kPrefetchStep) * 64, 64, lines * 64, lines};
  }
};

// The panels that a call takes of a block of rows.
struct PanelRange {
  int64_t first, last;
};

// Multiplies panels of rows with tokens first to last, and calls fold(panel, token, count) while scratch.tile holds the
// logits of `count` tokens from `token` on, [count][rows of the panel].
template <typename Fold>
inline void for_tiles(const LensProblem& problem, const PackedRows& rows, PanelRange panels, int64_t first,
                      int64_t last, const Scratch& scratch, Fold fold) {
  const Matrix& tokens = problem.unembedding;
  const int64_t d_model = tokens.columns, step = block_tokens(d_model);
  const PrefetchPlan plan(panels.last - panels.first, step / kGroup);
  for (int64_t token = first; token < last; token += step) {
    const int64_t count = last - token < step ? last - token : step;
    for (int64_t i = 0; i < kMaxTokens; ++i)
      scratch.bias[i] = problem.bias && i < count ? problem.bias[token + i] : 0.0f;
    for (int64_t p = panels.first; p < panels.last; ++p) {
      const Panel panel(rows, p, d_model);
      for (int64_t begin = 0; begin < d_model; begin += kMaxDepth) {
        const int64_t depth = d_model - begin < kMaxDepth ? d_model - begin : kMaxDepth;
        const bool is_staged = p > panels.first || begin > 0;
        const bool is_last = p + 1 == panels.last && begin + depth == d_model;
        for (int64_t i = 0, g = 0; i < count; i += kGroup, ++g)
          multiply(panel, find_group(tokens, token + i, last, scratch.block + i * staged_stride(d_model), is_staged),
                   begin, depth, {begin == 0, begin + depth == d_model, scratch.bias + i, problem.scale},
                   scratch.tile + i * panel.width(), plan.tokens(tokens, token + i, begin, p - panels.first),
                   plan.rows(panel, is_last, begin, depth, g));
      }
      fold(panel, token, count);
    }
  }
}

static void scan_range(const LensProblem& problem, const PackedRows& rows, int64_t first, int64_t last,
                       const RangeState* state, float* memory) {
  const Scratch scratch(memory);
  for_tiles(problem, rows, {0, panels_of(rows)}, first, last, scratch,
            [&](const Panel& panel, int64_t token, int64_t count) {
              if (!state) return;
              for (int64_t lane = 0; lane < panel.width(); lane += kLanes)
                reduce_lanes({scratch.tile + lane, panel.width(), count}, token, first, problem.softcap, *state,
                             panel.row + lane, rows.targets.at(0, panel.row + lane));
            });
}

}  // namespace refinelens::REFINELENS_KERNELS
// After the tiles.
#include "lens/average.inl"
#include "lens/divergence.inl"

namespace refinelens::REFINELENS_KERNELS {

static const LensKernels kLensKernels = {
    kWide,      block_tokens,   scratch_floats, pack_panel,
    scan_range, average_range,  merge_averages, divergence_range, multiply_adds,
};

}  // namespace refinelens::REFINELENS_KERNELS
