// Promotion: what rung 0 made of the blocks that a row needs original is taken back, and what their originals give is put in its
// place: scores and statistics, the splits' sums of the bound, and the sums of weights times values. One thread block a tile of rows and a
// split, which may have a part of another tile's blocks (select/sharing.cuh): a warp weighs the tokens of a block for a row, of as many blocks
// at once as are staged, then a thread has a channel of the values.
//
// Weights stay relative to the split's largest score of before, until the sums are written. Scores of originals are sums in FP32 of
// exact or once rounded products; what was taken back has been rounded once already, which the split's ERROR remembers (CERTIFICATE.md,
// "Promotion").

static_assert(WARPS == ROW_TILE && SPLIT_BLOCKS <= THREADS, "a warp a row, a thread a block");

// Adds what a warp's blocks have promoted to the `counts` of the tile's rows.
__device__ __forceinline__ void count_promoted(u32 mark, int *counts) {
  const int lane = threadIdx.x % LANES;
  int count = 0;
#pragma unroll
  for (int bit = 0; bit < 2 * ROW_TILE; bit++) {
    const int number = __popc(__ballot_sync(~0u, mark >> bit & 1));
    count = lane == bit ? number : count;
  }
  if (count) atomicAdd(counts + lane % ROW_TILE * 2 + lane / ROW_TILE, count);
}

// A row's weights of a staged block as its originals make them, against what they were, to `changes`; its statistics anew; and the mass times
// norms that is taken back. A warp's.
__device__ __forceinline__ void weigh(const Call &call, int block, u32 mark, int row, const unsigned char *stage, Scratch &room, Changes &changes,
                                      float *statistics) {
  const int lane = threadIdx.x % LANES, token = lane % TILE;
  const bool key = mark >> row & 1, value = mark >> row & 16;
  const unsigned char *record = stage + RECORD_STAGED_AT;
  const float *notes = (const float *)(record + NOTES_AT);
  const bool raw = __float_as_uint(notes[VALUES_RAW]);
  const float unit = unit_factor(call.unit);
  const float before = statistic((const float *)(stage + STATISTICS_STAGED_AT), block, row, TOP);
  float coded[TILES], s[TILES], top = before, size = 0.f;
  weights_of_codes(record, block, row, before, room, coded);
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
    const u32 both = ((const u32 *)(record + NORMS_AT))[t * TILE + token];
    const float nu = fmaxf(__uint_as_float(both << 16) * unit, NORM_FLOOR), stored = fmaxf(__uint_as_float(both & 0xffff0000u) * unit, NORM_FLOOR);
    const float was = coded[t];
    const float is = !key ? was : s[t] - top >= LOG2_MIN ? exp2_approx(s[t] - top) : 0.f;
    // Raw values have no codes that could err; promoted ones are used as they are.
    const float eta = value && raw ? 0.f : stored;
    sums.add(is, nu, eta);
    sums.v[TOP] += was * was_factor * (raw ? nu : nu + stored);  // a place that sums have free
    const float now = is * is_factor, then = was * was_factor;
    changes.coded[row][t * TILE + token] = value ? -then : now - then, changes.original[row][t * TILE + token] = value ? now : 0.f;
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
  if (lane == TOP) room.back[threadIdx.x / LANES][row] += sum;
}

// Sixteen tokens' numbers of a channel by their weights for a row.
__device__ __forceinline__ float weighted(const float (&x)[TILE], const float *weights, float sum) {
#pragma unroll
  for (int i = 0; i < TILE; i += 4) {
    const float4 w = *(const float4 *)(weights + i);
    sum = fmaf(w.x, x[i], fmaf(w.y, x[i + 1], fmaf(w.z, x[i + 2], fmaf(w.w, x[i + 3], sum))));
  }
  return sum;
}
// By how much a staged block changes the sums of weights times values, added to a thread's channels.
__device__ __forceinline__ void add_changes(const unsigned char *stage, u32 mark, const Changes &changes, Channels &change) {
  const __half2 thousand = __half2half2(__ushort_as_half(0x6400));
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int channel = step * THREADS + threadIdx.x;
    if (channel >= D) break;
    float of_block[ROW_TILE] = {0.f};
#pragma unroll 1
    for (int t = 0; t < TILES; t++) {
      float x[TILE];
      const unsigned char *part = stage + RECORD_STAGED_AT + SCORE_BYTES + t * VALUE_BYTES;
      const uint4 words = *(const uint4 *)(part + (channel / 16 * LANES + channel % 8 * 4) * 4);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const uint4 pairs = *(const uint4 *)(part + VALUE_SCALES_AT + (channel / GROUP * 4 + c) * 16);
        const u32 word = (c == 0 ? words.x : c == 1 ? words.y : c == 2 ? words.z : words.w) >> (8 * (channel % 16 / 8));
#pragma unroll
        for (int j = 0; j < 2; j++) {  // tokens 2 c and 2 c + 1 of each half of the tile; as FP16 with 1024 added: no conversion
          const __half2 codes = __hsub2(as_half2(either(word >> (4 * j), 0x000f000fu, 0x64006400u)), thousand);
          const float2 stored = __half22float2(__hfma2(codes, as_half2(j ? pairs.y : pairs.x), as_half2(j ? pairs.w : pairs.z)));
          x[j * 8 + 2 * c] = stored.x, x[j * 8 + 2 * c + 1] = stored.y;
        }
      }
#pragma unroll
      for (int row = 0; row < ROW_TILE; row++)
        if (mark >> row & 0x11) of_block[row] = weighted(x, changes.coded[row] + t * TILE, of_block[row]);
      if (mark < 16) continue;
#pragma unroll
      for (int i = 0; i < TILE; i++) x[i] = as_float(stage + VALUES_STAGED_AT, (t * TILE + i) * D + channel);
#pragma unroll
      for (int row = 0; row < ROW_TILE; row++)
        if (mark >> row & 0x10) of_block[row] = weighted(x, changes.original[row] + t * TILE, of_block[row]);
    }
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++) change[step][row] += of_block[row];
  }
}

// Puts a split together again: its sums of weights times values, `were` and by what they `change`, relative to its largest score of now, and its sums
// of the bound over the blocks' `statistics`. `back`: as join_parts has it. For all threads.
__device__ __forceinline__ void sum_anew(float *sums, float *partials, int first, int count, const float *statistics, const Channels &were,
                                         const Channels &change, float back, unsigned char *shared, const Scratch &room) {
  __shared__ float after[ROW_TILE], factors[ROW_TILE], errors[ROW_TILE];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  StatisticsHeld<SPLIT_BLOCKS> held;
  held.read(statistics, count);
  float *of_split = (float *)shared;
  held.leave(of_split, count);
  __syncthreads();
  float largest = LOWEST;
  u32 marks = 0, changed = 0;  // the latter: rows
  for (int b = lane; b < count; b += LANES) {
    largest = fmaxf(largest, statistic(of_split + b * STATISTIC_WORDS, first + b, warp, TOP));
    marks |= room.marks[b];
  }
  largest = warp_max(largest);
#pragma unroll
  for (int row = 0; row < ROW_TILE; row++) changed |= (__ballot_sync(~0u, marks >> row & 0x11) ? 1u : 0u) << row;
  const float to_largest = changed >> warp & 1 ? exp2_approx(room.top[warp] - largest) : 1.f;
  // A quarter more: the change itself was rounded too.
  if (lane == TOP) after[warp] = largest, factors[warp] = to_largest, errors[warp] = back > 0.f ? 1.25f * back * to_largest : 0.f;
  __syncthreads();
#pragma unroll
  for (int step = 0; step < STEPS; step++)
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++) {
      const int channel = step * THREADS + threadIdx.x;
      if (channel < D) sums[row * D + channel] = (were[step][row] + change[step][row]) * factors[row];
    }
  OfWarps &of_warps = *(OfWarps *)(of_split + SPLIT_BLOCKS * STATISTIC_WORDS);
  SplitSums<true> split_sums = {changed & changed - 1 ? Turn() : alone(__ffs(changed) - 1)};
  const float reference = after[split_sums.turn.row];
  if (split_sums.turn.first == 0) split_sums.p1[ERROR - 8] = errors[split_sums.turn.row];
  split_sums.add(of_split, first, count, reference, room.marks);
  split_sums.leave(of_warps, reference);
  __syncthreads();
  write_sums(partials, of_warps, changed);
}

extern "C" __global__ void __launch_bounds__(THREADS, STAGES > 1 ? 4 : 1) promote(const Call *calls, int heads, int group) {
  extern __shared__ __align__(128) unsigned char shared[];  // staged blocks; then the split's statistics, and their sums
  __shared__ Scratch room;
  let_next_begin();
  const Call &call = own_call<THREADS>(calls);
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, split = blockIdx.y, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  if (blockIdx.x >= heads * tiles || split >= call.splits || call.exact_only) return;
  const int first = split * call.per, count = min(call.per, call.full - first), block = first + min((int)threadIdx.x, count - 1);
  if (threadIdx.x < STAGES) barrier_init(&room.bars[threadIdx.x]);
  if (threadIdx.x < WARPS * ROW_TILE) room.back[threadIdx.x / ROW_TILE][threadIdx.x % ROW_TILE] = 0.f;
  barriers_ready();
  const Sharing sharing(call, heads, rows, tiles);
  wait_for_previous();
  const Share share = share_out(call, sharing, block, (int)threadIdx.x < count, (int (*)[LANES])room.changes);
  if (share.tile < 0) return;
  const int base = share.tile, h = share.head, tile = base - h * tiles;
  const Place own = place_of(call, heads, h, block);  // on its way while it is decided which blocks are promoted
  Chosen chosen;
  chosen.read(call, base, block, sharing.coverage);
  const Query query = read_query(call, h, group, tile * ROW_TILE + (lane >> 3), lane % 4, lane >> 2 & 1);
  // In which rows the thread's block is promoted.
  const u32 mark = (int)threadIdx.x < count ? chosen.mark(share.limits, sharing.coverage) : 0;
  const bool tells = share.part == 0 && !sharing.coverage;
  if (threadIdx.x < SPLIT_BLOCKS) room.marks[threadIdx.x] = mark;
  if (tells && mark) call.marks[(i64)base * call.full + block] = mark;
  const int rank = share.before + __popc(__ballot_sync(~0u, mark) & (1u << lane) - 1);  // of the promoted ones
  const int parts = share.parts, number = quotient(share.number - share.part + parts - 1, parts);
  auto stage_of = [&](int i) { return shared + i % STAGES * STAGED_BYTES; };
  float *statistics = call.statistics + ((i64)base * (call.full + 1) + first) * STATISTIC_WORDS;
  const int turn = quotient(rank, parts);  // which of its part's blocks this thread's is
  if (mark && rank == turn * parts + share.part) {
    room.order[turn] = threadIdx.x;
    if (turn < STAGES) stage_block(stage_of(turn), own, mark, statistics + threadIdx.x * STATISTIC_WORDS, &room.bars[turn]);
  }
  const i64 at_split = (i64)base * (call.splits + 1) + split;
  const float top = call.partials[(at_split * PARTIALS + SPLIT_TOP) * ROW_TILE + lane % ROW_TILE];
  if (threadIdx.x < ROW_TILE) room.top[threadIdx.x] = top;
  float *sums = call.sums + at_split * ROW_TILE * D;
  Channels change = {}, were;
#pragma unroll
  for (int step = 0; step < STEPS; step++)
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++) {
      const int channel = step * THREADS + threadIdx.x;
      were[step][row] = channel < D ? sums[row * D + channel] : 0.f;
    }
  if (tells) count_promoted(mark, call.counts + 2 * (h * rows + tile * ROW_TILE));
  leave_query(call, query, room);
  __syncthreads();
  // (One block after the other, a warp a row, took 0.5 us a block more: most often one row needs it, and three warps had nothing to do.)
  for (int from = 0; from < number; from += STAGES) {
    const int until = min(from + STAGES, number);
    int pair = 0;  // of a block and a row that needs it, which most often is one: a warp each
#pragma unroll 1
    for (int i = from; i < until; i++) {
      const int of = room.order[i];
      const u32 its_mark = room.marks[of];
      barrier_wait(&room.bars[i % STAGES], i / STAGES & 1);
#pragma unroll 1
      for (u32 left = (its_mark | its_mark >> ROW_TILE) & 15u; left; left &= left - 1, pair++)
        if (pair % WARPS == warp)
          weigh(call, first + of, its_mark, __ffs(left) - 1, stage_of(i), room, room.changes[i % STAGES], statistics + of * STATISTIC_WORDS);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = from; i < until; i++) add_changes(stage_of(i), room.marks[room.order[i]], room.changes[i % STAGES], change);
    __syncthreads();
    const int next = from + STAGES + threadIdx.x;
    if (threadIdx.x < STAGES && next < number) {
      const int of = room.order[next];
      stage_block(stage_of(next), place_of(call, heads, h, first + of), room.marks[of], statistics + of * STATISTIC_WORDS, &room.bars[next % STAGES]);
    }
  }
  float back = 0.f;  // of the warp's row, in lane TOP
  if (lane == TOP)
#pragma unroll
    for (int w = 0; w < WARPS; w++) back += room.back[w][warp];
  if (parts > 1 && !join_parts(call, heads, heads * tiles, split, share, change, back)) return;
  sum_anew(sums, call.partials + at_split * PARTIALS * ROW_TILE, first, count, statistics, were, change, back, shared, room);
}
