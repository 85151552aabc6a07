// Kernels of the screen that are the same for every integer product, and their table: folding a tile of screened logits,
// [tokens][rows of a panel], into the state of its rows, where a lane is a hidden row (screen_kernels.hpp says what is
// computed); in fp64, a vector quantised to kDigits digits, with the norms of the proof, and the weights and their
// products with a hidden row. Included after the product, whose layout it takes.

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

constexpr double kMaxNorm16 = 46339.0;  // 46340^2 < 2^31
constexpr double kMaxValue16 = 32766.0;
constexpr double kMaxValue24 = 8355000.0;  // 127 * (2^16 + 2^8 + 1) = 8355711
constexpr int kSums = 8;      // separate sums of squares, which the compiler may vectorise
constexpr int kDotSums = 16;  // of products

// The root of the sum of term(k)^2, rounded up.
template <typename Term>
inline double norm_of(int64_t depth, const Term& term) {
  double sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= depth; k += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += static_cast<double>(term(k + i)) * static_cast<double>(term(k + i));
  for (; k < depth; ++k) sums[0] += static_cast<double>(term(k)) * static_cast<double>(term(k));
  double sum = 0.0;
  for (double part : sums) sum += part;
  return __builtin_sqrt(sum) * kInflate;
}

inline float scale_of(double norm, double largest, int64_t depth) {
  // Rounding moves each value by at most 1/2, and so the norm by at most sqrt(depth) / 2.
  const double by_norm = norm / (kMaxNorm16 - 0.5 * __builtin_sqrt(static_cast<double>(depth)));
  const double by_value = largest / (kDigits == 1 ? kMaxValue16 : kMaxValue24);
  double scale = kDigits == 1 && by_norm > by_value ? by_norm : by_value;
  scale = scale > kSmallestScale ? scale : kSmallestScale;
  const float rounded = static_cast<float>(scale);
  return rounded < scale ? rounded * (1.0f + 0x1p-23f) : rounded;
}

// q = 2^16 d0 + 2^8 d1 + d2, each digit from -128 to 127, plane by plane.
static void split_digits(const int32_t* q, int64_t depth, int64_t plane_bytes, int8_t* planes) {
  for (int64_t k = 0; k < depth; ++k) {
    const int32_t low = static_cast<int8_t>(q[k]), rest = (q[k] - low) >> 8, middle = static_cast<int8_t>(rest);
    planes[2 * plane_bytes + k] = static_cast<int8_t>(low);
    planes[plane_bytes + k] = static_cast<int8_t>(middle);
    planes[k] = static_cast<int8_t>((rest - middle) >> 8);
  }
}

static Norms quantise(const double* x, int64_t depth, int64_t plane_bytes, int32_t* q, void* planes) {
  const double norm = norm_of(depth, [=](int64_t k) { return x[k]; });
  double largest = 0.0;
  for (int64_t k = 0; k < depth; ++k) {
    const double magnitude = x[k] < 0.0 ? -x[k] : x[k];
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = scale_of(norm, largest, depth);
  const double exact_scale = scale, inverse = 1.0 / exact_scale;
  constexpr double kToInteger = 0x1.8p52;  // adding 1.5 * 2^52 rounds to an integer
  for (int64_t k = 0; k < depth; ++k) q[k] = static_cast<int32_t>((x[k] * inverse + kToInteger) - kToInteger);
  // The product is exact: 24 bits by 24.
  Norms norms = {scale, norm, norm_of(depth, [=](int64_t k) { return x[k] - exact_scale * q[k]; }), 0.0, 0.0, 0.0};
  if (kDigits == 1) {
    int16_t* plane = static_cast<int16_t*>(planes);
    for (int64_t k = 0; k < depth; ++k) plane[k] = static_cast<int16_t>(q[k]);
    norms.digits = exact_scale * norm_of(depth, [=](int64_t k) { return q[k]; }) * kInflate;
    return norms;
  }
  int8_t* digits = static_cast<int8_t*>(planes);
  split_digits(q, depth, plane_bytes, digits);
  const auto norm_of_plane = [=](int plane) {
    return norm_of(depth, [=](int64_t k) { return digits[plane * plane_bytes + k]; });
  };
  norms.low = exact_scale * norm_of_plane(2) * kInflate;
  norms.middle = exact_scale * 0x1p8 * norm_of_plane(1) * kInflate;
  norms.digits = (exact_scale * 0x1p16 * norm_of_plane(0) + norms.middle + norms.low) * kInflate;
  norms.scale = scale * 0x1p8f;
  return norms;
}

template <typename T>
inline double widen_value(const void* w, int64_t k) {
  return T::widen(static_cast<const char*>(w) + k * T::kBytes);
}

static double dot_product(const void* w, Element element, const double* x, int64_t n) {
  return with_element(element, [=](auto type) {
    using T = decltype(type);
    double sums[kDotSums] = {};
    int64_t k = 0;
    for (; k + kDotSums <= n; k += kDotSums)
      for (int i = 0; i < kDotSums; ++i) sums[i] += widen_value<T>(w, k + i) * x[k + i];
    for (; k < n; ++k) sums[0] += widen_value<T>(w, k) * x[k];
    double sum = 0.0;
    for (double part : sums) sum += part;
    return sum;
  });
}

static void widen(const void* w, Element element, double* out, int64_t n) {
  with_element(element, [=](auto type) {
    for (int64_t k = 0; k < n; ++k) out[k] = widen_value<decltype(type)>(w, k);
  });
}

static const ScreenKernels kScreenKernels = {
    kName, {kDigits, kUnits, kGroup, kPanel}, widen, dot_product, quantise, enter, leave, multiply_tile, fold_tile,
};

}  // namespace refinelens::REFINELENS_KERNELS
