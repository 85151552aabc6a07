// Runs the CPU kernels on buffers that end where their data ends, so that a sanitizer or valgrind sees every access
// beyond them, and compares with sums in fp64. `odd_sizes overread` reads past a buffer on purpose.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "lens/divergence.hpp"
#include "lens/fused_lens.hpp"
#include "lens/mean_unembedding.hpp"
#include "screen/screen.hpp"

using namespace refinelens;

namespace {

struct Case {
  int64_t rows, d_model, vocab;
  Element element;
  NormSpec::Kind norm;
  bool targets, bias;
  float softcap;
};

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

// A matrix in a heap block of its own, exactly as long as it has to be, and its values in fp64.
struct Operand {
  std::unique_ptr<char[]> data;
  std::vector<double> values;
  Matrix matrix;

  Operand(int64_t rows, int64_t columns, Element element, std::mt19937& random, int64_t missing = 0)
      : values(rows * columns) {
    const int64_t size = element == Element::fp32 ? 4 : 2;
    data.reset(new char[(rows * columns - missing) * size]);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (int64_t i = 0; i < rows * columns - missing; ++i) {
      const float x = std::round(uniform(random) * 64) / 64;  // exact in bf16
      values[i] = x;
      const uint16_t half = to_bf16(x);
      if (size == 4) std::memcpy(data.get() + 4 * i, &x, 4);
      else std::memcpy(data.get() + 2 * i, &half, 2);
    }
    matrix = {data.get(), element, rows, columns, columns, 1};
  }
};

std::vector<double> reference_logits(const Case& c, const Operand& hidden, const Operand& unembedding,
                                     const std::vector<float>& bias, int64_t row) {
  const double* from = &hidden.values[row * c.d_model];
  std::vector<double> x(from, from + c.d_model), logits(c.vocab);
  double mean = 0, square = 0;
  if (c.norm == NormSpec::layer) for (double v : x) mean += v / c.d_model;
  for (double v : x) square += (v - mean) * (v - mean) / c.d_model;
  if (c.norm != NormSpec::none) for (double& v : x) v = (v - mean) / std::sqrt(square + 1e-5);
  for (int64_t t = 0; t < c.vocab; ++t) {
    for (int64_t k = 0; k < c.d_model; ++k) logits[t] += x[k] * unembedding.values[t * c.d_model + k];
    if (c.bias) logits[t] += bias[t];
    if (c.softcap != 0) logits[t] = c.softcap * std::tanh(logits[t] / c.softcap);
  }
  return logits;
}

bool agrees(const Case& c, int threads, std::mt19937& random) {
  const Operand hidden(c.rows, c.d_model, c.element, random), unembedding(c.vocab, c.d_model, c.element, random);
  const int64_t n = c.targets ? 3 : 0;  // targets of a row
  std::vector<float> bias(c.vocab), max_logit(c.rows), logsumexp(c.rows), entropy(c.rows), target_logit(c.rows * n);
  std::vector<int64_t> targets(c.rows * n), argmax(c.rows), rank(c.rows * n);
  for (float& b : bias) b = static_cast<float>(random() % 64) / 64;
  for (int64_t& t : targets) t = random() % c.vocab;
  std::vector<std::vector<double>> reference;
  for (int64_t r = 0; r < c.rows; ++r) {
    reference.push_back(reference_logits(c, hidden, unembedding, bias, r));
    const auto& logits = reference.back();
    if (n && r % 2) targets[r * n + r % n] = std::max_element(logits.begin(), logits.end()) - logits.begin();
  }
  const LensProblem problem{hidden.matrix, {c.norm, nullptr, nullptr, 1e-5}, unembedding.matrix,
                            c.bias ? bias.data() : nullptr, 1.0f, c.softcap, targets.data(), n};
  fused_lens(problem, lens_kernels(selected_isa(), c.rows), threads,
             {argmax.data(), max_logit.data(), logsumexp.data(), entropy.data(), target_logit.data(), rank.data(), 0,
              nullptr, nullptr});
  bool good = true;
  for (int64_t r = 0; r < c.rows; ++r) {
    const std::vector<double>& logits = reference[r];
    double peak = -INFINITY, sum = 0, weighted = 0;
    for (double l : logits) peak = std::fmax(peak, l);
    for (double l : logits) sum += std::exp(l - peak), weighted += (l - peak) * std::exp(l - peak);
    const double slack = 1e-4;
    good &= std::fabs(max_logit[r] - peak) < slack && logits[argmax[r]] > peak - slack;
    good &= std::fabs(logsumexp[r] - (peak + std::log(sum))) < slack;
    good &= std::fabs(entropy[r] - (std::log(sum) - weighted / sum)) < slack;
    for (int64_t i = r * n; i < (r + 1) * n; ++i) {
      const double own = logits[targets[i]];
      good &= (rank[i] == 0) == (argmax[r] == targets[i]);
      int64_t above = 0, near = 0;
      for (double l : logits) above += l > own + slack, near += std::fabs(l - own) <= slack;
      good &= std::fabs(target_logit[i] - own) < slack && rank[i] >= above && rank[i] < above + near;
    }
  }
  if (!good)
    std::printf("differs: rows %ld d_model %ld vocab %ld element %d norm %d threads %d\n", long(c.rows),
                long(c.d_model), long(c.vocab), int(c.element), int(c.norm), threads);
  return good;
}

// The averages of the unembedding under the softmax of rows that need no norm.
bool average_agrees(Case c, int threads, std::mt19937& random) {
  c.norm = NormSpec::none;
  c.softcap = 0.0f;
  const Operand x_hat(c.rows, c.d_model, Element::fp32, random), unembedding(c.vocab, c.d_model, c.element, random);
  std::vector<float> bias(c.vocab), weights(c.rows * c.d_model), mean_bias(c.rows), logsumexp(c.rows);
  for (float& b : bias) b = static_cast<float>(random() % 64) / 64;
  const LensProblem problem{x_hat.matrix, {c.norm, nullptr, nullptr, 0}, unembedding.matrix,
                            c.bias ? bias.data() : nullptr, 1.0f, 0.0f, nullptr, 0};
  mean_unembedding(problem, lens_kernels(selected_isa(), c.rows), threads,
                   {c.d_model, weights.data(), mean_bias.data(), logsumexp.data()});
  bool good = true;
  for (int64_t r = 0; r < c.rows; ++r) {
    const std::vector<double> logits = reference_logits(c, x_hat, unembedding, bias, r);
    double sum = 0, average = 0;
    std::vector<double> expected(c.d_model);
    for (double l : logits) sum += std::exp(l);
    for (int64_t v = 0; v < c.vocab; ++v) {
      const double p = std::exp(logits[v]) / sum;
      if (c.bias) average += p * bias[v];
      for (int64_t k = 0; k < c.d_model; ++k) expected[k] += p * unembedding.values[v * c.d_model + k];
    }
    const double slack = 1e-5;
    good &= std::fabs(mean_bias[r] - average) < slack && std::fabs(logsumexp[r] - std::log(sum)) < slack;
    for (int64_t k = 0; k < c.d_model; ++k) good &= std::fabs(weights[r * c.d_model + k] - expected[k]) < slack;
  }
  if (!good)
    std::printf("average differs: rows %ld d_model %ld vocab %ld element %d threads %d\n", long(c.rows),
                long(c.d_model), long(c.vocab), int(c.element), threads);
  return good;
}

// The divergences of rows in groups of 1, of 5 that straddle panels, or of all, each of logsumexps in fp64.
bool divergence_agrees(Case c, int threads, std::mt19937& random) {
  const int64_t group = c.rows % 5 == 0 ? 5 : c.rows % 3 == 0 ? 1 : c.rows;
  const Operand hidden(c.rows, c.d_model, c.element, random), unembedding(c.vocab, c.d_model, c.element, random);
  std::vector<float> bias(c.vocab), logsumexp(c.rows), found(c.rows);
  for (float& b : bias) b = static_cast<float>(random() % 64) / 64;
  std::vector<std::vector<double>> log_p;
  for (int64_t r = 0; r < c.rows; ++r) {
    log_p.push_back(reference_logits(c, hidden, unembedding, bias, r));
    double sum = 0;
    for (double l : log_p[r]) sum += std::exp(l);
    for (double& l : log_p[r]) l -= std::log(sum);
    logsumexp[r] = static_cast<float>(std::log(sum));
  }
  const LensProblem problem{hidden.matrix, {c.norm, nullptr, nullptr, 1e-5}, unembedding.matrix,
                            c.bias ? bias.data() : nullptr, 1.0f, c.softcap, nullptr, 0};
  bool good = true;
  for (auto kind : {Divergence::kullback_leibler, Divergence::jensen_shannon}) {
    divergence_from_first(problem, {kind, group, logsumexp.data()}, lens_kernels(selected_isa(), c.rows), threads,
                          found.data());
    for (int64_t r = 0; r < c.rows; ++r) {
      double expected = 0;
      for (int64_t v = 0; v < c.vocab; ++v) {
        const double a = log_p[r][v], b = log_p[r - r % group][v], p = std::exp(a), q = std::exp(b);
        const double mean = std::log((p + q) / 2);
        expected += kind == Divergence::kullback_leibler ? q * (b - a) : (p * (a - mean) + q * (b - mean)) / 2;
      }
      good &= std::fabs(found[r] - expected) < 1e-4 && (r % group != 0 || found[r] == 0.0f);
    }
  }
  if (!good)
    std::printf("divergence differs: rows %ld d_model %ld vocab %ld element %d norm %d threads %d\n", long(c.rows),
                long(c.d_model), long(c.vocab), int(c.element), int(c.norm), threads);
  return good;
}

// The certified lens, exactly and with all ties: products of these values and their sums have no rounding in fp64.
bool screen_agrees(Case c, int threads, std::mt19937& random) {
  c.norm = NormSpec::none;
  const Operand hidden(c.rows, c.d_model, Element::fp32, random), unembedding(c.vocab, c.d_model, c.element, random);
  std::vector<float> bias(c.vocab), bound(c.rows);
  std::vector<double> best(c.rows), logsumexp(c.rows), entropy(c.rows), target_z(c.rows);
  std::vector<int64_t> targets(c.rows), argmax(c.rows), rank(c.rows);
  const std::unique_ptr<bool[]> fell_back(new bool[c.rows]);
  for (float& b : bias) b = static_cast<float>(random() % 64) / 64;
  for (int64_t& t : targets) t = random() % c.vocab;
  const std::vector<double> wide_bias(bias.begin(), bias.end());
  const ScreenIndex index(unembedding.matrix, screen_kernels(c.d_model), threads);
  const CertifiedProblem problem{hidden.values.data(), c.rows, unembedding.matrix, c.bias ? wide_bias.data() : nullptr,
                                 1.0, c.softcap, c.targets ? targets.data() : nullptr};
  certified_lens(index, problem,
                 {argmax.data(), best.data(), logsumexp.data(), entropy.data(), bound.data(), fell_back.get(),
                  c.targets ? target_z.data() : nullptr, c.targets ? rank.data() : nullptr},
                 true, threads);
  bool good = true;
  for (int64_t r = 0; r < c.rows; ++r) {
    const float softcap = std::exchange(c.softcap, 0.0f);
    const std::vector<double> z = reference_logits(c, hidden, unembedding, bias, r);
    c.softcap = softcap;
    const int64_t largest = std::max_element(z.begin(), z.end()) - z.begin();
    double sum = 0;
    for (double l : reference_logits(c, hidden, unembedding, bias, r)) sum += std::exp(l);
    good &= argmax[r] == largest && best[r] == z[largest] && std::fabs(logsumexp[r] - std::log(sum)) <= bound[r] + 1e-9;
    if (!c.targets) continue;
    int64_t above = 0;
    for (int64_t v = 0; v < c.vocab; ++v) above += z[v] > z[targets[r]] || (z[v] == z[targets[r]] && v < targets[r]);
    good &= target_z[r] == z[targets[r]] && rank[r] == above;
  }
  if (!good)
    std::printf("screen differs: rows %ld d_model %ld vocab %ld element %d threads %d\n", long(c.rows),
                long(c.d_model), long(c.vocab), int(c.element), threads);
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937 random(0);
  if (argc > 1 && std::string(argv[1]) == "overread") {
    const Operand hidden(3, 33, Element::fp32, random, 1), unembedding(40, 33, Element::fp32, random);
    const LensProblem problem{hidden.matrix, {NormSpec::none, nullptr, nullptr, 0}, unembedding.matrix,
                              nullptr, 1.0f, 0.0f, nullptr, 0};
    int64_t argmax[3];
    float numbers[9];
    fused_lens(problem, lens_kernels(selected_isa(), 3), 1,
               {argmax, numbers, numbers + 3, numbers + 6, nullptr, nullptr, 0, nullptr, nullptr});
    return 0;
  }
  bool good = true;
  int count = 0;
  // One of everything; few; one off a vector, a register tile and a staged block; more rows than a panel.
  for (int64_t rows : {1, 3, 9, 15, 17, 33, 70})
    for (int64_t d_model : {1, 7, 16, 65})
      for (int64_t vocab : {1, 13, 129, 1031})
        for (Element element : {Element::fp32, Element::bf16})
          for (auto norm : {NormSpec::none, NormSpec::layer, NormSpec::rms}) {
            const bool odd = ++count % 2;
            const Case c{rows, d_model, vocab, element, norm, odd, !odd, odd ? 0.0f : 5.0f};
            good &= agrees(c, 1 + count % 3, random);
            if (norm == NormSpec::rms) good &= divergence_agrees(c, 1 + count % 3, random);
            if (norm == NormSpec::none) good &= average_agrees(c, 1 + count % 3, random);
            else good &= screen_agrees(c, 1 + count % 3, random);
          }
  std::printf("%d cases with %s\n", count, isa_description(selected_isa()));
  return good ? 0 : 1;
}
