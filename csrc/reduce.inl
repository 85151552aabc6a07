// One pass of statistics over a tile of logits, [tokens][rows of a panel], while it is in the first-level cache. See
// vectors.inl for how it is included. A lane is a hidden row, so nothing is ever added or compared across lanes.

namespace refinelens::REFINELENS_KERNELS {

struct Tile {
  float* z;       // overwritten where there is a softcap
  int64_t width;  // rows of the panel
  int64_t count;  // tokens
};

inline Floats column_max(const Tile& tile, int64_t lane) {
  Floats m[4];
  for (Floats& chain : m) chain = broadcast(-kInfinity);
  int64_t v = 0;
  for (; v + 4 <= tile.count; v += 4)
    for (int i = 0; i < 4; ++i) m[i] = larger(load(tile.z + (v + i) * tile.width + lane), m[i]);
  for (; v < tile.count; ++v) m[0] = larger(load(tile.z + v * tile.width + lane), m[0]);
  return larger(larger(m[0], m[1]), larger(m[2], m[3]));
}

// The lowest token of the tile, counted from its first, that has the value `best`.
inline Ints lowest_id(const Tile& tile, int64_t lane, Floats best) {
  Ints id = {};
  for (int64_t v = tile.count - 1; v >= 0; --v)
    id = load(tile.z + v * tile.width + lane) == best ? static_cast<int32_t>(v) - Ints{} : id;
  return id;
}

// The smallest float above t, for a normal t.
inline float next_above(float t) {
  const int32_t bits = __builtin_bit_cast(int32_t, t);
  return __builtin_bit_cast(float, bits + (bits < 0 ? -1 : 1));
}

// Tokens of the tile that beat the targets: larger, or equal with a lower id.
inline Ints count_beating(const Tile& tile, int64_t lane, int64_t first, const int64_t* target, const float* target_z) {
  // Where the target is not in the tile, one comparison does: with t if ties count, with the float above t if not.
  float limit[kLanes] __attribute__((aligned(kVectorBytes)));
  bool simple = true;
  for (int i = 0; i < kLanes; ++i) {
    const float t = target_z[i];
    const bool below = first + tile.count <= target[i], above = first > target[i];
    limit[i] = below ? t : next_above(t);
    simple &= (below || above) && __builtin_fabsf(t) > 0x1p-120f && __builtin_fabsf(t) < kInfinity;
  }
  Ints count = {};
  if (simple) {
    const Floats bound = load(limit);
    for (int64_t v = 0; v < tile.count; ++v)
      count = load(tile.z + v * tile.width + lane) >= bound ? count + 1 : count;
    return count;
  }
  const Floats t = load(target_z);
  for (int i = 0; i < kLanes; ++i)
    for (int64_t v = 0; v < tile.count; ++v) {
      const float z = tile.z[v * tile.width + lane + i];
      count[i] += z > t[i] || (z == t[i] && first + v < target[i]);
    }
  return count;
}

// Fold tokens first, first + 1, ... of kLanes rows into their state; `offset` is `first` counted from the range's start.
static void reduce_lanes(const Tile& tile, int64_t lane, int64_t first, int64_t offset, float softcap,
                         const RangeState& state, int64_t row, const int64_t* targets, const float* target_z) {
  const Floats tile_best = column_max(tile, lane), old_best = load(state.best + row);
  const Ints improved = tile_best > old_best;
  Ints& argmax = *reinterpret_cast<Ints*>(state.argmax + row);
  if (any(improved)) {
    store(state.best + row, larger(tile_best, old_best));
    argmax = improved ? lowest_id(tile, lane, tile_best) + static_cast<int32_t>(offset) : argmax;
  }
  if (targets) *reinterpret_cast<Ints*>(state.rank + row) += count_beating(tile, lane, first, targets, target_z);

  const Floats old_peak = load(state.peak + row);
  store(state.peak + row, load(state.best + row));
  if (softcap != 0.0f) {
    soft_cap(state.peak + row, kLanes, softcap);
    for (int64_t v = 0; v < tile.count; ++v) soft_cap(tile.z + v * tile.width + lane, kLanes, softcap);
  }
  const Floats peak = load(state.peak + row);
  // Rows that have seen nothing but -inf have sums of 0, for which any finite base and shift will do.
  const Floats base = peak == -kInfinity ? Floats{} : peak;
  Floats sums[2] = {}, moments[2] = {};
  for (int64_t v = 0; v < tile.count; ++v) {
    const Floats d = clamp_exponent(load(tile.z + v * tile.width + lane) - base);
    const Floats e = exp_nonpositive(d);
    sums[v & 1] += e;
    moments[v & 1] += d * e;
  }
  Floats shift = old_peak == -kInfinity ? Floats{} : old_peak - base;
  shift = clamp_exponent(shift);
  const Floats factor = exp_nonpositive(shift);
  // A tile of nothing but -inf adds nothing; a product, not a choice, so that a tile of NaN adds NaN.
  const Floats seen = tile_best == -kInfinity ? Floats{} : broadcast(1.0f);
  const Floats sum = (sums[0] + sums[1]) * seen, moment = (moments[0] + moments[1]) * seen;
  double* total = state.total + row;
  double* weighted = state.weighted + row;
  for (int i = 0; i < kLanes; ++i) {
    weighted[i] = (weighted[i] + shift[i] * total[i]) * factor[i] + moment[i];
    total[i] = total[i] * factor[i] + sum[i];
  }
}

}  // namespace refinelens::REFINELENS_KERNELS
