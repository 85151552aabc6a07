#include <cstdint>

#include "lens_kernels.hpp"

#if REFINELENS_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")

#define REFINELENS_KERNELS v4_kernels
#define REFINELENS_TABLE kLensKernelsV4

// 24 of 32 registers hold sums.
namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 64;
constexpr int kMaxVectors = 4;
constexpr int64_t kBlockBytes = 384 << 10;
}  // namespace refinelens::REFINELENS_KERNELS

#include "lens_kernels.inl"

#pragma GCC pop_options

#endif
