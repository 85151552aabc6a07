#include "screen.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dispatch.hpp"
#include "parallel.hpp"
#include "screen_exact.hpp"
#include "screen_finish.hpp"

namespace refinelens {

namespace {

constexpr int64_t kRangeTiles = 32;         // of a piece of work; states exist for each range
constexpr int64_t kBlockBytes = 768 << 10;  // of tokens, which stay in the second-level cache
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// All hidden rows, quantised, in panels.
class HiddenRows {
 public:
  HiddenRows(const ScreenIndex& index, const CertifiedProblem& problem, int n_threads)
      : problem_(problem),
        format_(index.kernels().format),
        panels_((problem.rows + format_.row_panel - 1) / format_.row_panel),
        digits_(aligned_zeros<char>(padded() * format_.bytes_per_vector(index.depth()))),
        bound_(aligned_zeros<float>(padded() * kTerms)),
        scale_(aligned_zeros<float>(padded())),
        slack_(aligned_zeros<float>(padded())),
        shift_(aligned_zeros<float>(padded())),
        target_z_(aligned_zeros<float>(padded())),
        live_(aligned_zeros<int32_t>(padded())) {
    double largest_bias = 0.0;
    for (int64_t v = 0; problem.bias && v < index.tokens(); ++v)
      if (problem.bias[v] != -INFINITY) largest_bias = std::max(largest_bias, std::fabs(problem.bias[v]));
    parallel_for(panels_, n_threads, [&](int64_t panel, int) {
      Quantiser quantiser(index.kernels(), index.depth());
      for (int i = 0; i < format_.row_panel; ++i) fill(index, largest_bias, panel, i, quantiser);
    });
  }

  int64_t panels() const { return panels_; }
  int64_t padded() const { return panels_ * format_.row_panel; }
  bool live(int64_t row) const { return live_[row]; }
  double shift(int64_t row) const { return shift_[row]; }

  ScreenRows panel(int64_t i) const {
    const int64_t first = i * format_.row_panel;
    return {digits_.get() + first * format_.bytes_per_vector(problem_.weights.columns),
            scale_.get() + first,
            bound_.get() + first * kTerms,
            slack_.get() + first,
            shift_.get() + first,
            target_z_.get() + first,
            live_.get() + first,
            first};
  }

  // The bound of a row where the tile's terms are `terms`.
  double bound(int64_t row, const float* terms) const {
    const float* own = bound_.get() + row / format_.row_panel * format_.row_panel * kTerms + row % format_.row_panel;
    double sum = slack_[row];
    for (int i = 0; i < kTerms; ++i) sum += static_cast<double>(own[i * format_.row_panel]) * terms[i];
    return sum * 1.00001;
  }

 private:
  void fill(const ScreenIndex& index, double largest_bias, int64_t panel, int i, Quantiser& quantiser) {
    const int64_t row = panel * format_.row_panel + i, depth = index.depth();
    target_z_[row] = std::numeric_limits<float>::quiet_NaN();
    if (row >= problem_.rows) return;
    const double* x = problem_.x + row * depth;
    double squares = 0.0;
    for (int64_t k = 0; k < depth; ++k) squares += x[k] * x[k];
    // Also false for NaN.
    if (!(std::sqrt(squares) * index.largest_norm() + largest_bias <= kLargestLogit)) return;
    const ExactRow exact(x, problem_.weights, problem_.bias, index);
    double shift = 0.0;
    for (int64_t k = 0; k < depth; ++k) shift += x[k] * index.mean()[k];
    const int64_t panel_bytes = format_.row_panel * format_.bytes_per_vector(depth);
    const Norms norms = quantiser.pack_row(x, i, digits_.get() + panel * panel_bytes);
    const double rounded = norms.residual + 10 * 0x1p-24 * norms.digits;
    const double terms[kTerms] = {norms.norm, rounded, norms.middle, norms.low, 1.0};
    for (int term = 0; term < kTerms; ++term)
      bound_[(panel * kTerms + term) * format_.row_panel + i] = static_cast<float>(terms[term]) * (1.0f + 0x1p-20f);
    scale_[row] = norms.scale;
    shift_[row] = static_cast<float>(shift);
    double doubt = 4 * exact.doubt(0);
    live_[row] = 1;
    if (problem_.targets) {
      const double target_z = exact.z(problem_.targets[row]) - shift;
      target_z_[row] = static_cast<float>(target_z);
      doubt += 4 * exact.doubt(problem_.targets[row]) + 0x1p-24 * std::fabs(target_z);
      live_[row] = std::isfinite(target_z);
    }
    slack_[row] = static_cast<float>(doubt) * (1.0f + 0x1p-20f) + 0x1p-124f;
  }

  const CertifiedProblem& problem_;
  const ScreenFormat format_;
  const int64_t panels_;
  Aligned<char> digits_;
  Aligned<float> bound_, scale_, slack_, shift_, target_z_;
  Aligned<int32_t> live_;
};

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
    kernels.enter();
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
    kernels.leave();
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
                    int n_threads) {
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
    if (!rows.live(row) || !gather(results, row, screened) || !finish_screened(problem, row, exact, screened, stats))
      finish_exhaustively(problem, row, exact, stats);
  });
}

}  // namespace refinelens
