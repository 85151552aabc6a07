// How far two rows agree in the order of their entries. No Python types here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "ranking.hpp"

namespace refinelens {

// `shared` over the geometric mean of two counts; 0 over 0, which is NaN, where a row is constant or too short. The
// root of a square is exact, so that rows in the same order give 1 and in opposite order -1.
inline double over_geometric_mean(double shared, double a, double b) { return shared / std::sqrt(a * b); }

// Pearson's correlation of average ranks; centred ranks are twice their distance from the mean, hence integers.
inline double spearman(const Ranking& a, const Ranking& b) {
  const int64_t n = a.centred.size();
  // A product is below n^2, so that a block's sum is below 2^63.
  const int64_t block = n == 0 ? 1 : std::max<int64_t>(1, std::numeric_limits<int64_t>::max() / n / n);
  Wide products = 0;
  for (int64_t start = 0; start < n; start += block) {
    int64_t sum = 0;
    for (int64_t i = start; i < std::min(n, start + block); ++i) sum += int64_t{a.centred[i]} * b.centred[i];
    products += sum;
  }
  return over_geometric_mean(static_cast<double>(products), static_cast<double>(a.squares),
                             static_cast<double>(b.squares));
}

// Kendall's tau-b by Knight (1966, JASA 61:436): entries in the order of (a, b), discordant pairs counted as the
// exchanges of a merge sort on b. The two orders are known, so that no other sort is needed: entries in the order of b
// are dealt out to the places of their value of a.
class KendallTauB {
 public:
  explicit KendallTauB(int64_t n) : sequence_(n), buffer_(n), groups_(n) {}

  double operator()(const Ranking& a, const Ranking& b) {
    const int64_t tied_in_both = deal_out(a, b);
    const int64_t n = sequence_.size(), pairs = n * (n - 1) / 2;
    const int64_t tied = (pairs - a.untied_pairs) + (pairs - b.untied_pairs) - tied_in_both;
    const int64_t concordant_less_discordant = pairs - tied - 2 * exchanges();
    return over_geometric_mean(static_cast<double>(concordant_less_discordant), static_cast<double>(a.untied_pairs),
                               static_cast<double>(b.untied_pairs));
  }

 private:
  struct Group {  // entries with one value of a, at the index of the first
    int32_t dealt;  // so far
    int32_t run;    // of the last one dealt: how many before it have its value of b too
  };

  // Writes b of all entries in the order of (a, b); returns the pairs tied in both.
  int64_t deal_out(const Ranking& a, const Ranking& b) {
    std::fill(groups_.begin(), groups_.end(), Group{0, 0});
    int64_t tied_in_both = 0;
    for (const int32_t index : b.order) {
      const int32_t start = a.first[index], value = b.first[index];
      Group& group = groups_[start];
      const int32_t place = start + group.dealt;
      group.run = group.dealt > 0 && sequence_[place - 1] == value ? group.run + 1 : 0;
      tied_in_both += group.run;
      sequence_[place] = value;
      ++group.dealt;
    }
    return tied_in_both;
  }

  // Pairs of `sequence_` in descending order; sorts it.
  int64_t exchanges() {
    constexpr int64_t kRun = 16;
    const int64_t n = sequence_.size();
    int64_t count = 0;
    for (int64_t start = 0; start < n; start += kRun) count += insertion_sort(start, std::min(n, start + kRun));
    for (int64_t run = kRun; run < n; run *= 2) {
      for (int64_t start = 0; start < n; start += 4 * run) {
        Merge one = merge_at(start, run), other = merge_at(std::min(n, start + 2 * run), run);
        while (one.goes_on() && other.goes_on()) {
          one.step();
          other.step();
        }
        count += one.finish() + other.finish();
      }
      sequence_.swap(buffer_);
    }
    return count;
  }

  int64_t insertion_sort(int64_t start, int64_t end) {
    int64_t count = 0;
    for (int64_t i = start + 1; i < end; ++i) {
      const int32_t value = sequence_[i];
      int64_t place = i;
      for (; place > start && sequence_[place - 1] > value; --place) sequence_[place] = sequence_[place - 1];
      sequence_[place] = value;
      count += i - place;
    }
    return count;
  }

  // Two neighbouring runs on their way into the buffer. No branch hangs on the values, which nobody can predict; what
  // remains is the wait of each step for the one before, so that two merges take turns.
  struct Merge {
    const int32_t *left, *middle, *right, *end;
    int32_t* out;
    int64_t count;  // exchanges so far

    bool goes_on() const { return left < middle && right < end; }

    void step() {
      const int32_t from_left = *left, from_right = *right;
      const int64_t exchange = from_right < from_left;
      *out++ = std::min(from_left, from_right);
      count += (middle - left) & -exchange;
      right += exchange;
      left += 1 - exchange;
    }

    int64_t finish() {
      while (goes_on()) step();
      std::copy(right, end, std::copy(left, middle, out));
      return count;
    }
  };

  Merge merge_at(int64_t start, int64_t run) {
    const int64_t n = sequence_.size();
    const int32_t* in = sequence_.data();
    const int32_t* middle = in + std::min(n, start + run);
    return {in + start, middle, middle, in + std::min(n, start + 2 * run), buffer_.data() + start, 0};
  }

  std::vector<int32_t> sequence_, buffer_;
  std::vector<Group> groups_;
};

// Share of the k smallest entries of one row that are among the k smallest of the other, 1 <= k <= n; of equal entries
// that with the lower index is taken for the smaller.
class TopKOverlap {
 public:
  TopKOverlap(int64_t n, int64_t k) : k_(k), in_a_(n, 0) {}

  double operator()(const Ranking& a, const Ranking& b) {
    for (int64_t i = 0; i < k_; ++i) in_a_[a.order[i]] = 1;
    int64_t shared = 0;
    for (int64_t i = 0; i < k_; ++i) shared += in_a_[b.order[i]];
    for (int64_t i = 0; i < k_; ++i) in_a_[a.order[i]] = 0;
    return static_cast<double>(shared) / static_cast<double>(k_);
  }

 private:
  int64_t k_;
  std::vector<uint8_t> in_a_;
};

// out[i] = agree(row a_index[i] of a, row b_index[i] of b), NaN where either holds one. Every row is ranked once if the
// pairs come from broadcasting.
template <typename Agree>
void compare_rows(const Rows& a, const int64_t* a_index, const Rows& b, const int64_t* b_index, int64_t pairs,
                  Agree agree, double* out) {
  Ranker ranker;
  Rankings of_a(a, pairs), of_b(b, pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    const Ranking &in_a = of_a(a_index[i], ranker), &in_b = of_b(b_index[i], ranker);
    out[i] = in_a.has_nan || in_b.has_nan ? std::numeric_limits<double>::quiet_NaN() : agree(in_a, in_b);
  }
}

}  // namespace refinelens
