// Both passes of a short split in one kernel: scores, then values by the same thread block. Nothing is left out of short splits, so the value pass needs
// nothing of other splits. An H200 takes 15.3 us for rung 0 of 8,192 tokens, 17.8 with two kernels; 31.2 and 33.0 for 32,768.
//
// A warp has one chunk of blocks at most. Its values are asked for where the score pass leaves room: two tiles once the chunk's offsets have been used, in
// their place and in that of a second chunk's scales, then one for each of the last two blocks' key codes. Asked for at once, with room of their own, they
// kept the first keys waiting: 8,192 tokens took an H100 17.2 us for 16.4. A brief split's weights stay in shared memory: 0.3 us.
struct ValueRing {
  static constexpr bool ONE_CHUNK = true;
  static constexpr int STAGES = 4, SHIFT = LINED ? SCORE_BYTES % LINE : 0, BUFFER = CHUNK * SCALE_BYTES;
  static_assert(CHUNK * WARPS * BLOCK >= JOINT_TOKENS, "a warp has one chunk");
  static_assert(SCORE_STAGES == 2 && SHIFT + VALUE_BYTES <= BUFFER && SHIFT + VALUE_BYTES <= CODES_EACH + (LINED ? 0 : LINE), "values have room there");
  // Where weights of a tile are kept: of each row sixteen, as `weight_at` has them, then of each row the block's largest score.
  static constexpr int ROW_ROOM = 4 * TILE, TOP_AT = ROW_TILE * ROW_ROOM, TILE_ROOM = 2 * TOP_AT;
  u32 bars, of_codes, kept;  // of this warp; of this lane's next weights, zero where none are kept
  u64 policy;
  u32 records, buffers;
  int count, items;

  __device__ __forceinline__ u32 at(int i) const {  // of tile i; the last two blocks leave their stages free in this order
    const int k = i % STAGES;
    return (k < 2 ? buffers + k * BUFFER : of_codes + (k + count & 1) * CODES_EACH) + SHIFT;
  }
  __device__ __forceinline__ u32 bar(int i) const { return bars + 8 * (i % STAGES); }
  __device__ __forceinline__ void issue(int i) const {
    if (i >= items || threadIdx.x % LANES) return;
    const uint2 record = shared64(records + 8 * (i / TILES));
    const u64 from = ((u64)record.y << 32 | record.x) + (SCORE_BYTES - KEY_CODES_AT) + i % TILES * VALUE_BYTES;
    barrier_expect(bar(i), VALUE_BYTES);
    bulk_stream(at(i), (const void *)from, VALUE_BYTES, bar(i), policy);
  }
  // From `score_split`: it has `blocks`, whose records are told at `records_at`; `free_at`: a chunk's scales that are not there, then its offsets.
  __device__ __forceinline__ void begin(int blocks, u32 records_at, u32 free_at) {
    records = records_at, buffers = free_at, count = blocks, items = blocks * TILES;
  }
  __device__ __forceinline__ void offsets_are_free() const {
    for (int i = 0; i < (count == 1 ? 3 : 2); i++) issue(i);
  }
  __device__ __forceinline__ void codes_are_free(int block) const { issue(block + STAGES - count); }
  // Of a block, what a lane has of its tiles' weights, and the largest score, which is all of a row's lanes'.
  __device__ __forceinline__ void keep(const float (&weights)[2 * TILES], float top) {
    if (!kept) return;
    const int r = threadIdx.x % LANES / 4;
#pragma unroll
    for (int t = 0; t < TILES; t++) store_shared(kept + t * TILE_ROOM, weights[2 * t], weights[2 * t + 1]);
    if (r < TILES) store_shared(kept + TOP_AT + (TILES > 1 ? r * (TILE_ROOM - 8) : 0), top);
    kept += TILES * TILE_ROOM;
  }
};

extern "C" __global__ void __launch_bounds__(WARPS *LANES, D <= 128 ? 4 : 2) attend(const Call *calls, int heads, int group, int brief) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  const int tiles = (group * call.n + ROW_TILE - 1) / ROW_TILE, split = blockIdx.y;
  if (blockIdx.x >= heads * tiles || split > call.splits || call.exact_only) return;
  const int h = quotient(blockIdx.x, tiles), tile = blockIdx.x - h * tiles, base = h * tiles + tile, full = call.full;
  if (split == call.splits) {
    if (call.tokens <= full * BLOCK) return;
    score_tail(calls + blockIdx.z, heads, group, h, tile, tiles, (float *)shared);
    __syncthreads();
    return value_tail(call, heads, h, base);
  }
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, r = lane / 4, c = lane % 4, row = r % ROW_TILE;
  __shared__ u64 bars[WARPS][ValueRing::STAGES];
  if (lane < ValueRing::STAGES) barrier_init(&bars[warp][lane]);
  const u32 here = shared_at(shared), kept = here + WARPS * STAGED_BYTES + warp * ValueRing::STAGES * ValueRing::TILE_ROOM;
  ValueRing ring = {shared_at(&bars[warp][0]), here + warp * STAGED_BYTES, brief ? kept + 4 * weight_at(c, r) : 0, stream_policy()};
  const float own_top = score_split(call, heads, group, h, tile, tiles, split, shared, ring);
  const float top = __shfl_sync(~0u, own_top, row);

  // What the score pass has written for later kernels, read back.
  const int per = call.per, first = split * per, blocks = min(per, full - first);
  const i64 place = (i64)base * (full + 1) + first, of_splits = (i64)base * (call.splits + 1) + split;
  StatisticsHeld<JOINT_TOKENS / BLOCK> held;
  if (!NAIVE) held.read(call.statistics + place * STATISTIC_WORDS, blocks);
  const float *weights = call.weights + (place + warp * (per / WARPS)) * TILES * WEIGHT_FLOATS;
  auto tile_of = [&](int i) -> Tile {
    const u32 own = kept + i * ValueRing::TILE_ROOM + row * ValueRing::ROW_ROOM;
    if (brief) return {ring.at(i), __uint_as_float(shared32(own + ValueRing::TOP_AT)), shared128(own + 16 * c)};
    return {ring.at(i), weights[i * WEIGHT_FLOATS + TOPS_AT + row], *(const uint4 *)(weights + i * WEIGHT_FLOATS + row * TILE + 4 * c)};
  };
  Tile next = {};
  if (ring.items) next = tile_of(0);
  Products acc;
  auto tile_here = [&](int i) {
    const Tile own = next;
    if (i + 1 < ring.items) next = tile_of(i + 1);
    barrier_wait(ring.bar(i), i / ValueRing::STAGES & 1);
    return own;
  };
  add_values(acc, ring.items, top, tile_here, [&](int i) { ring.issue(i + ValueRing::STAGES); });
  __syncthreads();  // all warps are done with their stages
  leave_values(acc, shared);
  float *of_blocks = (float *)shared + WARPS * ROW_TILE * D;
  if (!NAIVE) held.leave(of_blocks, blocks);
  __syncthreads();
  write_values(call.sums + of_splits * ROW_TILE * D, shared);
  if (threadIdx.x < SKIPS * ROW_TILE) call.skips[of_splits * SKIPS * ROW_TILE + threadIdx.x] = 0.f;
  if (NAIVE) return;
  __shared__ OfWarps of_warps;
  SplitSums<false> split_sums;
  split_sums.add(of_blocks, first, blocks, own_top);
  split_sums.leave(of_warps, own_top);
  __syncthreads();
  write_sums<false>(call.partials + of_splits * PARTIALS * ROW_TILE, of_warps);
}
