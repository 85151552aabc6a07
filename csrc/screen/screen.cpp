// Rows are quantised, threads screen ranges of the vocabulary, and a row is decided by the candidates of all ranges.
#include "screen/screen.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "common/parallel.hpp"

namespace refinelens {

namespace {

constexpr int64_t kRangeTiles = 32;         // of a piece of work; states exist for each range
constexpr int64_t kBlockBytes = 768 << 10;  // of tokens, which stay in the second-level cache
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// All hidden rows of a call, quantised, in panels, with what the kernels and the bound need of each.
class HiddenRows {
 public:
  HiddenRows(const ScreenIndex& index, const CertifiedProblem& problem, int n_threads)
      : problem_(problem),
        format_(index.kernels().format),
        panels_((problem.rows + format_.row_panel - 1) / format_.row_panel),
        digits_(aligned_filled<char>(padded() * format_.bytes_per_vector(index.depth()))),
        exact_shift_(aligned_filled<double>(padded())),
        bound_(aligned_filled<float>(padded() * kTerms)),
        scale_(aligned_filled<float>(padded())),
        slack_(aligned_filled<float>(padded())),
        shift_(aligned_filled<float>(padded())),
        target_z_(aligned_filled<float>(padded(), std::numeric_limits<float>::quiet_NaN())),
        screened_(aligned_filled<int32_t>(padded())) {
    double largest_bias = 0.0;
    for (int64_t v = 0; problem.bias && v < index.tokens(); ++v)
      if (problem.bias[v] != -INFINITY) largest_bias = std::max(largest_bias, std::fabs(problem.bias[v]));
    parallel_for(panels_, n_threads, [&](int64_t panel, int) {
      Quantiser quantiser(index.kernels(), index.depth());
      const int64_t first = panel * format_.row_panel;
      for (int64_t row = first; row < std::min(problem.rows, first + format_.row_panel); ++row)
        fill(index, largest_bias, row, quantiser);
    });
  }

  int64_t panels() const { return panels_; }
  int64_t padded() const { return panels_ * format_.row_panel; }
  bool is_screened(int64_t row) const { return screened_[row]; }
  double shift(int64_t row) const { return exact_shift_[row]; }  // x.m

  ScreenRows panel(int64_t i) const {
    const int64_t first = i * format_.row_panel;
    return {digits_.get() + first * format_.bytes_per_vector(problem_.weights.columns),
            scale_.get() + first,
            bound_.get() + first * kTerms,
            slack_.get() + first,
            shift_.get() + first,
            target_z_.get() + first,
            screened_.get() + first,
            first};
  }

  // The bound of a row where the tile's terms are `terms`.
  double bound(int64_t row, const float* terms) const {
    double sum = slack_[row];
    for (int i = 0; i < kTerms; ++i) sum += static_cast<double>(bound_[bound_at(row, i)]) * terms[i];
    return sum * 1.00001;
  }

 private:
  int64_t bound_at(int64_t row, int term) const {
    return (row / format_.row_panel * kTerms + term) * format_.row_panel + row % format_.row_panel;
  }

  void fill(const ScreenIndex& index, double largest_bias, int64_t row, Quantiser& quantiser) {
    const int64_t depth = index.depth();
    const double* x = problem_.x + row * depth;
    double squares = 0.0, shift = 0.0;
    for (int64_t k = 0; k < depth; ++k) squares += x[k] * x[k];
    // Negated, so that NaN is not screened either. Norms of weights beyond the limit would overflow the tiles' bounds.
    const double largest_norm = index.largest_norm();
    if (!(std::sqrt(squares) * largest_norm + largest_bias <= kLargestLogit && largest_norm <= kLargestLogit)) return;
    const ExactRow exact(x, problem_.weights, problem_.bias, index);
    for (int64_t k = 0; k < depth; ++k) shift += x[k] * index.mean()[k];
    const int64_t first = row / format_.row_panel * format_.row_panel;
    const Norms norms =
        quantiser.pack_row(x, row - first, digits_.get() + first * format_.bytes_per_vector(depth));
    const double rounded = norms.residual + 10 * 0x1p-24 * norms.digits;
    const double terms[kTerms] = {norms.norm, rounded, norms.middle, norms.low, 1.0};
    for (int i = 0; i < kTerms; ++i) bound_[bound_at(row, i)] = static_cast<float>(terms[i]) * (1.0f + 0x1p-20f);
    scale_[row] = norms.scale;
    exact_shift_[row] = shift;
    shift_[row] = static_cast<float>(shift);
    double error = 4 * exact.z_error(0);
    // Under a cap the kernels add the rounded shift: that, the sum and its product with the scale are rounded.
    if (problem_.softcap != 0.0) error += 4 * 0x1p-24 * std::fabs(shift);
    screened_[row] = 1;
    if (problem_.targets) {
      const double target_z = exact.z(problem_.targets[row]) - shift;
      target_z_[row] = static_cast<float>(target_z);
      error += 4 * exact.z_error(problem_.targets[row]) + 0x1p-24 * std::fabs(target_z);
      screened_[row] = std::isfinite(target_z);
    }
    slack_[row] = static_cast<float>(error) * (1.0f + 0x1p-20f) + 0x1p-124f;
  }

  const CertifiedProblem& problem_;
  const ScreenFormat format_;
  const int64_t panels_;
  Aligned<char> digits_;
  Aligned<double> exact_shift_;
  Aligned<float> bound_, scale_, slack_, shift_, target_z_;
  Aligned<int32_t> screened_;
};

// State and candidates of all rows over one range of the vocabulary.
struct RangeResult {
  Aligned<float> reached, peak;
  Aligned<double> total, weighted, uncertain;
  Aligned<int32_t> above, listed;
  std::vector<Candidate> candidates;  // once sorted, by row, and a row's in the order of tokens
  std::vector<int64_t> first;         // [rows + 1], of each row in the sorted candidates

  void allocate(int64_t rows) {
    reached = aligned_filled<float>(rows, -kInfinity);
    peak = aligned_filled<float>(rows, -kInfinity);
    total = aligned_filled<double>(rows);
    weighted = aligned_filled<double>(rows);
    uncertain = aligned_filled<double>(rows);
    above = aligned_filled<int32_t>(rows);
    listed = aligned_filled<int32_t>(rows);
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
      drop_low(problem);
      candidates.reserve(2 * (candidates.size() + count));
    }
    candidates.insert(candidates.end(), found, found + count);
  }

  void sort(const CertifiedProblem& problem) {
    drop_low(problem);
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
  void drop_low(const CertifiedProblem& problem) {
    const auto low = [&](const Candidate& c) { return !has_list(c.row) || is_too_low(problem, c, reached[c.row]); };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), low), candidates.end());
  }
};

// Around calls of multiply() on one thread.
struct MultiplyScope {
  const ScreenKernels& kernels;

  explicit MultiplyScope(const ScreenKernels& kernels_) : kernels(kernels_) { kernels.enter(); }
  ~MultiplyScope() { kernels.leave(); }
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
    const auto products = aligned_filled<float>(kTileTokens * kernels.format.row_panel);
    std::vector<Candidate> found(kTileTokens * kernels.format.row_panel);
    const int64_t steps = kernels.format.steps(index.depth());
    const int64_t tile_bytes = kTileTokens * kernels.format.bytes_per_vector(index.depth());
    const int64_t block = std::max<int64_t>(1, kBlockBytes / tile_bytes);
    const int64_t last = std::min(index.tiles(), (range + 1) * kRangeTiles);
    result.allocate(rows.padded());
    const MultiplyScope scope(kernels);
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
      return finish_undecided(row, stats);
    const ExactRow exact(x, problem.weights, problem.bias, index);
    ScreenedRow screened = {};
    screened.shift = rows.shift(row);
    screened.largest_bound = rows.bound(row, largest);
    const bool gathered = rows.is_screened(row) && gather(results, row, screened);
    if (gathered && finish_screened(problem, row, exact, screened, stats)) return;
    if (exhaustive)
      finish_exhaustively(problem, row, exact, stats);
    else
      finish_undecided(row, stats);
  });
}

}  // namespace refinelens
