// What selection knows of a row and of a block's shares of its bound, and the scale of its thresholds.
constexpr float TARGET = 0.9f;  // of the budget; what rows came to was at most 0.96 of it, and 0.99 with 0.93
// Thresholds, in targets, are the upper edges of bins: two octaves wide below 2^-14, where no more than rows of the longest contexts have
// theirs; a quarter of an octave up to 2^-2; and half of one above, where few blocks are left, and where what has a copy counts many times its
// share. Blocks of less than the lowest have, all together, at most a thirty-second of the target. (Fine up to 2^-7 alone,
// rows came to 0.62 of their budgets, as a median, and a call at 131,072 tokens and 5 % read 869 originals, not 586.)
constexpr int BINS = 64, QUARTERS_FROM = 127 - 14, HALVES_FROM = 127 - 2, QUARTERS = 4 * (HALVES_FROM - QUARTERS_FROM), ROOM_BELOW = 5;

// Where it lies: found before a wait, for the first look at a line of the call takes as long as one at what is waited for.
struct RowPlace {
  const float *facts;
  const int *state;
  bool real;
  __device__ __forceinline__ RowPlace(const Call &call, int h, int rows, int index)
      : facts(call.facts + (i64)(h * rows + min(index, rows - 1)) * ROW_FACTS), state(call.state + h * rows + min(index, rows - 1)), real(index < rows) {}
};
struct RowState {
  float top, mass, output, target, fixed;
  bool open, joins;  // and there is something that promotion could do
  __device__ __forceinline__ explicit RowState(const RowPlace &at) {
    const float *facts = at.facts;
    top = facts[ROW_TOP], mass = facts[ROW_MASS], output = facts[ROW_NORM], target = TARGET * facts[ROW_BUDGET], fixed = facts[ROW_FIXED];
    open = at.real && *at.state == OPEN;
    joins = open && target > 0.f && fixed * ((1.f + THETA) * SAFETY) <= target;
  }
  // That of another lane. For whole warps.
  __device__ __forceinline__ RowState of(int lane) const {
    RowState x = *this;
    for (float *number : {&x.top, &x.mass, &x.output, &x.target, &x.fixed}) *number = __shfl_sync(~0u, *number, lane);
    x.open = __shfl_sync(~0u, (int)open, lane), x.joins = __shfl_sync(~0u, (int)joins, lane);
    return x;
  }
};
struct Shares { float key, value; Terms terms; };

// What rung 0 left of a full block and a row. Read apart from what is made of it, so that several blocks' are under way together.
struct Seen { Stats x; };
__device__ __forceinline__ Seen seen(const Call &call, int base, int b, int row) {
  const float *p = call.statistics + ((i64)base * (call.full + 1) + b) * STATISTIC_WORDS;
  Seen found;
#pragma unroll
  for (int k = 0; k < STATISTICS + 3; k++) found.x[k] = statistic(p, b, row, k);
  return found;
}
__device__ __forceinline__ Shares shares(const Seen &block, const RowState &own) {
  const Stats &x = block.x;
  Shares s = {0.f, 0.f, {}};
  if (x[SUM] <= 0.f) return s;
  s.terms = block_terms(x, __fdividef(exp2_approx(x[TOP] - own.top), own.mass), false);
  s.key = s.terms.t1 + s.terms.g * own.output, s.value = s.terms.value;
  return s;
}

// A share of the row's target: what thresholds are held against. The divisions of selection need not be right to the last bit.
__device__ __forceinline__ float weight(float share, float target) {
  const float x = __fdividef(share, target);
  return x < INFINITY ? x : INFINITY;  // a NaN too
}

// By a float's bits: its exponent, and up to two bits more.
struct Bins {
  int below, lowest;  // bins up to the first quarter of an octave; the exponent of the lowest edge
  __device__ __forceinline__ explicit Bins(int blocks)
      : below(max(0, exponent_above((float)blocks) + ROOM_BELOW - (127 - QUARTERS_FROM) + 1) / 2), lowest(QUARTERS_FROM - 2 * below) {}
  // The first bin whose edge is above x; BINS where none is.
  __device__ __forceinline__ int of(float x) const {
    const int bits = __float_as_uint(x), exponent = bits >> 23;
    if (exponent < lowest) return 0;
    if (exponent < QUARTERS_FROM) return 1 + (exponent - lowest) / 2;
    if (exponent < HALVES_FROM) return 1 + below + (bits >> 21) - 4 * QUARTERS_FROM;
    return min(1 + below + QUARTERS + (bits >> 22) - 2 * HALVES_FROM, BINS);
  }
  __device__ __forceinline__ float edge(int bin) const {
    const int i = bin - below;
    return __uint_as_float(i < 0 ? lowest + 2 * bin << 23 : i < QUARTERS ? 4 * QUARTERS_FROM + i << 21 : 2 * HALVES_FROM + i - QUARTERS << 22);
  }
};
