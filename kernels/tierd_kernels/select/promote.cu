// Promotion: what the first passes made of the blocks that a row needs original is taken back, and what their originals give is put in its
// place: scores and statistics, the splits' sums of the bound, and the sums of weights times values. One thread block a tile of rows and a
// split; a warp a promoted block. Most find nothing to do.
//
// Weights stay relative to the row's largest score of the first pass. Scores of originals are sums in FP32 of exact or once rounded
// products; what was taken back has been rounded once already, which the split's ERROR remembers (CERTIFICATE.md, "Promotion").

// Of a thread of what the split has: its sums; its statistics, four at a time.
constexpr int OWN_SUMS = (ROW_TILE * D + THREADS - 1) / THREADS, OWN_STATISTICS = (SPLIT_BLOCKS * STATISTIC_FLOATS / 4 + THREADS - 1) / THREADS;
static_assert(SPLIT_BLOCKS * STATISTIC_FLOATS * 4 <= WARPS * (STAGED_BYTES + 4 * ROW_TILE * D), "a split's statistics fit where blocks were staged");
constexpr int CHANNELS = 4 /* `Four` */, STEPS = (D + CHANNELS * LANES - 1) / (CHANNELS * LANES);  // of a value, a lane's neighbouring ones

// Which blocks of the split are promoted in which rows, to `marks` (the row's own are decided here, those of the coverage policy were
// before), and, in order, the blocks that are promoted in any; returns their number. For all threads: `limit` is that of row threadIdx.x %
// ROW_TILE.
__device__ __forceinline__ int decide(const Call &call, int h, int rows, int tile, int base, int first, int count, float limit, Scratch &to) {
  const int row = threadIdx.x % ROW_TILE, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  u32 *marks = call.marks + (i64)base * call.full + first;
  const float2 *written = call.row_weights + ((i64)base * call.full + first) * ROW_TILE;
  float2 weights[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int at = threadIdx.x + i * THREADS;  // of a row that nothing has chosen for, whatever lies there
    weights[i] = at < count * ROW_TILE ? written[at] : make_float2(0.f, 0.f);
  }
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
      if (call.coverage) mark = marks[b];
      else if (mark) marks[b] = mark;
      to.marks[b] = mark & 255u;
    }
    mine[i] = row == 0 && b < count ? mark & 255u : 0u;
    const u32 some = __ballot_sync(~0u, mine[i] != 0);
    if (lane == 0) to.found[i][warp] = __popc(some);
  }
  for (int bit = ROW_TILE; bit < LANES; bit <<= 1) keys += __shfl_xor_sync(~0u, keys, bit), values += __shfl_xor_sync(~0u, values, bit);
  int *counts = call.counts + 2 * (h * rows + tile * ROW_TILE + row);
  if (lane < ROW_TILE && keys) atomicAdd(counts, keys);
  if (lane < ROW_TILE && values) atomicAdd(counts + 1, values);
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

// One block: its statistics anew, and by how much the split's sums change, which is added to `change` [ROW_TILE][D]. A warp's. All that it
// reads is under way together: one part after the other waited four times for memory.
__device__ __forceinline__ void promote_block(const Call &call, int block, u32 mark, const Place &at, float *statistics,
                                              const float (&tops)[ROW_TILE], unsigned char *stage, Scratch &room, float *change) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, token = lane % TILE, pair = lane / TILE * 2;
  const float unit = unit_factor(call.unit), *weights = (const float *)(stage + WEIGHTS_STAGED_AT), *notes = (const float *)(stage + NOTES_STAGED_AT);
  const u64 policy = stream_policy();
  __syncwarp();  // the block before is done with the stage
  if (mark & 15) stage_keys(shared_at(stage), at, 0, lane, policy);
  stage_values(shared_at(stage), at, 0, mark & 240, lane, policy);
  stage_bytes(shared_at(stage) + NOTES_STAGED_AT, at.record + NOTES_AT, 64, lane, policy);
  copies_wait();

  float s[TILES][ROW_TILE], most[2 * ROW_TILE];  // most: the rows' largest scores, then the largest of their sizes
  bool wrong = false;
#pragma unroll
  for (int row = 0; row < ROW_TILE; row++) most[row] = -INFINITY, most[ROW_TILE + row] = 0.f;
  if (mark & 15) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      if (t) {
        __syncwarp();
        stage_keys(shared_at(stage), at, t, lane, policy);
        copies_wait();
      }
      score_originals(stage, room, lane, s[t]);
#pragma unroll
      for (int row = 0; row < ROW_TILE; row++) {
        const bool seen = block * BLOCK + t * TILE + token < room.seen[row];
        wrong = wrong || (seen && !(fabsf(s[t][row]) < INFINITY));
        if (seen) most[ROW_TILE + row] = fmaxf(most[ROW_TILE + row], fabsf(s[t][row]));
        s[t][row] = seen ? s[t][row] : -INFINITY;
        most[row] = fmaxf(most[row], s[t][row]);
      }
    }
  }
  wrong = __ballot_sync(~0u, wrong) != 0;
  RowSums sums[2];  // of this half's pair of rows
  float extra[2] = {0.f, 0.f}, of_block[STEPS][ROW_TILE][CHANNELS];
#pragma unroll
  for (int k = 0; k < STEPS; k++)
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++)
#pragma unroll
      for (int c = 0; c < CHANNELS; c++) of_block[k][row][c] = 0.f;
  const float folded = fold_half(most, lane, [](float x, float y) { return fmaxf(x, y); });
  // Of this half's rows from here on: selected, for registers are not indexed at run time.
  const bool upper = lane >= TILE;
  float top[2], size[2], score[TILES][2], factor_was[2], factor_is[2];
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const float before = weights[TOPS_AT + pair + k], reference = tops[pair + k];
    const float after = __shfl_sync(~0u, folded, pair + k);
    top[k] = mark >> (pair + k) & 1 ? after : before, size[k] = __shfl_sync(~0u, folded, ROW_TILE + pair + k);
    factor_was[k] = exp2_approx(before - reference), factor_is[k] = exp2_approx(top[k] - reference);
#pragma unroll
    for (int t = 0; t < TILES; t++) score[t][k] = upper ? s[t][2 + k] : s[t][k];
  }
#pragma unroll 1
  for (int t = 0; t < TILES; t++) {
    if (t) {
      __syncwarp();
      stage_values(shared_at(stage), at, t, mark & 240, lane, policy);
      copies_wait();
    }
    const u32 both = ((const u32 *)(stage + NORMS_STAGED_AT))[token];
    const bool raw = ((const u32 *)notes)[VALUES_RAW];
    const float nu = fmaxf(__uint_as_float(both << 16) * unit, NORM_FLOOR), stored = fmaxf(__uint_as_float(both & 0xffff0000u) * unit, NORM_FLOOR);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const bool key = mark >> (pair + k) & 1, value = mark >> (pair + k) & 16;
      const float was = weights[(pair + k) * TILE + token];
      float own = score[0][k];
#pragma unroll
      for (int i = 1; i < TILES; i++) own = t == i ? score[i][k] : own;
      const float is = !key ? was : own - top[k] >= LOG2_MIN ? exp2_approx(own - top[k]) : 0.f;
      // Raw values have no codes that could err; promoted ones are used as they are.
      const float eta = value && raw ? 0.f : stored;
      sums[k].add(is, nu, eta, value ? nu : nu + eta);
      if (value) sums[k].v[SUM_SQUARE_ERROR] = 0.f;
      const bool touched = key || value;
      if (touched) extra[k] += was * factor_was[k] * (raw ? nu : nu + stored);
      const float now = touched ? is * factor_is[k] : 0.f, before = touched ? was * factor_was[k] : 0.f;
      room.weight[warp][token][pair + k] = value ? -before : now - before;
      room.weight[warp][token][ROW_TILE + pair + k] = value ? now : 0.f;
    }
    __syncwarp();
    const unsigned char *part = stage + CODES_STAGED_AT, *values = stage + VALUES_STAGED_AT;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int channel = (step * LANES + lane) * CHANNELS;
      if (channel >= D) continue;
#pragma unroll 1
      for (int c = 0; c < 4; c++) {
        const uint4 scales = *(const uint4 *)(part + VALUE_SCALES_AT + (channel / GROUP * 4 + c) * 16);
        const __half *pairs = (const __half *)&scales;
        u32 words[CHANNELS];
#pragma unroll
        for (int k = 0; k < CHANNELS; k++) words[k] = ((const u32 *)part)[channel / 16 * LANES + (channel % 8 + k) * 4 + c];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int i = 2 * c + j % 2 + j / 2 * 8, shift = 8 * (channel % 16 / 8) + 4 * (j / 2) + 16 * (j % 2);
          float of_codes[ROW_TILE], of_original[ROW_TILE];
          *(float4 *)of_codes = *(const float4 *)room.weight[warp][i];
          const __half2 scale = __half2half2(pairs[j]), offset = __half2half2(pairs[4 + j]), thousand = __half2half2(__ushort_as_half(0x6400));
#pragma unroll
          for (int k = 0; k < CHANNELS; k += 2) {  // as FP16 with 1024 added: no conversion
            const u32 codes = (words[k] >> shift & 15) | (words[k + 1] >> shift & 15) << 16 | 0x64006400u;
            const float2 stored = __half22float2(__hfma2(__hsub2(as_half2(codes), thousand), scale, offset));
#pragma unroll
            for (int row = 0; row < ROW_TILE; row++) {
              of_block[step][row][k] = fmaf(of_codes[row], stored.x, of_block[step][row][k]);
              of_block[step][row][k + 1] = fmaf(of_codes[row], stored.y, of_block[step][row][k + 1]);
            }
          }
          if (!(mark & 240)) continue;
          const Four original = four_of(values, i * D + channel);
          *(float4 *)of_original = *(const float4 *)(room.weight[warp][i] + ROW_TILE);
#pragma unroll
          for (int k = 0; k < CHANNELS; k++)
#pragma unroll
            for (int row = 0; row < ROW_TILE; row++) of_block[step][row][k] = fmaf(of_original[row], as_float(&original, k), of_block[step][row][k]);
        }
      }
    }
  }
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int channel = (step * LANES + lane) * CHANNELS;
    if (channel >= D) continue;
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++)
#pragma unroll
      for (int k = 0; k < CHANNELS; k++) change[row * D + channel + k] += of_block[step][row][k];
  }
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int row = pair + k;
    sums[k].v[TOP] = extra[k];  // a place that sums have free
    const float sum = fold_half(sums[k].v, lane, [](float x, float y) { return x + y; });
    if (token > TOP || !(mark >> row & 0x11)) continue;
    if (token == TOP) room.extra[warp][row] += sum;
    else statistics[token * ROW_TILE + row] = sum;
    if (token || !(mark >> row & 1)) continue;
    if (wrong) statistics[SUM * ROW_TILE + row] = 1.f;  // a block without mass would not be looked at
    const float eps = wrong ? INFINITY
                            : (room.size[row] * (room.q_norm[row] * notes[KEY_NORM_MAX] * KEY_ROUNDINGS + KEY_FLOOR) +
                               SCORE_ROUNDINGS * size[k] + EXP_ERROR) * STORE;
    statistics[TOP * ROW_TILE + row] = top[k];
    statistics[DELTA * ROW_TILE + row] = eps;
    statistics[D_NORM * ROW_TILE + row] = BLOCK_ROOT * eps * STORE;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, TILES == 1 && 128 % D == 0 ? 4 : 1) promote(const Call *calls, int heads, int group) {
  extern __shared__ __align__(128) unsigned char shared[];  // of each warp, what it stages of a block; then the changes of the sums
  __shared__ Scratch room;
  __shared__ float tops[ROW_TILE], after[ROW_TILE];
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, split = blockIdx.y, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  if (blockIdx.x >= heads * tiles || split >= call.splits || call.exact_only) return;
  const int h = blockIdx.x / tiles, tile = blockIdx.x % tiles, base = blockIdx.x;
  const int first = split * call.per, count = min(call.per, call.full - first), index = tile * ROW_TILE + lane % ROW_TILE;
  const int at_row = h * rows + min(index, rows - 1);
  const bool coverage = call.coverage;
  float q[PER_LANE];
  const int seen = read_query(call, h, group, tile * ROW_TILE + warp, q);  // which no kernel of the step writes
  wait_for_previous();
  const float *facts = call.facts + (i64)at_row * ROW_FACTS, top = facts[ROW_TOP], chosen = facts[ROW_LIMIT];
  const bool open = index < rows && call.state[at_row] == OPEN;
  const float limit = open && !coverage ? chosen : INFINITY;  // of a row that is not open nothing has chosen it
  if (!__ballot_sync(~0u, coverage ? open : limit < INFINITY)) return;
  if (threadIdx.x < ROW_TILE) tops[threadIdx.x] = index < rows ? top : 0.f;
  if (threadIdx.x < WARPS * ROW_TILE) room.extra[threadIdx.x / ROW_TILE][threadIdx.x % ROW_TILE] = 0.f;
  const int number = decide(call, h, rows, tile, base, first, count, limit, room);
  if (!number) return;
  const int own = warp + lane * WARPS;  // in the list, of this warp's lane-th block
  const i64 before = (i64)base * (call.full + 1) + first;
  const unsigned char *record = nullptr, *keys = nullptr, *values = nullptr;
  if (own < number) {
    const int block = first + room.list[own];
    record = call.pool + call.hot[block] + (i64)h * RECORD_BYTES, keys = located(call, 0, heads, h, block), values = located(call, 1, heads, h, block);
  }
  scaled_query(call, q, seen, room);
  float *changes = (float *)(shared + WARPS * STAGED_BYTES);
  for (int i = threadIdx.x; i < WARPS * ROW_TILE * D; i += THREADS) changes[i] = 0.f;
  __syncthreads();
  for (int i = 0; warp + i * WARPS < number; i++) {
    const int b = room.list[warp + i * WARPS];
    auto of_lane = [&](const unsigned char *x) { return (const unsigned char *)__shfl_sync(~0u, (u64)x, i); };
    const Place at = {of_lane(record), of_lane(keys), of_lane(values), call.weights + (before + b) * TILES * WEIGHT_FLOATS};
    float *statistics = call.statistics + (before + b) * STATISTIC_FLOATS;
    promote_block(call, first + b, room.marks[b], at, statistics, tops, shared + warp * STAGED_BYTES, room, changes + warp * ROW_TILE * D);
  }
  // What the split has, all on its way together; its statistics then lie where promoted blocks were staged.
  float *sums = call.sums + ((i64)base * (call.splits + 1) + split) * ROW_TILE * D, were[OWN_SUMS];
#pragma unroll
  for (int k = 0; k < OWN_SUMS; k++) were[k] = threadIdx.x + k * THREADS < ROW_TILE * D ? sums[threadIdx.x + k * THREADS] : 0.f;
  __syncthreads();
  const float4 *written = (const float4 *)(call.statistics + before * STATISTIC_FLOATS);
  float4 statistics[OWN_STATISTICS];
#pragma unroll
  for (int k = 0; k < OWN_STATISTICS; k++)
    if (threadIdx.x + k * THREADS < count * (STATISTIC_FLOATS / 4)) statistics[k] = written[threadIdx.x + k * THREADS];
#pragma unroll
  for (int k = 0; k < OWN_SUMS; k++) {
    const int i = threadIdx.x + k * THREADS;
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) x += i < ROW_TILE * D ? changes[w * ROW_TILE * D + i] : 0.f;
    if (i < ROW_TILE * D) sums[i] = were[k] + x;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < OWN_STATISTICS; k++)
    if (threadIdx.x + k * THREADS < count * (STATISTIC_FLOATS / 4)) ((float4 *)shared)[threadIdx.x + k * THREADS] = statistics[k];
  __syncthreads();
  const float *of_split = (const float *)shared;
  float largest = -INFINITY;
  for (int b = lane; b < count; b += LANES) largest = fmaxf(largest, of_split[b * STATISTIC_FLOATS + TOP * ROW_TILE + warp]);
  largest = warp_max(largest);
  if (lane == 0) after[warp] = largest;
  __syncthreads();
  split_sums<true>(call, of_split, base, split, after[threadIdx.x % ROW_TILE], room.marks);
  __syncthreads();
  if (threadIdx.x >= ROW_TILE) return;
  float extra = 0.f;
  for (int w = 0; w < WARPS; w++) extra += room.extra[w][threadIdx.x];
  float *partials = call.partials + ((i64)base * (call.splits + 1) + split) * PARTIALS * ROW_TILE + threadIdx.x;
  // A quarter more: the change itself was rounded too.
  if (extra > 0.f) partials[ERROR * ROW_TILE] += 1.25f * extra * exp2_approx(tops[threadIdx.x] - after[threadIdx.x]);
}
