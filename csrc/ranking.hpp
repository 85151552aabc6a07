// Rows of numbers put in order, ties included. No Python types here.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
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

}  // namespace refinelens
