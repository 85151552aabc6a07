// Rows of numbers put in order, ties included, and how far two of them agree. No Python types.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace refinelens {

__extension__ using Wide = __int128;  // sums of products of ranks, exact for any length below 2^31

// Rows of one length, row-major.
struct Rows {
  const void* data;
  bool floating;  // fp64, otherwise int64
  int64_t count;
  int64_t length;  // below 2^31
};

// One row in ascending order, equal values in the order of their indices.
struct Ranking {
  std::vector<int32_t> order;    // index of the i-th smallest entry
  std::vector<int32_t> first;    // per entry: how many are smaller
  std::vector<int32_t> centred;  // per entry: how many are smaller less how many are larger
  Wide squares;                  // sum of centred^2
  int64_t untied_pairs;          // pairs of entries with different values
  bool has_nan;                  // then nothing else is set
};

// Puts rows in order. Keeps its working memory, so that one of them serves all rows.
class Ranker {
 public:
  void rank(const Rows& rows, int64_t row, Ranking& out) {
    out.has_nan = !read_keys(rows, row);
    if (out.has_nan) return;
    sort();
    settle_ties(out);
  }

 private:
  struct Entry {
    uint64_t key;  // ordered as the values are
    int32_t index;
  };

  static constexpr uint64_t kSign = uint64_t{1} << 63;

  static uint64_t key_of(int64_t value) { return static_cast<uint64_t>(value) ^ kSign; }

  static uint64_t key_of(double value) {
    if (value == 0) value = 0;  // -0.0 equals 0.0
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & kSign ? ~bits : bits | kSign;
  }

  // False where there is a NaN.
  bool read_keys(const Rows& rows, int64_t row) {
    entries_.resize(rows.length);
    other_.resize(rows.length);
    bool numbers = true;
    for (int64_t i = 0; i < rows.length; ++i) {
      const int64_t at = row * rows.length + i;
      if (rows.floating) {
        const double value = static_cast<const double*>(rows.data)[at];
        numbers &= value == value;
        entries_[i] = {key_of(value), static_cast<int32_t>(i)};
      } else {
        entries_[i] = {key_of(static_cast<const int64_t*>(rows.data)[at]), static_cast<int32_t>(i)};
      }
    }
    return numbers;
  }

  // Radix sort from the lowest byte up: stable, and bytes in which no two keys differ cost nothing.
  void sort() {
    constexpr size_t kRadixPays = 128;
    if (entries_.size() < kRadixPays) {
      std::sort(entries_.begin(), entries_.end(),
                [](const Entry& a, const Entry& b) { return std::pair(a.key, a.index) < std::pair(b.key, b.index); });
      return;
    }
    uint64_t differing = 0;
    for (const Entry& entry : entries_) differing |= entry.key ^ entries_[0].key;
    for (int shift = 0; shift < 64; shift += 8)
      if (differing >> shift & 255) sort_by_byte(shift);
  }

  void sort_by_byte(int shift) {
    std::array<int32_t, 257> start{};
    for (const Entry& entry : entries_) ++start[(entry.key >> shift & 255) + 1];
    for (int i = 1; i < 257; ++i) start[i] += start[i - 1];
    for (const Entry& entry : entries_) other_[start[entry.key >> shift & 255]++] = entry;
    std::swap(entries_, other_);
  }

  void settle_ties(Ranking& out) const {
    const int64_t n = entries_.size();
    out.order.resize(n);
    out.first.resize(n);
    out.centred.resize(n);
    out.squares = 0;
    out.untied_pairs = n * (n - 1) / 2;
    for (int64_t start = 0, end; start < n; start = end) {
      for (end = start + 1; end < n && entries_[end].key == entries_[start].key;) ++end;
      const int64_t size = end - start, centred = start + end - n;
      for (int64_t i = start; i < end; ++i) {
        const int32_t index = entries_[i].index;
        out.order[i] = index;
        out.first[index] = static_cast<int32_t>(start);
        out.centred[index] = static_cast<int32_t>(centred);
      }
      out.squares += Wide{size} * (centred * centred);
      out.untied_pairs -= size * (size - 1) / 2;
    }
  }

  std::vector<Entry> entries_, other_;
};

// The rankings of rows that are asked for one at a time. Where rows are asked for repeatedly each is ranked once and
// kept; otherwise one ranking at a time is held.
class Rankings {
 public:
  Rankings(const Rows& rows, int64_t requests)
      : rows_(rows), keep_(rows.count < requests), slots_(keep_ ? rows.count : 1), held_(slots_.size(), -1) {}

  const Ranking& operator()(int64_t row, Ranker& ranker) {
    const int64_t slot = keep_ ? row : 0;
    if (held_[slot] != row) {
      ranker.rank(rows_, row, slots_[slot]);
      held_[slot] = row;
    }
    return slots_[slot];
  }

 private:
  Rows rows_;
  bool keep_;
  std::vector<Ranking> slots_;
  std::vector<int64_t> held_;  // row in each slot
};

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
// are distributed to the places of their value of a.
class KendallTauB {
 public:
  explicit KendallTauB(int64_t n) : sequence_(n), buffer_(n), groups_(n) {}

  double operator()(const Ranking& a, const Ranking& b) {
    const int64_t tied_in_both = distribute(a, b);
    const int64_t n = sequence_.size(), pairs = n * (n - 1) / 2;
    const int64_t tied = (pairs - a.untied_pairs) + (pairs - b.untied_pairs) - tied_in_both;
    const int64_t concordant_less_discordant = pairs - tied - 2 * exchanges();
    return over_geometric_mean(static_cast<double>(concordant_less_discordant), static_cast<double>(a.untied_pairs),
                               static_cast<double>(b.untied_pairs));
  }

 private:
  struct Group {  // entries with one value of a, at the index of the first
    int32_t placed;  // so far
    int32_t run;     // of the last one placed: how many before it have its value of b too
  };

  // Writes b of all entries in the order of (a, b); returns the pairs tied in both.
  int64_t distribute(const Ranking& a, const Ranking& b) {
    std::fill(groups_.begin(), groups_.end(), Group{0, 0});
    int64_t tied_in_both = 0;
    for (const int32_t index : b.order) {
      const int32_t start = a.first[index], value = b.first[index];
      Group& group = groups_[start];
      const int32_t place = start + group.placed;
      group.run = group.placed > 0 && sequence_[place - 1] == value ? group.run + 1 : 0;
      tied_in_both += group.run;
      sequence_[place] = value;
      ++group.placed;
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
        while (one.both_have_entries() && other.both_have_entries()) {
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

    bool both_have_entries() const { return left < middle && right < end; }

    void step() {
      const int32_t from_left = *left, from_right = *right;
      const int64_t exchange = from_right < from_left;
      *out++ = std::min(from_left, from_right);
      count += (middle - left) & -exchange;
      right += exchange;
      left += 1 - exchange;
    }

    int64_t finish() {
      while (both_have_entries()) step();
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
