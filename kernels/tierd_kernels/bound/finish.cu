// Puts a row together: the output from the splits' sums, its norms, and the bound of CERTIFICATE.md, "The bound".
// One thread block a row.
constexpr float NORM_RETURN = 1.f / (1.f + 1.f / 128) - 1.f / 16384;

constexpr int SUMMED = RUN_MASS;  // of the partials, what is put together here
constexpr int FINISH_WARPS = 16, THREADS = FINISH_WARPS * LANES;
constexpr int PER_LANE = (D + LANES - 1) / LANES;  // channels of a lane: its own and every 32nd from it on
constexpr int AHEAD = 4, AT_ONCE = AHEAD * FINISH_WARPS;  // splits of a warp, every 16th, and of the thread block, under way together

extern "C" __global__ void __launch_bounds__(THREADS, 1) finish(const Call *calls, int heads, int group, int again) {
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  const int n = call.n, full = call.full, per = call.per, tokens = call.tokens, unit = call.unit, own_splits = call.splits, exact_only = call.exact_only;
  const int rows = group * n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int h = blockIdx.y, index = blockIdx.x, tile = index / ROW_TILE, row = index % ROW_TILE;
  if (index >= rows) return;
  const Groups groups(call);
  int share = 1;  // lanes to a group
  while (share < LANES && share < groups.together) share <<= 1;
  const float2 ahead = group_norms(call, groups, warp * (LANES / share) + lane / share, heads, h);
  int *state = call.state + h * rows + index, *counts = call.counts + 2 * (h * rows + index);
  float *facts = call.facts + (i64)(h * rows + index) * ROW_FACTS;
  // What is needed last, and by one thread: each first look at a line of the call costs as much as a look at the splits' sums.
  const double atol = call.atol, rtol = call.rtol;
  const int relative_to_output = call.relative_to_output, require_rank = call.require_rank, coverage = call.coverage;
  double *out = call.fields + h * rows + index;
  const int splits = own_splits + (tokens > full * BLOCK), base = h * tiles + tile;
  const float *partials = call.partials + (i64)base * (own_splits + 1) * PARTIALS * ROW_TILE + row;
  const float *sums = call.sums + ((i64)base * (own_splits + 1) * ROW_TILE + row) * D;
  const float *skips = call.skips + (i64)base * (own_splits + 1) * SKIPS * ROW_TILE + row;
  float *out_dots = call.dots + (i64)(h * rows + index) * (own_splits + 1);
  void *output = call.output;
  wait_for_previous();
  if (exact_only) {
    if (threadIdx.x == 0) *state = DUE;
    return;
  }
  float top_before = 0.f;
  int promoted_keys = 0, promoted_values = 0;
  if (again) {
    top_before = facts[ROW_TOP], promoted_keys = counts[0], promoted_values = counts[1];
    if (*state != OPEN) return;
  }
  __shared__ double wide_of[FINISH_WARPS][D];
  __shared__ float stored[D], norms[2][FINISH_WARPS], dots[SPLITS_MAX], found[8][FINISH_WARPS], of_row[2], left[SKIPS];
  extern __shared__ float own[];  // the row's partials, [splits][SUMMED], and skips, [splits][SKIPS]
  float held[AHEAD][PER_LANE];  // of the sums, from split `first` on
  auto hold = [&](int first) {
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      const int s = first + k * FINISH_WARPS + warp;
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) held[k][i] = s < splits && (D % LANES == 0 || i * LANES + lane < D) ? sums[(i64)s * ROW_TILE * D + i * LANES + lane] : 0.f;
    }
  };
  const int last_held = (splits - 1) / AT_ONCE * AT_ONCE;
  hold(last_held);
  const int skip_floats = NAIVE ? 0 : splits * SKIPS;
  const float first_skip = threadIdx.x < skip_floats ? skips[threadIdx.x * ROW_TILE] : 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < splits * SUMMED; i += THREADS) own[i] = partials[(i / SUMMED * PARTIALS + i % SUMMED) * ROW_TILE];
  if (threadIdx.x < skip_floats) own[splits * SUMMED + threadIdx.x] = first_skip;
#pragma unroll 1
  for (int i = threadIdx.x + THREADS; i < skip_floats; i += THREADS) own[splits * SUMMED + i] = skips[i * ROW_TILE];
  auto part = [&](int i, int k) { return own[i * SUMMED + k]; };
  double wide[PER_LANE] = {0.};
#pragma unroll 1
  for (int first = last_held;; first -= AT_ONCE) {
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) wide[i] += held[k][i];
    if (first == 0) break;
    hold(first - AT_ONCE);
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; i++)
    if (D % LANES == 0 || i * LANES + lane < D) wide_of[warp][i * LANES + lane] = wide[i];
  __syncthreads();

  // One warp finds the row's largest score and its mass, another what was skipped; others add up the channels meanwhile.
  constexpr int CHANNELS_FROM = THREADS - 256;  // the threads that have a channel each
  const int channel = threadIdx.x - CHANNELS_FROM;
  double sum = 0.;
  if (warp == 0) {
    float top = LOWEST, mass = 0.f;
#pragma unroll 1
    for (int i = lane; i < splits; i += LANES) top = fmaxf(top, part(i, SPLIT_TOP));
    top = again ? top_before : warp_max(top);  // to which the value pass has weighed
#pragma unroll 1
    for (int i = lane; i < splits; i += LANES) mass += exp2_approx(part(i, SPLIT_TOP) - top) * part(i, MASS);
    mass = warp_sum(mass);
    if (lane == 0) of_row[0] = top, of_row[1] = mass;
  } else if (warp == 1 && !NAIVE) {
    float x[SKIPS] = {0.f};
#pragma unroll 1
    for (int i = lane; i < splits; i += LANES)
#pragma unroll
      for (int k = 0; k < SKIPS; k++) x[k] += own[splits * SUMMED + i * SKIPS + k];
#pragma unroll
    for (int k = 0; k < SKIPS; k++) x[k] = warp_sum(x[k]);
    if (lane < SKIPS) left[lane] = lane == SKIP_MASS ? x[SKIP_MASS] : lane == SKIP_GROWN ? x[SKIP_GROWN] : lane == SKIP_NORM ? x[SKIP_NORM] : x[SKIP_COUNT];
  } else if (channel >= 0 && channel < D) {
#pragma unroll
    for (int w = 0; w < FINISH_WARPS; w++) sum += wide_of[w][channel];
  }
  __syncthreads();
  // Of what was kept: sums over all blocks, divided by it, only grow.
  const float top = of_row[0], mass = of_row[1] - (NAIVE ? 0.f : left[SKIP_MASS]), inverse = __fdividef(1.f, mass);

  float norm2 = 0.f, error2 = 0.f;
  if (channel >= 0 && channel < D) {
    const i64 at = ((i64)(h * group + index / n) * n + index % n) * D;
    sum /= mass;
    const double y = store(output, at + channel, sum);
    const float scaled = (float)(y * unit_factor(unit)), off = (float)((y - sum) * unit_factor(unit));
    stored[channel] = scaled;
    norm2 = scaled * scaled, error2 = off * off;
  }
  if (NAIVE) return;
  if (channel >= 0 && warp - CHANNELS_FROM / LANES < PER_LANE) {
    norm2 = warp_sum(norm2), error2 = warp_sum(error2);
    if (lane == 0) norms[0][channel / LANES] = norm2, norms[1][channel / LANES] = error2;
  }
  __syncthreads();
  norm2 = error2 = 0.f;
#pragma unroll
  for (int w = 0; w < PER_LANE; w++) norm2 += norms[0][w], error2 += norms[1][w];
  const float o = sqrtf(norm2) * ROOM + LEAST, rounding = sqrtf(error2) * ROOM + LEAST;
#pragma unroll 1
  for (int first = 0; first < splits; first += AT_ONCE) {
    if (first) hold(first);
    float dot[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      dot[k] = 0.f;
#pragma unroll
      for (int i = 0; i < PER_LANE; i++)
        if (D % LANES == 0 || i * LANES + lane < D) dot[k] = fmaf(held[k][i], stored[i * LANES + lane], dot[k]);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++) dot[k] = warp_sum(dot[k]);
    const int s = first + lane * FINISH_WARPS + warp;
#pragma unroll
    for (int k = 1; k < AHEAD; k++) dot[0] = lane == k ? dot[k] : dot[0];
    if (lane < AHEAD && s < splits) dots[s] = out_dots[s] = dot[0] * (unit_factor(unit) * inverse);
  }
  __syncthreads();

  // The lanes that share a group each take splits of it; sums of a warp's groups go to `found`, and the first warp puts the row together.
  float key = 0.f, value = 0.f, low = 0.f, norm = 0.f, failed = 0.f, delta_max = 0.f, norm_top = 0.f, amplitude_top = 0.f;
#pragma unroll 1
  for (int k = warp * (LANES / share) + lane / share; k - lane / share < groups.count; k += FINISH_WARPS * (LANES / share)) {
    const int first = min(k * groups.together, own_splits);
    const int last = k >= groups.count ? first : first == own_splits ? splits : min(first + groups.together, own_splits);
    Group x = {};
#pragma unroll 1
    for (int i = first + lane % share; i < last; i += share) {
      const float f = exp2_approx(part(i, SPLIT_TOP) - top) * inverse;
      add_split(x, f, [&](int k) { return part(i, k); });
      x.dot += dots[i];
      low += f * part(i, LOW), norm += f * part(i, NORM), failed += f * part(i, ERROR);
      delta_max = fmaxf(delta_max, part(i, DELTA_MAX)), norm_top = fmaxf(norm_top, part(i, NORM_TOP));
      amplitude_top = fmaxf(amplitude_top, part(i, AMPLITUDE_TOP));
    }
#pragma unroll 1
    for (int bit = 1; bit < share; bit <<= 1) x.join(bit);
    if (k >= groups.count || lane % share) continue;
    const float2 of_group = k < FINISH_WARPS * (LANES / share) ? ahead : group_norms(call, groups, k, heads, h);
    const float2 terms = group_terms<false>(x, spread_factor<false>(x, o), of_group, o);
    key += terms.x, value += terms.y;
  }
  key = warp_sum(key), value = warp_sum(value), low = warp_sum(low), norm = warp_sum(norm), failed = warp_sum(failed);
  delta_max = warp_max(delta_max), norm_top = warp_max(norm_top), amplitude_top = warp_max(amplitude_top);
  if (lane == 0) {
    const float mine[8] = {key, value, low, norm, failed, delta_max, norm_top, amplitude_top};
#pragma unroll
    for (int i = 0; i < 8; i++) found[i][warp] = mine[i];
  }
  __syncthreads();
  if (warp) return;
  auto gathered = [&](int i) { return lane < FINISH_WARPS ? found[i][lane] : 0.f; };
  key = warp_sum(gathered(0)) * ROOM, value = warp_sum(gathered(1)) * ROOM, low = warp_sum(gathered(2)), norm = warp_sum(gathered(3));
  failed = warp_sum(gathered(4)) * ROOM, delta_max = warp_max(gathered(5)), norm_top = warp_max(gathered(6)), amplitude_top = warp_max(gathered(7));
  const float left_norm = left[SKIP_NORM] * inverse * ROOM, left_grown = left[SKIP_GROWN] * inverse * ROOM, left_count = left[SKIP_COUNT];
  if (lane) return;
  // Weights that counted as zero; low parts of weights, off by 2^-25 in units of 2^-14: of a mass that was 1 or more before promotion.
  const float each = tokens / fminf(mass, 1.f), lost = each * 0x1p-123f * (norm_top + o);
  float arithmetic = VALUE_ROUNDING * (norm * ROOM + failed) + THETA * o + rounding + LEAST + each * (0x1p-39f * amplitude_top);
  const float flushed = lost * expf(delta_max), denominator = 1.f - low * LOW_ROUNDING;
  float skip = flushed + left_norm + left_grown * o;
  float stretch = denominator > 1e-4f ? (1.f + THETA) * SAFETY / denominator : INFINITY, total = (key + value + skip + arithmetic) * stretch;
  const float tilt = tanhf(delta_max) * ROOM * (norm_top + o + value + arithmetic);
  const float capped = (tilt + value + 2.f * lost + arithmetic) * ((1.f + THETA) * SAFETY);
  if (!(left_grown > 0.f) && !(total <= capped)) total = capped, key = tilt, skip = 2.f * lost, stretch = (1.f + THETA) * SAFETY;
  // Infinite or NaN wherever something was, whatever comparisons made of it.
  if (!(failed < INFINITY) || !(total < INFINITY) || !(mass > 0.f)) total = INFINITY;
  // The budget, rounded down; in double, as the fields: tolerances and values may lie where units do not.
  const float vbar = fmaxf((norm - left_norm) * NORM_RETURN - 2.f * NORM_FLOOR, 0.f);
  const double size = power_of_two(unit), reference = relative_to_output ? sqrtf(norm2) * (1.f - 1e-5f) : vbar;
  const double asked = atol * power_of_two(-unit) + rtol * reference, budget = asked < 1e-250 ? 0. : fmin(asked * (1. - 2e-5), BUDGET_MAX);
  const bool good = total <= budget && o < INFINITY;
  const i64 stride = (i64)heads * rows;
  if (!again) {
    const bool unranked = require_rank && !(out[RANKED * stride] > 0.);
    *state = unranked ? DUE : good && !coverage ? CERTIFIED : OPEN;
  } else {
    *state = good ? CERTIFIED : DUE;
  }
  if (!again) {
    // Blocks that stay original make it infinite, until they are promoted.
    const float fixed = skip + arithmetic < INFINITY ? skip + arithmetic
                                                     : left_norm + left_grown * o + 2.f * VALUE_ROUNDING * norm + THETA * o + rounding;
    const float found[ROW_FACTS] = {top, mass, o, (float)fmin(budget, 1e30), fixed, 0.f};
    for (int k = 0; k < ROW_FACTS; k++) facts[k] = found[k];
    counts[0] = counts[1] = 0;
  }
  const double fields[CANDIDATE] = {total * size, fmin(budget * size, BUDGET_MAX), key * stretch * size, value * stretch * size,
                                    skip * stretch * size, arithmetic * stretch * size, vbar * size, o * size, left_count};
  for (int k = 0; k < CANDIDATE; k++) out[k * stride] = fields[k];
  out[KEYS * stride] = promoted_keys, out[VALUES * stride] = promoted_values;
  if (again) return;
  out[CANDIDATE * stride] = total * size, out[SCORE_TOP * stride] = 0.;
  out[PAPER_KEY_BOUND * stride] = NAN;
  if (!require_rank) out[RANKED * stride] = 0.;
}
