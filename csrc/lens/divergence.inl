// Divergences of a tile of logits, of which the first row of every group is the one that the others are compared with.

namespace refinelens::REFINELENS_KERNELS {

// log(1 + y) for 0 <= y <= 1: y times the polynomial of degree 8 whose largest relative error there is smallest (3e-8,
// by Remez's algorithm).
inline Floats log1p_of_share(Floats y) {
  Floats p = y * 5.2326941e-3f - 2.9505237e-2f;
  p = p * y + 7.8225948e-2f;
  p = p * y - 1.3663245e-1f;
  p = p * y + 1.9106006e-1f;
  p = p * y - 2.4842982e-1f;
  p = p * y + 3.3319097e-1f;
  p = p * y - 4.9999493e-1f;
  p = p * y + 9.9999997e-1f;
  return p * y;
}

// What a token adds to the Jensen-Shannon divergence of probabilities e^a and e^b, neither exponent below kExpFloor:
// with P the larger, e the smaller over P, h = -ln(e) / 2 and y = (1 - e) / (1 + e) = tanh(h), it is
// P (1 + e) / 2 * (log(1 + y) - (1 - y) h). Where they are close, y from h keeps the digits that 1 - e loses.
inline Floats jensen_shannon_of(Floats a, Floats b) {
  const Floats difference = magnitude(a - b), h = difference * 0.5f;
  const Floats larger_p = exp_nonpositive(larger(a, b)), e = exp_nonpositive(clamp_exponent(-difference));
  const Floats rest = 2.0f * e / (1.0f + e);  // 1 - y
  const Ints is_close = h < 1.0f;
  const Floats y = is_close ? small_tanh(h, h * h) : 1.0f - rest;
  return larger_p * (1.0f + e) * 0.5f * (log1p_of_share(y) - (is_close ? 1.0f - y : rest) * h);
}

// What it adds to KL(e^b || e^a), and e^b.
struct Weighted {
  Floats value, mass;
};

inline Weighted kullback_leibler_of(Floats a, Floats b) {
  const Floats floor = broadcast(kExpFloor), q = exp_nonpositive(clamp_exponent(b, floor));
  const Ints is_absent = b < floor;
  return {is_absent ? Floats{} : q * (b - a), is_absent ? Floats{} : q};
}

// Columns of a tile, [row of a group][token], and which of them each lane of a vector is compared with.
class Firsts {
 public:
  // Takes the columns of the groups that begin in a panel; that of a group that goes on from the panel before is kept.
  void take(const float* tile, const Panel& panel, int64_t count, int64_t group) {
    const int64_t before = panel.row / group;
    if (panel.row % group != 0 && before != first_)
      for (int64_t i = 0; i < count; ++i) columns_[0][i] = columns_[before - first_][i];
    first_ = before;
    for (int64_t lane = (group - panel.row % group) % group; lane < panel.count; lane += group)
      for (int64_t i = 0; i < count; ++i)
        columns_[(panel.row + lane) / group - first_][i] = tile[i * panel.width() + lane];
  }

  // to[token][lane] of the vector of rows from `row` on; beyond the panel's last row any.
  void spread(int64_t row, int64_t n_rows, int64_t count, int64_t group, float* to) const {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t own = row + (lane < n_rows ? lane : 0);
      const float* column = columns_[own / group - first_];
      for (int64_t i = 0; i < count; ++i) to[i * kLanes + lane] = column[i];
    }
  }

 private:
  int64_t first_ = 0;  // the group of the first column
  float columns_[kWide + 1][kMaxTokens];
};

// Adds what the tokens of kLanes rows contribute; both are log-probabilities, that of the first ones [token][kLanes].
inline void add_divergence(const Lanes& lanes, const float* first, Divergence kind, const DivergenceState& state,
                           int64_t row) {
  Floats values[2] = {}, masses[2] = {};
  const Floats floor = opaque(kExpFloor);
  if (kind == Divergence::jensen_shannon)
    for_tokens(lanes.count, [&](int64_t token, int i) {
      values[i] += jensen_shannon_of(clamp_exponent(lanes.at(token), floor),
                                     clamp_exponent(load(first + token * kLanes), floor));
    });
  else
    for_tokens(lanes.count, [&](int64_t token, int i) {
      const Weighted found = kullback_leibler_of(lanes.at(token), load(first + token * kLanes));
      values[i] += found.value;
      masses[i] += found.mass;
    });
  const Floats value = values[0] + values[1], mass = masses[0] + masses[1];
  for (int i = 0; i < kLanes; ++i) {
    state.value[row + i] += value[i];
    state.mass[row + i] += mass[i];
  }
}

static void divergence_range(const LensProblem& problem, const PackedRows& rows, const DivergenceSpec& spec,
                             int64_t first, int64_t last, const DivergenceState& state, float* memory) {
  const Scratch scratch(memory);
  Firsts firsts;
  alignas(64) float compared[kMaxTokens * kLanes];
  for_tiles(problem, rows, {0, panels_of(rows)}, first, last, scratch,
            [&](const Panel& panel, int64_t, int64_t count) {
              alignas(64) float logsumexp[kWide] = {};
              __builtin_memcpy(logsumexp, spec.logsumexp + panel.row, sizeof(float) * panel.count);
              for (int64_t i = 0; i < count; ++i) {
                float* z = scratch.tile + i * panel.width();
                if (problem.softcap != 0.0f) soft_cap(z, panel.width(), problem.softcap);
                for (int64_t lane = 0; lane < panel.width(); lane += kLanes)
                  store(z + lane, load(z + lane) - load(logsumexp + lane));
              }
              firsts.take(scratch.tile, panel, count, spec.group);
              for (int64_t lane = 0; lane < panel.count; lane += kLanes) {
                firsts.spread(panel.row + lane, panel.count - lane, count, spec.group, compared);
                add_divergence({scratch.tile + lane, panel.width(), count}, compared, spec.kind, state,
                               panel.row + lane);
              }
            });
}

}  // namespace refinelens::REFINELENS_KERNELS
