#include <cstdint>

#include "screen_kernels.hpp"

#define REFINELENS_KERNELS baseline_screen
#define REFINELENS_TABLE kScreenBaseline
#define REFINELENS_NAME "baseline, 16-bit screen"

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

#include "screen_kernels.inl"
