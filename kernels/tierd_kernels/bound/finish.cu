// Puts a row together: the output from the splits' sums, its norms, and the bound of CERTIFICATE.md, "The bound".
// One thread block a row; `again`, after promotion, so many, some for no row, and behind them `readers`, all of each KV head. A build fixes the kernel's
// name, FINISH, and FINISH_WARPS, how many warps it has.
constexpr float NORM_RETURN = 1.f / (1.f + 1.f / 128) - 1.f / 16384;

constexpr int THREADS = FINISH_WARPS * LANES;
constexpr int PER_LANE = D > 128 ? 8 : D > 64 ? 4 : 2, LANES_USED = D / PER_LANE;  // neighbouring channels of a lane, and lanes that have some
static_assert(D % PER_LANE == 0 && LANES_USED <= LANES && PARTIALS <= LANES, "a lane has whole loads");
struct __align__(PER_LANE > 2 ? 16 : 8) Channels { float x[PER_LANE]; };
// What a row needs of its groups: sums, and the largest from LARGEST_DELTA on.
enum { OF_KEYS, OF_VALUES, OF_LOW, OF_NORM, OF_FAILED, LARGEST_DELTA, LARGEST_NORM, LARGEST_AMPLITUDE, COLLECTED };
static_assert(COLLECTED * 4 == LANES, "four lanes a number");
constexpr int COLLECTED_BYTES = 4 * COLLECTED * LANES, CHANNELS_ROOM = D > COLLECTED_BYTES / 8 ? D : COLLECTED_BYTES / 8;
constexpr int AHEAD = 4, AT_ONCE = AHEAD * FINISH_WARPS;  // splits of a warp, every FINISH_WARPS-th, and of the thread block, under way together

// What rows have read of a KV head's originals once some were promoted: of each record a bit, and of each row how many had no copy. By thread
// blocks of their own, on multiprocessors that those of the rows leave idle. It makes a step that promotes 1.3 us longer, as it did where
// promotion told it, and spares the host the marks of all tiles: 40 us and their way.
__device__ __forceinline__ void tell_reads(const Call &call, int heads, int h, int rows, int tiles, int reader, int readers) {
  const int lane = threadIdx.x % LANES, full = call.full;
  const u32 *marks = call.marks + (i64)h * tiles * full;
  wait_for_previous();
  for (int tile = 0; tile < tiles; tile++, marks += full) {
    const int first = h * rows + tile * ROW_TILE, here = min(ROW_TILE, rows - tile * ROW_TILE);
    if (!__ballot_sync(~0u, lane < 2 * here && call.counts[2 * first + lane])) continue;
    int found = 0;  // in the row's lane
    for (int from = reader * THREADS + threadIdx.x - lane; from < full; from += readers * THREADS) {
      const int b = from + lane;
      const u32 mark = b < full ? marks[b] : 0u;
      u32 cold = 0;
#pragma unroll
      for (int kind = 0; kind < 2; kind++) {
        const u32 of_rows = mark & 15u << ROW_TILE * kind, record = record_of(kind, heads, h, b), bit = 1u << record % 32;
        if (!of_rows) continue;
        atomicOr(call.reads + record / 32, bit);
        if (!call.copied || !(copied_with(call, record) & bit)) cold |= of_rows;
      }
#pragma unroll
      for (int row = 0; row < ROW_TILE; row++) {
        const int count = __popc(__ballot_sync(~0u, cold >> row & 1u)) + __popc(__ballot_sync(~0u, cold >> (ROW_TILE + row) & 1u));
        found += lane == row ? count : 0;
      }
    }
    if (lane < here && found) atomicAdd(call.cold + first + lane, found);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS > 256 ? 1 : 2) FINISH(const Call *calls, int heads, int group, int again, int readers) {
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  const int n = call.n, full = call.full, tokens = call.tokens, unit = call.unit, own_splits = call.splits, exact_only = call.exact_only;
  const int rows = group * n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int h = blockIdx.y, index = blockIdx.x, tile = index / ROW_TILE, row = index % ROW_TILE;
  if (again && index >= again && !exact_only) return tell_reads(call, heads, h, rows, tiles, index - again, readers);
  if (index >= rows) return;
  const Groups groups(call);
  const int share = groups.together, side_by_side = LANES >> groups.doublings;  // lanes to a group, groups of a warp
  const GroupNorms ahead(call, groups, warp * side_by_side + (lane >> groups.doublings), heads, h);
  int *state = call.state + h * rows + index, *counts = call.counts + 2 * (h * rows + index), *cold = call.cold + h * rows + index;
  float *facts = call.facts + (i64)(h * rows + index) * ROW_FACTS;
  // What is needed last, and by one thread: each first look at a line of the call costs as much as a look at the splits' sums.
  const double atol = call.atol, rtol = call.rtol;
  const int relative_to_output = call.relative_to_output, require_rank = call.require_rank, coverage = call.coverage;
  double *out = call.fields + h * rows + index;
  const int splits = own_splits + (tokens > full * BLOCK), base = h * tiles + tile;
  const float *partials = call.partials + (i64)base * (own_splits + 1) * PARTIALS * ROW_TILE + row;
  const float *sums = call.sums + ((i64)base * (own_splits + 1) * ROW_TILE + row) * D;
  float *out_dots = call.dots + (i64)(h * rows + index) * (own_splits + 1);
  void *output = call.output;
  wait_for_previous();
  if (exact_only) {
    if (threadIdx.x == 0) *state = DUE, *cold = 0;
    return;
  }
  const bool ranked = !require_rank || out[RANKED * ((i64)heads * rows)] > 0.;
  int promoted_keys = 0, promoted_values = 0;
  if (again) {
    promoted_keys = counts[0], promoted_values = counts[1];
    if (*state != OPEN) return;
  }
  __shared__ __align__(16) double wide_of[FINISH_WARPS][CHANNELS_ROOM];  // then what a warp collects
  __shared__ __align__(16) float found[COLLECTED][FINISH_WARPS];
  __shared__ __align__(16) float stored[D];
  __shared__ float norms[2][FINISH_WARPS], dots[SPLITS_MAX], mass_of_row;
  extern __shared__ float own[];  // the row's partials, [splits][PARTIALS]
  // Of splits from `first` on, a warp's: sums, relative to the split's largest score, and a lane a partial. All loads are under way together (at
  // 8,192 tokens this kernel takes 4.6 us; 5.1 where the loop that unrolling leaves over for the last few waited for each).
  Channels held[AHEAD];
  float numbers[AHEAD];
  auto hold = [&](int first) {
    const int s = first + warp;
    const Channels *its_sums = (const Channels *)(sums + (i64)s * ROW_TILE * D) + lane;
    const float *its_numbers = partials + (s * PARTIALS + lane) * ROW_TILE;
#pragma unroll
    for (int k = 0; k < AHEAD; k++, its_numbers += PARTIALS * ROW_TILE * FINISH_WARPS) {
      const bool here = s + k * FINISH_WARPS < splits;
      numbers[k] = lane == SPLIT_TOP ? LOWEST : 0.f, held[k] = {};
      if (here && lane < PARTIALS) numbers[k] = *its_numbers;
      if (here && lane < LANES_USED) held[k] = its_sums[k * FINISH_WARPS * ROW_TILE * LANES_USED];
    }
  };
  const int last_held = (splits - 1) / AT_ONCE * AT_ONCE;
  hold(last_held);
  float top = LOWEST;  // each warp finds the row's largest score for itself
  const float *its_top = partials + (lane * PARTIALS + SPLIT_TOP) * ROW_TILE;
#pragma unroll 1
  for (int i = lane; i < splits; i += AHEAD * LANES, its_top += AHEAD * LANES * PARTIALS * ROW_TILE) {
#pragma unroll
    for (int k = 0; k < AHEAD; k++) top = fmaxf(top, i + k * LANES < splits ? its_top[k * LANES * PARTIALS * ROW_TILE] : LOWEST);
  }
  top = warp_max(top);
  auto part = [&](int i, int k) { return own[i * PARTIALS + k]; };
  double wide[PER_LANE] = {0.};
#pragma unroll 1
  for (int first = last_held;; first -= AT_ONCE) {
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      const int s = first + k * FINISH_WARPS + warp;
      if (s >= splits) break;  // to widen zeros would take as long
      if (lane < PARTIALS) own[s * PARTIALS + lane] = numbers[k];
      const double f = exp2_approx(__shfl_sync(~0u, numbers[k], SPLIT_TOP) - top);
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) wide[i] = fma(f, (double)held[k].x[i], wide[i]);
    }
    if (first == 0) break;
    hold(first - AT_ONCE);
  }
  if (lane < LANES_USED)
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) wide_of[warp][lane * PER_LANE + i] = wide[i];
  __syncthreads();

  // One warp finds the row's mass; others add up the channels meanwhile.
  constexpr int CHANNEL_WARPS = (D + LANES - 1) / LANES, CHANNELS_FROM = THREADS - CHANNEL_WARPS * LANES;  // the last threads have a channel each
  static_assert(CHANNELS_FROM >= LANES, "not those of the first warp");
  const int channel = threadIdx.x - CHANNELS_FROM;
  double sum = 0.;
  if (warp == 0) {
    float mass = 0.f;
#pragma unroll 1
    for (int i = lane; i < splits; i += LANES) mass += exp2_approx(part(i, SPLIT_TOP) - top) * part(i, MASS);
    mass = warp_sum(mass);
    if (lane == 0) mass_of_row = mass;
  } else if (channel >= 0 && channel < D) {
    double quarters[4] = {0.};  // sums that do not wait for one another
#pragma unroll
    for (int w = 0; w < FINISH_WARPS; w++) quarters[w % 4] += wide_of[w][channel];
    sum = (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
  }
  __syncthreads();
  const float mass = mass_of_row, inverse = __fdividef(1.f, mass);

  float norm2 = 0.f, error2 = 0.f;
  if (channel >= 0 && channel < D) {
    const i64 at = (i64)(h * rows + index) * D;
    // A quotient in double is a subroutine; one step of Newton's takes the inverse from 2^-22 to 2^-44.
    sum *= fma(-(double)mass, (double)inverse, 2.) * inverse;
    const double y = store(output, at + channel, sum);
    const float scaled = (float)(y * unit_factor(unit)), off = (float)((y - sum) * unit_factor(unit));
    stored[channel] = scaled;
    norm2 = scaled * scaled, error2 = off * off;
  }
  if (NAIVE) return;
  if (channel >= 0 && warp - CHANNELS_FROM / LANES < CHANNEL_WARPS) {
    norm2 = warp_sum(norm2), error2 = warp_sum(error2);
    if (lane == 0) norms[0][channel / LANES] = norm2, norms[1][channel / LANES] = error2;
  }
  __syncthreads();
  norm2 = error2 = 0.f;
#pragma unroll
  for (int w = 0; w < CHANNEL_WARPS; w++) norm2 += norms[0][w], error2 += norms[1][w];
  const float o = sqrt_approx(norm2) * ROOM + LEAST, rounding = sqrt_approx(error2) * ROOM + LEAST;
  const Channels own_output = lane < LANES_USED ? ((const Channels *)stored)[lane] : Channels{};
#pragma unroll 1
  for (int first = 0; first < splits; first += AT_ONCE) {
    if (first) hold(first);
    float dot[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      dot[k] = 0.f;
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) dot[k] = fmaf(held[k].x[i], own_output.x[i], dot[k]);
    }
    const float own_dot = fold_warp(dot, lane);
    const int s = first + lane * FINISH_WARPS + warp;
    if (lane < AHEAD && s < splits) dots[s] = out_dots[s] = own_dot * (exp2_approx(part(s, SPLIT_TOP) - top) * unit_factor(unit) * inverse);
  }
  __syncthreads();

  // The lanes that share a group each take splits of it. What a row needs is added up, or the largest found, by lanes, a warp's and then all
  // warps', and the first warp puts the row together.
  float own_sums[COLLECTED] = {0.f};
#pragma unroll 1
  for (int of_warp = warp * side_by_side; of_warp < groups.count; of_warp += FINISH_WARPS * side_by_side) {
    const int k = of_warp + (lane >> groups.doublings), i = groups.split_of(k, lane);
    Group x = {};
    if (i >= 0) {
      const float f = exp2_approx(part(i, SPLIT_TOP) - top) * inverse;
      add_split(x, f, [&](int k) { return part(i, k); });
      x.dot += dots[i];
      own_sums[OF_LOW] += f * part(i, LOW), own_sums[OF_NORM] += f * part(i, NORM), own_sums[OF_FAILED] += f * part(i, ERROR);
      own_sums[LARGEST_DELTA] = fmaxf(own_sums[LARGEST_DELTA], part(i, DELTA_MAX));
      own_sums[LARGEST_NORM] = fmaxf(own_sums[LARGEST_NORM], part(i, NORM_TOP));
      own_sums[LARGEST_AMPLITUDE] = fmaxf(own_sums[LARGEST_AMPLITUDE], part(i, AMPLITUDE_TOP));
    }
#pragma unroll 1
    for (int bit = 1; bit < share; bit <<= 1) x.join(bit);
    const GroupNorms of_group = of_warp < FINISH_WARPS * side_by_side ? ahead : GroupNorms(call, groups, k, heads, h);
    const float2 terms = group_terms(x, spread_factor(x, o), of_group.in_units(unit_factor(unit)), o);
    const bool counts = k < groups.count && (lane & share - 1) == 0;  // once for the lanes that share it
    own_sums[OF_KEYS] += counts ? terms.x : 0.f, own_sums[OF_VALUES] += counts ? terms.y : 0.f;
  }
  // Four lanes a number, each a quarter of the lanes; then of the warps.
  float(&by_lane)[COLLECTED][LANES] = *(float(*)[COLLECTED][LANES])&wide_of[warp][0];
#pragma unroll
  for (int i = 0; i < COLLECTED; i++) by_lane[i][lane] = own_sums[i];
  __syncwarp();
  const int which = lane / 4, quarter = lane % 4;
  auto collected = [&](const float *from, int count) {
    float sum = 0.f, largest = 0.f;
#pragma unroll
    for (int i = 0; i < count; i++) sum += from[i], largest = fmaxf(largest, from[i]);
#pragma unroll
    for (int bit = 1; bit < 4; bit <<= 1) sum += __shfl_xor_sync(~0u, sum, bit), largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bit));
    return which >= LARGEST_DELTA ? largest : sum;
  };
  const float of_warp = collected(&by_lane[which][quarter * (LANES / 4)], LANES / 4);
  if (quarter == 0) found[which][warp] = of_warp;
  __syncthreads();
  if (warp) return;
  const float of_row = collected(&found[which][quarter * (FINISH_WARPS / 4)], FINISH_WARPS / 4);
  auto gathered = [&](int i) { return __shfl_sync(~0u, of_row, 4 * i); };
  const float low = gathered(OF_LOW), summed_norm = gathered(OF_NORM), norm = summed_norm * ONCE_ABOVE, failed = gathered(OF_FAILED) * ROOM;
  const float delta_max = gathered(LARGEST_DELTA), norm_top = gathered(LARGEST_NORM), amplitude_top = gathered(LARGEST_AMPLITUDE);
  float key = gathered(OF_KEYS) * ROOM, value = gathered(OF_VALUES) * ROOM;
  // Weights that counted as zero; low parts of weights, off by 2^-25 in units of 2^-14: of a mass of 1 or more, but for what it is off by.
  const float each = tokens * ROOM, lost = each * 0x1p-123f * (norm_top + o);
  float arithmetic = VALUE_ROUNDING * (norm * ROOM + failed) + THETA * o + rounding + LEAST + each * (0x1p-39f * amplitude_top);
  const float flushed = lost * expf(delta_max), denominator = 1.f - low * LOW_ROUNDING;
  float stretch = denominator > 1e-4f ? __fdividef((1.f + THETA) * SAFETY * ROOM, denominator) : INFINITY;
  float skip = flushed, total = (key + value + skip + arithmetic) * stretch;
  const float tilt = tanhf(delta_max) * ROOM * (norm_top + o + value + arithmetic);
  const float capped = (tilt + value + 2.f * lost + arithmetic) * ((1.f + THETA) * SAFETY);
  if (!(total <= capped)) total = capped, key = tilt, skip = 2.f * lost, stretch = (1.f + THETA) * SAFETY;
  // Infinite or NaN wherever something was, whatever comparisons made of it.
  if (!(failed < INFINITY) || !(total < INFINITY) || !(mass > 0.f)) total = INFINITY;
  // The budget, rounded down; in double, as the fields: tolerances and values may lie where units do not.
  const float vbar = fmaxf(summed_norm * (1.f / ONCE_ABOVE) * NORM_RETURN - 2.f * NORM_FLOOR, 0.f);
  const double size = power_of_two(unit), reference = relative_to_output ? sqrt_approx(norm2) * (1.f - 1e-5f) : vbar;
  const double asked = atol * power_of_two(-unit) + rtol * reference, budget = asked < 1e-250 ? 0. : fmin(asked * (1. - 2e-5), BUDGET_MAX);
  const bool good = total <= budget && o < INFINITY;
  // Blocks that stay original make it infinite, until they are promoted.
  const float fixed = skip + arithmetic < INFINITY ? skip + arithmetic : 2.f * VALUE_ROUNDING * norm + THETA * o + rounding;
  // A lane a field, and behind them a lane a fact.
  const float told[FIELDS + ROW_FACTS] = {
      total, 0.f, key * stretch, value * stretch, skip * stretch, arithmetic * stretch, vbar, o, 0.f, total, (float)promoted_keys,
      (float)promoted_values, 0.f, 0.f, NAN, top, mass, o, (float)fmin(budget, 1e30), fixed, 0.f};
  float x = 0.f;
#pragma unroll
  for (int k = 0; k < FIELDS + ROW_FACTS; k++) x = lane == k ? told[k] : x;
  const bool of_first = lane == CANDIDATE || lane == SCORE_TOP || lane == PAPER_KEY_BOUND || (lane == RANKED && !require_rank);
  if (lane < CANDIDATE || lane == KEYS || lane == VALUES || (of_first && !again))
    out[lane * ((i64)heads * rows)] = lane == BUDGET ? fmin(budget * size, BUDGET_MAX) : lane < SKIPPED || lane == CANDIDATE ? x * size : x;
  if (!again && lane >= FIELDS && lane < FIELDS + ROW_LIMIT) facts[lane - FIELDS] = x;
  if (lane) return;
  if (again) {
    *state = good ? CERTIFIED : DUE;
    return;
  }
  *state = !ranked ? DUE : good && !coverage ? CERTIFIED : OPEN;
  counts[0] = counts[1] = *cold = 0;
}
