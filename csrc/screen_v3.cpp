#include <immintrin.h>

#include <cstdint>

#include "screen_kernels.hpp"

#if REFINELENS_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define REFINELENS_KERNELS v3_screen
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

// After multiply_add, in the order of use.
#include "screen_product.inl"
#include "screen_fold.inl"
#include "screen_quantise.inl"
#include "screen_wide.inl"

namespace refinelens {
using namespace REFINELENS_KERNELS;
extern const ScreenKernels kScreenV3 = {
    "AVX2, 16-bit screen", {kDigits, 1, kGroup, kPanel},
    widen, dot_product, quantise, nothing, nothing, multiply_tile, fold_tile,
};
}  // namespace refinelens

#pragma GCC pop_options

#endif
