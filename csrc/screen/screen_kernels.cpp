// The kernels of a 16-bit screen for each instruction set; lens/lens_kernels.cpp says how they are compiled. The
// namespace holds kName, kVectorBytes, kGroup (tokens of a register tile) and, after the vectors, multiply_add(sum, a,
// b), which adds the products of pairs of 16-bit numbers to 32-bit sums.
#include "screen/screen_kernels.hpp"

#include <cstdint>

#if REFINELENS_X86_LEVELS
#include <immintrin.h>
#endif

#define REFINELENS_KERNELS baseline_screen
namespace refinelens::REFINELENS_KERNELS {
constexpr char kName[] = "baseline, 16-bit screen";
constexpr int kVectorBytes = 16;
constexpr int kGroup = 6;
}  // namespace refinelens::REFINELENS_KERNELS
#include "common/vectors.inl"
namespace refinelens::REFINELENS_KERNELS {
// The upper halves by a shift, the lower by a shift up and down again: no instruction beyond the baseline's is needed.
inline Ints multiply_add(Ints sum, Ints a, Ints b) {
  return sum + (a >> 16) * (b >> 16) + ((a << 16) >> 16) * ((b << 16) >> 16);
}
}  // namespace refinelens::REFINELENS_KERNELS
#include "screen/int16_product.inl"
#include "screen/screen_kernels.inl"
#undef REFINELENS_KERNELS

#if REFINELENS_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define REFINELENS_KERNELS v3_screen
namespace refinelens::REFINELENS_KERNELS {
constexpr char kName[] = "AVX2, 16-bit screen";
constexpr int kVectorBytes = 32;
constexpr int kGroup = 6;
}  // namespace refinelens::REFINELENS_KERNELS
#include "common/vectors.inl"
namespace refinelens::REFINELENS_KERNELS {
inline Ints multiply_add(Ints sum, Ints a, Ints b) { return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
}  // namespace refinelens::REFINELENS_KERNELS
#include "screen/int16_product.inl"
#include "screen/screen_kernels.inl"
#undef REFINELENS_KERNELS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define REFINELENS_KERNELS v4_screen
namespace refinelens::REFINELENS_KERNELS {
constexpr char kName[] = "AVX-512 VNNI, 16-bit screen";
constexpr int kVectorBytes = 64;
constexpr int kGroup = 12;
}  // namespace refinelens::REFINELENS_KERNELS
#include "common/vectors.inl"
namespace refinelens::REFINELENS_KERNELS {
inline Ints multiply_add(Ints sum, Ints a, Ints b) {
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
}  // namespace refinelens::REFINELENS_KERNELS
#include "screen/int16_product.inl"
#include "screen/screen_kernels.inl"
#undef REFINELENS_KERNELS
#pragma GCC pop_options

#endif

namespace refinelens {

const ScreenKernels& screen_kernels([[maybe_unused]] int64_t depth) {
  [[maybe_unused]] const Isa isa = selected_isa();
#if REFINELENS_X86_AMX
  if (isa == Isa::amx && depth <= kMaxDigitDepth) return amx_screen_kernels();
#endif
#if REFINELENS_X86_LEVELS
  if (isa >= Isa::v4 && __builtin_cpu_supports("avx512vnni")) return v4_screen::kScreenKernels;
  if (isa >= Isa::v3) return v3_screen::kScreenKernels;
#endif
  return baseline_screen::kScreenKernels;
}

}  // namespace refinelens
