#include <immintrin.h>

#include <cstdint>

#include "screen_kernels.hpp"

#if REFINELENS_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8")

#define REFINELENS_KERNELS amx_screen
namespace refinelens::REFINELENS_KERNELS {
constexpr int kVectorBytes = 64;
constexpr int kGroup = 16;
constexpr int kPanel = 32;
constexpr int kDigits = 3;
constexpr int kUnits = 16;
constexpr int kTileBytes = 1024;  // 16 rows of 64 bytes
}  // namespace refinelens::REFINELENS_KERNELS

#include "vectors.inl"
// After the vectors.
#include "screen_fold.inl"

namespace refinelens::REFINELENS_KERNELS {

struct alignas(64) TileConfig {
  uint8_t palette, start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

static void enter() {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  // GCC 12 takes the instruction to read 8 bytes, and would drop what is written to the others.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

static void leave() { _tile_release(); }

// Registers 0 to 5 hold the sums: digits d_i . d_j' with i + j = g, of the left (right) half of the panel, in register
// g (g + 3). Register 6 holds 16 tokens, register 7 half of the panel.
#define REFINELENS_MULTIPLY(left, right, digit)                        \
  _tile_loadd(7, hidden + (digit) * 2 * kTileBytes, kPanel * 4);      \
  _tile_dpbssd(left, 6, 7);                                            \
  _tile_loadd(7, hidden + (digit) * 2 * kTileBytes + 64, kPanel * 4); \
  _tile_dpbssd(right, 6, 7)

static void multiply_group(const char* tokens, const char* hidden, int64_t steps, int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  // The order keeps four products between two that add to the same register.
  for (int64_t k = 0; k < steps; ++k, tokens += kDigits * kTileBytes, hidden += 2 * kDigits * kTileBytes) {
    _tile_loadd(6, tokens + 2 * kTileBytes, 64);
    REFINELENS_MULTIPLY(2, 5, 0);
    _tile_loadd(6, tokens, 64);
    REFINELENS_MULTIPLY(0, 3, 0);
    REFINELENS_MULTIPLY(2, 5, 2);
    REFINELENS_MULTIPLY(1, 4, 1);
    _tile_loadd(6, tokens + kTileBytes, 64);
    REFINELENS_MULTIPLY(2, 5, 1);
    REFINELENS_MULTIPLY(1, 4, 0);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  _tile_stored(4, sums + 1024, 64);
  _tile_stored(5, sums + 1280, 64);
}

#undef REFINELENS_MULTIPLY

static void multiply_tile(const ScreenTile& tile, const ScreenRows& rows, int64_t steps, float* products) {
  alignas(64) int32_t sums[6 * 256];
  const char* tokens = static_cast<const char*>(tile.digits);
  for (int group = 0; group < kTileTokens; group += kGroup, tokens += steps * kDigits * kTileBytes) {
    multiply_group(tokens, static_cast<const char*>(rows.digits), steps, sums);
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < kGroup; ++i) {
        Floats digits[kDigits];
        for (int g = 0; g < kDigits; ++g) {
          const int32_t* sum = sums + (half * kDigits + g) * 256 + i * kLanes;
          digits[g] = __builtin_convertvector(*reinterpret_cast<const Ints*>(sum), Floats);
        }
        store(products + (group + i) * kPanel + half * kLanes, digits[0] * 0x1p16f + (digits[1] * 0x1p8f + digits[2]));
      }
  }
}

}  // namespace refinelens::REFINELENS_KERNELS

namespace refinelens {
using namespace REFINELENS_KERNELS;
extern const ScreenKernels kScreenAmx = {
    "AMX, 24-bit screen", {kDigits, kUnits, kGroup, kPanel}, enter, leave, multiply_tile, fold_tile};
}  // namespace refinelens

#pragma GCC pop_options

#endif
