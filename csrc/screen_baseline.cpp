#include <cstdint>

#include "screen_kernels.hpp"

#define REFINELENS_KERNELS baseline_screen
namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 16;
constexpr int kGroup = 6;
}  // namespace refinelens::REFINELENS_KERNELS

#include "vectors.inl"

namespace refinelens::REFINELENS_KERNELS {
// The upper halves by a shift, the lower by a shift up and down again: no instruction beyond the baseline's is needed.
inline Ints multiply_add(Ints sum, Ints a, Ints b) {
  return sum + (a >> 16) * (b >> 16) + ((a << 16) >> 16) * ((b << 16) >> 16);
}
}  // namespace refinelens::REFINELENS_KERNELS

// After multiply_add, in the order of use.
#include "screen_product.inl"
#include "screen_fold.inl"
#include "screen_quantise.inl"
#include "screen_wide.inl"

namespace refinelens {
using namespace REFINELENS_KERNELS;
extern const ScreenKernels kScreenBaseline = {
    "baseline, 16-bit screen", {kDigits, 1, kGroup, kPanel},
    widen, dot_product, quantise, nothing, nothing, multiply_tile, fold_tile,
};
}  // namespace refinelens
