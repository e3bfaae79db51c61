// Rung 0 but for what puts rows together: scores of quantised keys, statistics of every block and the sums of the bound over a split's, and its sums of
// weights times values. One thread block a tile of rows and split, or trailing block.
//
// One warp takes a block after the other: scores, weights, statistics, products. What the products so far are relative to, the row's largest score in the
// warp, grows with them, so nobody waits for another warp before the end. Weights are not written: what promotion needs of them it works out
// again, and of 131,072 tokens an H200 took 4 us for writing them.
//
// An H200 takes 14.3, 28.8, 46.2 and 82.3 us for rung 0 of 8,192, 32,768, 65,536 and 131,072 tokens. At 131,072 tokens memory is what limits it: the same
// copies without any arithmetic take 75 us, and 45 instructions of 500 less a block are worth 0.7. Of 512 thread blocks, all resident, the first ends at 52
// us, half by 66, the last at 74: how fast one is depends on its multiprocessor.
//
// Registers are what there is least of, 128 with four thread blocks to a multiprocessor, which is why queries lie in shared memory: with them in
// registers it took 91 us.

__device__ __forceinline__ void attend_split(const Call &call, int heads, int group, int h, int tile, int base, int split, unsigned char *shared) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, r = lane / 4, c = lane % 4, limb = r & 1;
  const int full = call.full, per = call.per;
  const float softmax_scale = (float)(call.scale * 1.4426950408889634);
  __shared__ u64 bars[WARPS][KEY_STAGES + VALUE_STAGES];
  __shared__ const unsigned char *records[WARPS][LANES];  // of the warp's blocks; behind the last one that one again

  const int each = per / WARPS, first = split * per + warp * each, count = max(0, min(each, full - first));
  if (count > 0) records[warp][lane] = call.pool + (i64)h * RECORD_BYTES + call.hot[first + min(lane, count - 1)];
  const Query query = read_query(call, h, group, tile * ROW_TILE + (r >> 1), c, limb);
  if (lane < KEY_STAGES + VALUE_STAGES) barrier_init(&bars[warp][lane]);
  barriers_ready();
  const Stages stages(shared_at(shared) + warp * STAGED_BYTES, shared_at(&bars[warp][0]), shared_at(&records[warp][0]), count);
  for (int i = 0; i < min(count, CHUNK); i++) stages.fetch_head(i);
  for (int i = 0; i < KEY_STAGES; i++) stages.issue_keys(i);

  float q[KEY_STEPS * 4];
  const RowFacts mine = scale_query(query, softmax_scale, c, limb, q);
  __shared__ Parts parts;
  __shared__ Sizes sizes;
  __shared__ float4 queries[KEY_STEPS][LANES];
  prepare_operands(parts, NAIVE ? nullptr : &sizes, q, warp, lane, limb);
  if (warp == 0)
#pragma unroll
    for (int j = 0; j < KEY_STEPS; j++) queries[j][lane] = {q[4 * j], q[4 * j + 1], q[4 * j + 2], q[4 * j + 3]};
  __syncthreads();
  // Facts of row c, which is the row of the scores that a lane holds; lane 8 c has r / 2 = c.
  const float scale = __shfl_sync(~0u, mine.scale, 8 * c), q_norm = __shfl_sync(~0u, mine.q_norm, 8 * c);
  const int seen = __shfl_sync(~0u, query.seen, 8 * c);
  const float unit = unit_factor(call.unit);
  const u64 kept = keep_policy();
  const float size = natural_size(scale);
  const i64 place = (i64)base * (full + 1) + first;
  // Where a lane writes of a block: word r of row c's statistics, of which those that tell of scores are written once more behind the chunk.
  float *statistics = call.statistics + place * STATISTIC_WORDS + c;
  // Sums over a block's tokens, but for that of weights, are an MMA's. Columns of B are weights and their squares, 2 * row and 2 * row + 1; row r of
  // A holds a norm of each token, of values or of their errors, or its square, row r + 8 ones, or the norm itself. So lane (r, c) comes by the one
  // or two sums that word r of row c has, where sums by lanes and a fold of them took 25 instructions more.
  constexpr u32 ONES = 0x3f803f80, FLOORS = 0x26802680;  // pairs of 1 and of NORM_FLOOR
  const bool of_squares = r == SUM_SQUARES, of_errors = r == SUM_ERROR, shares_word = of_squares || of_errors;
  const u32 square = in_register(r == SUM_NORM ? 0u : ~0u), error = in_register(of_errors ? ~0u : 0u);
  const u32 norm_bytes = in_register(of_errors ? BOTH_UPPER : BOTH_LOWER), halves = shares_word ? BOTH_UPPER : THE_OTHER, units = bf16_pair(unit, unit);
  // By what a lane's sums are multiplied: room, and units.
  const float own_unit = IN_UNITS ? 1.f : unit, above = shares_word ? BF16_ABOVE : 1.f, of_lower = above * TWICE_ABOVE * own_unit * own_unit;
  const float alone = r == SUM_NORM ? own_unit : r == SUM_SQUARE_VALUE ? of_lower : 1.f;
  const float of_upper = of_squares ? above * ONCE_ABOVE : of_errors ? above * ONCE_ABOVE * own_unit : alone;

  __shared__ float offset_dots[WARPS][CHUNK][ROW_TILE];
  const bool some_unseen = __ballot_sync(~0u, seen < (first + count) * BLOCK) != 0;
  const u32 queries_at = in_register(shared_at(&queries[0][lane]));
  Limbs limbs;  // of the next block
  auto prepare_limbs = [&](int block) { limbs.prepare<LANES * 16>(stages.head(block) + 16 * c + 8 * limb, queries_at, limb); };
  Products acc;
  float highest = LOWEST, running = 0.f;  // largest score of row c, what `acc` is relative to; without a certificate the mass
#pragma unroll 1
  for (int begin = 0; begin < count; begin += CHUNK) {
    copies_wait();
    const u32 head_r = stages.heads + r * HEAD_BYTES;
    const BlockFacts fact = block_facts(head_r, parts, sizes, c, lane, {size, q_norm});
    offset_dots[warp][r][c] = fact.offset_dot;
    float note = 0.f;  // of sV, amp and the largest norm, in units, and C1 the lane's
    if (!NAIVE) note = __uint_as_float(shared32(head_r + NOTES_AT + 4 * (c == 0 ? SV : c == 1 ? AMP : c == 2 ? VALUE_NORM_MAX : C1))) * (c == 3 ? 1.f : unit);
    __syncwarp();
    if (begin == 0)
      for (int i = 0; i < VALUES_AHEAD; i++) stages.issue_values(i);
    prepare_limbs(begin);
    const int end = min(begin + CHUNK, count);
    float own_step = 0.f;  // of block r of the chunk
    u32 dots_at = in_register(shared_at(&offset_dots[warp][0][c]));
#pragma unroll 1
    for (int i = begin; i < end; i++) {
      const float offset_dot = __uint_as_float(shared32(dots_at));
      dots_at += 4 * ROW_TILE;
      const float step = limbs.step(c);
      uint2 norms[TILES][2];
      float s[2 * TILES], largest = LOWEST;  // no score is lower: where a row sees nothing its weights are 2^-infinity
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const int item = i * TILES + t;
        const u32 codes = stages.keys_here(item);
        const CodeProducts products(codes, limbs, lane);
        if (!NAIVE)
#pragma unroll
          for (int half = 0; half < 2; half++) norms[t][half] = shared64(codes + TILE_CODES + half * 32 + c * 8);  // of tokens 2c and 2c + 1
        __syncwarp();  // all lanes have read the tile
        stages.issue_keys(item + KEY_STAGES);
        if (VALUES_AHEAD < VALUE_STAGES) stages.issue_values(item + VALUES_AHEAD);
        if (t == TILES - 1 && i + CHUNK < count) stages.fetch_head(i + CHUNK);
#pragma unroll
        for (int half = 0; half < 2; half++) s[2 * t + half] = products.score(half, step, offset_dot, scale);
        if (some_unseen) {
          const int left = seen - (first + i) * BLOCK - t * TILE - r;  // of the row's tokens, from this one on
          if (left <= 0) s[2 * t] = -INFINITY;
          if (left <= 8) s[2 * t + 1] = -INFINITY;
        }
        largest = fmaxf(largest, fmaxf(s[2 * t], s[2 * t + 1]));
      }
#pragma unroll
      for (int bit = 4; bit < 32; bit <<= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bit));
      const float before = highest;
      highest = fmaxf(highest, largest);
      const float keep = exp2_approx(before - highest), take = exp2_approx(largest - highest);
      if (__ballot_sync(~0u, before != highest)) acc.rescale(keep);  // seldom, once a warp has seen some blocks
      float sums[4] = {0.f, 0.f, 0.f, 0.f}, mass = 0.f;
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        u32 of_weights[2], used[2], plain[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float w = exp2_approx(s[2 * t + half] - largest);  // which is zero from 2^-126 down
          s[2 * t + half] = w, mass += w;
          if (NAIVE) continue;
          of_weights[half] = transposed(bf16_pair(w, w * w));
          const uint2 both = norms[t][half];
          u32 norm = __byte_perm(both.x, both.y, norm_bytes);
          if (IN_UNITS) norm = bf16_largest(bf16_products(norm, units), FLOORS);
          used[half] = bf16_products(norm, (norm & square) | (ONES & ~square)), plain[half] = (norm & error) | (ONES & ~error);
        }
        if (!NAIVE) mma_bf16(sums, used[0], plain[0], used[1], plain[1], of_weights[0], of_weights[1]);
      }
#pragma unroll
      for (int bit = 4; bit < 32; bit <<= 1) mass += __shfl_xor_sync(~0u, mass, bit);
      if (NAIVE) running = fmaf(running, keep, mass * take);
      else {
        const float mine = r == SUM ? mass : sums[0];
        if (r == i - begin) own_step = step;
        const float upper = r == SUM_SQUARES ? sums[3] : r == SUM_ERROR ? sums[2] : r == TOP ? largest : mine;
        const float lower = r == SUM_SQUARES ? sums[1] : sums[0];
        store_kept(statistics + word_at(first + i, r), word_of(upper * of_upper, lower * of_lower, halves), kept);
      }
      statistics += STATISTIC_WORDS;
      __syncwarp();
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const u32 b0 = weight_parts(s[2 * t] * take), b1 = weight_parts(s[2 * t + 1] * take), here = stages.values_here(i * TILES + t);
        if (t == 0 && i + 1 < end) prepare_limbs(i + 1);  // here, where it waits for little that the products wait for (1.1 of 88 us)
        acc.add(here, b0, b1);
        if (VALUES_AHEAD < VALUE_STAGES) continue;
        __syncwarp();
        stages.issue_values(i * TILES + t + VALUE_STAGES);
      }
    }
    const float code_sum = __shfl_sync(~0u, note, lane | 3);
    if (NAIVE || begin + r >= count) continue;
    // What is known of scores: by a lane for block r, where a lane for word r of each block took ten instructions more.
    const float eps = fmaf(code_sum * own_step, size * (0.5f * (1.f + 64.f * U32F)), fact.eps);
    float *of_block = statistics + (begin + r - end) * STATISTIC_WORDS;
    store_kept(of_block + word_at(first + begin + r, DELTA_WORD), fmaf(STORE, eps, fact.delta * STORE), kept);
    store_kept(of_block + word_at(first + begin + r, D_AND_NOTE), both_above(fmaf(BLOCK_ROOT * STORE, eps, fact.d_norm * STORE), note), kept);
  }
  __shared__ float tops[WARPS][ROW_TILE], masses[WARPS][ROW_TILE];
  if (r == 0) tops[warp][c] = highest;
  if (NAIVE && r == 0) masses[warp][c] = running;
  StatisticsHeld<SPLIT_BLOCKS / WARPS, LANES> held;
  if (!NAIVE) {  // what the warp has written for later kernels, read back while others end
    __syncwarp();
    held.read(call.statistics + place * STATISTIC_WORDS, count);
  }
  __syncthreads();  // all warps are done with what they staged
  const int blocks = min(per, full - split * per), place_of_split = split * per + threadIdx.x;
  if (threadIdx.x < per && place_of_split < full) call.marks[(i64)base * full + place_of_split] = 0;
  if (h == 0 && tile == 0) {  // for all tiles: words that begin with a record of the split
    const int records = 2 * heads, end = (min((split + 1) * per, full) * records + 31) / 32;
    for (int i = (split * per * records + 31) / 32 + threadIdx.x; i < end; i += WARPS * LANES) call.reads[i] = 0;
  }
  float reference = LOWEST;
#pragma unroll
  for (int w = 0; w < WARPS; w++) reference = fmaxf(reference, tops[w][c]);
  acc.leave(shared, exp2_approx(highest - reference));
  float *of_split = (float *)shared + WARPS * ROW_TILE * D, *partials = call.partials + ((i64)base * (call.splits + 1) + split) * PARTIALS * ROW_TILE;
  if (!NAIVE) held.leave(of_split + warp * each * STATISTIC_WORDS, count);
  __syncthreads();
  write_values(call.sums + ((i64)base * (call.splits + 1) + split) * ROW_TILE * D, shared);
  if (NAIVE) {
    if (warp || r) return;
    float mass = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) mass = fmaf(masses[w][c], exp2_approx(tops[w][c] - reference), mass);
    partials[MASS * ROW_TILE + c] = mass, partials[SPLIT_TOP * ROW_TILE + c] = reference;
    return;
  }
  OfWarps &of_warps = *(OfWarps *)(of_split + SPLIT_BLOCKS * STATISTIC_WORDS);
  SplitSums<false> sums;
  sums.add(of_split, split * per, blocks, reference);
  sums.leave(of_warps, reference);
  __syncthreads();
  write_sums(partials, of_warps);
}

extern "C" __global__ void __launch_bounds__(WARPS *LANES, D <= 128 ? 4 : 2) attend(const Call *calls, int heads, int group) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  const int tiles = (group * call.n + ROW_TILE - 1) / ROW_TILE, split = blockIdx.y;
  if (blockIdx.x >= heads * tiles || split > call.splits || call.exact_only) return;
  const int h = quotient(blockIdx.x, tiles), tile = blockIdx.x - h * tiles, base = h * tiles + tile;
  if (split == call.splits) {
    if (call.tokens <= call.full * BLOCK) return;
    static_assert(4 * BLOCK * (D + 1 + ROW_TILE) <= WARPS * STAGED_BYTES, "a trailing block has room where others are staged");
    float *originals = (float *)shared, *weights = originals + BLOCK * (D + 1);
    score_tail(calls + blockIdx.z, heads, group, h, tile, tiles, originals, weights);
    __syncthreads();
    return value_tail(call, heads, h, base, weights);
  }
  attend_split(call, heads, group, h, tile, base, split, shared);
}
