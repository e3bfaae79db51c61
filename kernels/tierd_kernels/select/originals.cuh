// What promotion works on: queries, and a block as it is staged in shared memory, scored by its codes and by its originals.
constexpr int THREADS = WARPS * LANES;
constexpr int HALF = D / 2, PER_LOAD = 16 / ITEM, ROW_BYTES = D * ITEM;
// What is staged of a block: original keys and values, its record, statistics as they were. Where it is small a warp each are staged at a time;
// four thread blocks still fit on a multiprocessor.
constexpr int VALUES_STAGED_AT = ORIGINAL_BYTES, RECORD_STAGED_AT = 2 * ORIGINAL_BYTES, STATISTICS_STAGED_AT = RECORD_STAGED_AT + RECORD_BYTES;
constexpr int STAGED_BYTES = (STATISTICS_STAGED_AT + 4 * STATISTIC_WORDS + LINE - 1) / LINE * LINE, STAGES = STAGED_BYTES <= 13 * 1024 ? WARPS : 1;
// Eight sums of HALF / 8 fused products each, and what joins them; q is scaled, its norm is at least 1/2.
constexpr float KEY_ROUNDINGS = (HALF / 8 + 8) * U32F * (1.f + 1e-4f);
constexpr float KEY_FLOOR = 0x1p-90f;  // products and keys that FP32 flushes

// Of a staged block's tokens, [row][token]: by how much the weight of the coded value changes; that of the original.
struct __align__(16) Changes { float coded[ROW_TILE][BLOCK], original[ROW_TILE][BLOCK]; };

struct __align__(16) Scratch {
  float q[ROW_TILE][KEY_DIM], scale[ROW_TILE], size[ROW_TILE], q_norm[ROW_TILE];
  Parts parts;
  int seen[ROW_TILE];  // tokens
  float top[ROW_TILE];  // of the split, before promotion
  float back[WARPS][ROW_TILE];  // what each warp took back: mass times norms
  Changes changes[STAGES];
  u64 bars[STAGES];
  unsigned char marks[SPLIT_BLOCKS];
  unsigned char order[SPLIT_BLOCKS];  // of the split's blocks, those that this thread block promotes
};

// The tile's query, of which every warp has read all rows, scaled as scores of codes have it; and the scales that undo it, in binary units and, as
// sizes, natural ones.
__device__ __forceinline__ void leave_query(const Call &call, const Query &query, Scratch &to) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, r = lane / 4, c = lane % 4, limb = r & 1, row = r >> 1;
  float q[KEY_STEPS * 4];
  const RowFacts facts = scale_query(query, (float)(call.scale * 1.4426950408889634), c, limb, q);
  prepare_operands(to.parts, nullptr, q, warp, lane, limb);
  if (warp) return;
#pragma unroll
  for (int j = 0; j < KEY_STEPS; j++) *(float4 *)(to.q[row] + 32 * j + 8 * c + 4 * limb) = {q[4 * j], q[4 * j + 1], q[4 * j + 2], q[4 * j + 3]};
  if (c || limb) return;
  to.seen[row] = query.seen, to.q_norm[row] = facts.q_norm, to.scale[row] = facts.scale, to.size[row] = natural_size(facts.scale);
}

// Copies of a block what its rows need, as `mark` says, with its `statistics`: original keys or values only where one does. A thread's: copies of
// sixteen bytes by all threads were 400 instructions a block.
__device__ __forceinline__ void stage_block(unsigned char *stage, const Place &of, u32 mark, const float *statistics, u64 *bar) {
  constexpr int STATISTIC_BYTES = 4 * STATISTIC_WORDS;
  const int keys = mark & 15 ? ORIGINAL_BYTES : 0, values = mark & 240 ? ORIGINAL_BYTES : 0;
  barrier_expect(bar, keys + values + RECORD_BYTES + STATISTIC_BYTES);
  if (keys) bulk_copy(stage, of.keys, ORIGINAL_BYTES, bar);
  if (values) bulk_copy(stage + VALUES_STAGED_AT, of.values, ORIGINAL_BYTES, bar);
  bulk_copy(stage + RECORD_STAGED_AT, of.record, RECORD_BYTES, bar);
  bulk_copy(stage + STATISTICS_STAGED_AT, statistics, STATISTIC_BYTES, bar);
}

// What rung 0 weighed a row's tokens of a block by, whose record lies in shared memory and whose largest score was `top`: of each tile the weight of
// token lane % TILE. Made by the same instructions, so the same bits. A warp's.
__device__ __forceinline__ void weights_of_codes(const unsigned char *record, int block, int row, float top, const Scratch &with, float (&w)[TILES]) {
  const int lane = threadIdx.x % LANES, r = lane / 4, c = lane % 4, limb = r & 1;
  const u32 at = shared_at(record);
  Limbs limbs;
  limbs.prepare<4 * 32>(at + 16 * c + 8 * limb, shared_at(with.q[r >> 1] + 8 * c + 4 * limb), limb);
  const float step = limbs.step(c), scale = with.scale[c];
  float dot[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 2 * KEY_STEPS; i++) add_offsets(dot, offsets_of(at, i / 2, c), i % 2, with.parts[i / 2][i % 2][lane]);
  const float offset_dot = dot[0] + dot[1];
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const CodeProducts products(at + KEY_CODES_AT + t * TILE_CODES, limbs, lane);
    const int left = with.seen[c] - block * BLOCK - t * TILE - r;  // of row c's tokens, from r on
    const float early = left <= 0 ? -INFINITY : products.score(0, step, offset_dot, scale);
    const float late = left <= 8 ? -INFINITY : products.score(1, step, offset_dot, scale);
    const int from = lane % 8 * 4 + row;
    const float x = __shfl_sync(~0u, early, from), y = __shfl_sync(~0u, late, from);
    w[t] = exp2_approx((lane & 8 ? y : x) - top);
  }
}

// Scores, in binary units, of a staged tile of sixteen original keys for one row: a lane has token lane % 16. Lanes begin with different
// channels, so that what they read lies in different banks.
__device__ __forceinline__ float score_original(const unsigned char *keys, const Scratch &with, int row, int lane) {
  constexpr int CHUNKS = HALF / 8;
  const int begin = lane / TILE * HALF;
  const unsigned char *own = keys + lane % TILE * ROW_BYTES;
  float x[8];
#pragma unroll
  for (int k = 0; k < 8; k++) x[k] = 0.f;
  int chunk = lane % TILE % CHUNKS;
#pragma unroll 4
  for (int i = 0; i < CHUNKS; i++) {
    const int from = begin + chunk * 8;
    uint4 bits[8 / PER_LOAD];
#pragma unroll
    for (int k = 0; k < 8 / PER_LOAD; k++) bits[k] = *(const uint4 *)(own + from * ITEM + 16 * k);
    float q[8];
    *(float4 *)q = *(const float4 *)(with.q[row] + from), *(float4 *)(q + 4) = *(const float4 *)(with.q[row] + from + 4);
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = fmaf(q[k], as_float(&bits[k / PER_LOAD], k % PER_LOAD), x[k]);
    chunk = chunk + 1 == CHUNKS ? 0 : chunk + 1;
  }
  const float sum = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  return (sum + __shfl_xor_sync(~0u, sum, TILE)) * with.scale[row];
}
