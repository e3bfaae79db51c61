// Value pass: a split's sum of weights times values, per tile of rows, relative to the split's largest score; and, while values are on their
// way, its sums of the bound.
//
// Blocks of so little mass in all rows of the tile that leaving them out costs at most a share of the budget are not read: a block may
// spend an equal part of that share. Those whose copies are issued before masses are known are read anyhow.
constexpr int VALUE_STAGES = 4;  // at 131,072 tokens: 3 42 us, 4 40, 6 42
// The row's largest score; what a skipped block may cost it, in units of its mass: m e^Delta (nu + ||O||) at most this; and ||O||, as long as
// it is not known.
struct Limits { float top[ROW_TILE], most[ROW_TILE], output[ROW_TILE]; };

// What the score pass left of splits of a row, every 32nd from `first` on: largest score, mass and mass times norms.
struct Runs {
  static constexpr int COUNT = 4;  // loads under way together: one after the other took 6 us at 131,072 tokens
  float top[COUNT], mass[COUNT], norm[COUNT];
  __device__ __forceinline__ void read(const float *partials, int first, int number) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const int i = first + k * THREADS_A_ROW;
      const float *p = partials + (i64)min(i, number - 1) * PARTIALS * ROW_TILE;
      top[k] = i < number ? p[SPLIT_TOP * ROW_TILE] : -INFINITY, mass[k] = p[RUN_MASS * ROW_TILE], norm[k] = p[RUN_NORM * ROW_TILE];
    }
  }
};

// Of each row of the tile: never so much that the heaviest block could go. For a thread block of WARPS warps, all of whose threads come here:
// a thread a row and every 32nd of the `number` splits, of which it has read the first `runs`.
__device__ __forceinline__ void row_limits(const Call &call, const float *partials, int number, Runs &runs, Limits &limits) {
  __shared__ float of_warp[3][WARPS][ROW_TILE];
  const int lane = threadIdx.x % LANES, row = threadIdx.x % ROW_TILE, warp = threadIdx.x / LANES;
  float top = LOWEST, mass = 0.f, norm = 0.f;
#pragma unroll 1
  for (int i = 0; i < number; i += Runs::COUNT * THREADS_A_ROW) {
    if (i) runs.read(partials, i + threadIdx.x / ROW_TILE, number);
    float largest = top;
#pragma unroll
    for (int k = 0; k < Runs::COUNT; k++) largest = fmaxf(largest, runs.top[k]);
    const float f = exp2_approx(top - largest);
    mass *= f, norm *= f;
#pragma unroll
    for (int k = 0; k < Runs::COUNT; k++) {
      const float g = exp2_approx(runs.top[k] - largest);
      mass = fmaf(g, runs.mass[k], mass), norm = fmaf(g, runs.norm[k], norm);
    }
    top = largest;
  }
  float largest = top;
#pragma unroll
  for (int bit = ROW_TILE; bit < LANES; bit <<= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bit));
  const float f = exp2_approx(top - largest);
  mass *= f, norm *= f;
#pragma unroll
  for (int bit = ROW_TILE; bit < LANES; bit <<= 1) mass += __shfl_xor_sync(~0u, mass, bit), norm += __shfl_xor_sync(~0u, norm, bit);
  if (lane < ROW_TILE) of_warp[0][warp][row] = largest, of_warp[1][warp][row] = mass, of_warp[2][warp][row] = norm;
  __syncthreads();
  if (threadIdx.x < ROW_TILE) {
#pragma unroll
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, of_warp[0][w][row]);
    mass = norm = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float f = exp2_approx(of_warp[0][w][row] - largest);
      mass = fmaf(f, of_warp[1][w][row], mass), norm = fmaf(f, of_warp[2][w][row], norm);
    }
    const float vbar = norm / mass, budget = (float)fmin(call.atol * power_of_two(-call.unit) + call.rtol * vbar, (double)vbar);
    // A tenth is held back, as in step.py; and more than half of the mass is kept, so that the difference of two sums is still within
    // THETA.
    limits.top[row] = largest, limits.most[row] = fminf(0.9f * (float)call.skip_share, 0.45f) * budget * mass / (call.full + 1);
    limits.output[row] = vbar * ONCE_ABOVE;
  }
  __syncthreads();
}

// Which of a warp's blocks are left out, a block a lane: of those that `may`. `x`: the statistics of the lane's block, which is block `b`. What
// rows lose by it, to `skipped`.
__device__ __forceinline__ u32 leave_out(const float *x, int b, bool may, const Limits &limits, float (&skipped)[SKIPS][ROW_TILE]) {
  float mass[ROW_TILE];
#pragma unroll
  for (int k = 0; k < ROW_TILE; k++) {
    const float sum = statistic(x, b, k, SUM);
    mass[k] = sum != 0.f ? exp2_approx(statistic(x, b, k, TOP) - limits.top[k]) * sum : 0.f;
    may = may && !(mass[k] * limits.output[k] > limits.most[k]);
  }
  if (!__ballot_sync(~0u, may)) return 0;  // so it is most often
  float grown[ROW_TILE], nu = statistic(x, b, 0, STATISTICS + 2);
#pragma unroll
  for (int k = 0; k < ROW_TILE; k++) {
    grown[k] = mass[k] != 0.f ? mass[k] * expf(statistic(x, b, k, DELTA)) * (1.f + 1e-6f) : 0.f;
    may = may && (mass[k] == 0.f || grown[k] * (nu + limits.output[k]) <= limits.most[k]);
  }
  const u32 gone = __ballot_sync(~0u, may);
  if (!gone) return 0;
#pragma unroll
  for (int k = 0; k < ROW_TILE; k++) {
    const float left = may ? grown[k] : 0.f, parts[SKIPS] = {may ? mass[k] : 0.f, left, left > 0.f ? left * nu : 0.f, may ? 1.f : 0.f};
#pragma unroll
    for (int i = 0; i < SKIPS; i++) {
      const float sum = warp_sum(parts[i]);
      if (threadIdx.x % LANES == 0) skipped[i][k] = sum;
    }
  }
  return gone;
}

extern "C" __global__ void __launch_bounds__(WARPS *LANES, D <= 128 ? 4 : 2) value(const Call *calls, int heads, int group) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, r = lane / 4, c = lane % 4;
  const int n = call.n, full = call.full, per = call.per, splits = call.splits, exact_only = call.exact_only;
  const bool may_skip = !NAIVE && call.skip_share > 0.;
  const int tiles = (group * n + ROW_TILE - 1) / ROW_TILE, split = blockIdx.y;
  if (blockIdx.x >= heads * tiles || split > splits || exact_only) return;
  const int h = quotient(blockIdx.x, tiles), tile = blockIdx.x - h * tiles, base = h * tiles + tile;
  constexpr int STAGE_BYTES = VALUE_BYTES + WEIGHT_FLOATS * 4;  // a tile of tokens
  // Where codes can keep their lines, all of them come first, then all weights.
  constexpr int CODES_EACH = LINED ? VALUE_BYTES : STAGE_BYTES, WEIGHTS_EACH = LINED ? WEIGHT_FLOATS * 4 : STAGE_BYTES;
  unsigned char *stage = shared + (LINED ? SCORE_BYTES % LINE : 0) + warp * VALUE_STAGES * CODES_EACH;
  unsigned char *of_weights = shared + (LINED ? WARPS * VALUE_STAGES * VALUE_BYTES + LINE : VALUE_BYTES) + warp * VALUE_STAGES * WEIGHTS_EACH;
  float *statistics = (float *)(shared + WARPS * VALUE_STAGES * STAGE_BYTES + LINE);  // of the split's blocks
  __shared__ u64 bars[WARPS][VALUE_STAGES], statistics_here;
  const bool tail = split == splits;
  const int each = per / WARPS, first = split * per + warp * each, count = tail ? 0 : max(0, min(each, full - first));
  i64 offset = lane < count ? call.hot[first + lane] : 0;
  int block = lane;  // of this warp's, the one that is lane-th to be read; `offset` is its own
  if (lane < VALUE_STAGES) barrier_init(&bars[warp][lane]);
  if (threadIdx.x == 0) barrier_init(&statistics_here);
  barriers_ready();
  const float *weights = call.weights + ((i64)base * (full + 1) + first) * TILES * WEIGHT_FLOATS;
  const unsigned char *pool = call.pool + (i64)h * RECORD_BYTES + SCORE_BYTES;
  // Here, before what is waited for: the first look at a line of the call takes as long as one at what it waits for.
  float *sums = call.sums + ((i64)base * (splits + 1) + split) * ROW_TILE * D;
  float *skips = call.skips + ((i64)base * (splits + 1) + split) * SKIPS * ROW_TILE;
  float *partials = call.partials + ((i64)base * (splits + 1) + split) * PARTIALS * ROW_TILE;
  const float *of_blocks = call.statistics + ((i64)base * (full + 1) + split * per) * STATISTIC_WORDS;
  const u64 policy = stream_policy();
  auto issue_codes = [&](int i, int s) {  // and what the barrier waits for: their weights too
    i64 at = __shfl_sync(~0u, offset, i / TILES) + i % TILES * VALUE_BYTES;
    if (lane == 0) {
      barrier_expect(&bars[warp][s], VALUE_BYTES + WEIGHT_FLOATS * 4);
      bulk_stream(stage + s * CODES_EACH, pool + at, VALUE_BYTES, &bars[warp][s], policy);
    }
  };
  auto issue_weights = [&](int i, int s) {
    const int tile_of_tokens = __shfl_sync(~0u, block, i / TILES) * TILES + i % TILES;
    if (lane == 0) bulk_copy(of_weights + s * WEIGHTS_EACH, weights + tile_of_tokens * WEIGHT_FLOATS, WEIGHT_FLOATS * 4, &bars[warp][s]);
  };
  constexpr int BLOCKS_AHEAD = (VALUE_STAGES + TILES - 1) / TILES;  // those whose copies are issued before masses are known
  int items = count * TILES;
  for (int i = 0; i < min(items, VALUE_STAGES); i++) issue_codes(i, i);
  __syncthreads();      // all warps wait on `statistics_here`
  wait_for_previous();  // codes are no kernel's of the step
  if (tail) {
    if (call.tokens > full * BLOCK) value_tail(call, heads, h, base);
    return;
  }
  const bool skipping = may_skip && per * BLOCK > JOINT_TOKENS;
  __shared__ Limits limits;
  const float own_top = partials[SPLIT_TOP * ROW_TILE + threadIdx.x % ROW_TILE];
  const int number = splits + (call.tokens > full * BLOCK), blocks = min(per, full - split * per);
  const float *of_splits = partials - split * PARTIALS * ROW_TILE + threadIdx.x % ROW_TILE;
  Runs runs;
  if (skipping) runs.read(of_splits, threadIdx.x / ROW_TILE, number);
  if (!NAIVE && threadIdx.x == 0) {
    const u32 bytes = blocks * STATISTIC_WORDS * 4;
    barrier_expect(&statistics_here, bytes);
    bulk_copy(statistics, of_blocks, bytes, &statistics_here);
  }
  for (int i = 0; i < min(items, VALUE_STAGES); i++) issue_weights(i, i);
  const int row = r & 3;
  const float top = __shfl_sync(~0u, own_top, row);
  __shared__ float skipped[WARPS][SKIPS][ROW_TILE];
  if (lane < SKIPS * ROW_TILE) skipped[warp][lane / ROW_TILE][lane % ROW_TILE] = 0.f;

  // All of this ahead of the first tile, though memory has a pause then. Behind the first tiles, or in parts between tiles, it has none, and an
  // H200 took 91.6 us for rung 0 of 131,072 tokens, not 89.7, and 33.6 for 32,768, not 32.6.
  if (skipping) {
    row_limits(call, of_splits, number, runs, limits);
    barrier_wait(&statistics_here, 0);
    u32 gone = 0;
    if (count > BLOCKS_AHEAD) {
      const int own = warp * each + min(lane, count - 1);
      gone = leave_out(statistics + own * STATISTIC_WORDS, split * per + own, lane >= BLOCKS_AHEAD && lane < count, limits, skipped[warp]);
    }
    if (gone) {
      __shared__ unsigned char order[WARPS][LANES];
      const u32 wanted = (count == LANES ? ~0u : (1u << count) - 1) & ~gone;
      if (gone >> lane & 1) call.marks[(i64)base * full + first + lane] = SKIPPED_BLOCK;
      if (wanted >> lane & 1) order[warp][__popc(wanted & ((1u << lane) - 1))] = lane;
      __syncwarp();
      items = __popc(wanted) * TILES;
      block = lane < __popc(wanted) ? order[warp][lane] : 0;
      offset = __shfl_sync(~0u, offset, block);
    }
  }
  __shared__ OfWarps of_warps;
  if (!NAIVE) {
    barrier_wait(&statistics_here, 0);
    SplitSums<false> split_sums;
    split_sums.add(statistics, split * per, blocks, own_top);
    split_sums.leave(of_warps, own_top);
  }
  Products acc;
  int now = 0;
  u32 parity = 0;
  auto tile_here = [&](int) -> Tile {
    const u32 own = shared_at(of_weights) + now * WEIGHTS_EACH;
    barrier_wait(&bars[warp][now], parity);
    return {shared_at(stage) + now * CODES_EACH, __uint_as_float(shared32(own + (TOPS_AT + row) * 4)), shared128(own + row * TILE * 4 + 16 * c)};
  };
  add_values(acc, items, top, tile_here, [&](int i) {
    if (i + VALUE_STAGES < items) issue_codes(i + VALUE_STAGES, now), issue_weights(i + VALUE_STAGES, now);
    now = now + 1 == VALUE_STAGES ? 0 : now + 1;
    parity ^= now == 0;
  });
  __syncthreads();  // all warps are done with their stages
  leave_values(acc, shared);
  if (!NAIVE) write_sums<false>(partials, of_warps);
  __syncthreads();
  write_values(sums, shared);
  if (threadIdx.x < SKIPS * ROW_TILE) {
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) x += skipped[w][threadIdx.x / ROW_TILE][threadIdx.x % ROW_TILE];
    skips[threadIdx.x] = x;
  }
}
