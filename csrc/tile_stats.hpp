// One-pass reduction of tiles of logits to per-row lens statistics.
//
// A caller multiplies the hidden rows with one slice ("tile") of the vocabulary at a time, in ascending
// order of token id, and hands each tile to reduce_tile(). The state of a row is a few numbers, so logits
// of rows x vocabulary never exist. No Python types here; bindings.cpp wraps this file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

// One binary runs on any x86-64: the loader picks the widest clone that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define REFINELENS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define REFINELENS_CLONES
#endif
#define REFINELENS_INLINE inline __attribute__((always_inline))

namespace refinelens {

// Running statistics of a block of rows; every array has one entry per row.
// z = logit_scale * (dot + bias) decides argmax and rank; l = softcap * tanh(z / softcap) enters the sums.
struct RowState {
  float* best;         // largest z so far, -inf before the first tile
  int64_t* argmax;     // its lowest id
  float* peak;         // largest l so far
  double* total;       // sum of exp(l - peak)
  double* weighted;    // sum of (l - peak) * exp(l - peak)
  const float* t_z;       // z of the target, or null without targets
  const int64_t* target;  // id of the target, or null
  int64_t* rank;          // tokens that beat the target so far, or null
};

struct Tile {
  float* dots;        // [rows, stride], overwritten
  int64_t stride;     // elements between rows
  int64_t columns;    // logits per row
  int64_t first_id;   // token id of column 0
  const float* bias;  // [columns], or null
  float scale;
  float softcap;  // 0 for none
};

constexpr int kLanes = 16;

// exp(x) for x <= 0 with a relative error of 2e-7: 2^n * e^r, |r| <= ln(2)/2, degree-6 minimax polynomial
// (coefficients of Cephes expf). NaN stays NaN; below -87 the result is 0.
REFINELENS_INLINE float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;  // the low bits of `shifted` hold n; 0x3f800000 is 1.0f
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

// cap * tanh(z / cap), from tanh(y) = sign(y) * (1 - e) / (1 + e) with e = exp(-2|y|).
REFINELENS_INLINE float soft_cap(float z, float cap) {
  const float e = exp_nonpositive(-2.0f * std::fabs(z / cap));
  return std::copysign(cap * (1.0f - e) / (1.0f + e), z);
}

// Sums run in kLanes separate accumulators, in an order fixed by the column, so that the compiler may
// vectorise them without being allowed to reorder floating-point additions.
REFINELENS_INLINE float lane_max(const float* v, int64_t n) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = -std::numeric_limits<float>::infinity();
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int i = 0; i < kLanes; ++i) lanes[i] = v[j + i] > lanes[i] ? v[j + i] : lanes[i];
  for (; j < n; ++j) lanes[0] = v[j] > lanes[0] ? v[j] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

REFINELENS_INLINE void lane_exp_sums(const float* v, int64_t n, float peak, double& total, double& weighted) {
  float sums[kLanes] = {}, moments[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const float d = v[j + i] - peak;
      const float e = exp_nonpositive(d);
      sums[i] += e;
      moments[i] += e == 0.0f ? 0.0f : d * e;
    }
  for (; j < n; ++j) {
    const float d = v[j] - peak;
    const float e = exp_nonpositive(d);
    sums[0] += e;
    moments[0] += e == 0.0f ? 0.0f : d * e;
  }
  for (int i = 0; i < kLanes; ++i) {
    total += sums[i];
    weighted += moments[i];
  }
}

// Columns of v[0..n) that exceed t, or equal it when ties_count.
REFINELENS_INLINE int64_t count_beating(const float* v, int64_t n, float t, bool ties_count) {
  int32_t count = 0;
  if (ties_count)
    for (int64_t j = 0; j < n; ++j) count += v[j] >= t;
  else
    for (int64_t j = 0; j < n; ++j) count += v[j] > t;
  return count;
}

// Tokens of this tile that beat the target: larger, or equal with a lower id. Its own column is skipped.
REFINELENS_INLINE int64_t count_rank(const float* z, const Tile& tile, float t, int64_t target) {
  const int64_t below = std::clamp<int64_t>(target - tile.first_id, 0, tile.columns);
  const int64_t above = std::clamp<int64_t>(target + 1 - tile.first_id, 0, tile.columns);
  return count_beating(z, below, t, true) + count_beating(z + above, tile.columns - above, t, false);
}

REFINELENS_CLONES static void reduce_rows(const Tile& tile, const RowState& rows, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    float* z = tile.dots + r * tile.stride;
    if (tile.bias)
      for (int64_t j = 0; j < tile.columns; ++j) z[j] = tile.scale * (z[j] + tile.bias[j]);
    else if (tile.scale != 1.0f)
      for (int64_t j = 0; j < tile.columns; ++j) z[j] = tile.scale * z[j];

    const float best = lane_max(z, tile.columns);
    if (best > rows.best[r]) {
      rows.best[r] = best;
      rows.argmax[r] = tile.first_id + (std::find(z, z + tile.columns, best) - z);
    }
    if (rows.target) rows.rank[r] += count_rank(z, tile, rows.t_z[r], rows.target[r]);

    float peak = best;
    if (tile.softcap != 0.0f) {
      for (int64_t j = 0; j < tile.columns; ++j) z[j] = soft_cap(z[j], tile.softcap);
      peak = lane_max(z, tile.columns);
    }
    if (peak > rows.peak[r]) {
      if (rows.total[r] > 0.0) {
        const double shift = static_cast<double>(rows.peak[r]) - peak;
        rows.weighted[r] = (rows.weighted[r] + shift * rows.total[r]) * std::exp(shift);
        rows.total[r] *= std::exp(shift);
      }
      rows.peak[r] = peak;
    }
    // A row that has only seen -inf adds exp(-inf) = 0 from any finite peak; NaN comes through.
    const float base = std::isinf(rows.peak[r]) && rows.peak[r] < 0 ? 0.0f : rows.peak[r];
    lane_exp_sums(z, tile.columns, base, rows.total[r], rows.weighted[r]);
  }
}

// Reduce a tile with up to n_threads threads over rows. A row is always reduced by one thread in one order,
// so results do not depend on the number of threads.
inline void reduce_tile(const Tile& tile, const RowState& rows, int64_t n_rows, int n_threads) {
  constexpr int64_t kLogitsPerThread = 1 << 16;  // below this a thread costs more than it saves
  const int64_t useful = n_rows * tile.columns / kLogitsPerThread + 1;
  const int64_t n = std::max<int64_t>(1, std::min<int64_t>({n_threads, useful, n_rows}));
  std::vector<std::thread> workers;
  for (int64_t i = 1; i < n; ++i)
    workers.emplace_back([&, i] { reduce_rows(tile, rows, n_rows * i / n, n_rows * (i + 1) / n); });
  reduce_rows(tile, rows, 0, n_rows / n);
  for (auto& worker : workers) worker.join();
}

}  // namespace refinelens
