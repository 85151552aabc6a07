// Matrices of numbers in memory: their elements, arrays aligned to a cache line, and a checksum of their bytes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "common/parallel.hpp"

namespace refinelens {

enum class Element { fp32, fp16, bf16 };

constexpr int64_t bytes_of(Element element) { return element == Element::fp32 ? 4 : 2; }

struct Matrix {
  const void* data;
  Element element;
  int64_t rows, columns;
  int64_t row_stride, column_stride;  // in elements; any value, also 0 or negative
};

// The start of a row of a matrix with a column_stride of 1.
inline const char* row_of(const Matrix& m, int64_t row) {
  return static_cast<const char*>(m.data) + row * m.row_stride * bytes_of(m.element);
}

constexpr std::align_val_t kCacheLine{64};

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, kCacheLine); }
};
template <typename T>
using Aligned = std::unique_ptr<T[], AlignedDelete>;

// Uninitialised.
template <typename T>
Aligned<T> aligned(int64_t count) {
  return Aligned<T>(static_cast<T*>(::operator new(count * sizeof(T), kCacheLine)));
}

template <typename T>
Aligned<T> aligned_filled(int64_t count, T value = {}) {
  Aligned<T> values = aligned<T>(count);
  std::fill_n(values.get(), count, value);
  return values;
}

// Folded products of 64 bits by 64, in chains that do not wait for each other; as fast as memory is read.
class Checksum {
 public:
  void add(const char* bytes, int64_t count) {
    for (; count >= kBytes; bytes += kBytes, count -= kBytes) add_words(bytes);
    if (count == 0) return;
    char rest[kBytes] = {};
    std::copy_n(bytes, count, rest);
    add_words(rest);
  }

  uint64_t value() const {
    uint64_t sum = 0;
    for (const uint64_t chain : chains_) sum = fold(sum ^ chain, kOdd);
    return sum;
  }

 private:
  static constexpr int kChains = 4;
  static constexpr int64_t kBytes = kChains * 2 * sizeof(uint64_t);
  static constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;  // 2^64 over the golden ratio

  // Both halves of the product: every bit of a factor reaches one of them.
  static uint64_t fold(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }

  void add_words(const char* bytes) {
    uint64_t words[2 * kChains];
    std::memcpy(words, bytes, kBytes);
    for (int i = 0; i < kChains; ++i) chains_[i] = fold(words[2 * i] ^ kOdd, words[2 * i + 1] ^ chains_[i]);
  }

  std::array<uint64_t, kChains> chains_ = {kOdd, 3 * kOdd, 5 * kOdd, 7 * kOdd};
};

// Of a matrix with a column_stride of 1, by which an index can tell that its weights have changed; the same for any
// number of threads.
inline uint64_t checksum(const Matrix& weights, int n_threads) {
  constexpr int64_t kPieces = 64;
  const int64_t row_bytes = weights.columns * bytes_of(weights.element);
  std::array<uint64_t, kPieces> sums;
  constexpr double kFlopsPerByte = 4;  // what a byte takes compared with multiplying
  const double flops = kFlopsPerByte * static_cast<double>(row_bytes * weights.rows);
  parallel_for(kPieces, useful_threads(flops, n_threads), [&](int64_t piece, int) {
    Checksum sum;
    for (int64_t v = weights.rows * piece / kPieces; v < weights.rows * (piece + 1) / kPieces; ++v)
      sum.add(row_of(weights, v), row_bytes);
    sums[piece] = sum.value();
  });
  Checksum whole;
  whole.add(reinterpret_cast<const char*>(sums.data()), sizeof(sums));
  return whole.value();
}

}  // namespace refinelens
