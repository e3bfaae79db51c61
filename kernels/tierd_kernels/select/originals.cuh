// What promotion works on: queries as they are multiplied with original keys, and a block as it is staged in shared memory, scored.
constexpr int THREADS = WARPS * LANES;
constexpr int HALF = D / 2, PER_LOAD = 16 / ITEM, ROW_BYTES = D * ITEM;
// What is staged of a block: original keys and values, coded values, weights and statistics as they were, norms and notes. Where it is small four
// are staged at a time; four thread blocks still fit on a multiprocessor.
constexpr int VALUES_STAGED_AT = ORIGINAL_BYTES, NORMS_STAGED_AT = VALUES_STAGED_AT + ORIGINAL_BYTES, CODES_STAGED_AT = NORMS_STAGED_AT + 4 * BLOCK;
constexpr int WEIGHTS_STAGED_AT = CODES_STAGED_AT + TILES * VALUE_BYTES, NOTES_STAGED_AT = WEIGHTS_STAGED_AT + 4 * TILES * WEIGHT_FLOATS;
constexpr int STATISTICS_STAGED_AT = NOTES_STAGED_AT + 64, STAGED_BYTES = (STATISTICS_STAGED_AT + 4 * STATISTIC_WORDS + LINE - 1) / LINE * LINE;
static_assert(NORMS_AT + 4 * BLOCK == SCORE_BYTES, "norms and coded values are one copy");
constexpr int STAGES = STAGED_BYTES <= 11 * 1024 ? 4 : 1;
// Eight sums of HALF / 8 fused products each, and what joins them; q is scaled, its norm is at least 1/2.
constexpr float KEY_ROUNDINGS = (HALF / 8 + 8) * U32F * (1.f + 1e-4f);
constexpr float KEY_FLOOR = 0x1p-90f;  // products and keys that FP32 flushes

// A promoted block: where its records lie and its weights, in which rows what of it is promoted, as `marks` has it, and its number in the split.
struct Place { const unsigned char *record, *keys, *values; const float *weights; u32 mark; int block; };
// Of a staged block's tokens, [row][token]: by how much the weight of the coded value changes; that of the original.
struct __align__(16) Changes { float coded[ROW_TILE][BLOCK], original[ROW_TILE][BLOCK]; };

struct __align__(16) Scratch {
  float q[ROW_TILE][D], scale[ROW_TILE], size[ROW_TILE], q_norm[ROW_TILE];
  int seen[ROW_TILE];  // tokens
  float top[ROW_TILE];  // of the split, before promotion
  float back[WARPS][ROW_TILE];  // what each warp took back: mass times norms
  Changes changes[STAGES];
  u64 bars[STAGES];
  u32 marks[SPLIT_BLOCKS];
  int promoted[WARPS];  // blocks of each warp's
  Place places[SPLIT_BLOCKS];  // of those that this thread block promotes
};

constexpr int PER_LANE = (D + LANES - 1) / LANES;
// A row's query: a warp's, a lane has every 32nd channel. Returns how many tokens it sees.
__device__ __forceinline__ int read_query(const Call &call, int h, int group, int index, float (&q)[PER_LANE]) {
  const Row query = query_row(call, h, group, index);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const int channel = i * LANES + threadIdx.x % LANES;
    q[i] = query.real && channel < D ? as_float(call.q, query.at + channel) : 0.f;
  }
  return query.seen;
}
// The same, which sees so many tokens, scaled by a power of two into [-1, 1], and the scales that undo it, in binary units and, as sizes,
// natural ones. A warp a row.
__device__ __forceinline__ void scaled_query(const Call &call, const float (&q)[PER_LANE], int seen, Scratch &to) {
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  float top = 0.f, norm = 0.f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) top = fmaxf(top, fabsf(q[i]));
  top = warp_max(top);
  const int e = exponent_above(top);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const float x = downscale(q[i], e);
    if (i * LANES + lane < D) to.q[row][i * LANES + lane] = x;
    norm = fmaf(x, x, norm);
  }
  norm = warp_sum(norm);
  if (lane) return;
  to.seen[row] = seen, to.q_norm[row] = sqrtf(norm) * STORE, to.scale[row] = downscale((float)(call.scale * 1.4426950408889634), -e);
  to.size[row] = fabsf(to.scale[row]) * 0.69314724f;
}

// Copies of a block what its rows need, with the split's `statistics`: original keys or values only where one does. A thread's: copies of sixteen
// bytes by all threads were 400 instructions a block.
__device__ __forceinline__ void stage_block(unsigned char *stage, const Place &of, const float *statistics, u64 *bar) {
  constexpr int CODES_BYTES = 4 * BLOCK + TILES * VALUE_BYTES, WEIGHTS_BYTES = 4 * TILES * WEIGHT_FLOATS, STATISTIC_BYTES = 4 * STATISTIC_WORDS;
  const int keys = of.mark & 15 ? ORIGINAL_BYTES : 0, values = of.mark & 240 ? ORIGINAL_BYTES : 0;
  barrier_expect(bar, keys + values + CODES_BYTES + WEIGHTS_BYTES + 64 + STATISTIC_BYTES);
  if (keys) bulk_copy(stage, of.keys, ORIGINAL_BYTES, bar);
  if (values) bulk_copy(stage + VALUES_STAGED_AT, of.values, ORIGINAL_BYTES, bar);
  bulk_copy(stage + NORMS_STAGED_AT, of.record + NORMS_AT, CODES_BYTES, bar);
  bulk_copy(stage + WEIGHTS_STAGED_AT, of.weights, WEIGHTS_BYTES, bar);
  bulk_copy(stage + NOTES_STAGED_AT, of.record + NOTES_AT, 64, bar);
  bulk_copy(stage + STATISTICS_STAGED_AT, statistics + of.block * STATISTIC_WORDS, STATISTIC_BYTES, bar);
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
