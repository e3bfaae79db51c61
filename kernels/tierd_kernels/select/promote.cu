// Promotion: what the first passes made of the blocks that a row needs original is taken back, and what their originals give is put in its
// place: scores and statistics, the splits' sums of the bound, and the sums of weights times values. One thread block a tile of rows and a
// split, which may have a part of another tile's blocks (select/sharing.cuh): a warp weighs the tokens of a block for a row, then a thread has
// a channel of the values.
//
// Weights stay relative to the split's largest score of the first pass, until the sums are written. Scores of originals are sums in FP32 of
// exact or once rounded products; what was taken back has been rounded once already, which the split's ERROR remembers (CERTIFICATE.md,
// "Promotion").

static_assert(WARPS == ROW_TILE, "a warp a row");
static_assert(SPLIT_BLOCKS <= THREADS, "a thread a block");
constexpr int OWN_STATISTICS = (SPLIT_BLOCKS * STATISTIC_WORDS / 4 + THREADS - 1) / THREADS;  // of a thread, four at a time

// Which blocks of the split are promoted in which rows, to `marks` (the row's own are decided here, those of the coverage policy were
// before), and, in order, the blocks that are promoted in any; returns their number. For all threads: `limit` is that of row threadIdx.x %
// ROW_TILE, `weights` what selection wrote for it and every 32nd block; `counting`: whether this thread block counts them.
__device__ __forceinline__ int decide(const Call &call, int h, int rows, int tile, int base, int first, int count, float limit, bool coverage,
                                      bool counting, const float2 (&weights)[ROUNDS], Scratch &to) {
  const int row = threadIdx.x % ROW_TILE, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  u32 *marks = call.marks + (i64)base * call.full + first;
  int keys = 0, values = 0;
  u32 mine[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int b = (threadIdx.x + i * THREADS) / ROW_TILE;
    u32 mark = 0;
    if (b < count && limit < INFINITY) {
      const bool key = weights[i].x >= limit, value = weights[i].y >= limit;
      keys += key, values += value, mark = (key ? 1u : 0u) << row | (value ? 16u : 0u) << row;
    }
#pragma unroll
    for (int bit = 1; bit < ROW_TILE; bit <<= 1) mark |= __shfl_xor_sync(~0u, mark, bit);
    if (b < count && row == 0) {
      if (coverage) mark = marks[b];
      else if (mark) marks[b] = mark;
      to.marks[b] = mark & 255u;
    }
    mine[i] = row == 0 && b < count ? mark & 255u : 0u;
    const u32 some = __ballot_sync(~0u, mine[i] != 0);
    if (lane == 0) to.found[i][warp] = __popc(some);
  }
  for (int bit = ROW_TILE; bit < LANES; bit <<= 1) keys += __shfl_xor_sync(~0u, keys, bit), values += __shfl_xor_sync(~0u, values, bit);
  int *counts = call.counts + 2 * (h * rows + tile * ROW_TILE + row);
  if (counting && lane < ROW_TILE && keys) atomicAdd(counts, keys);
  if (counting && lane < ROW_TILE && values) atomicAdd(counts + 1, values);
  __syncthreads();
  int before = 0;
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const u32 some = __ballot_sync(~0u, mine[i] != 0);
    for (int w = 0; w < WARPS; w++) {
      if (w == warp && mine[i]) to.list[before + __popc(some & ((1u << lane) - 1))] = (threadIdx.x + i * THREADS) / ROW_TILE;
      before += to.found[i][w];
    }
  }
  __syncthreads();
  return before;
}

// A row's weights of a staged block as its originals make them, against what they were, to `room.weight`; its statistics anew. A warp's. Returns
// in lane TOP the mass times norms that is taken back.
__device__ __forceinline__ float weigh(const Call &call, int block, u32 mark, int row, const unsigned char *stage, Scratch &room,
                                       float *statistics) {
  const int lane = threadIdx.x % LANES, token = lane % TILE;
  const bool key = mark >> row & 1, value = mark >> row & 16;
  const float *notes = (const float *)(stage + NOTES_STAGED_AT);
  const bool raw = __float_as_uint(notes[VALUES_RAW]);
  const float *weights = (const float *)(stage + WEIGHTS_STAGED_AT), before = weights[TOPS_AT + row], unit = unit_factor(call.unit);
  float s[TILES], top = before, size = 0.f;
  bool wrong = false;
  if (key) {
    top = -INFINITY;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      const bool seen = block * BLOCK + t * TILE + token < room.seen[row];
      const float score = score_original(stage + t * TILE * ROW_BYTES, room, row, lane);
      wrong = wrong || (seen && !(fabsf(score) < INFINITY));
      if (seen) size = fmaxf(size, fabsf(score));
      s[t] = seen ? score : -INFINITY;
      top = fmaxf(top, s[t]);
    }
#pragma unroll
    for (int bit = 1; bit < TILE; bit <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, bit)), size = fmaxf(size, __shfl_xor_sync(~0u, size, bit));
    wrong = __ballot_sync(~0u, wrong) != 0;
  }
  RowSums sums;
  const float was_factor = exp2_approx(before - room.top[row]), is_factor = exp2_approx(top - room.top[row]);
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    if (lane / TILE != t % 2) continue;  // the halves of a warp take tiles in turn
    const u32 both = ((const u32 *)(stage + NORMS_STAGED_AT))[t * TILE + token];
    const float nu = fmaxf(__uint_as_float(both << 16) * unit, NORM_FLOOR), stored = fmaxf(__uint_as_float(both & 0xffff0000u) * unit, NORM_FLOOR);
    const float was = weights[t * WEIGHT_FLOATS + weight_at(row, token)];
    const float is = !key ? was : s[t] - top >= LOG2_MIN ? exp2_approx(s[t] - top) : 0.f;
    // Raw values have no codes that could err; promoted ones are used as they are.
    const float eta = value && raw ? 0.f : stored;
    sums.add(is, nu, eta);
    sums.v[TOP] += was * was_factor * (raw ? nu : nu + stored);  // a place that sums have free
    const float now = is * is_factor, then = was * was_factor;
    room.weight[t * TILE + token][row] = value ? -then : now - then, room.weight[t * TILE + token][ROW_TILE + row] = value ? now : 0.f;
  }
  if (value) sums.v[SUM_SQUARE_ERROR] = 0.f;
  const float sum = fold_warp(sums.v, lane);
  const float eps = wrong ? INFINITY
                          : (room.size[row] * (room.q_norm[row] * notes[KEY_NORM_MAX] * KEY_ROUNDINGS + KEY_FLOOR) +
                             SCORE_ROUNDINGS * size + EXP_ERROR) * STORE;
  float x = lane == SUM && wrong ? 1.f : sum, other = __shfl_xor_sync(~0u, sum, 2);  // a block without mass would not be looked at
  if (lane == D_AND_NOTE) x = BLOCK_ROOT * eps * STORE, other = notes[row == 0 ? SV : row == 1 ? AMP : VALUE_NORM_MAX] * unit;
  if (lane == SUM_SQUARES || lane == SUM_ERROR || lane == D_AND_NOTE) x = both_above(x, other);
  if (lane == DELTA_WORD) x = eps;
  if (lane == TOP) x = top;
  if (lane <= TOP && (key || lane < DELTA_WORD || lane == SUM_ERROR)) statistics[word_at(block, lane) + row] = x;
  return sum;
}

// By how much a staged block changes the sums of weights times values, added to a thread's channels.
__device__ __forceinline__ void add_change(const unsigned char *stage, u32 mark, const Scratch &room, Channels &change) {
  const __half2 thousand = __half2half2(__ushort_as_half(0x6400));
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int channel = step * THREADS + threadIdx.x;
    if (channel >= D) break;
    float of_block[ROW_TILE] = {0.f};
#pragma unroll 1
    for (int t = 0; t < TILES; t++) {
      const unsigned char *part = stage + CODES_STAGED_AT + t * VALUE_BYTES;
      const uint4 words = *(const uint4 *)(part + (channel / 16 * LANES + channel % 8 * 4) * 4);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const uint4 pairs = *(const uint4 *)(part + VALUE_SCALES_AT + (channel / GROUP * 4 + c) * 16);
        const u32 word = (c == 0 ? words.x : c == 1 ? words.y : c == 2 ? words.z : words.w) >> (8 * (channel % 16 / 8));
#pragma unroll
        for (int j = 0; j < 2; j++) {  // tokens 2 c and 2 c + 1 of each half of the tile; as FP16 with 1024 added: no conversion
          const __half2 codes = __hsub2(as_half2(either(word >> (4 * j), 0x000f000fu, 0x64006400u)), thousand);
          const float2 stored = __half22float2(__hfma2(codes, as_half2(j ? pairs.y : pairs.x), as_half2(j ? pairs.w : pairs.z)));
          const float *weights = room.weight[t * TILE + j * 8 + 2 * c];
#pragma unroll
          for (int row = 0; row < ROW_TILE; row++)
            of_block[row] = fmaf(weights[2 * ROW_TILE + row], stored.y, fmaf(weights[row], stored.x, of_block[row]));
        }
      }
      if (mark & 240)
#pragma unroll
        for (int i = 0; i < TILE; i++) {
          const float original = as_float(stage + VALUES_STAGED_AT, (t * TILE + i) * D + channel);
          const float *weights = room.weight[t * TILE + i] + ROW_TILE;
#pragma unroll
          for (int row = 0; row < ROW_TILE; row++) of_block[row] = fmaf(weights[row], original, of_block[row]);
        }
    }
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++) change[step][row] += of_block[row];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, STAGES > 1 ? 4 : 1) promote(const Call *calls, int heads, int group) {
  extern __shared__ __align__(128) unsigned char shared[];  // staged blocks; then the split's statistics
  __shared__ Scratch room;
  __shared__ float after[ROW_TILE], factors[ROW_TILE], errors[ROW_TILE];
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, split = blockIdx.y, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  if (blockIdx.x >= heads * tiles || split >= call.splits || call.exact_only) return;
  const int first = split * call.per, count = min(call.per, call.full - first);
  const Sharing sharing(call, heads, rows, tiles);
  wait_for_previous();
  const Share share = sharing.own();
  if (share.tile < 0) return;
  const bool coverage = sharing.coverage;
  const int base = share.tile, h = base / tiles, tile = base % tiles, index = tile * ROW_TILE + lane % ROW_TILE;
  const int at_row = h * rows + min(index, rows - 1);
  float q[PER_LANE];
  const int seen = read_query(call, h, group, tile * ROW_TILE + warp, q);
  const float2 *of_rows = call.row_weights + ((i64)base * call.full + first) * ROW_TILE;
  float *partials = call.partials + ((i64)base * (call.splits + 1) + split) * PARTIALS * ROW_TILE;
  const float chosen = call.facts[(i64)at_row * ROW_FACTS + ROW_LIMIT], top = partials[SPLIT_TOP * ROW_TILE + lane % ROW_TILE];
  const bool open = index < rows && call.state[at_row] == OPEN;
  float2 weights[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int at = threadIdx.x + i * THREADS;  // of a row that nothing has chosen for, whatever lies there
    weights[i] = at < count * ROW_TILE ? of_rows[at] : make_float2(0.f, 0.f);
  }
  const i64 before = (i64)base * (call.full + 1) + first;
  if (threadIdx.x < count) {  // of all blocks, while their weights are on their way: asked for once the list is there they took another 1 us
    const int block = first + threadIdx.x;
    room.places[threadIdx.x] = {call.pool + call.hot[block] + (i64)h * RECORD_BYTES, located(call, 0, heads, h, block), located(call, 1, heads, h, block),
                                call.weights + (before + threadIdx.x) * TILES * WEIGHT_FLOATS};
  }
  const float limit = open && !coverage ? chosen : INFINITY;  // of a row that is not open nothing has chosen it
  const int listed = decide(call, h, rows, tile, base, first, count, limit, coverage, share.part == 0, weights, room);
  const int parts = max(1, min(share.parts, listed / PART_LEAST)), number = share.part < parts ? (listed - share.part + parts - 1) / parts : 0;
  if (!number) return;
  auto listed_at = [&](int i) { return room.list[share.part + i * parts]; };
  if (threadIdx.x < ROW_TILE) room.top[threadIdx.x] = top;
  if (threadIdx.x < STAGES) barrier_init(&room.bars[threadIdx.x]);
  barriers_ready();
  __syncthreads();
  auto stage_of = [&](int i) { return shared + i % STAGES * STAGED_BYTES; };
  auto stage_blocks = [&](int from, int to) {  // a warp's
#pragma unroll 1
    for (int k = from; k < min(to, number); k++) stage_block(stage_of(k), room.places[listed_at(k)], room.marks[listed_at(k)], &room.bars[k % STAGES]);
  };
  if (warp == 0) stage_blocks(0, STAGES);
  float *sums = call.sums + ((i64)base * (call.splits + 1) + split) * ROW_TILE * D;
  Channels change = {}, were;
#pragma unroll
  for (int step = 0; step < STEPS; step++)
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++) {
      const int channel = step * THREADS + threadIdx.x;
      were[step][row] = channel < D ? sums[row * D + channel] : 0.f;
    }
  scaled_query(call, q, seen, room);
  float *statistics = call.statistics + before * STATISTIC_WORDS;
  float back = 0.f;  // in lane TOP
#pragma unroll 1
  for (int i = 0; i < number; i++) {
    const int b = listed_at(i);
    const u32 mark = room.marks[b];
    __syncthreads();  // all are done with the block before
    if (i && STAGES > 1 && warp == 0) stage_blocks(i + STAGES - 1, i + STAGES);
    barrier_wait(&room.bars[i % STAGES], i / STAGES & 1);
    if (mark >> warp & 0x11) back += weigh(call, first + b, mark, warp, stage_of(i), room, statistics + b * STATISTIC_WORDS);
    else for (int t = lane; t < BLOCK; t += LANES) room.weight[t][warp] = room.weight[t][ROW_TILE + warp] = 0.f;
    __syncthreads();
    add_change(stage_of(i), mark, room, change);
    if (STAGES > 1) continue;
    __syncthreads();
    if (warp == 0) stage_blocks(i + 1, i + 2);
  }
  __syncthreads();
  if (parts > 1 && !join_parts(call, heads, heads * tiles, split, share, parts, change, back)) return;
  const float4 *written = (const float4 *)statistics;
  float4 held[OWN_STATISTICS];
#pragma unroll
  for (int k = 0; k < OWN_STATISTICS; k++)
    if (threadIdx.x + k * THREADS < count * (STATISTIC_WORDS / 4)) held[k] = __ldcg(written + threadIdx.x + k * THREADS);  // other parts', too
#pragma unroll
  for (int k = 0; k < OWN_STATISTICS; k++)
    if (threadIdx.x + k * THREADS < count * (STATISTIC_WORDS / 4)) ((float4 *)shared)[threadIdx.x + k * THREADS] = held[k];
  __syncthreads();
  const float *of_split = (const float *)shared;
  float largest = LOWEST;
  for (int b = lane; b < count; b += LANES) largest = fmaxf(largest, statistic(of_split + b * STATISTIC_WORDS, first + b, warp, TOP));
  largest = warp_max(largest);
  // A quarter more: the change itself was rounded too.
  const float to_largest = exp2_approx(room.top[warp] - largest);
  if (lane == TOP) after[warp] = largest, factors[warp] = to_largest, errors[warp] = back > 0.f ? 1.25f * back * to_largest : 0.f;
  __syncthreads();
#pragma unroll
  for (int step = 0; step < STEPS; step++)
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++) {
      const int channel = step * THREADS + threadIdx.x;
      if (channel < D) sums[row * D + channel] = (were[step][row] + change[step][row]) * factors[row];
    }
  __shared__ OfWarps of_warps;
  const float reference = after[threadIdx.x % ROW_TILE];
  SplitSums<true> split_sums;
  if (threadIdx.x < ROW_TILE) split_sums.p1[ERROR - 8] = errors[threadIdx.x];
  split_sums.add(of_split, first, count, reference, room.marks);
  split_sums.leave(of_warps, reference);
  __syncthreads();
  write_sums<true>(partials, of_warps);
}
