// From a block's statistics to its part of the bound, for one row: what rung 0 sums over a split, what selection weighs, and how
// a group's sums become its key and value terms (CERTIFICATE.md, sections 4 to 6).
constexpr float ROOM = 1.f + 1e-5f;  // FP32 sums of at most a thousand positive terms, and roots, which are off by 2^-22
constexpr float LEAST = 0x1p-40f;    // in units: over FP32 sums that underflow
constexpr float SAFETY = 1.f + 1.f / 1024, THETA = 3e-5f, LOW_ROUNDING = 1.f + 1.f / 16384;
// One MMA over 17 aligned and truncated addends loses at most 34 u of their absolute sum (an assumption: 6.5 u is the worst that was
// measured); TILE tokens an MMA, 32 MMAs at most into one accumulator (a warp's blocks of a split). Two FP16 parts of a weight: 2^-22.
// Warps, splits and corrections: 24 additions. By how much a block's factor in the sums of values differs from that in masses: 308.
constexpr float VALUE_ROUNDING = (32 * 34 + 4 + 24 + 308) * U32F;
constexpr int GROUP_BITS = 10, GROUP_TOKENS = 1 << GROUP_BITS;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit <<= 1) x += __shfl_xor_sync(~0u, x, bit);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, bit));
  return x;
}

// Sums N values, N a power of two, each over N lanes that are `apart` from one another: the i-th of them returns the sum of value i. Shuffles are
// one a cycle of a multiprocessor: seven of them for eight values where butterflies take twenty-four.
template <int apart, int N>
__device__ __forceinline__ float fold(float (&v)[N], int lane) {
#pragma unroll
  for (int half = N / 2; half; half >>= 1) {
    const bool upper = lane & half * apart;
#pragma unroll
    for (int i = 0; i < N / 2; i++)
      if (i < half) {
        const float keep = upper ? v[i + half] : v[i], give = upper ? v[i] : v[i + half];
        v[i] = keep + __shfl_xor_sync(~0u, give, half * apart);
      }
  }
  return v[0];
}
// The same over a warp: lane i of N returns the sum of value i. Nine shuffles for eight values, six for four.
template <int N>
__device__ __forceinline__ float fold_warp(float (&v)[N], int lane) {
  float sum = fold<1>(v, lane);
#pragma unroll
  for (int bit = N; bit < LANES; bit <<= 1) sum += __shfl_xor_sync(~0u, sum, bit);
  return sum;
}

// (e^x - 1 - x) / x^2 from above and 1 - e^-x from above, for 0 <= x; bound/cpu.py::series says why.
__device__ __forceinline__ void series(float delta, float x, float &psi, float &fall) {
  if (delta <= 0.5f) {
    psi = 0.5f + delta * (1.f / 6 + delta * (1.f / 24 + delta * (1.f / 120 + delta * (1.f / 720 + delta * (1.f / 5040 + delta * (1.07f / 40320))))));
    fall = x * (1.f - x * (0.5f - x * (1.f / 6 - x * (1.f / 24 - x * (1.f / 120)))));
  } else {
    psi = (expm1f(delta) - delta) / (delta * delta);
    fall = -expm1f(-x);
  }
}

struct Terms { float rho, low, t1, g, spread, used, error2, amplitude, squares, value, coded, norm, bad; };

// `here`: the factor of the block's weights. With `exact_values` no value error is left, and amplitude is that of originals where codes
// have none.
__device__ __forceinline__ Terms block_terms(const Stats &x, float here, bool exact_values) {
  const float delta = x[DELTA], d = x[D_NORM], amp = x[STATISTICS + 1], nu = x[STATISTICS + 2];
  const float rho = here * x[SUM], a2 = here * sqrt_approx(x[SUM_SQUARES]), cross = a2 * d;
  float psi, fall;
  series(delta, rho > 0.f ? fminf(delta, __fdividef(cross, rho)) : 0.f, psi, fall);
  const float phi = 1.f + delta * psi, norm = here * x[SUM_NORM], norm2 = here * sqrt_approx(x[SUM_SQUARES_NORM]);
  const float failed = here * x[SUM_ERROR], error = exact_values ? 0.f : failed, other = a2 * x[STATISTICS], c = phi * fminf(here * d, a2 * delta);
  Terms t;
  t.rho = rho;
  t.low = rho * fall;
  t.t1 = phi * fminf(delta * norm * ONCE_ABOVE, d * norm2);
  t.g = fminf(phi * fminf(rho * delta, cross), cross + psi * here * d * d);
  t.spread = phi * phi * fminf(fminf(rho * delta * delta, here * d * d), delta * cross);
  const float size = sqrt_approx(x[SUM_SQUARE_VALUE]) + sqrt_approx(x[SUM_SQUARE_ERROR]);  // Minkowski's: of nu + eta
  t.used = here * (size * size * ROOM);
  t.error2 = here * x[SUM_SQUARE_ERROR];
  t.amplitude = rho * (exact_values && !(amp < INFINITY) ? nu : fmaxf(amp, nu));
  t.squares = c * c;
  t.value = other < error ? other : error;
  t.coded = exact_values ? 0.f : a2 * a2;
  t.norm = norm;
  // Minimum and maximum drop a NaN and comparisons hide it: zero times everything brings it, and infinity, to light.
  // Arithmetic errs on codes and, a quarter of it, on the differences to originals that are added.
  t.bad = (exact_values ? 1.25f : 1.f) * failed + 0.f * (delta + d + norm + rho);
  return t;
}

// Statistics of neighbouring blocks, `most` at most, on their way to shared memory; other thread blocks may have written some. For all threads of a
// thread block, or of a warp where THREADS is LANES.
template <int most, int THREADS = WARPS * LANES>
struct StatisticsHeld {
  static constexpr int WORDS = STATISTIC_WORDS / 4, EACH = (most * WORDS + THREADS - 1) / THREADS;  // four words at a time
  float4 held[EACH];
  __device__ __forceinline__ void read(const float *from, int blocks) {
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const int i = k * THREADS + threadIdx.x % THREADS;
      if (i < blocks * WORDS) held[k] = __ldcg((const float4 *)from + i);
    }
  }
  __device__ __forceinline__ void leave(float *to, int blocks) const {
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const int i = k * THREADS + threadIdx.x % THREADS;
      if (i < blocks * WORDS) ((float4 *)to)[i] = held[k];
    }
  }
};

constexpr int THREADS_A_ROW = WARPS * LANES / ROW_TILE;
// Of which row a thread adds up blocks of a split, and which ones: every `step`-th, from `first` on. Threads have all rows in turn, or one alone.
struct Turn {
  int row = threadIdx.x % ROW_TILE, first = threadIdx.x / ROW_TILE, step = THREADS_A_ROW;
  __device__ __forceinline__ bool alone() const { return step > THREADS_A_ROW; }
};
__device__ __forceinline__ Turn alone(int row) { return {row, (int)threadIdx.x, WARPS * LANES}; }
// The sums of a split over its blocks' statistics, relative to `reference`, the row's largest score in it: what each thread adds up, a block and
// row at a time, and what the thread block makes of it. `marked`: some blocks were promoted, as `marks` says, and scores changed.
typedef float OfWarps[WARPS][PARTIALS][ROW_TILE];
template <bool marked>
struct SplitSums {
  const Turn turn = {};
  float p0[8] = {0.f}, p1[8] = {0.f}, delta_max = 0.f, norm_top = 0.f, amplitude_top = 0.f;

  // Of a split's `count` blocks, whose words lie in shared memory; `first`: the number of the first one.
  __device__ __forceinline__ void add(const float *of_split, int first, int count, float reference, const unsigned char *marks = nullptr) {
    static_assert(THREADS_A_ROW % 8 == 0, "words of a thread's blocks lie alike");
    const int row = turn.row, own = turn.first;
    u32 at[8];  // of the words of one block: worked out for every block, where they lie was a quarter of all instructions
#pragma unroll
    for (int k = 0; k < 8; k++) at[k] = in_register(shared_at(of_split + own * STATISTIC_WORDS + word_at(first + own, k) + row));
#pragma unroll 1
    for (int b = own; b < count; b += turn.step) {
      float words[8];
#pragma unroll
      for (int k = 0; k < 8; k++) words[k] = __uint_as_float(shared32(at[k]));
      const uint4 of_rows = shared128(at[D_AND_NOTE] - 4 * row);
      const u32 notes[] = {of_rows.x, of_rows.y, of_rows.z};
#pragma unroll
      for (int k = 0; k < 8; k++) at[k] += turn.step * STATISTIC_WORDS * 4;
      Stats x;
#pragma unroll
      for (int k = 0; k < STATISTICS + 3; k++) x[k] = part_of(k < STATISTICS ? words[word_with(k)] : __uint_as_float(notes[k - STATISTICS]), k);
      if (x[SUM] > 0.f) add(x, reference, marked && marks[b] >> (4 + row) & 1);
    }
  }

  // A block, of which values are exact or not.
  __device__ __forceinline__ void add(const Stats &x, float reference, bool exact_values) {
    const Terms t = block_terms(x, exp2_approx(x[TOP] - reference), exact_values);
    p0[MASS] += t.rho, p0[LOW] += t.low, p0[T1] += t.t1, p0[MASS_ERROR] += t.g, p0[SPREAD] += t.spread, p0[USED] += t.used;
    p0[ERROR2] += t.error2, p0[AMPLITUDE] += t.amplitude;
    p1[KEY_SQUARES - 8] += t.squares, p1[VALUE - 8] += t.value, p1[SQUARES - 8] += t.coded, p1[NORM - 8] += t.norm, p1[ERROR - 8] += t.bad;
    const float nu = x[STATISTICS + 2], amp = x[STATISTICS + 1];
    delta_max = fmaxf(delta_max, x[DELTA]);
    norm_top = fmaxf(norm_top, nu);
    amplitude_top = fmaxf(amplitude_top, exact_values && !(amp < INFINITY) ? nu : fmaxf(amp, nu));
  }

  // A warp's, to `room`; `write` comes behind a barrier. Once: the sums are folded away.
  __device__ __forceinline__ void leave(OfWarps &room, float reference) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, r = lane / 4, c = lane % 4;
#pragma unroll
    for (int bit = 1; bit < 32; bit <<= 1) {
      if (bit < ROW_TILE && !turn.alone()) continue;
      delta_max = fmaxf(delta_max, __shfl_xor_sync(~0u, delta_max, bit));
      norm_top = fmaxf(norm_top, __shfl_xor_sync(~0u, norm_top, bit));
      amplitude_top = fmaxf(amplitude_top, __shfl_xor_sync(~0u, amplitude_top, bit));
    }
    float low = fold<4>(p0, lane), high = fold<4>(p1, lane);
    if (turn.alone())
#pragma unroll
      for (int bit = 1; bit < ROW_TILE; bit <<= 1) low += __shfl_xor_sync(~0u, low, bit), high += __shfl_xor_sync(~0u, high, bit);
    if (r == SPLIT_TOP - 8) high = reference;
    if (r == DELTA_MAX - 8) high = delta_max;
    if (r == NORM_TOP - 8) high = norm_top;
    room[warp][r][c] = low;
    room[warp][8 + r][c] = high;
    if (r == 0) room[warp][AMPLITUDE_TOP][c] = amplitude_top;
  }
};

// What all warps left of some rows, a bit each, to the split's `partials`.
__device__ __forceinline__ void write_sums(float *partials, const OfWarps &room, u32 rows = ~0u) {
  const int k = threadIdx.x / ROW_TILE, row = threadIdx.x % ROW_TILE;
  if (k >= PARTIALS || !(rows >> row & 1)) return;
  float x = room[0][k][row];
#pragma unroll
  for (int w = 1; w < WARPS; w++) {
    const float y = room[w][k][row];
    const bool largest = k == SPLIT_TOP || k == DELTA_MAX || k == NORM_TOP || k == AMPLITUDE_TOP;
    x = largest ? fmaxf(x, y) : x + y;
  }
  partials[threadIdx.x] = x;
}

// Groups of 1024 tokens, or splits where they are larger; the trailing block is a group of its own, the last.
struct Groups {
  int doublings, together, spanned, splits, count;  // a group has 2^doublings splits, a lane each; or a split spans groups
  __device__ __forceinline__ explicit Groups(const Call &call) {
    static_assert(GROUP_TOKENS / (WARPS * BLOCK) <= LANES, "a lane a split of a group");
    const int bits = 31 - __clz(call.per * BLOCK);
    doublings = max(0, GROUP_BITS - bits), together = 1 << doublings, spanned = 1 << max(0, bits - GROUP_BITS);
    splits = call.splits, count = (splits + together - 1 >> doublings) + (call.tokens > call.full * BLOCK);
  }
  // The split of group k that is a lane's, of the lanes that share it; -1 where it has none.
  __device__ __forceinline__ int split_of(int k, int lane) const {
    const int first = min(k << doublings, splits), split = first + (lane & together - 1);
    return k < count && split < (first == splits ? splits + 1 : min(first + together, splits)) ? split : -1;
  }
};
struct Group {
  float t1, g, spread, used, error, amplitude, squares, coded, a2, rho, dot;
  // Over the lanes that differ in `bit`.
  __device__ __forceinline__ void join(int bit) {
    float *sums[] = {&t1, &g, &spread, &used, &error, &amplitude, &squares, &coded, &a2, &rho, &dot};
#pragma unroll
    for (float *sum : sums) *sum += __shfl_xor_sync(~0u, *sum, bit);
  }
};
// Adds a split, but for its dot product with the output; f: the factor of its weights, part(k): partial k.
template <typename Part>
__device__ __forceinline__ void add_split(Group &x, float f, Part part) {
  x.t1 += f * part(T1), x.g += f * part(MASS_ERROR), x.spread += f * part(SPREAD), x.used += f * part(USED), x.error += f * part(ERROR2);
  x.amplitude += f * part(AMPLITUDE), x.squares += f * part(KEY_SQUARES) * f, x.coded += f * part(VALUE), x.a2 += f * part(SQUARES) * f;
  x.rho += f * part(MASS);
}

// Spectral norms of group k's values and of their errors; infinite where the group is not complete. Read apart from what is made of them, so that
// who asks before a wait does not wait for them first.
struct GroupNorms {
  static constexpr int SPANNED_MAX = SPLIT_TOKENS / GROUP_TOKENS;
  float value[SPANNED_MAX], error[SPANNED_MAX];
  __device__ __forceinline__ GroupNorms(const Call &call, const Groups &groups, int k, int heads, int h) {
    const bool complete = k * groups.together < call.splits && (k + 1) * groups.spanned * GROUP_TOKENS <= call.groups * GROUP_TOKENS;
#pragma unroll
    for (int i = 0; i < SPANNED_MAX; i++) {
      const int at = (k * groups.spanned + i) * heads + h;
      value[i] = error[i] = complete ? 0.f : INFINITY;
      if (complete && i < groups.spanned) value[i] = call.group_values[at], error[i] = call.group_errors[at];
    }
  }
  // Of several groups: the root of their squares' sum.
  __device__ __forceinline__ float2 in_units(float unit) const {
    float2 squares = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < SPANNED_MAX; i++) {
      const float x = value[i] * unit, y = error[i] * unit;
      squares.x += x * x, squares.y += y * y;
    }
    return make_float2(sqrt_approx(squares.x) * ROOM + LEAST, sqrt_approx(squares.y) * ROOM + LEAST);
  }
};

// What the second bound of a group's key error multiplies the root of its `spread` by; o: the norm of the output.
__device__ __forceinline__ float spread_factor(const Group &x, float o) {
  const float slack = 4.f * (VALUE_ROUNDING + THETA) * (x.used + x.rho * o * o + 2.f * o * x.amplitude) + LEAST;
  return sqrt_approx(fmaxf(x.used - 2.f * x.dot + x.rho * o * o, 0.f) + slack) + sqrt_approx(x.error);
}

// E_key and E_val of a group, `factor` being its spread's.
__device__ __forceinline__ float2 group_terms(const Group &x, float factor, float2 norms, float o) {
  float best = x.t1 + x.g * o, other = factor * sqrt_approx(x.spread);
  best = other < best ? other : best;
  other = norms.x * sqrt_approx(x.squares) + o * x.g;
  best = other < best ? other : best;
  other = norms.y * sqrt_approx(x.a2);
  return make_float2(best, other < x.coded ? other : x.coded);
}
