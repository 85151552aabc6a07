#include <cstdint>

#include "screen_kernels.hpp"

#if REFINELENS_X86_LEVELS

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define REFINELENS_KERNELS v3_screen
#define REFINELENS_TABLE kScreenV3
#define REFINELENS_NAME "AVX2, 16-bit screen"

namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 32;
constexpr int kGroup = 6;
}  // namespace refinelens::REFINELENS_KERNELS

#include "vectors.inl"

namespace refinelens::REFINELENS_KERNELS {
inline Ints multiply_add(Ints sum, Ints a, Ints b) {
  return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
}  // namespace refinelens::REFINELENS_KERNELS

#include "screen_kernels.inl"

#pragma GCC pop_options

#endif
