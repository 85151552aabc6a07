#include "screen_finish.hpp"

#include <algorithm>
#include <cmath>
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
double cap_doubt(const CertifiedProblem& problem, const ScreenedRow& screened) {
  return kCapError * std::min(problem.softcap, std::fabs(screened.peak) + kWeightless);
}

struct Decision {
  int64_t argmax = -1;
  double best = 0.0;
  int64_t rank = 0;
};

// Argmax and rank among `tokens`, whose z are those of the exact row.
template <typename Counts>
Decision decide(const CertifiedProblem& problem, int64_t row, const ExactRow& exact, int64_t count,
                const int64_t* tokens, const double* z, const Counts& counts) {
  Decision decision;
  const int64_t target = problem.targets ? problem.targets[row] : -1;
  const double target_z = target < 0 ? 0.0 : exact.z(target);
  for (int64_t i = 0; i < count; ++i) {
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

bool finish_screened(const CertifiedProblem& problem, int64_t row, const ExactRow& exact, ScreenedRow& screened,
                     const CertifiedStats& stats) {
  auto& candidates = screened.candidates;
  // Ranges list what reached their own maximum; here only what reaches that of all counts.
  const auto too_low = [&](const Candidate& c) { return is_too_low(problem, c, screened.reached); };
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), too_low), candidates.end());
  if (candidates.empty()) return false;
  const int64_t count = static_cast<int64_t>(candidates.size());
  std::vector<int64_t> tokens(count);
  std::vector<double> z(count);
  for (int64_t i = 0; i < count; ++i) {
    tokens[i] = candidates[i].token;
    z[i] = exact.z(tokens[i]);
  }
  Decision decision = decide(problem, row, exact, count, tokens.data(), z.data(),
                             [&](int64_t i) { return candidates[i].near_target != 0; });
  decision.rank += screened.above;

  // In the sums exact logits take the place of the candidates' screened ones.
  const double offset = problem.softcap == 0.0 ? problem.scale * screened.shift : 0.0;
  double total = screened.total, weighted = screened.weighted, uncertain = screened.uncertain;
  for (int64_t i = 0; i < count; ++i) {
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
  const double doubt = 4 * problem.scale * exact.doubt(decision.argmax);
  const double rounding = kSumError + kFp32 * std::fabs(logsumexp) + cap_doubt(problem, screened) + doubt;
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
  const Decision decision =
      decide(problem, row, exact, count, tokens.data(), z.data(), [](int64_t) { return true; });
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
  const double doubt = problem.scale * exact.doubt(decision.argmax);
  stats.logsumexp_bound[row] = static_cast<float>(1e-9 + 4 * doubt + 1.0001 * kFp32 * std::fabs(stats.logsumexp[row]));
  stats.fell_back[row] = true;
}

void finish_broken(int64_t row, const CertifiedStats& stats) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  stats.argmax[row] = 0;
  stats.best[row] = stats.logsumexp[row] = stats.entropy[row] = nan;
  stats.logsumexp_bound[row] = std::numeric_limits<float>::infinity();
  stats.fell_back[row] = true;
  if (stats.rank) stats.rank[row] = 0;
  if (stats.target_z) stats.target_z[row] = nan;
}

}  // namespace refinelens
