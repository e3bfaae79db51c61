// What selection knows of a row and of a block's shares of its bound, and the threshold that its launches have found so far.
constexpr float TARGET = 0.85f;    // of the budget
constexpr int OCTAVES_ABOVE = 10;  // of the largest threshold, over the target: a share of T1 may be far above what T2 or T3 make of it

struct RowState {
  float top, mass, output, target, fixed;
  __device__ __forceinline__ RowState(const Call &call, int h, int rows, int index) {
    const float *facts = call.facts + (i64)(h * rows + index) * ROW_FACTS;
    top = facts[ROW_TOP], mass = facts[ROW_MASS], output = facts[ROW_NORM], target = TARGET * facts[ROW_BUDGET], fixed = facts[ROW_FIXED];
  }
};
struct Shares { float key, value; Terms terms; };

__device__ __forceinline__ bool open_row(const Call &call, int h, int group, int tile, int row) {
  const int rows = group * call.n, index = tile * ROW_TILE + row;
  return index < rows && call.state[h * rows + index] == OPEN;
}

// Of full block b; what was skipped can have no share less.
__device__ __forceinline__ Shares shares(const Call &call, int base, int b, int row, const RowState &own) {
  const float *p = call.statistics + ((i64)base * (call.full + 1) + b) * STATISTIC_FLOATS;
  Stats x;
#pragma unroll
  for (int k = 0; k < STATISTICS + 3; k++) x[k] = p[k < STATISTICS ? k * ROW_TILE + row : BLOCK_NOTES + k - STATISTICS];
  Shares s = {0.f, 0.f, {}};
  if (x[SUM] <= 0.f) return s;
  s.terms = block_terms(x, exp2_approx(x[TOP] - own.top) / own.mass, false);
  if (call.marks[(i64)base * call.full + b] & SKIPPED_BLOCK) return s;
  s.key = s.terms.t1 + s.terms.g * own.output, s.value = s.terms.value;
  return s;
}

__device__ __forceinline__ float *picks(const Call &call, int base, int round, int part) {
  return call.picks + (((i64)base * 2 + round) * PICK_PARTS + part) * ROW_TILE * LANES * 2;
}

// The threshold that this lane tries in a round, 0 or 1; of round 2, what was found. Infinite where no promotion would do. For a whole warp.
__device__ __forceinline__ float threshold(const Call &call, int base, int row, const RowState &own, int round, int lane) {
  if (!(own.target > 0.f)) return INFINITY;
  float best = own.target * exp2f(OCTAVES_ABOVE);
  for (int r = 0; r < round; r++) {
    float terms = 0.f, low = 0.f;
    for (int part = 0; part < PICK_PARTS; part++) {
      const float *p = picks(call, base, r, part) + (row * LANES + lane) * 2;
      terms += p[0], low += p[1];
    }
    const float denominator = 1.f - low * LOW_ROUNDING;
    const bool fits = denominator > 1e-4f && (terms + own.fixed) * ((1.f + THETA) * SAFETY) / denominator <= own.target;
    const u32 fitting = __ballot_sync(~0u, fits);
    if (r == 0) {
      if (!fitting) return INFINITY;
      best *= exp2f(-(float)(__ffs(fitting) - 1));
    } else if (fitting) {
      best *= exp2f((31 - (__ffs(fitting) - 1)) / 32.f);
    }
  }
  return round == 0 ? best * exp2f(-(float)lane) : round == 1 ? best * exp2f((31 - lane) / 32.f) : best;
}
