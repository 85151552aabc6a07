// What the driver (screen.cpp), the index (screen_index.cpp) and the kernels of each instruction set of the certified
// lens agree on, and the proof that the screen misses nothing. No Python types.
//
// A hidden row x (normed, fp64) and a token's weights w in the unembedding have the logit z = x.w + b. The screen
// computes an approximation of all z by integers, and a bound on its error; only tokens whose interval reaches the
// largest z, or the target's, are computed in fp64, and compared exactly where that is in doubt (exact.hpp).
//
// Proof of the bound. Let m be any fixed vector (the mean of the weights) and c = w - m. Then z = x.c + x.m + b, and
// x.m is the same for all tokens of a row; the screen compares x.c + b. Vectors are quantised as x = s q + r with a
// scale s and integers q; likewise c = s' q' + r'. By the Cauchy-Schwarz inequality
//   (1)  |x.c - s s' q.q'| = |x.r' + r.(s' q')| <= |x| |r'| + |r| |s' q'|.
// These norms are measured on the vectors themselves in fp64 and rounded up; nothing is assumed about them.
//
// One digit of 16 bits: |q| |q'| < 2^31, so that q.q' and each of its partial sums fit into 32 bits, and the integer
// product is exact in any order.
//
// Three digits of 8 bits: q = 2^16 d0 + 2^8 d1 + d2 with -128 <= di <= 127. The products d0.d0', d0.d1' + d1.d0' and
// d0.d2' + d1.d1' + d2.d0' fit into 32 bits each (depth <= kMaxDigitDepth) and are exact. The others are left out,
// which adds, with L = s |d2| and M = s 2^8 |d1|, at most
//   (2)  |s 2^8 d1 . s' d2' + s d2 . s' (2^8 d1' + d2')| <= M L' + L (M' + L').
//
// Rounding. Let T = s |q|, and for three digits T = s (|2^16 d0| + |2^8 d1| + |d2|). The integers become one fp32
// number, by one rounding or by three conversions and two additions; then come a product of scales, a product with it,
// the addition of the bias rounded to fp32, under a softcap that of x.m (whose own part HiddenRows adds), and a product
// with the logit scale. These are at most 9.1 roundings of values of at most T T', and 5.1 of values of at most |b|.
// With u = 2^-24, and scales of at least kSmallestScale so that products are normal numbers, this adds at most
//   (3)  10 u T T' + 6 u |b| + 2^-125.
//
// The sum of (1), (2) and (3) is an inner product of five numbers of the row with five of the token; the largest in a
// tile of kTileTokens tokens stand for all of them.
//
// Assumptions: IEEE 754 arithmetic with round to nearest; subnormal numbers are not flushed in fp64; x, w and b are
// finite (or b = -inf: such a token beats nobody, and without a softcap it has probability 0); |x| |w| + |b| and |w|
// are at most kLargestLogit. Rows for which the last does not hold are not screened.
#pragma once

#include <cstdint>

#include "common/dispatch.hpp"
#include "common/matrix.hpp"

namespace refinelens {

constexpr int kTileTokens = 96;         // tokens that are multiplied and folded at a time; they share one bound
constexpr int kTerms = 5;               // of the bound
constexpr int kMaxListed = 256;         // candidates of a row in one range of the vocabulary
constexpr int kMaxHeavy = 8;            // where so many are listed, none is for its weight in the sums alone
constexpr float kHeavyNats = 3.0f;      // below the largest logit: at least 5 % of its weight
constexpr int64_t kMaxDigitDepth = 32768;
constexpr double kInflate = 1.0 + 0x1p-26;  // more than the roundings of a sum of 2^24 squares, and a root
constexpr double kSmallestScale = 0x1p-60;
constexpr double kLargestLogit = 1e30;

// How quantised vectors are laid out. K, the dimension that is summed over, is cut into steps of 4 * units bytes for
// each digit. Tokens are stored [group][step][digit][token][unit], hidden rows [panel][step][digit][unit][row].
struct ScreenFormat {
  int digits;       // 1 of 16 bits, or 3 of 8 bits
  int units;        // of 4 bytes
  int token_group;  // divides kTileTokens
  int row_panel;    // hidden rows multiplied together

  int64_t steps(int64_t depth) const {
    const int64_t values = digits == 1 ? 2 * units : 4 * units;
    return (depth + values - 1) / values;
  }
  int64_t plane_bytes(int64_t depth) const { return steps(depth) * units * 4; }
  int64_t bytes_per_vector(int64_t depth) const { return digits * plane_bytes(depth); }
};

// Norms of a quantised vector, as the proof names them, rounded up.
struct Norms {
  float scale;      // of the integer products; s, for three digits 2^8 s
  double norm;      // |x|
  double residual;  // |r|
  double digits;    // T
  double middle;    // M, 0 for one digit
  double low;       // L, 0 for one digit
};

// kTileTokens tokens; those beyond the vocabulary, from `count` on, have offset -inf.
struct ScreenTile {
  const void* digits;
  const float* scale;
  const float* offset;  // bias
  const float* bound;   // [kTerms]
  int64_t first_token;
  int count;
};

// A panel of hidden rows. Arrays of rows are [row_panel], those with several numbers a row [number][row_panel].
struct ScreenRows {
  const void* digits;
  const float* scale;
  const float* bound;       // [kTerms][row_panel]
  const float* slack;       // added to every bound: rounding of what was computed in fp64
  const float* shift;       // x.m
  const float* target_z;    // of x.c + b, NaN where there is no target
  const int32_t* screened;  // 0 for rows that are not
  int64_t first_row;
};

// Running statistics of a panel of rows over a range of the vocabulary; l is the logit, after scale and softcap, less
// the constant scale * x.m where there is no softcap.
struct ScreenState {
  float* reached;      // the largest z is known to be at least this
  float* peak;         // largest l
  double* total;       // sum of exp(l - peak)
  double* weighted;    // sum of (l - peak) * exp(l - peak)
  double* uncertain;   // sum of exp(l - peak) * (exp(bound of l) - 1), rounded up
  int32_t* above;      // tokens that certainly beat the target
  int32_t* listed;     // candidates; more than kMaxListed: the list is not complete
};

// A token that may be the argmax, or that may or may not beat the target, or that weighs much in the sums. A call has
// fewer than 2^32 rows and 2^31 tokens.
struct Candidate {
  float z, bound;
  uint32_t row;
  uint32_t token : 31, near_target : 1;  // near_target: not decided, and not counted in `above`
};
static_assert(sizeof(Candidate) == 16);

struct LogitMap {
  float scale;
  float softcap;  // 0 for none
};

struct ScreenKernels {
  const char* name;
  ScreenFormat format;

  // Values of a row of weights in fp64, and their products with x summed up in fp64 in any order.
  void (*widen)(const void* w, Element element, double* out, int64_t depth);
  double (*dot_product)(const void* w, Element element, const double* x, int64_t depth);

  // The digits of a finite vector as planes of plane_bytes each, the highest digit first; what lies beyond depth is not
  // written. q is scratch memory of depth numbers.
  Norms (*quantise)(const double* x, int64_t depth, int64_t plane_bytes, int32_t* q, void* planes);

  // Around calls of multiply() on one thread.
  void (*enter)();
  void (*leave)();

  // products[token][row] of a tile and a panel; 64-byte aligned.
  void (*multiply)(const ScreenTile&, const ScreenRows&, int64_t steps, float* products);

  // Fold products, which are overwritten, into the state; candidates (at most kTileTokens * row_panel) are written to
  // `found`, and their number is returned.
  int64_t (*fold)(const ScreenTile&, const ScreenRows&, const LogitMap&, float* products, const ScreenState&,
                  Candidate* found);
};

#if REFINELENS_X86_AMX
const ScreenKernels& amx_screen_kernels();
#endif

// The kernels for an unembedding: those of selected_isa(), or the next ones that can do it.
const ScreenKernels& screen_kernels(int64_t depth);

}  // namespace refinelens
