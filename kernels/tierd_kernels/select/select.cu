// Selection: for a row that missed its budget, the fewest blocks whose keys or values, read as originals, are predicted to bring it within.
//
// A key and a value record cost the same bytes, so one threshold on both shares of the bound ranks them; it is found by bisection over
// the whole bound (select/reference.py::cheapest_within), a group of 1024 tokens a warp. Selection may be wrong at will: only what
// finish computes from what was used opens the gate.
constexpr int SELECT_WARPS = 16, THREADS = SELECT_WARPS * LANES, ROUNDS = 12;
constexpr float TARGET = 0.85f;   // of the budget: ||O|| and o_G change with the promotion
constexpr float OCTAVES = 30.f;   // below the largest share, in which the threshold is sought

// A block of one row: its terms as it stands, and with keys or values promoted.
struct Candidate {
  Stats x;
  float here, key, value;  // factor over mass; shares
  bool live;
};

__device__ __forceinline__ Terms promoted_terms(const Candidate &c, bool keys, bool values) {
  if (!keys) return block_terms(c.x, c.here, values);
  Stats x;
#pragma unroll
  for (int k = 0; k < STATISTICS + 3; k++) x[k] = c.x[k];
  x[DELTA] = c.x[EPSILON], x[D_NORM] = c.x[EPSILON] * (BLOCK == 16 ? 4.f : BLOCK == 32 ? 5.6568549f : 8.f);
  return block_terms(x, c.here, values);
}

extern "C" __global__ void __launch_bounds__(THREADS) select_blocks(const Call *calls, int heads, int group) {
  const Call &call = calls[blockIdx.z];
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int h = blockIdx.y, index = blockIdx.x, row = index % ROW_TILE, base = h * tiles + index / ROW_TILE;
  if (index >= rows || call.exact_only) return;
  int *state = call.state + h * rows + index;
  if (*state != OPEN) return;
  const float *facts = call.facts + (i64)(h * rows + index) * ROW_FACTS, *dots = call.dots + (i64)(h * rows + index) * (call.splits + 1);
  const float top = facts[ROW_TOP], mass = facts[ROW_MASS], o = facts[ROW_NORM], target = TARGET * facts[ROW_BUDGET], fixed = facts[ROW_FIXED];
  const float *statistics = call.statistics + (i64)base * (call.full + 1) * STATISTIC_FLOATS + row;
  const Groups groups(call);
  const int per_group = groups.together * call.per, trailing = call.tokens > call.full * BLOCK;
  __shared__ float of_warp[3][SELECT_WARPS];

  auto candidate = [&](int b, int end) {
    Candidate c;
    const float *p = statistics + (i64)b * STATISTIC_FLOATS;
    c.live = b < end && !(p[SUM * ROW_TILE] <= 0.f);
#pragma unroll
    for (int k = 0; k < STATISTICS + 3; k++) c.x[k] = c.live ? p[k < STATISTICS ? k * ROW_TILE : BLOCK_NOTES + k - STATISTICS - row] : 0.f;
    c.here = c.live ? exp2_approx(c.x[TOP] - top) / mass : 0.f;
    const Terms t = block_terms(c.x, c.here, false);
    c.key = c.live ? t.t1 + t.g * o : 0.f, c.value = c.live ? t.value : 0.f;
    return c;
  };
  // The predicted bound with all shares above the threshold promoted; all threads return it.
  auto predict = [&](float threshold) {
    float key = 0.f, value = 0.f, low = 0.f;
    for (int k = warp; k < groups.count; k += SELECT_WARPS) {
      Group x = {};
      if (k == groups.count - 1 && trailing) {
        const float *p = call.partials + ((i64)base * (call.splits + 1) + call.splits) * PARTIALS * ROW_TILE + row;
        const float f = lane == 0 ? exp2_approx(p[SPLIT_TOP * ROW_TILE] - top) / mass : 0.f;
        x.t1 = f * p[T1 * ROW_TILE], x.g = f * p[MASS_ERROR * ROW_TILE], x.spread = f * p[SPREAD * ROW_TILE], x.used = f * p[USED * ROW_TILE];
        x.amplitude = f * p[AMPLITUDE * ROW_TILE], x.squares = f * f * p[KEY_SQUARES * ROW_TILE], x.rho = f * p[MASS * ROW_TILE];
        low += f * p[LOW * ROW_TILE];
      } else {
        const int end = min((k + 1) * per_group, call.full);
        for (int b = k * per_group + lane; b < end; b += LANES) {
          const Candidate c = candidate(b, end);
          if (!c.live) continue;
          const Terms t = promoted_terms(c, !(c.key <= threshold), !(c.value <= threshold));
          x.t1 += t.t1, x.g += t.g, x.spread += t.spread, x.used += t.used, x.error += t.error2, x.amplitude += t.amplitude;
          x.squares += t.squares, x.coded += t.value, x.a2 += t.coded, x.rho += t.rho;
          low += t.low;
        }
      }
      float *sums[10] = {&x.t1, &x.g, &x.spread, &x.used, &x.error, &x.amplitude, &x.squares, &x.coded, &x.a2, &x.rho};
#pragma unroll
      for (int i = 0; i < 10; i++) *sums[i] = warp_sum(*sums[i]);
      if (lane == 0) {
        const int first = min(k * groups.together, call.splits), last = first == call.splits ? first + 1 : min(first + groups.together, call.splits);
        for (int i = first; i < last; i++) x.dot += dots[i];
        const float2 terms = group_terms(x, group_norms(call, groups, k, heads, h), o);
        key += terms.x, value += terms.y;
      }
    }
    low = warp_sum(low);
    __syncthreads();
    if (lane == 0) of_warp[0][warp] = key, of_warp[1][warp] = value, of_warp[2][warp] = low;
    __syncthreads();
    key = value = low = 0.f;
    for (int w = 0; w < SELECT_WARPS; w++) key += of_warp[0][w], value += of_warp[1][w], low += of_warp[2][w];
    const float denominator = 1.f - low * LOW_ROUNDING;
    return denominator > 1e-4f ? (key + value + fixed) * ((1.f + THETA) * SAFETY) / denominator : INFINITY;
  };

  float most = 0.f;
  for (int b = threadIdx.x; b < call.full; b += THREADS) {
    const Candidate c = candidate(b, call.full);
    most = fmaxf(most, fmaxf(fminf(c.key, 1e30f), fminf(c.value, 1e30f)));
  }
  most = warp_max(most);
  if (lane == 0) of_warp[0][warp] = most;
  __syncthreads();
  for (int w = 0; w < SELECT_WARPS; w++) most = fmaxf(most, of_warp[0][w]);
  // Thresholds from `below`, which fits, to `above`, which may not; what is infinite or NaN is above both.
  float above = log2f(fmaxf(most, 1e-37f)) + 0.01f, below = above - OCTAVES;
  bool fits = target > 0.f && predict(exp2f(below)) <= target;
  if (fits) {
    for (int i = 0; i < ROUNDS; i++) {
      const float middle = 0.5f * (below + above);
      if (predict(exp2f(middle)) <= target) below = middle; else above = middle;
    }
  }
  const float threshold = exp2f(below);
  int keys = 0, values = 0;
  for (int b = threadIdx.x; fits && b < call.full; b += THREADS) {
    const Candidate c = candidate(b, call.full);
    const bool key = c.live && !(c.key <= threshold), value = c.live && !(c.value <= threshold);
    if (key | value) atomicOr(call.marks + (i64)base * call.full + b, (key ? 1u : 0u) << row | (value ? 16u : 0u) << row);
    keys += key, values += value;
  }
  __syncthreads();
  const float all_keys = warp_sum(keys), all_values = warp_sum(values);
  if (lane == 0) of_warp[0][warp] = all_keys, of_warp[1][warp] = all_values;
  __syncthreads();
  if (threadIdx.x) return;
  float counts[2] = {0.f, 0.f};
  for (int w = 0; w < SELECT_WARPS; w++) counts[0] += of_warp[0][w], counts[1] += of_warp[1][w];
  const i64 stride = (i64)heads * rows;
  call.fields[KEYS * stride + h * rows + index] = counts[0], call.fields[VALUES * stride + h * rows + index] = counts[1];
  *state = fits ? PROMOTED : DUE;
}
