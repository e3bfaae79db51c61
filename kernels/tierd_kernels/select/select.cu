// Selection: for a row that missed its budget, the fewest blocks whose keys or values, read as originals, are predicted to bring it within.
//
// A key and a value record cost the same bytes, so one threshold on both shares of the bound ranks them (as select/reference.py's
// cheapest_within does). A lane tries one threshold: octaves first, then parts of an octave, over groups of 1024 tokens, a warp each. What is
// promoted counts as without error, which a target below the budget makes up for. Selection may be wrong at will: only what finish
// computes from what was used opens the gate.
constexpr int SELECT_WARPS = 16, THREADS = SELECT_WARPS * LANES, AT_ONCE = 64;
constexpr float TARGET = 0.85f;        // of the budget
constexpr int OCTAVES_ABOVE = 10;      // of the largest threshold, over the target: a share of T1 may be far above what T2 or T3 make of it

struct Shares { float key, value; Terms terms; };

extern "C" __global__ void __launch_bounds__(THREADS) select_blocks(const Call *calls, int heads, int group) {
  const Call &call = calls[blockIdx.z];
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int h = blockIdx.y, index = blockIdx.x, row = index % ROW_TILE, base = h * tiles + index / ROW_TILE;
  if (index >= rows || call.exact_only || call.coverage) return;
  int *state = call.state + h * rows + index;
  if (*state != OPEN) return;
  const float *facts = call.facts + (i64)(h * rows + index) * ROW_FACTS, *dots = call.dots + (i64)(h * rows + index) * (call.splits + 1);
  const float top = facts[ROW_TOP], mass = facts[ROW_MASS], o = facts[ROW_NORM], target = TARGET * facts[ROW_BUDGET], fixed = facts[ROW_FIXED];
  const float *statistics = call.statistics + (i64)base * (call.full + 1) * STATISTIC_FLOATS;
  const Groups groups(call);
  const int per_group = groups.together * call.per, trailing = call.tokens > call.full * BLOCK;
  __shared__ float of_block[SELECT_WARPS][AT_ONCE][8], of_warp[SELECT_WARPS][LANES][3];

  auto shares = [&](int b) {
    const float *p = statistics + (i64)b * STATISTIC_FLOATS;
    Stats x;
#pragma unroll
    for (int k = 0; k < STATISTICS + 3; k++) x[k] = p[k < STATISTICS ? k * ROW_TILE + row : BLOCK_NOTES + k - STATISTICS];
    Shares s = {0.f, 0.f, {}};
    if (x[SUM] <= 0.f) return s;
    s.terms = block_terms(x, exp2_approx(x[TOP] - top) / mass, false);
    s.key = s.terms.t1 + s.terms.g * o, s.value = s.terms.value;
    return s;
  };
  // The predicted bound with all shares above the lane's threshold promoted; every warp's lanes return the same.
  auto predict = [&](float threshold) {
    float key = 0.f, value = 0.f, low = 0.f;
    for (int k = warp; k < groups.count; k += SELECT_WARPS) {
      Group x = {};
      if (k == groups.count - 1 && trailing) {
        const float *p = call.partials + ((i64)base * (call.splits + 1) + call.splits) * PARTIALS * ROW_TILE + row;
        const float f = exp2_approx(p[SPLIT_TOP * ROW_TILE] - top) / mass;
        x.t1 = f * p[T1 * ROW_TILE], x.g = f * p[MASS_ERROR * ROW_TILE], x.spread = f * p[SPREAD * ROW_TILE], x.used = f * p[USED * ROW_TILE];
        x.amplitude = f * p[AMPLITUDE * ROW_TILE], x.squares = f * f * p[KEY_SQUARES * ROW_TILE], x.rho = f * p[MASS * ROW_TILE];
        low += f * p[LOW * ROW_TILE];
      } else {
        const int end = min((k + 1) * per_group, call.full);
        for (int first = k * per_group; first < end; first += AT_ONCE) {
          const int count = min(AT_ONCE, end - first);
          __syncwarp();
          for (int b = lane; b < count; b += LANES) {
            const Shares s = shares(first + b);
            const float mine[8] = {s.key, s.value, s.terms.t1, s.terms.g, s.terms.spread, s.terms.squares, s.terms.low, s.terms.coded};
#pragma unroll
            for (int i = 0; i < 8; i++) of_block[warp][b][i] = mine[i];
            x.used += s.terms.used, x.error += s.terms.error2, x.amplitude += s.terms.amplitude, x.rho += s.terms.rho;
          }
          __syncwarp();
          for (int b = 0; b < count; b++) {
            const float4 y = *(const float4 *)of_block[warp][b], z = *(const float4 *)(of_block[warp][b] + 4);
            if (y.x <= threshold) x.t1 += y.z, x.g += y.w, x.spread += z.x, x.squares += z.y, low += z.z;
            if (y.y <= threshold) x.coded += y.y, x.a2 += z.w;
          }
        }
        x.used = warp_sum(x.used), x.error = warp_sum(x.error), x.amplitude = warp_sum(x.amplitude), x.rho = warp_sum(x.rho);
      }
      const int first = min(k * groups.together, call.splits), last = first == call.splits ? first + 1 : min(first + groups.together, call.splits);
      for (int i = first; i < last; i++) x.dot += dots[i];
      const float2 terms = group_terms(x, group_norms(call, groups, k, heads, h), o);
      key += terms.x, value += terms.y;
    }
    __syncthreads();
    of_warp[warp][lane][0] = key, of_warp[warp][lane][1] = value, of_warp[warp][lane][2] = low;
    __syncthreads();
    key = value = low = 0.f;
    for (int w = 0; w < SELECT_WARPS; w++) key += of_warp[w][lane][0], value += of_warp[w][lane][1], low += of_warp[w][lane][2];
    const float denominator = 1.f - low * LOW_ROUNDING;
    return denominator > 1e-4f ? (key + value + fixed) * ((1.f + THETA) * SAFETY) / denominator : INFINITY;
  };

  // Lane 0 tries the largest threshold; the first that fits is refined upwards.
  float threshold = target * exp2f(OCTAVES_ABOVE - lane);
  u32 fitting = __ballot_sync(~0u, predict(threshold) <= target);
  const bool fits = fitting && target > 0.f;
  float best = 0.f;
  if (fits) {  // uniform over the thread block
    best = target * exp2f(OCTAVES_ABOVE - (__ffs(fitting) - 1));
    threshold = best * exp2f((31 - lane) / 32.f);
    fitting = __ballot_sync(~0u, predict(threshold) <= target);
    if (fitting) best *= exp2f((31 - (__ffs(fitting) - 1)) / 32.f);
  }
  int keys = 0, values = 0;
  for (int b = threadIdx.x; fits && b < call.full; b += THREADS) {
    const Shares s = shares(b);
    const bool key = !(s.key <= best), value = !(s.value <= best);
    if (key | value) atomicOr(call.marks + (i64)base * call.full + b, (key ? 1u : 0u) << row | (value ? 16u : 0u) << row);
    keys += key, values += value;
  }
  const float all_keys = warp_sum(keys), all_values = warp_sum(values);
  __syncthreads();
  if (lane == 0) of_warp[warp][0][0] = all_keys, of_warp[warp][0][1] = all_values;
  __syncthreads();
  if (threadIdx.x) return;
  float counts[2] = {0.f, 0.f};
  for (int w = 0; w < SELECT_WARPS; w++) counts[0] += of_warp[w][0][0], counts[1] += of_warp[w][0][1];
  const i64 stride = (i64)heads * rows;
  call.fields[KEYS * stride + h * rows + index] = counts[0], call.fields[VALUES * stride + h * rows + index] = counts[1];
  *state = fits ? PROMOTED : DUE;
}
