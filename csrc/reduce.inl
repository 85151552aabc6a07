// One pass of statistics over a tile of logits, [tokens][rows of a panel], while it is near. A lane is a hidden
// row, so nothing is ever added or compared across lanes.

namespace refinelens::REFINELENS_KERNELS {

// Logits of kLanes rows: `count` tokens, `stride` floats apart.
struct Lanes {
  float* z;  // overwritten where there is a softcap
  int64_t stride, count;

  Floats at(int64_t token) const { return load(z + token * stride); }
};

// f(token, i) for every token, with i running over 0, 1, 0, 1, ... as a constant: two chains for what depends on the
// token before.
template <typename F>
inline void for_tokens(int64_t count, F f) {
  int64_t token = 0;
  for (; token + 4 <= count; token += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) f(token + i, i & 1);
  }
  for (; token < count; ++token) f(token, 0);
}

inline Floats largest(const Lanes& lanes) {
  Floats best[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  for_tokens(lanes.count, [&](int64_t token, int i) { best[i] = larger(lanes.at(token), best[i]); });
  return larger(best[0], best[1]);
}

// The lowest token, counted from the first, that has the value `best`.
inline Ints lowest_id(const Lanes& lanes, Floats best) {
  Ints id = {}, candidate = static_cast<int32_t>(lanes.count) - Ints{};
  for (int64_t token = lanes.count - 1; token >= 0; --token) {
    candidate -= 1;
    id = lanes.at(token) == best ? candidate : id;
  }
  return id;
}

// The smallest float above t, for a normal t.
inline Floats next_above(Floats t) {
  const Ints bits = reinterpret_cast<const Ints&>(t);
  const Ints next = bits < 0 ? bits - 1 : bits + 1;
  return reinterpret_cast<const Floats&>(next);
}

// Tokens that beat the targets: larger, or equal with a lower id. `targets` are counted from the first token.
inline Ints count_beating(const Lanes& lanes, Ints target, Floats target_z) {
  // Where the target is not among the tokens one comparison does: with t if ties count, with the float above if not.
  const Ints after = target >= static_cast<int32_t>(lanes.count), before = target < 0;
  const Floats magnitude = target_z < 0.0f ? -target_z : target_z;
  const Ints is_normal = (magnitude > 0x1p-120f) & (magnitude < kInfinity);
  if (!any(~((after | before) & is_normal))) {
    const Floats bound = after ? target_z : next_above(target_z);
    Ints count[2] = {};
    for_tokens(lanes.count, [&](int64_t token, int i) {
      count[i] = lanes.at(token) >= bound ? count[i] + 1 : count[i];
    });
    return count[0] + count[1];
  }
  Ints count = {};
  for (int64_t token = 0; token < lanes.count; ++token) {
    const Floats z = lanes.at(token);
    const Ints has_lower_id = static_cast<int32_t>(token) < target;
    count -= (z > target_z) | ((z == target_z) & has_lower_id);
  }
  return count;
}

// Fold the tokens first, first + 1, ... of a range that starts at `range` into the statistics of kLanes rows.
inline void reduce_lanes(const Lanes& lanes, int64_t first, int64_t range, float softcap, const RangeState& state,
                         int64_t row, const int32_t* targets, const float* target_z) {
  const Floats tile_best = largest(lanes), old_best = load(state.best + row);
  const Ints improved = tile_best > old_best;
  Ints& argmax = *reinterpret_cast<Ints*>(state.argmax + row);
  if (any(improved)) {
    store(state.best + row, larger(tile_best, old_best));
    argmax = improved ? lowest_id(lanes, tile_best) + static_cast<int32_t>(first - range) : argmax;
  }
  if (targets) {
    const Ints relative = *reinterpret_cast<const Ints*>(targets) - static_cast<int32_t>(first);
    *reinterpret_cast<Ints*>(state.rank + row) += count_beating(lanes, relative, load(target_z));
  }

  const Floats old_peak = load(state.peak + row);
  store(state.peak + row, load(state.best + row));
  if (softcap != 0.0f) {
    soft_cap(state.peak + row, kLanes, softcap);
    for (int64_t token = 0; token < lanes.count; ++token) soft_cap(lanes.z + token * lanes.stride, kLanes, softcap);
  }
  const Floats peak = load(state.peak + row);
  // Rows that have seen nothing but -inf have sums of 0, for which any finite base and shift will do.
  const Floats base = peak == -kInfinity ? Floats{} : peak;
  Floats sums[2] = {}, moments[2] = {};
  for_tokens(lanes.count, [&](int64_t token, int i) {
    const Floats d = clamp_exponent(lanes.at(token) - base);
    const Floats e = exp_nonpositive(d);
    sums[i] += e;
    moments[i] += d * e;
  });
  const Floats shift = clamp_exponent(old_peak == -kInfinity ? Floats{} : old_peak - base);
  const Floats factor = exp_nonpositive(shift);
  // Tokens of nothing but -inf add nothing; a product, not a choice, so that nothing but NaN adds NaN.
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
