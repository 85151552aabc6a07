#include <cstdint>

#include "lens_kernels.hpp"

#define REFINELENS_KERNELS baseline_kernels
#define REFINELENS_TABLE kLensKernelsBaseline

// What every compiler vectorises: 12 of SSE2's 16 registers hold sums.
namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 16;
constexpr int kMaxVectors = 2;
constexpr int64_t kBlockBytes = 160 << 10;
}  // namespace refinelens::REFINELENS_KERNELS

#include "lens_kernels.inl"
