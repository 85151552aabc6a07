#include <cstdint>

#include "lens_kernels.hpp"

#if REFINELENS_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define REFINELENS_KERNELS v3_kernels
#define REFINELENS_TABLE kLensKernelsV3

// 12 of 16 registers hold sums.
namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 32;
constexpr int kMaxVectors = 2;
constexpr int64_t kBlockBytes = 160 << 10;
}  // namespace refinelens::REFINELENS_KERNELS

#include "lens_kernels.inl"

#pragma GCC pop_options

#endif
