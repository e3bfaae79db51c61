// Second score pass: blocks whose keys or values were promoted, anew from their originals, and their splits' sums. One thread block a
// tile of rows and a split; most find nothing to do.
extern "C" __global__ void __launch_bounds__(WARPS *LANES) rescore(const Call *calls, int heads, int group) {
  extern __shared__ __align__(128) unsigned char shared[];
  float *x = (float *)shared;  // [BLOCK][D + 1]
  const Call &call = calls[blockIdx.z];
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES, split = blockIdx.y, full = call.full;
  const int tiles = (group * call.n + ROW_TILE - 1) / ROW_TILE;
  if (blockIdx.x >= heads * tiles || split >= call.splits || call.exact_only) return;
  const int h = blockIdx.x / tiles, tile = blockIdx.x % tiles, base = h * tiles + tile;
  const int first = split * call.per, count = min(call.per, full - first);
  const u32 *marks = call.marks + (i64)base * full + first;
  if (!__syncthreads_or(threadIdx.x < count && marks[min((int)threadIdx.x, count - 1)])) return;

  __shared__ float q[ROW_TILE][D + 1], scores[ROW_TILE][BLOCK], tops[ROW_TILE];
  __shared__ double sizes[ROW_TILE][BLOCK];
  const float unit = unit_factor(call.unit[h]);
  for (int i = threadIdx.x; i < ROW_TILE * D; i += WARPS * LANES) {
    const Row query = query_row(call, h, group, tile * ROW_TILE + i / D);
    q[i / D][i % D] = query.real ? as_float(call.q, query.at + i % D) : 0.f;
  }
  for (int b = 0; b < count; b++) {
    const u32 mark = marks[b];
    if (!mark) continue;
    const unsigned char *record = call.pool + call.hot[first + b] + (i64)h * RECORD_BYTES;
    __syncthreads();
    if (mark & 15) {
      load_record(x, located(call, call.key_at, heads, h, first + b), BLOCK, WARPS * LANES);
      __syncthreads();
      for (int i = threadIdx.x; i < ROW_TILE * BLOCK; i += WARPS * LANES) {
        const int of = i % ROW_TILE, token = i / ROW_TILE;
        const Product dot = product(x + token * (D + 1), [&](int k) { return q[of][k]; });
        const bool seen = (first + b) * BLOCK + token < query_row(call, h, group, tile * ROW_TILE + of).seen;
        scores[of][token] = seen ? (float)(dot.sum * call.scale * 1.4426950408889634) : -INFINITY;
        sizes[of][token] = seen ? dot.size * fabs(call.scale) : 0.;
      }
      __syncthreads();
    }
    if (!(mark >> row & 0x11)) continue;  // a warp a row
    const bool keys = mark >> row & 1, values = mark >> row & 16, raw = ((const u32 *)(record + NOTES_AT))[VALUES_RAW];
    const i64 place = (i64)base * (full + 1) + first + b;
    float *weights = call.weights + place * TILES * WEIGHT_FLOATS, *statistics = call.statistics + place * STATISTIC_FLOATS + row;
    float largest = statistics[TOP * ROW_TILE], magnitude = 0.f;
    double size = 0.;
    if (keys) {
      largest = -INFINITY;
      for (int t = lane; t < BLOCK; t += LANES) {
        largest = fmaxf(largest, scores[row][t]), size = fmax(size, sizes[row][t]);
        if (scores[row][t] > -INFINITY) magnitude = fmaxf(magnitude, fabsf(scores[row][t]));
      }
      largest = warp_max(largest), magnitude = warp_max(magnitude);
      for (int bit = 1; bit < 32; bit <<= 1) size = fmax(size, __shfl_xor_sync(~0u, size, bit));
    }
    RowSums sum;
    for (int t = lane; t < BLOCK; t += LANES) {
      float &weight = weights[t / TILE * WEIGHT_FLOATS + row * TILE + t % TILE];
      if (keys) {
        const float y = scores[row][t] - largest;
        weight = y >= LOG2_MIN ? exp2_approx(y) : 0.f;
      }
      const u32 both = ((const u32 *)(record + NORMS_AT))[t];
      const float nu = fmaxf(__uint_as_float(both << 16) * unit, NORM_FLOOR);
      // Raw values have no codes that could err; promoted ones are used as they are.
      const float eta = values && raw ? 0.f : fmaxf(__uint_as_float(both & 0xffff0000u) * unit, NORM_FLOOR);
      sum.add(weight, nu, eta, values ? nu : nu + eta);
    }
#pragma unroll
    for (int k = 0; k < TOP; k++) sum.v[k] = warp_sum(sum.v[k]);
    if (lane) continue;
    if (keys) {
      const float eps = exact_epsilon(magnitude, size);
      for (int k = 0; k < TILES; k++) weights[k * WEIGHT_FLOATS + TOPS_AT + row] = largest;
      statistics[TOP * ROW_TILE] = largest;
      statistics[DELTA * ROW_TILE] = statistics[EPSILON * ROW_TILE] = eps;
      statistics[D_NORM * ROW_TILE] = BLOCK_ROOT * eps * STORE;
    }
    if (values) sum.v[SUM_SQUARE_ERROR] = 0.f;
    for (int k = 0; k < TOP; k++) statistics[k * ROW_TILE] = sum.v[k];
  }
  __syncthreads();
  const float *of_split = call.statistics + ((i64)base * (full + 1) + first) * STATISTIC_FLOATS + TOP * ROW_TILE;
  float largest = -INFINITY;
  for (int b = lane; b < count; b += LANES) largest = fmaxf(largest, of_split[b * STATISTIC_FLOATS + row]);
  largest = warp_max(largest);
  if (lane == 0) tops[row] = largest;
  __syncthreads();
  split_sums<true>(call, base, split, tops[threadIdx.x % ROW_TILE]);
}
