#include "screen.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
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
  std::vector<Candidate> candidates;  // once sorted, by row, and a row's in the order of tokens
  std::vector<int64_t> first;         // [rows + 1], of each row in the sorted candidates

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

  // Whether a row has its list; if not, it is not screened, and needs none of its candidates.
  bool has_list(int64_t row) const { return listed[row] <= kMaxListed; }

  // Before the candidates grow, those that nothing needs go.
  void add(const CertifiedProblem& problem, const Candidate* found, int64_t count) {
    if (candidates.size() + count > candidates.capacity()) {
      drop_useless(problem);
      candidates.reserve(2 * (candidates.size() + count));
    }
    candidates.insert(candidates.end(), found, found + count);
  }

  void sort(const CertifiedProblem& problem) {
    drop_useless(problem);
    first.assign(problem.rows + 1, 0);
    for (const Candidate& c : candidates) ++first[c.row + 1];
    for (int64_t row = 0; row < problem.rows; ++row) first[row + 1] += first[row];
    std::vector<Candidate> sorted(candidates.size());
    std::vector<int64_t> at(first.begin(), first.end() - 1);
    for (const Candidate& c : candidates) sorted[at[c.row]++] = c;
    candidates = std::move(sorted);
  }

 private:
  // What is known to be reached only grows: what is too low now stays so.
  void drop_useless(const CertifiedProblem& problem) {
    const auto useless = [&](const Candidate& c) {
      return !has_list(c.row) || is_too_low(problem, c, reached[c.row]);
    };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), useless), candidates.end());
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
  const CertifiedProblem& problem;
  const LogitMap map;
  std::vector<float> offsets, bounds;

  Screen(const ScreenIndex& index_, const HiddenRows& rows_, const CertifiedProblem& problem_)
      : index(index_),
        rows(rows_),
        problem(problem_),
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
          result.add(problem, found.data(), count);
        }
      }
    result.sort(problem);
  }
};

// The ranges' states and candidates of a row in one; false when a range's list is not complete.
bool gather(const std::vector<RangeResult>& results, int64_t row, ScreenedRow& out) {
  out.reached = out.peak = -kInfinity;
  for (const auto& result : results) {
    if (!result.has_list(row)) return false;
    out.reached = std::max<double>(out.reached, result.reached[row]);
    out.peak = std::max<double>(out.peak, result.peak[row]);
  }
  if (std::isinf(out.peak)) return false;
  for (const auto& result : results) {
    const auto all = result.candidates.begin();
    out.candidates.insert(out.candidates.end(), all + result.first[row], all + result.first[row + 1]);
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
  const Isa isa = picked_isa();
#if REFINELENS_X86_AMX
  if (isa == Isa::amx && depth <= kMaxDigitDepth) return kScreenAmx;
#endif
#if REFINELENS_X86_LEVELS
  if (isa >= Isa::v4 && __builtin_cpu_supports("avx512vnni")) return kScreenV4;
  if (isa >= Isa::v3) return kScreenV3;
#endif
  (void)isa;
  (void)depth;
  return kScreenBaseline;
}

void certified_lens(const ScreenIndex& index, const CertifiedProblem& problem, const CertifiedStats& stats,
                    bool exhaustive, int n_threads) {
  const HiddenRows rows(index, problem, n_threads);
  const Screen screen(index, rows, problem);
  std::vector<RangeResult> results(screen.ranges());
  parallel_for(screen.ranges(), n_threads, [&](int64_t range, int) { screen.scan(range, results[range]); });
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
    const bool gathered = rows.live(row) && gather(results, row, screened);
    if (gathered && finish_screened(problem, row, exact, screened, stats)) return;
    if (exhaustive)
      finish_exhaustively(problem, row, exact, stats);
    else
      finish_broken(row, stats);
  });
}

}  // namespace refinelens
