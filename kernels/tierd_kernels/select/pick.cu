// Selection under the hard budget: for a row that missed it, the fewest blocks whose keys or values, read as originals, are predicted to bring it
// within.
//
// A key and a value record cost the same bytes, so one threshold on both shares of the bound ranks them (as select/reference.py's
// cheapest_within does). A lane tries one threshold: octaves in the first launch (`round` 0), parts of the octave that fits in the second. A
// thread block takes a tile of rows and a part of the groups of 1024 tokens; who needs the outcome adds the parts (`threshold`). What is
// promoted counts as without error, which a target below the budget makes up for. Selection may be wrong at will: only what finish computes
// from what was used opens the gate.
constexpr int PICK_WARPS = 16, THREADS = PICK_WARPS * LANES, AT_ONCE = LANES;

extern "C" __global__ void __launch_bounds__(THREADS) pick(const Call *calls, int heads, int group, int round) {
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  wait_for_previous();
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  if (blockIdx.x >= heads * tiles || call.exact_only || call.coverage) return;
  const int h = blockIdx.x / tiles, tile = blockIdx.x % tiles, base = blockIdx.x, row = warp % ROW_TILE;
  if (!any_row(call, h, group, tile, OPEN)) return;
  __shared__ __align__(16) float of_block[PICK_WARPS][AT_ONCE][8];
  __shared__ float of_warp[PICK_WARPS / ROW_TILE][ROW_TILE][LANES][2];
  float terms = 0.f, low = 0.f;
  const Groups groups(call);
  const int each = (groups.count + PICK_PARTS - 1) / PICK_PARTS, first = blockIdx.y * each, last = min(first + each, groups.count);
  if (open_row(call, h, group, tile, row)) {
    const RowState own(call, h, rows, tile * ROW_TILE + row);
    const float limit = threshold(call, base, row, own, round, lane);
    const int per_group = groups.together * call.per, trailing = call.tokens > call.full * BLOCK;
    for (int k = first + warp / ROW_TILE; k < last; k += PICK_WARPS / ROW_TILE) {
      Group x = {};
      if (k == groups.count - 1 && trailing) {
        const float *p = call.partials + ((i64)base * (call.splits + 1) + call.splits) * PARTIALS * ROW_TILE + row;
        const float f = exp2_approx(p[SPLIT_TOP * ROW_TILE] - own.top) / own.mass;
        x.t1 = f * p[T1 * ROW_TILE], x.g = f * p[MASS_ERROR * ROW_TILE], x.spread = f * p[SPREAD * ROW_TILE], x.used = f * p[USED * ROW_TILE];
        x.amplitude = f * p[AMPLITUDE * ROW_TILE], x.squares = f * f * p[KEY_SQUARES * ROW_TILE], x.rho = f * p[MASS * ROW_TILE];
        low += f * p[LOW * ROW_TILE];
      } else {
        const int end = min((k + 1) * per_group, call.full);
        for (int b = k * per_group; b < end; b += AT_ONCE) {
          const int count = min(AT_ONCE, end - b);
          __syncwarp();
          if (lane < count) {
            const Shares s = shares(call, base, b + lane, row, own);
            const float mine[8] = {s.key, s.value, s.terms.t1, s.terms.g, s.terms.spread, s.terms.squares, s.terms.low, s.terms.coded};
#pragma unroll
            for (int i = 0; i < 8; i++) of_block[warp][lane][i] = mine[i];
            x.used += s.terms.used, x.error += s.terms.error2, x.amplitude += s.terms.amplitude, x.rho += s.terms.rho;
          }
          __syncwarp();
          for (int i = 0; i < count; i++) {
            const float4 y = *(const float4 *)of_block[warp][i], z = *(const float4 *)(of_block[warp][i] + 4);
            if (y.x <= limit) x.t1 += y.z, x.g += y.w, x.spread += z.x, x.squares += z.y, low += z.z;
            if (y.y <= limit) x.coded += y.y, x.a2 += z.w;
          }
        }
        x.used = warp_sum(x.used), x.error = warp_sum(x.error), x.amplitude = warp_sum(x.amplitude), x.rho = warp_sum(x.rho);
      }
      const float *dots = call.dots + (i64)(h * rows + tile * ROW_TILE + row) * (call.splits + 1);
      const int begin = min(k * groups.together, call.splits), stop = begin == call.splits ? begin + 1 : min(begin + groups.together, call.splits);
      for (int i = begin; i < stop; i++) x.dot += dots[i];
      const float2 found = group_terms(x, group_norms(call, groups, k, heads, h), own.output);
      terms += found.x + found.y;
    }
  }
  of_warp[warp / ROW_TILE][row][lane][0] = terms, of_warp[warp / ROW_TILE][row][lane][1] = low;
  __syncthreads();
  if (threadIdx.x >= ROW_TILE * LANES) return;
  float *out = picks(call, base, round, blockIdx.y) + (threadIdx.x / LANES * LANES + lane) * 2;
  for (int i = 0; i < 2; i++) {
    float sum = 0.f;
    for (int w = 0; w < PICK_WARPS / ROW_TILE; w++) sum += of_warp[w][threadIdx.x / LANES][lane][i];
    out[i] = sum;
  }
}
