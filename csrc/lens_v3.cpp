#include <cstdint>

#include "lens_kernels.hpp"

#if REFINELENS_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define REFINELENS_KERNELS v3_kernels
namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 32;
constexpr int kMaxVectors = 2;  // of rows in a register tile
constexpr int64_t kBlockBytes = 160 << 10;
}  // namespace refinelens::REFINELENS_KERNELS

#include "vectors.inl"
// After the vectors, in the order of use.
#include "product.inl"
#include "pack.inl"
#include "reduce.inl"
#include "scan.inl"

namespace refinelens {
using namespace REFINELENS_KERNELS;
extern const LensKernels kLensKernelsV3 = {kWide,      block_tokens, scratch_floats,
                                            pack_panel, scan_range,   multiply_adds};
}  // namespace refinelens

#pragma GCC pop_options

#endif
