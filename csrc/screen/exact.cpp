#include "screen/exact.hpp"

#include <cmath>
#include <cstring>
#include <limits>

namespace refinelens {

namespace {

// Relative error of the fp32 sums of exponentials of a range: the exponential itself 2e-7, its argument 2^-20 where it
// is above -32 (what lies below weighs nothing), 48 additions to a partial sum 48 * 2^-24, and the rescaling of
// all this with each new peak, at most once in each of the 32 tiles of a range, 32 * 2.5e-7.
constexpr double kSumError = 1.3e-5;
constexpr double kLoosestBound = 1.0;  // nats, of a logsumexp that is worth giving
constexpr double kFp32 = 0x1p-24;
constexpr double kCapError = 1e-6;     // of a capped logit in fp32, as a share of it: soft_cap's own is 2.3e-7
constexpr double kWeightless = 100.0;  // nats below the largest logit: what lies lower weighs nothing

// A sum of doubles without rounding: parts that do not overlap, in the order of magnitude (Shewchuk 1997, section 2.4).
// Exact as long as nothing overflows, and no product of add_product() lies below 2^-960, where its rounding would.
class ExactSum {
 public:
  void add(double x) {
    size_t kept = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const double sum = x + parts_[i], y = sum - x;
      const double error = (x - (sum - y)) + (parts_[i] - y);
      if (error != 0.0) parts_[kept++] = error;
      x = sum;
    }
    parts_.resize(kept);
    if (x != 0.0) parts_.push_back(x);
  }

  void add_product(double a, double b) {
    volatile const double product = a * b;  // else the compiler may fuse it with a sum, unrounded
    add(product);
    add(std::fma(a, b, -product));
  }

  int sign() const { return parts_.empty() ? 0 : parts_.back() > 0.0 ? 1 : -1; }

 private:
  std::vector<double> parts_;
};

double capped(const CertifiedProblem& problem, double z) {
  return problem.softcap == 0.0 ? z : problem.softcap * std::tanh(z / problem.softcap);
}

// l of a candidate as the kernels had it, but for a few fp32 roundings of values of at most |z| and |x.m|, ...
double screened_logit(const CertifiedProblem& problem, const ScreenedRow& screened, const Candidate& candidate) {
  const double shift = problem.softcap == 0.0 ? 0.0 : static_cast<float>(screened.shift);
  return capped(problem, problem.scale * (candidate.z + shift));
}

// ... which are at most this: what is taken out of the sums for the candidate may miss so much of what is in them.
double unmatched(const CertifiedProblem& problem, const ScreenedRow& screened, const Candidate& candidate) {
  const double shift = problem.softcap == 0.0 ? 0.0 : screened.shift;
  return 4 * kFp32 * problem.scale * (std::fabs(candidate.z) + std::fabs(shift));
}

// What the errors of capped logits make of a logsumexp: no more than that of any logit that weighs something.
double cap_error(const CertifiedProblem& problem, const ScreenedRow& screened) {
  return kCapError * std::min(problem.softcap, std::fabs(screened.peak) + kWeightless);
}

struct Decision {
  int64_t argmax = -1;
  double best = 0.0;
  int64_t rank = 0;
};

// Argmax and rank among `tokens`, whose z are those of the exact row.
template <typename Counts>
Decision decide(const CertifiedProblem& problem, int64_t row, const ExactRow& exact, const std::vector<int64_t>& tokens,
                const std::vector<double>& z, const Counts& counts) {
  Decision decision;
  const int64_t target = problem.targets ? problem.targets[row] : -1;
  const double target_z = target < 0 ? 0.0 : exact.z(target);
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (decision.argmax < 0 || exact.beats(tokens[i], z[i], decision.argmax, decision.best)) {
      decision.argmax = tokens[i];
      decision.best = z[i];
    }
    if (target >= 0 && tokens[i] != target && counts(i))
      decision.rank += exact.beats(tokens[i], z[i], target, target_z);
  }
  return decision;
}

void write_decision(const CertifiedProblem& problem, int64_t row, const ExactRow& exact, const Decision& decision,
                    const CertifiedStats& stats) {
  stats.argmax[row] = decision.argmax;
  stats.best[row] = problem.scale * decision.best;
  if (!problem.targets) return;
  stats.rank[row] = decision.rank;
  stats.target_z[row] = problem.scale * exact.z(problem.targets[row]);
}

}  // namespace

ExactRow::ExactRow(const double* x, const Matrix& weights, const double* bias, const ScreenIndex& index)
    : x_(x), weights_(weights), kernels_(index.kernels()), bias_(bias) {
  double squares = 0.0, largest = 0.0;
  for (int64_t k = 0; k < weights.columns; ++k) {
    squares += x[k] * x[k];
    largest = std::max(largest, std::fabs(x[k]));  // for the case that all squares underflow
  }
  const double norm = std::max(std::sqrt(squares), largest) * 1.000001;
  product_error_ = (weights.columns + 4) * 0x1p-53 * norm * index.largest_norm();
}

double ExactRow::z(int64_t token) const {
  const double dot = kernels_.dot_product(row_of(weights_, token), weights_.element, x_, weights_.columns);
  return bias_ ? dot + bias_[token] : dot;
}

double ExactRow::z_error(int64_t token) const {
  return product_error_ + (bias_ && bias_[token] != -INFINITY ? 0x1p-52 * std::fabs(bias_[token]) : 0.0);
}

bool ExactRow::beats(int64_t a, double z_a, int64_t b, double z_b) const {
  if (std::fabs(z_a - z_b) > z_error(a) + z_error(b)) return z_a > z_b;
  const int order = compare(a, b);
  return order > 0 || (order == 0 && a < b);
}

int ExactRow::compare(int64_t a, int64_t b) const {
  const double bias_a = bias_ ? bias_[a] : 0.0, bias_b = bias_ ? bias_[b] : 0.0;
  if (std::isinf(bias_a) || std::isinf(bias_b)) return (bias_a > bias_b) - (bias_a < bias_b);
  const size_t row_bytes = weights_.columns * bytes_of(weights_.element);
  if (product_error_ == 0.0 || std::memcmp(row_of(weights_, a), row_of(weights_, b), row_bytes) == 0)
    return (bias_a > bias_b) - (bias_a < bias_b);
  std::vector<double> w_a(weights_.columns), w_b(weights_.columns);
  kernels_.widen(row_of(weights_, a), weights_.element, w_a.data(), weights_.columns);
  kernels_.widen(row_of(weights_, b), weights_.element, w_b.data(), weights_.columns);
  ExactSum difference;
  for (int64_t k = 0; k < weights_.columns; ++k) {
    difference.add_product(x_[k], w_a[k]);
    difference.add_product(x_[k], -w_b[k]);
  }
  difference.add(bias_a);
  difference.add(-bias_b);
  return difference.sign();
}

bool finish_screened(const CertifiedProblem& problem, int64_t row, const ExactRow& exact, ScreenedRow& screened,
                     const CertifiedStats& stats) {
  auto& candidates = screened.candidates;
  // Ranges list what reached their own maximum; here only what reaches that of all counts.
  const auto too_low = [&](const Candidate& c) { return is_too_low(problem, c, screened.reached); };
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), too_low), candidates.end());
  if (candidates.empty()) return false;
  std::vector<int64_t> tokens;
  std::vector<double> z;
  for (const Candidate& c : candidates) {
    tokens.push_back(c.token);
    z.push_back(exact.z(c.token));
  }
  Decision decision =
      decide(problem, row, exact, tokens, z, [&](size_t i) { return candidates[i].near_target != 0; });
  decision.rank += screened.above;

  // In the sums exact logits take the place of the candidates' screened ones.
  const double offset = problem.softcap == 0.0 ? problem.scale * screened.shift : 0.0;
  double total = screened.total, weighted = screened.weighted, uncertain = screened.uncertain;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const double before = std::max(screened_logit(problem, screened, candidates[i]) - screened.peak, -87.0);
    const double after = capped(problem, problem.scale * z[i]) - offset - screened.peak;
    const double bound = problem.scale * candidates[i].bound;
    total += std::exp(after) - std::exp(before);
    weighted += after * std::exp(after) - before * std::exp(before);
    uncertain += (unmatched(problem, screened, candidates[i]) - (bound > 1.0 ? 0.0 : bound + bound * bound)) *
                 std::exp(before);
  }
  const double logsumexp = screened.peak + offset + std::log(total);
  const double share = std::max(uncertain, 0.0) / total;
  const double by_mass = share < 0.5 ? -std::log1p(-share) : std::numeric_limits<double>::infinity();
  const double z_error = 4 * problem.scale * exact.z_error(decision.argmax);
  const double rounding = kSumError + kFp32 * std::fabs(logsumexp) + cap_error(problem, screened) + z_error;
  const double bound = 1.0001 * (std::min(by_mass, problem.scale * screened.largest_bound) + rounding);
  if (!(bound <= kLoosestBound) || !std::isfinite(logsumexp)) return false;
  write_decision(problem, row, exact, decision, stats);
  stats.logsumexp[row] = logsumexp;
  stats.entropy[row] = std::log(total) - weighted / total;
  stats.logsumexp_bound[row] = static_cast<float>(bound);
  return true;
}

void finish_exhaustively(const CertifiedProblem& problem, int64_t row, const ExactRow& exact,
                         const CertifiedStats& stats) {
  const int64_t count = problem.weights.rows;
  std::vector<int64_t> tokens(count);
  std::vector<double> z(count);
  for (int64_t v = 0; v < count; ++v) {
    tokens[v] = v;
    z[v] = exact.z(v);
  }
  const Decision decision = decide(problem, row, exact, tokens, z, [](size_t) { return true; });
  write_decision(problem, row, exact, decision, stats);
  const double peak = capped(problem, problem.scale * decision.best);
  double total = 0.0, weighted = 0.0;
  for (int64_t v = 0; v < count; ++v) {
    const double d = capped(problem, problem.scale * z[v]) - peak;
    if (d < -700.0) continue;
    total += std::exp(d);
    weighted += d * std::exp(d);
  }
  stats.logsumexp[row] = peak + std::log(total);
  stats.entropy[row] = std::log(total) - weighted / total;
  const double z_error = 4 * problem.scale * exact.z_error(decision.argmax);
  stats.logsumexp_bound[row] = static_cast<float>(1e-9 + z_error + 1.0001 * kFp32 * std::fabs(stats.logsumexp[row]));
  stats.fell_back[row] = true;
}

void finish_undecided(int64_t row, const CertifiedStats& stats) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  stats.argmax[row] = 0;
  stats.best[row] = stats.logsumexp[row] = stats.entropy[row] = nan;
  stats.logsumexp_bound[row] = std::numeric_limits<float>::infinity();
  stats.fell_back[row] = true;
  if (stats.rank) stats.rank[row] = 0;
  if (stats.target_z) stats.target_z[row] = nan;
}

}  // namespace refinelens
