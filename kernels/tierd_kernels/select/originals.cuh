// What promotion works on: queries as they are multiplied with original keys, and a block as a warp stages it in shared memory, scored.
constexpr int THREADS = WARPS * LANES, ROUNDS = (SPLIT_BLOCKS * ROW_TILE + THREADS - 1) / THREADS;
constexpr int HALF = D / 2, PER_LOAD = 16 / ITEM, ROW_BYTES = D * ITEM;
// What a warp stages of a block, of a tile of tokens each: original keys, original and coded values, weights as they were, norms; and the
// notes.
constexpr int VALUES_STAGED_AT = TILE * ROW_BYTES, CODES_STAGED_AT = VALUES_STAGED_AT + TILE * ROW_BYTES;
constexpr int WEIGHTS_STAGED_AT = CODES_STAGED_AT + VALUE_BYTES, NORMS_STAGED_AT = WEIGHTS_STAGED_AT + 4 * WEIGHT_FLOATS;
constexpr int NOTES_STAGED_AT = NORMS_STAGED_AT + 4 * TILE, STAGED_BYTES = (NOTES_STAGED_AT + 64 + LINE - 1) / LINE * LINE;
// Eight sums of HALF / 8 fused products each, and what joins them; q is scaled, its norm is at least 1/2.
constexpr float KEY_ROUNDINGS = (HALF / 8 + 8) * U32F * (1.f + 1e-4f);
constexpr float KEY_FLOOR = 0x1p-90f;  // products and keys that FP32 flushes

struct __align__(16) Scratch {
  float q[ROW_TILE][D], scale[ROW_TILE], size[ROW_TILE], q_norm[ROW_TILE];
  int seen[ROW_TILE];  // tokens
  float weight[WARPS][TILE][2 * ROW_TILE];  // of a tile of tokens and row: by how much that of the coded value changes; that of the original
  float extra[WARPS][ROW_TILE];             // mass times norms that is taken back
  u32 marks[SPLIT_BLOCKS];
  int list[SPLIT_BLOCKS], found[ROUNDS][WARPS];
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

// Where the records of a block lie, and its weights.
struct Place { const unsigned char *record, *keys, *values; const float *weights; };

// Where a byte of the keys is staged: sixteen bytes of a line change places by the row, so that the same ones of eight rows lie in different banks.
__device__ __forceinline__ int key_at(int at) { return at ^ (((ROW_BYTES % LINE ? at / LINE : at / ROW_BYTES) & 7) << 4); }
// Copies to a warp's stage; `copies_wait` waits.
__device__ __forceinline__ void stage_bytes(u32 to, const void *from, int count, int lane, u64 policy) {
#pragma unroll 1
  for (int at = lane * 16; at < count; at += LANES * 16) copy16(to + at, (const unsigned char *)from + at, policy);
}
__device__ __forceinline__ void stage_keys(u32 stage, const Place &of, int t, int lane, u64 policy) {
  const unsigned char *keys = of.keys + t * TILE * ROW_BYTES;
#pragma unroll 4
  for (int at = lane * 16; at < TILE * ROW_BYTES; at += LANES * 16) copy16(stage + key_at(at), keys + at, policy);
}
// All else of a tile; original values where some row needs them.
__device__ __forceinline__ void stage_values(u32 stage, const Place &of, int t, bool originals, int lane, u64 policy) {
  if (originals) stage_bytes(stage + VALUES_STAGED_AT, of.values + t * TILE * ROW_BYTES, TILE * ROW_BYTES, lane, policy);
  stage_bytes(stage + CODES_STAGED_AT, of.record + SCORE_BYTES + t * VALUE_BYTES, VALUE_BYTES, lane, policy);
  stage_bytes(stage + WEIGHTS_STAGED_AT, of.weights + t * WEIGHT_FLOATS, 4 * WEIGHT_FLOATS, lane, policy);
  stage_bytes(stage + NORMS_STAGED_AT, of.record + NORMS_AT + 4 * t * TILE, 4 * TILE, lane, policy);
}

// Scores, in binary units, of the staged tile of sixteen tokens of an original record for the four rows: a lane has token lane % 16.
__device__ __forceinline__ void score_originals(const unsigned char *stage, const Scratch &with, int lane, float (&s)[ROW_TILE]) {
  const int begin = lane / TILE * HALF, own = lane % TILE * ROW_BYTES + begin * ITEM;
  float sums[ROW_TILE][8];
#pragma unroll
  for (int row = 0; row < ROW_TILE; row++)
#pragma unroll
    for (int k = 0; k < 8; k++) sums[row][k] = 0.f;
#pragma unroll 2
  for (int i = 0; i < HALF; i += 8) {
    uint4 bits[8 / PER_LOAD];
#pragma unroll
    for (int k = 0; k < 8 / PER_LOAD; k++) bits[k] = *(const uint4 *)(stage + key_at(own + i * ITEM + 16 * k));
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const float key = as_float(&bits[k / PER_LOAD], k % PER_LOAD);
#pragma unroll
      for (int row = 0; row < ROW_TILE; row++) sums[row][k] = fmaf(with.q[row][begin + i + k], key, sums[row][k]);
    }
  }
#pragma unroll
  for (int row = 0; row < ROW_TILE; row++) {
    const float (&x)[8] = sums[row];
    const float sum = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    s[row] = (sum + __shfl_xor_sync(~0u, sum, TILE)) * with.scale[row];
  }
}

// Joins eight values over the sixteen lanes of each half of a warp: lane i of eight returns value i. Eight shuffles where butterflies take 32.
template <typename Join>
__device__ __forceinline__ float fold_half(float (&v)[8], int lane, Join join) {
#pragma unroll
  for (int half = 4; half; half >>= 1) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < half) {
        const float keep = upper ? v[i + half] : v[i], give = upper ? v[i] : v[i + half];
        v[i] = join(keep, __shfl_xor_sync(~0u, give, half));
      }
  }
  return join(v[0], __shfl_xor_sync(~0u, v[0], 8));
}
