// Arrays aligned to a cache line.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace refinelens {

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
Aligned<T> aligned_zeros(int64_t count) {
  Aligned<T> values = aligned<T>(count);
  std::fill_n(values.get(), count, T{});
  return values;
}

}  // namespace refinelens
