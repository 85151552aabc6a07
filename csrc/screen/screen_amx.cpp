// The screen of three 8-bit digits in AMX's tiles. screen_kernels.cpp says how it is compiled.
#include "screen/screen_kernels.hpp"

#include <cstdint>

#if REFINELENS_X86_AMX

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8")

#define REFINELENS_KERNELS amx_screen
namespace refinelens::REFINELENS_KERNELS {
constexpr char kName[] = "AMX, 24-bit screen";
constexpr int kVectorBytes = 64;
constexpr int kGroup = 16;
constexpr int kPanel = 16;
constexpr int kDigits = 3;
constexpr int kUnits = 16;
constexpr int kTileBytes = 1024;  // 16 rows of 64 bytes
}  // namespace refinelens::REFINELENS_KERNELS

#include "common/vectors.inl"

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

// Registers 0 to 5 hold the sums: digits d_i . d_j' with i + j = g, of the first (second) 16 tokens, in register g
// (g + 3). Register 6 holds tokens, which stream from the second-level cache, each once and past the first level, so
// that the rows stay there; register 7 holds rows. Each step changes one of the two.
#define REFINELENS_TOKENS(group, digit) _tile_stream_loadd(6, tokens + (group) * stride + (digit) * kTileBytes, 64)
#define REFINELENS_ROWS(digit) _tile_loadd(7, hidden + (digit) * kTileBytes, 64)
#define REFINELENS_MULTIPLY(sum) _tile_dpbssd(sum, 6, 7)

static void multiply_groups(const char* tokens, int64_t stride, const char* hidden, int64_t steps, int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t k = 0; k < steps; ++k, tokens += kDigits * kTileBytes, hidden += kDigits * kTileBytes) {
    REFINELENS_TOKENS(0, 2);
    REFINELENS_ROWS(0);
    REFINELENS_MULTIPLY(2);
    REFINELENS_TOKENS(1, 2);
    REFINELENS_MULTIPLY(5);
    REFINELENS_TOKENS(1, 0);
    REFINELENS_MULTIPLY(3);
    REFINELENS_ROWS(2);
    REFINELENS_MULTIPLY(5);
    REFINELENS_ROWS(1);
    REFINELENS_MULTIPLY(4);
    REFINELENS_TOKENS(0, 0);
    REFINELENS_MULTIPLY(1);
    REFINELENS_ROWS(2);
    REFINELENS_MULTIPLY(2);
    REFINELENS_ROWS(0);
    REFINELENS_MULTIPLY(0);
    REFINELENS_TOKENS(0, 1);
    REFINELENS_MULTIPLY(1);
    REFINELENS_ROWS(1);
    REFINELENS_MULTIPLY(2);
    REFINELENS_TOKENS(1, 1);
    REFINELENS_MULTIPLY(5);
    REFINELENS_ROWS(0);
    REFINELENS_MULTIPLY(4);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  _tile_stored(4, sums + 1024, 64);
  _tile_stored(5, sums + 1280, 64);
}

#undef REFINELENS_TOKENS
#undef REFINELENS_ROWS
#undef REFINELENS_MULTIPLY

static void multiply_tile(const ScreenTile& tile, const ScreenRows& rows, int64_t steps, float* products) {
  alignas(64) int32_t sums[2 * kDigits * 256];
  const int64_t stride = steps * kDigits * kTileBytes;  // from one group of tokens to the next
  const char* tokens = static_cast<const char*>(tile.digits);
  for (int group = 0; group < kTileTokens; group += 2 * kGroup, tokens += 2 * stride) {
    multiply_groups(tokens, stride, static_cast<const char*>(rows.digits), steps, sums);
    for (int i = 0; i < 2 * kGroup; ++i) {
      Floats digits[kDigits];
      for (int g = 0; g < kDigits; ++g) {
        const int32_t* sum = sums + (i / kGroup * kDigits + g) * 256 + i % kGroup * kLanes;
        digits[g] = __builtin_convertvector(*reinterpret_cast<const Ints*>(sum), Floats);
      }
      store(products + (group + i) * kPanel, digits[0] * 0x1p16f + (digits[1] * 0x1p8f + digits[2]));
    }
  }
}

}  // namespace refinelens::REFINELENS_KERNELS

#include "screen/screen_kernels.inl"

#pragma GCC pop_options

namespace refinelens {

const ScreenKernels& amx_screen_kernels() { return amx_screen::kScreenKernels; }

}  // namespace refinelens

#endif
