// Folds a tile of screened logits, [tokens][rows of a panel], into the state of its rows; a lane is a hidden row.
// screen_kernels.hpp says what is computed.

namespace refinelens::REFINELENS_KERNELS {

constexpr float kUp = 1.0f + 0x1p-20f;  // more than the roundings of the few fp32 operations on bounds

// Below, or above, the exact value of a sum whose rounded value is x.
inline Floats lowered(Floats x) { return x - (magnitude(x) * 0x1p-22f + 0x1p-125f); }
inline Floats raised(Floats x) { return x + (magnitude(x) * 0x1p-22f + 0x1p-125f); }

inline Floats error_bound(const ScreenTile& tile, const ScreenRows& rows, int lane) {
  Floats sum = load(rows.slack + lane);
  for (int i = 0; i < kTerms; ++i) sum += tile.bound[i] * load(rows.bound + i * kPanel + lane);
  return sum * kUp;
}

// Products become z in place; returns the largest of each row.
inline Floats scale_products(const ScreenTile& tile, Floats scale, float* products) {
  Floats m[4];
  for (Floats& chain : m) chain = broadcast(-kInfinity);
  for (int v = 0; v < kTileTokens; v += 4)
    for (int i = 0; i < 4; ++i) {
      float* p = products + (v + i) * kPanel;
      const Floats z = load(p) * (scale * tile.scale[v + i]) + tile.offset[v + i];
      store(p, z);
      m[i] = larger(z, m[i]);
    }
  return larger(larger(m[0], m[1]), larger(m[2], m[3]));
}

// Sums of exp(l - peak), where `best` is the largest l; z is read where `capped` is null.
inline void add_exponentials(const float* z, const float* capped, const LogitMap& map, Floats best, Floats error,
                             const ScreenState& state, int lane) {
  const Floats old_peak = load(state.peak + lane);
  const Floats peak = larger(best, old_peak);
  store(state.peak + lane, peak);
  const Floats base = peak == -kInfinity ? Floats{} : peak;
  Floats sums[2] = {}, moments[2] = {};
  for (int v = 0; v < kTileTokens; ++v) {
    const Floats l = capped ? load(capped + v * kLanes) : load(z + v * kPanel) * map.scale;
    const Floats d = clamp_exponent(l - base);
    const Floats e = exp_nonpositive(d);
    sums[v & 1] += e;
    moments[v & 1] += d * e;
  }
  Floats shift = old_peak == -kInfinity ? Floats{} : old_peak - base;
  shift = clamp_exponent(shift);
  const Floats factor = exp_nonpositive(shift);
  const Floats seen = best == -kInfinity ? Floats{} : broadcast(1.0f);
  const Floats sum = (sums[0] + sums[1]) * seen, moment = (moments[0] + moments[1]) * seen;
  // exp(x) - 1 <= x + x^2 for x <= 1; beyond, the logsumexp's bound is the largest bound of a logit.
  const Floats x = error * map.scale;
  const Floats growth = x > 1.0f ? broadcast(1e30f) : (x + x * x) * kUp;
  for (int i = 0; i < kLanes; ++i) {
    double* total = state.total + lane + i;
    double* weighted = state.weighted + lane + i;
    double* uncertain = state.uncertain + lane + i;
    *weighted = (*weighted + shift[i] * *total) * factor[i] + moment[i];
    *total = *total * factor[i] + sum[i];
    *uncertain = *uncertain * factor[i] + static_cast<double>(sum[i]) * growth[i];
  }
}

static int64_t fold_lanes(const ScreenTile& tile, const ScreenRows& rows, const LogitMap& map, int lane, float* z,
                          const ScreenState& state, Candidate* found) {
  const Floats error = error_bound(tile, rows, lane);
  const Floats best = scale_products(tile, load(rows.scale + lane), z);

  const Floats reached = larger(lowered(best - error), load(state.reached + lane));
  store(state.reached + lane, reached);
  // Of a row that has only seen -inf nothing is listed.
  const Floats lowest = broadcast(-0x1.fffffep127f);
  const Floats limit = larger(lowered(reached - error), lowest);
  const Ints full = *reinterpret_cast<const Ints*>(state.listed + lane) >= kMaxHeavy;
  const Floats heavy_limit = full ? broadcast(kInfinity) : larger(reached - kHeavyNats / map.scale, lowest);
  const Floats target = load(rows.target_z + lane);
  const Floats high = raised(target + error), low = lowered(target - error);
  Ints above = {}, reaching = {};
  for (int v = 0; v < kTileTokens; ++v) {
    const Floats value = load(z + v * kPanel);
    above = value > high ? above + 1 : above;
    reaching = value >= low ? reaching + 1 : reaching;
  }
  *reinterpret_cast<Ints*>(state.above + lane) += above;

  int64_t count = 0;
  const Ints interesting = (best >= limit) | (best >= heavy_limit) | (above != reaching);
  if (any(interesting))
    for (int i = 0; i < kLanes; ++i) {
      if (!interesting[i] || !rows.screened[lane + i]) continue;
      int32_t& listed = state.listed[lane + i];
      for (int v = 0; v < kTileTokens && listed <= kMaxListed; ++v) {
        const float value = z[v * kPanel + i];
        const bool near_target = value >= low[i] && !(value > high[i]);
        const bool heavy = value >= heavy_limit[i] && listed < kMaxHeavy;
        if (!near_target && !heavy && !(value >= limit[i])) continue;
        ++listed;
        found[count++] = {value, error[i], static_cast<uint32_t>(rows.first_row + lane + i),
                          static_cast<uint32_t>(tile.first_token + v), near_target};
      }
    }

  if (map.softcap == 0.0f) {
    add_exponentials(z, nullptr, map, best * map.scale, error, state, lane);
    return count;
  }
  float capped[(kTileTokens + 1) * kLanes] __attribute__((aligned(kVectorBytes)));
  const Floats shift = load(rows.shift + lane);
  for (int v = 0; v < kTileTokens; ++v) store(capped + v * kLanes, (load(z + v * kPanel) + shift) * map.scale);
  float* top = capped + kTileTokens * kLanes;
  store(top, (best + shift) * map.scale);
  soft_cap(capped, (kTileTokens + 1) * kLanes, map.softcap);
  // The cap makes -inf finite: right for a token, wrong for what only fills up the tile.
  for (int v = tile.count; v < kTileTokens; ++v) store(capped + v * kLanes, broadcast(-kInfinity));
  add_exponentials(z, capped, map, load(top), error, state, lane);
  return count;
}

static int64_t fold_tile(const ScreenTile& tile, const ScreenRows& rows, const LogitMap& map, float* products,
                         const ScreenState& state, Candidate* found) {
  int64_t count = 0;
  for (int lane = 0; lane < kPanel; lane += kLanes)
    count += fold_lanes(tile, rows, map, lane, products + lane, state, found + count);
  return count;
}

}  // namespace refinelens::REFINELENS_KERNELS
