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

inline Floats largest_of(const Lanes& lanes) {
  Floats best[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  for_tokens(lanes.count, [&](int64_t token, int i) { best[i] = larger(lanes.at(token), best[i]); });
  return larger(best[0], best[1]);
}

// How many tokens have at least `bound`.
inline Ints count_reaching(const Lanes& lanes, Floats bound) {
  Ints count[2] = {};
  for_tokens(lanes.count, [&](int64_t token, int i) { count[i] = lanes.at(token) >= bound ? count[i] + 1 : count[i]; });
  return count[0] + count[1];
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

// What tokens that beat the targets reach, where no target is among them: t itself if ties count, else the float above.
inline Floats bound_of(const Lanes& lanes, Ints target, Floats target_z) {
  return target >= static_cast<int32_t>(lanes.count) ? target_z : next_above(target_z);
}

// Whether some target is among the tokens, or its z is not normal. `targets` are counted from the first token.
inline bool needs_comparison(const Lanes& lanes, Ints target, Floats target_z) {
  const Ints outside = (target >= static_cast<int32_t>(lanes.count)) | (target < 0);
  return any(~(outside & (magnitude(target_z) > 0x1p-120f) & (magnitude(target_z) < kInfinity)));
}

// Tokens that beat the targets: larger, or equal with a lower id.
inline Ints count_beating(const Lanes& lanes, Ints target, Floats target_z) {
  Ints count = {};
  for (int64_t token = 0; token < lanes.count; ++token) {
    const Floats z = lanes.at(token);
    const Ints has_lower_id = static_cast<int32_t>(token) < target;
    count -= (z > target_z) | ((z == target_z) & has_lower_id);
  }
  return count;
}

// Adds to the rank of every target of kLanes rows how many of the tokens first, first + 1, ... beat it.
inline void count_ranks(const Lanes& lanes, int64_t first, const PackedTargets& targets, int32_t* rank) {
  for (int64_t i = 0; i < targets.count; ++i) {
    const PackedTargets own = targets.at(i, 0);
    const Ints target = *reinterpret_cast<const Ints*>(own.token) - static_cast<int32_t>(first);
    const Floats z = load(own.z);
    *reinterpret_cast<Ints*>(rank + i * targets.stride) += needs_comparison(lanes, target, z)
                                                               ? count_beating(lanes, target, z)
                                                               : count_reaching(lanes, bound_of(lanes, target, z));
  }
}

// Puts the tokens first, first + 1, ... that belong there into the lists of kLanes rows. Rare once the lists are full:
// of V tokens in random order about k ln(V / k) come in.
inline void list_top(const Lanes& lanes, Floats largest, int64_t first, const TopState& top, int64_t row) {
  const Ints reaches = largest >= load(top.last + row);
  if (!any(reaches)) return;
  const int64_t end = top.k - 1;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!reaches[lane]) continue;
    float* z = top.z + (row + lane) * top.k;
    int32_t* id = top.id + (row + lane) * top.k;
    const auto stays_before = [&](int64_t i, float value, int32_t token) {
      return z[i] > value || (z[i] == value && id[i] < token);  // ranges come to a thread in any order
    };
    for (int64_t i = 0; i < lanes.count; ++i) {
      const float value = lanes.z[i * lanes.stride + lane];
      const int32_t token = static_cast<int32_t>(first + i);
      if (!(value >= z[end]) || stays_before(end, value, token)) continue;
      int64_t at = end;
      for (; at > 0 && !stays_before(at - 1, value, token); --at) {
        z[at] = z[at - 1];
        id[at] = id[at - 1];
      }
      z[at] = value;
      id[at] = token;
    }
    top.last[row + lane] = z[end];
  }
}

// Fold the tokens first, first + 1, ... of a range that starts at `range` into the statistics of kLanes rows.
inline void reduce_lanes(const Lanes& lanes, int64_t first, int64_t range, float softcap, const RangeState& state,
                         int64_t row, const PackedTargets& targets) {
  const Floats tile_best = largest_of(lanes), old_best = load(state.best + row), seen = load(state.seen + row);
  // What lies below a z seen in another range is not the argmax, and need not be found: so this is rare.
  const Ints leads = (tile_best > old_best) & (tile_best >= seen);
  store(state.best + row, larger(tile_best, old_best));
  if (any(leads)) {
    Ints& argmax = *reinterpret_cast<Ints*>(state.argmax + row);
    argmax = leads ? lowest_id(lanes, tile_best) + static_cast<int32_t>(first - range) : argmax;
    store(state.seen + row, larger(tile_best, seen));
  }
  if (state.top.k) list_top(lanes, tile_best, first, state.top, row);
  count_ranks(lanes, first, targets, state.rank + row);

  const Floats old_peak = load(state.peak + row);
  store(state.peak + row, load(state.best + row));
  if (softcap != 0.0f) {
    soft_cap(state.peak + row, kLanes, softcap);
    for (int64_t token = 0; token < lanes.count; ++token) soft_cap(lanes.z + token * lanes.stride, kLanes, softcap);
  }
  const Floats peak = load(state.peak + row);
  // Rows that have seen nothing but -inf have sums of 0, for which any finite base and shift will do.
  const Floats base = peak == -kInfinity ? Floats{} : peak;
  const Floats floor = opaque(kExpFloor);
  Floats sums[2] = {}, moments[2] = {};
  for_tokens(lanes.count, [&](int64_t token, int i) {
    const Floats d = clamp_exponent(lanes.at(token) - base, floor);
    __builtin_prefetch(lanes.z + token * lanes.stride + kLanes);  // what the next lanes' first pass would wait for
    const Floats e = exp_nonpositive(d);
    sums[i] += e;
    moments[i] += d * e;
  });
  const Floats shift = clamp_exponent(old_peak == -kInfinity ? Floats{} : old_peak - base);
  const Floats factor = exp_nonpositive(shift);
  // Tokens of no logit but -inf add nothing; a product, not a choice, so that nothing but NaN adds NaN. A softcap makes
  // -inf finite.
  Floats any_finite = broadcast(1.0f);
  if (softcap == 0.0f) any_finite = tile_best == -kInfinity ? Floats{} : any_finite;
  const Floats sum = (sums[0] + sums[1]) * any_finite, moment = (moments[0] + moments[1]) * any_finite;
  double* total = state.total + row;
  double* weighted = state.weighted + row;
  for (int i = 0; i < kLanes; ++i) {
    weighted[i] = (weighted[i] + shift[i] * total[i]) * factor[i] + moment[i];
    total[i] = total[i] * factor[i] + sum[i];
  }
}

}  // namespace refinelens::REFINELENS_KERNELS
