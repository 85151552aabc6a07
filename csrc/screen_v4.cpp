#include <cstdint>

#include "screen_kernels.hpp"

#if REFINELENS_X86_LEVELS

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

#define REFINELENS_KERNELS v4_screen
#define REFINELENS_TABLE kScreenV4
#define REFINELENS_NAME "AVX-512 VNNI, 16-bit screen"

namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 64;
constexpr int kGroup = 12;
}  // namespace refinelens::REFINELENS_KERNELS

#include "vectors.inl"

namespace refinelens::REFINELENS_KERNELS {
inline Ints multiply_add(Ints sum, Ints a, Ints b) {
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
}  // namespace refinelens::REFINELENS_KERNELS

#include "screen_kernels.inl"

#pragma GCC pop_options

#endif
