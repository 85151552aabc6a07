// The kernels of the fused lens, compiled once for each instruction set in a namespace of their own,
// REFINELENS_KERNELS, which holds kVectorBytes, kMaxVectors (vectors of hidden rows in a register tile) and kBlockBytes
// (part of the second-level cache that a block of tokens may fill).
//
// Headers come first, for they are for all processors. The .inl files are for one: they instantiate nothing of the
// standard library, since an inline function that the linker might share with code for older processors must not be
// compiled for newer ones.
#include <cstdint>

#include "lens/divergence.hpp"
#include "lens/fused_lens.hpp"
#include "lens/mean_unembedding.hpp"

#define REFINELENS_KERNELS baseline_lens
// What every compiler vectorises: 12 of SSE2's 16 registers hold sums.
namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 16;
constexpr int kMaxVectors = 2;
constexpr int64_t kBlockBytes = 160 << 10;
}  // namespace refinelens::REFINELENS_KERNELS
#include "lens/scan.inl"
#undef REFINELENS_KERNELS

#if REFINELENS_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define REFINELENS_KERNELS v3_lens
// 12 of 16 registers hold sums.
namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 32;
constexpr int kMaxVectors = 2;
constexpr int64_t kBlockBytes = 160 << 10;
}  // namespace refinelens::REFINELENS_KERNELS
#include "lens/scan.inl"
#undef REFINELENS_KERNELS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define REFINELENS_KERNELS v4_lens
// 24 of 32 registers hold sums.
namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 64;
constexpr int kMaxVectors = 4;
constexpr int64_t kBlockBytes = 384 << 10;
}  // namespace refinelens::REFINELENS_KERNELS
#include "lens/scan.inl"
#undef REFINELENS_KERNELS

#define REFINELENS_KERNELS v4_few_lens
// For few rows: half the lanes take half the time, and blocks as large as those of the wide kernels give their bits.
namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 32;
constexpr int kMaxVectors = 1;
constexpr int64_t kBlockBytes = v4_lens::kBlockBytes;
}  // namespace refinelens::REFINELENS_KERNELS
#include "lens/scan.inl"
#undef REFINELENS_KERNELS
#pragma GCC pop_options

#endif

namespace refinelens {

const LensKernels& lens_kernels([[maybe_unused]] Isa isa, [[maybe_unused]] int64_t rows) {
#if REFINELENS_X86_LEVELS
  if (isa >= Isa::v4) return rows > v4_few_lens::kLanes ? v4_lens::kLensKernels : v4_few_lens::kLensKernels;
  if (isa >= Isa::v3) return v3_lens::kLensKernels;
#endif
  return baseline_lens::kLensKernels;
}

}  // namespace refinelens
