// The integer product of one 16-bit digit: kGroup tokens by two vectors of hidden rows in registers. AMX has another, in
// screen_amx.cpp. screen_kernels.cpp says how this is included.

namespace refinelens::REFINELENS_KERNELS {

constexpr int kPanel = 2 * kLanes;
constexpr int kDigits = 1;
constexpr int kUnits = 1;

inline Ints load_ints(const int32_t* p) { return *reinterpret_cast<const Ints*>(p); }

static void multiply_tile(const ScreenTile& tile, const ScreenRows& rows, int64_t steps, float* products) {
  const int32_t* tokens = static_cast<const int32_t*>(tile.digits);
  for (int group = 0; group < kTileTokens; group += kGroup) {
    Ints sums[kGroup][2] = {};
    const int32_t* pairs = static_cast<const int32_t*>(rows.digits);
    for (int64_t k = 0; k < steps; ++k, pairs += kPanel, tokens += kGroup) {
      const Ints left = load_ints(pairs), right = load_ints(pairs + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i) {
        const Ints weight = tokens[i] - Ints{};
        sums[i][0] = multiply_add(sums[i][0], weight, left);
        sums[i][1] = multiply_add(sums[i][1], weight, right);
      }
    }
    for (int i = 0; i < kGroup; ++i)
      for (int half = 0; half < 2; ++half)
        store(products + (group + i) * kPanel + half * kLanes, __builtin_convertvector(sums[i][half], Floats));
  }
}

static void enter() {}
static void leave() {}

}  // namespace refinelens::REFINELENS_KERNELS
