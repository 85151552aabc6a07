#include "screen.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dispatch.hpp"
#include "parallel.hpp"
#include "screen_exact.hpp"
#include "screen_finish.hpp"
#include "screen_rows.hpp"

namespace refinelens {

namespace {

constexpr int64_t kRangeTiles = 32;         // of a piece of work; states exist for each range
constexpr int64_t kBlockBytes = 768 << 10;  // of tokens, which stay in the second-level cache
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// State and candidates of all rows over one range of the vocabulary.
struct RangeResult {
  Aligned<float> reached, peak;
  Aligned<double> total, weighted, uncertain;
  Aligned<int32_t> above, listed;
  std::vector<Candidate> candidates;

  void allocate(const HiddenRows& rows) {
    const int64_t n = rows.padded();
    reached = aligned_zeros<float>(n);
    peak = aligned_zeros<float>(n);
    total = aligned_zeros<double>(n);
    weighted = aligned_zeros<double>(n);
    uncertain = aligned_zeros<double>(n);
    above = aligned_zeros<int32_t>(n);
    listed = aligned_zeros<int32_t>(n);
    std::fill_n(reached.get(), n, -kInfinity);
    std::fill_n(peak.get(), n, -kInfinity);
  }

  ScreenState state(int64_t row) const {
    return {reached.get() + row,   peak.get() + row,  total.get() + row, weighted.get() + row,
            uncertain.get() + row, above.get() + row, listed.get() + row};
  }
};

// Around calls of multiply() on one thread.
struct Multiplying {
  const ScreenKernels& kernels;

  explicit Multiplying(const ScreenKernels& kernels_) : kernels(kernels_) { kernels.enter(); }
  ~Multiplying() { kernels.leave(); }
};

struct Screen {
  const ScreenIndex& index;
  const HiddenRows& rows;
  const LogitMap map;
  std::vector<float> offsets, bounds;

  Screen(const ScreenIndex& index_, const HiddenRows& rows_, const CertifiedProblem& problem)
      : index(index_),
        rows(rows_),
        map{static_cast<float>(problem.scale), static_cast<float>(problem.softcap)},
        offsets(index.tiles() * kTileTokens, -kInfinity),
        bounds(index.bound_terms(problem.bias)) {
    for (int64_t v = 0; v < index.tokens(); ++v)
      offsets[v] = problem.bias ? static_cast<float>(problem.bias[v]) : 0.0f;
  }

  int64_t ranges() const { return (index.tiles() + kRangeTiles - 1) / kRangeTiles; }

  // The tokens of a block stay in cache while all rows pass.
  void scan(int64_t range, RangeResult& result) const {
    const ScreenKernels& kernels = index.kernels();
    const auto products = aligned_zeros<float>(kTileTokens * kernels.format.row_panel);
    std::vector<Candidate> found(kTileTokens * kernels.format.row_panel);
    const int64_t steps = kernels.format.steps(index.depth());
    const int64_t tile_bytes = kTileTokens * kernels.format.bytes_per_vector(index.depth());
    const int64_t block = std::max<int64_t>(1, kBlockBytes / tile_bytes);
    const int64_t last = std::min(index.tiles(), (range + 1) * kRangeTiles);
    result.allocate(rows);
    const Multiplying multiplying(kernels);
    for (int64_t first = range * kRangeTiles; first < last; first += block)
      for (int64_t panel = 0; panel < rows.panels(); ++panel) {
        const ScreenRows hidden = rows.panel(panel);
        const ScreenState state = result.state(hidden.first_row);
        for (int64_t i = first; i < std::min(last, first + block); ++i) {
          const ScreenTile tile = index.tile(i, offsets.data(), bounds.data());
          kernels.multiply(tile, hidden, steps, products.get());
          const int64_t count = kernels.fold(tile, hidden, map, products.get(), state, found.data());
          result.candidates.insert(result.candidates.end(), found.begin(), found.begin() + count);
        }
      }
  }
};

// The candidates of all rows, sorted by row, in the order of the vocabulary's ranges.
struct CandidatesByRow {
  std::vector<Candidate> candidates;
  std::vector<int64_t> first;  // [rows + 1]

  CandidatesByRow(const std::vector<RangeResult>& results, int64_t rows) : first(rows + 1, 0) {
    for (const auto& result : results)
      for (const Candidate& c : result.candidates) ++first[c.row + 1];
    for (int64_t row = 0; row < rows; ++row) first[row + 1] += first[row];
    candidates.resize(first[rows]);
    std::vector<int64_t> at(first.begin(), first.end() - 1);
    for (const auto& result : results)
      for (const Candidate& c : result.candidates) candidates[at[c.row]++] = c;
  }
};

// The ranges' states of a row in one; false when a range's list is not complete.
bool gather(const std::vector<RangeResult>& results, int64_t row, ScreenedRow& out) {
  out.reached = out.peak = -kInfinity;
  for (const auto& result : results) {
    if (result.listed[row] > kMaxListed) return false;
    out.reached = std::max<double>(out.reached, result.reached[row]);
    out.peak = std::max<double>(out.peak, result.peak[row]);
  }
  if (std::isinf(out.peak)) return false;
  for (const auto& result : results) {
    const double shift = result.peak[row] - out.peak, factor = std::exp(shift);
    out.above += result.above[row];
    if (factor == 0.0) continue;
    out.total += result.total[row] * factor;
    out.weighted += (result.weighted[row] + shift * result.total[row]) * factor;
    out.uncertain += result.uncertain[row] * factor;
  }
  return true;
}

}  // namespace

const ScreenKernels& screen_kernels(int64_t depth) {
#if REFINELENS_X86_LEVELS
  const Isa isa = picked_isa();
  if (isa == Isa::amx && depth <= kMaxDigitDepth) return kScreenAmx;
  if (isa >= Isa::v4 && __builtin_cpu_supports("avx512vnni")) return kScreenV4;
  if (isa >= Isa::v3) return kScreenV3;
#endif
  (void)depth;
  return kScreenBaseline;
}

void certified_lens(const ScreenIndex& index, const CertifiedProblem& problem, const CertifiedStats& stats,
                    bool exhaustive, int n_threads) {
  const HiddenRows rows(index, problem, n_threads);
  const Screen screen(index, rows, problem);
  std::vector<RangeResult> results(screen.ranges());
  parallel_for(screen.ranges(), n_threads, [&](int64_t range, int) { screen.scan(range, results[range]); });
  const CandidatesByRow by_row(results, problem.rows);
  float largest[kTerms] = {};
  for (int64_t i = 0; i < index.tiles() * kTerms; ++i)
    largest[i % kTerms] = std::max(largest[i % kTerms], screen.bounds[i]);
  parallel_for(problem.rows, n_threads, [&](int64_t row, int) {
    const double* x = problem.x + row * index.depth();
    stats.fell_back[row] = false;
    if (!std::all_of(x, x + index.depth(), [](double value) { return std::isfinite(value); }))
      return finish_broken(row, stats);
    const ExactRow exact(x, problem.weights, problem.bias, index);
    ScreenedRow screened = {};
    screened.shift = rows.shift(row);
    screened.largest_bound = rows.bound(row, largest);
    const auto listed = by_row.candidates.begin();
    screened.candidates.assign(listed + by_row.first[row], listed + by_row.first[row + 1]);
    if (rows.live(row) && gather(results, row, screened) && finish_screened(problem, row, exact, screened, stats)) return;
    if (exhaustive)
      finish_exhaustively(problem, row, exact, stats);
    else
      finish_broken(row, stats);
  });
}

}  // namespace refinelens
