// What selection knows of a row and of a block's shares of its bound, and the scale of its thresholds.
constexpr float TARGET = 0.9f;  // of the budget; what rows came to was at most 0.96 of it, and 0.99 with 0.93
// Thresholds, in targets: upper edges of bins that are half an octave wide, and from FINE on four octaves. Blocks of less than the lowest
// have, all together, at most a thirty-second of the target. Fine ones go up to 2^5, for most thresholds lie above 2^-5, and what has a copy
// counts many times its share. (With quarters of an octave up to 2^-5, and two octaves from there, rows came to 0.62 of their budgets, as a
// median, and a call at 131,072 tokens and 5 % read 869 originals, not 616; 976, not 757, where those with a copy are preferred.)
constexpr int BINS = 64, FINE = 56, FINE_SHIFT = 22, COARSE_SHIFT = FINE_SHIFT + 3, ROOM_BELOW = 6;

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
};
struct Shares { float key, value; Terms terms; };

// What the passes left of a full block and a row. Read apart from what is made of it, so that several blocks' are under way together.
struct Seen { Stats x; u32 mark; };
__device__ __forceinline__ Seen seen(const Call &call, int base, int b, int row) {
  const float *p = call.statistics + ((i64)base * (call.full + 1) + b) * STATISTIC_WORDS;
  Seen found;
#pragma unroll
  for (int k = 0; k < STATISTICS + 3; k++) found.x[k] = statistic(p, b, row, k);
  found.mark = call.marks[(i64)base * call.full + b];
  return found;
}
// What was skipped can have no share less.
__device__ __forceinline__ Shares shares(const Seen &block, const RowState &own) {
  const Stats &x = block.x;
  Shares s = {0.f, 0.f, {}};
  if (x[SUM] <= 0.f) return s;
  s.terms = block_terms(x, __fdividef(exp2_approx(x[TOP] - own.top), own.mass), false);
  if (block.mark & SKIPPED_BLOCK) return s;
  s.key = s.terms.t1 + s.terms.g * own.output, s.value = s.terms.value;
  return s;
}

// A share of the row's target: what thresholds are held against. The divisions of selection need not be right to the last bit.
__device__ __forceinline__ float weight(float share, float target) {
  const float x = __fdividef(share, target);
  return x < INFINITY ? x : INFINITY;  // a NaN too
}

// By a float's bits: its exponent, and one bit more.
struct Bins {
  u32 lowest;  // at every eighth from there a bin of four octaves begins
  __device__ __forceinline__ explicit Bins(int blocks) : lowest((127 - ((exponent_above((float)blocks) + ROOM_BELOW) | 3)) << (23 - FINE_SHIFT)) {}
  // The first bin whose edge is above x; BINS where none is.
  __device__ __forceinline__ int of(float x) const {
    const u32 bits = __float_as_uint(x);
    if (bits >> FINE_SHIFT < lowest) return 0;
    const u32 fine = (bits >> FINE_SHIFT) - lowest, coarse = FINE + (bits >> COARSE_SHIFT) - ((lowest + FINE) >> (COARSE_SHIFT - FINE_SHIFT));
    return fine < FINE ? fine : min(coarse, (u32)BINS);
  }
  __device__ __forceinline__ float edge(int bin) const {
    if (bin < FINE) return __uint_as_float((lowest + bin + 1) << FINE_SHIFT);
    return __uint_as_float((((lowest + FINE) >> (COARSE_SHIFT - FINE_SHIFT)) + bin - FINE + 1) << COARSE_SHIFT);
  }
};
