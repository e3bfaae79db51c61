// Score pass: weights 2^(s - top) of every token, statistics of every block, and of every split its largest score, mass and mass times
// norms.
//
// One warp takes a block after the other; codes and norms arrive in shared memory by bulk copies, SCORE_STAGES ahead. Codes are the A
// operand of mma.m16n8k32.s8 as stored; B holds q times the block's scale, in units of its largest entry / 32512, as two int8 limbs:
// columns 2 * row + limb. A lane prepares the four channels of each step that its limb names, for both limbs, and gives the other limb's
// bytes to its neighbour. int32 sums are exact, D <= 512. What depends on a block's scales and offsets alone, q . offset and the norms of q
// * scale, comes from MMAs over CHUNK blocks at once: 40 instructions a block where sums by lanes took 110. Those scales and offsets arrive
// before their blocks, once: read from global memory where they were needed, and with their block again, they kept the first blocks waiting
// for 28 MB (131,072 tokens: 13 us).
//
// On an H200 instructions count as bytes do while there are many: with 420 of them a block of 16 tokens rung 0 of 131,072 tokens took 94.1 us, with
// 363 it took 89.8, with 323 it takes 88.7. Without the certificate, 249, no fewer than with 285, take 80: memory's time, 3.5 us until the first
// codes are asked for, and what the last thread block takes longer than most, 5 us.
constexpr int SCORE_STAGES = 2;  // at 131,072 tokens: 2 67 us, 3 66, 4 70; two blocks at once in a warp 73, five or six blocks resident 72 to 87
constexpr int CHUNK = 8, SCALE_BYTES = 2 * KEY_DIM, NOTE_BYTES = KEY_CODES_AT - 2 * SCALE_BYTES;  // of a block; its offsets take as much as its scales
constexpr int CODE_BYTES = SCORE_BYTES - KEY_CODES_AT;                                          // and its norms
constexpr int CODES_EACH = LINED ? (CODE_BYTES + LINE - 1) / LINE * LINE : CODE_BYTES;  // in shared memory
constexpr int STAGED_BYTES = SCORE_STAGES * CODES_EACH + LINE + CHUNK * (3 * SCALE_BYTES + NOTE_BYTES);  // of a warp; scales of two chunks
constexpr float LIMB_MAX = 32512.f;
// Whether norms are brought into units before they are summed. Sums of half precision have room for them as they are, and follow at their end.
constexpr bool IN_UNITS = DTYPE != 0;
constexpr float PRODUCT_FLOOR = 0x1p-90f;                            // entries of q below 2^-126 of the largest, which are flushed, times keys below 2^23
constexpr float NORM_ROOM = 1.f + 6.103515625e-5f;                  // 2^-14: sixteen MMAs over positive terms, 34 u each, and the root
// q . offset: parts of q, one MMA each, sums of 2 * KEY_STEPS of them; in units of ||q|| ||offset||, ||q|| >= 1/2.
constexpr float OFFSET_ROUNDINGS = (34.f + 2.f * KEY_STEPS + 16.f + 24.f) * U32F;

struct RowFacts { float scale, q_norm; };

// Of row `row` of the tile the channels of this lane, 8 c + 4 limb and the three behind it of each step, as they are stored.
struct Query { Four raw[KEY_STEPS]; int seen; };  // seen: tokens; 0 where there is no such row
__device__ __forceinline__ bool inside(int j, int c, int limb) { return KEY_DIM == D || 32 * j + 8 * c + 4 * limb < D; }
__device__ __forceinline__ Query read_query(const Call &call, int h, int group, int row, int c, int limb) {
  const Row own = query_row(call, h, group, row);
  Query query = {{}, own.seen};
#pragma unroll
  for (int j = 0; j < KEY_STEPS; j++) query.raw[j] = four_of(call.q, own.at + (inside(j, c, limb) ? 32 * j + 8 * c + 4 * limb : 0));
  return query;
}

// The same in FP32, scaled by a power of two into [-1, 1]; and what undoes it, times the softmax scale in binary units.
__device__ __forceinline__ RowFacts scale_query(const Query &query, float softmax_scale, int c, int limb, float (&q)[KEY_STEPS * 4]) {
  float top = 0.f, norm = 0.f;
#pragma unroll
  for (int j = 0; j < KEY_STEPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      q[4 * j + i] = query.seen > 0 && inside(j, c, limb) ? as_float(&query.raw[j], i) : 0.f;
      top = fmaxf(top, fabsf(q[4 * j + i]));
    }
#pragma unroll
  for (int bit = 1; bit < 8; bit <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, bit));
  const int e = exponent_above(top);
#pragma unroll
  for (int i = 0; i < KEY_STEPS * 4; i++) {
    q[i] = downscale(q[i], e);
    norm = fmaf(q[i], q[i], norm);
  }
#pragma unroll
  for (int bit = 1; bit < 8; bit <<= 1) norm += __shfl_xor_sync(~0u, norm, bit);
  return {downscale(softmax_scale, -e), sqrt_approx(norm) * NORM_ROOM};
}

// Of a block and row, ready for the scores: q . offset, and Delta, D and eps but for the limbs' part of eps.
struct __align__(16) BlockFacts { float offset_dot, delta, d_norm, eps; };
struct RowSize { float size, q_norm; };  // |softmax scale| as `scale_query` has it, in natural units; ||q||

__device__ __forceinline__ u32 halves(float x, float y) { return as_bits(__floats2half2_rn(x, y)); }
// x, y >= 0 in FP16, not below: the factor is worth more than rounding, the sum more than a subnormal's.
__device__ __forceinline__ u32 halves_above(float x, float y) { return halves(fmaf(x, 1.001f, 1.2e-7f), fmaf(y, 1.001f, 1.2e-7f)); }
// (64 s)^2 in FP16, not below; infinite from s = 4 on.
__device__ __forceinline__ u32 scale_squares(u32 s) {
  const __half2 x = __hmul2(as_half2(s), __half2half2(__float2half(64.125f)));
  return as_bits(__hmul2(x, x));
}

// The B operands of one step of `block_facts`: columns are rows of the tile, q in a high and a low FP16 part, and |q| and q^2 from above
// in the high part's place. All warps of a thread block use the same: each prepares some of the steps.
typedef uint2 Operands[KEY_STEPS][2][3][LANES];
__device__ __forceinline__ void prepare_operands(Operands &operands, const float (&q)[KEY_STEPS * 4], int warp, int lane, int limb) {
#pragma unroll
  for (int first = 0; first < KEY_STEPS; first += WARPS) {
    const int j = first + warp;
    if (KEY_STEPS % WARPS && j >= KEY_STEPS) break;
    float x[8];  // this row's eight channels from 32 j + 8 c on
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float own = q[4 * first + i];
#pragma unroll
      for (int w = 1; w < WARPS && first + w < KEY_STEPS; w++) own = w == warp ? q[4 * (first + w) + i] : own;
      const float other = __shfl_xor_sync(~0u, own, 4);
      x[i] = limb ? other : own;
      x[4 + i] = limb ? own : other;
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
      u32 b[2], up[2], squares[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float u = x[4 * k + 2 * i], v = x[4 * k + 2 * i + 1];
        up[i] = limb ? 0u : halves_above(fabsf(u), fabsf(v));
        squares[i] = limb ? 0u : halves_above(u * u, v * v);
        u32 high = halves(u, v);
        float2 back = __half22float2(as_half2(high));
        b[i] = limb ? halves(u - back.x, v - back.y) : high;
      }
      operands[j][k][0][lane] = make_uint2(b[0], b[1]);
      operands[j][k][1][lane] = make_uint2(up[0], up[1]);
      operands[j][k][2][lane] = make_uint2(squares[0], squares[1]);
    }
  }
}

// Facts of block r of a chunk, for row c of the tile: rows of A are blocks, the upper eight none.
__device__ __forceinline__ BlockFacts block_facts(u32 scales, u32 offsets, u32 notes, const Operands &operands, int c, int lane, const RowSize &row) {
  float dot[4] = {0.f, 0.f, 0.f, 0.f}, l1[4] = {0.f, 0.f, 0.f, 0.f}, l2[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int j = 0; j < KEY_STEPS; j++) {
    const uint4 s = shared128(scales + 2 * (32 * j + 8 * c)), z = shared128(offsets + 2 * (32 * j + 8 * c));
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const u32 a0 = k ? s.z : s.x, a2 = k ? s.w : s.y;
      float part[4] = {0.f, 0.f, 0.f, 0.f};  // an accumulator of its own: one MMA's rounding, not that of a chain
      const uint2 b = operands[j][k][0][lane], up = operands[j][k][1][lane], squares = operands[j][k][2][lane];
      mma_f16(part, k ? z.z : z.x, 0, k ? z.w : z.y, 0, b.x, b.y);
      dot[0] += part[0], dot[1] += part[1];
      if (NAIVE) continue;
      mma_f16(l1, a0, 0, a2, 0, up.x, up.y);
      mma_f16(l2, scale_squares(a0), 0, scale_squares(a2), 0, squares.x, squares.y);
    }
  }
  BlockFacts facts = {dot[0] + dot[1], 0.f, 0.f, 0.f};
  if (NAIVE) return facts;
  auto note = [&](int i) { return __uint_as_float(shared32(notes + 4 * i)); };
  const float norm1 = l1[0] * NORM_ROOM;  // no norm is above it, where a square was infinite
  const float norm2 = fminf(sqrt_approx(l2[0]) * (NORM_ROOM / 64.f), norm1);
  facts.delta = row.size * fminf(note(H) * norm1, note(RK) * norm2);
  facts.d_norm = row.size * note(SK) * norm2;
  facts.eps = row.size * (norm1 * (128.f * (16.f * U32F + SCORE_ROUNDINGS)) +
                          row.q_norm * note(OFFSET_NORM) * (OFFSET_ROUNDINGS + SCORE_ROUNDINGS) + PRODUCT_FLOOR) + EXP_ERROR;
  return facts;
}

// The trailing block, from its originals: a split of its own, one warp a row. Scores in double.
__device__ __noinline__ void score_tail(const Call *at_call, int heads, int group, int h, int tile, int tiles, float *x) {
  const Call &call = *at_call;
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES, count = call.tokens - call.full * BLOCK, unit = call.unit;
  const unsigned char *keys = call.originals + call.original[call.full] + (i64)h * ORIGINAL_BYTES, *values = keys + (i64)heads * ORIGINAL_BYTES;
  const Row query = query_row(call, h, group, tile * ROW_TILE + row);
  const int seen = query.seen - call.full * BLOCK;
  float s[(BLOCK + 31) / 32], largest = -INFINITY, norms[(BLOCK + 31) / 32];
  double size = 0.;
  for (int k = 0; k < (BLOCK + 31) / 32; k++) s[k] = -INFINITY, norms[k] = 0.f;
  for (int part = 0; part < 2; part++) {
    __syncthreads();
    load_record(x, part ? values : keys, count, WARPS * LANES);
    __syncthreads();
    for (int k = 0; k < (BLOCK + 31) / 32; k++) {
      const int t = k * 32 + lane;
      const float *y = x + t * (D + 1);
      if (t >= count) continue;
      const Product dot = part ? product(y, [&](int i) { return y[i]; }) : product(y, [&](int i) { return as_float(call.q, query.at + i); });
      if (part) norms[k] = fmaxf((float)(ldexp(sqrt(dot.sum), -unit) * (1. + 1e-6)), NORM_FLOOR);
      else if (t < seen) s[k] = (float)(dot.sum * call.scale * 1.4426950408889634), size = fmax(size, dot.size * fabs(call.scale));
    }
  }
  float magnitude = 0.f;
  for (int k = 0; k < (BLOCK + 31) / 32; k++) {
    largest = fmaxf(largest, s[k]);
    if (k * 32 + lane < seen) magnitude = fmaxf(magnitude, fabsf(s[k]));
  }
  largest = warp_max(largest);
  magnitude = warp_max(magnitude);
  for (int bit = 1; bit < 32; bit <<= 1) size = fmax(size, __shfl_xor_sync(~0u, size, bit));
  const i64 block = (i64)(h * tiles + tile) * (call.full + 1) + call.full;
  float *weights = call.weights + block * TILES * WEIGHT_FLOATS, *statistics = call.statistics + block * STATISTIC_WORDS + row;
  auto word = [&](int k) -> float & { return statistics[word_at(call.full, k)]; };
  RowSums sum;
  float norm_top = 0.f;
  for (int k = 0; k < (BLOCK + 31) / 32; k++) {
    float y = s[k] - largest, w = y >= LOG2_MIN ? exp2_approx(y) : 0.f;
    const int token = k * 32 + lane;
    if (token < BLOCK) weights[token / TILE * WEIGHT_FLOATS + weight_at(row, token % TILE)] = w;
    if (k * 32 + lane < seen) norm_top = fmaxf(norm_top, norms[k]);
    sum.add(w, norms[k], 0.f);
  }
  norm_top = warp_max(norm_top);
#pragma unroll
  for (int k = 0; k < TOP; k++) sum.v[k] = warp_sum(sum.v[k]);
  if (lane) return;
  const float eps = exact_epsilon(magnitude, size), d = BLOCK_ROOT * eps * STORE;
  for (int k = 0; k < TILES; k++) weights[k * WEIGHT_FLOATS + TOPS_AT + row] = largest;
  for (int k = 0; k < D_AND_NOTE; k++) word(k) = sum.v[k];
  word(SUM_SQUARES) = both_above(sum.v[SUM_SQUARES], sum.v[SUM_SQUARES_NORM]);
  word(SUM_ERROR) = both_above(sum.v[SUM_ERROR], sum.v[SUM_SQUARE_ERROR]);
  word(DELTA_WORD) = eps, word(D_AND_NOTE) = both_above(d, 0.f);  // nobody asks for a trailing block's notes
  word(TOP) = largest;
  const float mass = sum.v[SUM], phi = 1.f + eps, a2 = sqrtf(sum.v[SUM_SQUARES]), g = phi * mass * eps, c = phi * a2 * eps;
  const float parts[PARTIALS] = {mass, mass * eps, phi * eps * sum.v[SUM_NORM], g, phi * phi * mass * eps * eps, sum.v[SUM_SQUARE_VALUE], 0.f,
                                 mass * norm_top, c * c, 0.f, 0.f, sum.v[SUM_NORM], largest, eps, norm_top, 0.f * (eps + sum.v[SUM_NORM] + mass), norm_top, mass, sum.v[SUM_NORM]};
  float *out = call.partials + ((i64)(h * tiles + tile) * (call.splits + 1) + call.splits) * PARTIALS * ROW_TILE + row;
  for (int k = 0; k < PARTIALS; k++) out[k * ROW_TILE] = parts[k];
}

// What the score pass does for a split, by one thread block; returns the split's largest score of row c of the tile. `values` hears which of the
// shared memory it no longer needs.
template <typename Values>
__device__ __forceinline__ float score_split(const Call &call, int heads, int group, int h, int tile, int tiles, int split, unsigned char *shared,
                                             Values &values) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, r = lane / 4, c = lane % 4, limb = r & 1;
  const int full = call.full, per = call.per, splits = call.splits, unit_exponent = call.unit;
  const float softmax_scale = (float)(call.scale * 1.4426950408889634);
  const u32 scales = shared_at(shared) + warp * STAGED_BYTES + SCORE_STAGES * CODES_EACH + LINE;  // [2][CHUNK], then [CHUNK] each
  const u32 offsets = scales + 2 * CHUNK * SCALE_BYTES, notes = offsets + CHUNK * SCALE_BYTES;
  __shared__ u64 bars[WARPS][SCORE_STAGES];
  __shared__ const unsigned char *records[WARPS][LANES];  // codes of the warp's blocks; behind the last one that one again

  const int each = per / WARPS, first = split * per + warp * each, count = max(0, min(each, full - first));
  const unsigned char *pool = call.pool + (i64)h * RECORD_BYTES + KEY_CODES_AT;
  if (count > 0) records[warp][lane] = pool + call.hot[first + min(lane, count - 1)];
  const Query query = read_query(call, h, group, tile * ROW_TILE + (r >> 1), c, limb);
  if (lane < SCORE_STAGES) barrier_init(&bars[warp][lane]);
  barriers_ready();
  const u64 policy = stream_policy(), kept = keep_policy();
  const u32 codes_at = in_register(shared_at(shared) + warp * STAGED_BYTES + (LINED ? KEY_CODES_AT % LINE : 0));
  const u32 bars_at = in_register(shared_at(&bars[warp][0])), records_at = in_register(shared_at(&records[warp][0]));
  auto issue = [&](int i, int s) {
    if (lane) return;
    barrier_expect(bars_at + 8 * s, CODE_BYTES);
    const uint2 record = shared64(records_at + 8 * i);
    bulk_stream(codes_at + s * CODES_EACH, (const void *)((u64)record.y << 32 | record.x), CODE_BYTES, bars_at + 8 * s, policy);
  };
  auto fetch = [&](int i) {  // scales, offsets and notes of the chunk that begins with block i
    const u32 to = scales + (i / CHUNK & 1) * CHUNK * SCALE_BYTES;
    constexpr int PIECES = 2 * SCALE_BYTES / 16;  // of a block
#pragma unroll
    for (int k = 0; k < CHUNK * PIECES; k += LANES) {
      if (k == CHUNK / 2 * PIECES && count - i <= CHUNK / 2) break;  // asked of each block it would be 23 instructions a chunk
      const int b = (k + lane) / PIECES, at = (k + lane) % PIECES * 16;
      copy16((at < SCALE_BYTES ? to : offsets - SCALE_BYTES) + b * SCALE_BYTES + at, records[warp][i + b] + at - KEY_CODES_AT, policy);
    }
    constexpr int NOTE_PIECES = NOTE_BYTES / 16;
    static_assert(CHUNK * NOTE_PIECES == LANES, "a lane a piece");
    copy16(notes + lane * 16, records[warp][i + lane / NOTE_PIECES] + NOTES_AT - KEY_CODES_AT + lane % NOTE_PIECES * 16, policy);
  };
  if (count > 0) fetch(0);
  for (int i = 0; i < min(count, SCORE_STAGES); i++) issue(i, i);
  values.begin(count, records_at, scales + CHUNK * SCALE_BYTES);

  float q[KEY_STEPS * 4];
  const RowFacts mine = scale_query(query, softmax_scale, c, limb, q);
  __shared__ Operands operands;
  prepare_operands(operands, q, warp, lane, limb);
  __syncthreads();
  // Facts of row c, which is the row of the scores that a lane holds; lane 8 c has r / 2 = c.
  const float scale = __shfl_sync(~0u, mine.scale, 8 * c), q_norm = __shfl_sync(~0u, mine.q_norm, 8 * c);
  const int seen = __shfl_sync(~0u, query.seen, 8 * c);
  const float unit = unit_factor(unit_exponent);
  const float size = fabsf(scale) * 0.69314724f;  // |softmax scale| in natural units, rounded up
  const u32 keep_bytes = limb ? 0x5410 : 0x7632, give_bytes = limb ? 0x7632 : 0x5410;
  const u32 flip = limb ? 0x80808080u : 0u;  // a low limb is stored + 128
  const i64 place = (i64)(h * tiles + tile) * (full + 1) + first;
  // Where a lane writes of a block: weights of row c, tokens r and r + 8; word r of row c's statistics, of which those that tell of scores are
  // written once more behind the chunk; and the largest score to tile r's weights.
  const bool tops_weights = r < TILES;
  float *weights = call.weights + place * TILES * WEIGHT_FLOATS + weight_at(c, r), *statistics = call.statistics + place * STATISTIC_WORDS + c;
  float *top_of_weights = call.weights + (place * TILES + r % TILES) * WEIGHT_FLOATS + TOPS_AT + c, *const of_blocks = statistics;
  // Sums over a block's tokens, but for that of weights, are an MMA's. Columns of B are weights and their squares, 2 * row and 2 * row + 1; row r of
  // A holds a norm of each token, of values or of their errors, or its square, row r + 8 ones, or the norm itself. So lane (r, c) comes by the one
  // or two sums that word r of row c has, where sums by lanes and a fold of them took 25 instructions more.
  constexpr u32 ONES = 0x3f803f80, FLOORS = 0x26802680;  // pairs of 1 and of NORM_FLOOR
  const bool of_squares = r == SUM_SQUARES, of_errors = r == SUM_ERROR, shares_word = of_squares || of_errors;
  const u32 square = in_register(r == SUM_NORM ? 0u : ~0u), error = in_register(of_errors ? ~0u : 0u);
  const u32 norm_bytes = in_register(of_errors ? BOTH_UPPER : BOTH_LOWER), halves = shares_word ? BOTH_UPPER : THE_OTHER, units = bf16_pair(unit, unit);
  // By what a lane's sums are multiplied: room, and units.
  const float own_unit = IN_UNITS ? 1.f : unit, above = shares_word ? BF16_ABOVE : 1.f, of_lower = above * TWICE_ABOVE * own_unit * own_unit;
  const float of_upper = of_squares ? above * ONCE_ABOVE : of_errors ? above * ONCE_ABOVE * own_unit : r == SUM_NORM ? own_unit : r == SUM_SQUARE_VALUE ? of_lower : 1.f;

  __shared__ BlockFacts facts_of[WARPS][CHUNK][ROW_TILE];
  __shared__ float notes_of[WARPS][CHUNK][4];  // sV, amp and the largest norm, in units, and C1
  BlockFacts(*facts)[ROW_TILE] = facts_of[warp];
  const bool some_unseen = __ballot_sync(~0u, seen < (first + count) * BLOCK) != 0;
  float highest = LOWEST, running = 0.f;  // largest score, and sum r relative to it, of row c
#pragma unroll 1
  for (int begin = 0; begin < count; begin += CHUNK) {
    copies_wait();
    const u32 own = notes + r * NOTE_BYTES, of_chunk = scales + (begin / CHUNK & 1) * CHUNK * SCALE_BYTES;
    facts[r][c] = block_facts(of_chunk + r * SCALE_BYTES, offsets + r * SCALE_BYTES, own, operands, c, lane, {size, q_norm});
    if (!NAIVE) {
      auto note = [&](int k) { return __uint_as_float(shared32(own + 4 * k)); };
      notes_of[warp][r][c] = note(c == 0 ? SV : c == 1 ? AMP : c == 2 ? VALUE_NORM_MAX : C1) * (c == 3 ? 1.f : unit);
    }
    if (Values::ONE_CHUNK) bulk_copies_follow();
    __syncwarp();
    if (Values::ONE_CHUNK) values.offsets_are_free();
    else if (begin + CHUNK < count) fetch(begin + CHUNK);
    const int end = min(begin + CHUNK, count);
    float own_step = 0.f;  // of block r of the chunk
    u32 own_scales = in_register(of_chunk + 16 * c + 8 * limb), dots_at = in_register(shared_at(&facts[0][c].offset_dot));
#pragma unroll 1
    for (int i = begin; i < end; i++) {
      const u32 codes = codes_at + i % SCORE_STAGES * CODES_EACH;
      barrier_wait(bars_at + 8 * (i % SCORE_STAGES), i / SCORE_STAGES & 1);
      float a[KEY_STEPS * 4], tops4[4] = {1e-30f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int j = 0; j < KEY_STEPS; j++) {
        const uint2 s = shared64(own_scales + 64 * j);
        const float2 x = __half22float2(as_half2(s.x)), y = __half22float2(as_half2(s.y));
        const float scales[4] = {x.x, x.y, y.x, y.y};
#pragma unroll
        for (int e = 0; e < 4; e++) {
          a[4 * j + e] = q[4 * j + e] * scales[e];
          tops4[e] = fmaxf(tops4[e], fabsf(a[4 * j + e]));
        }
      }
      float top = fmaxf(fmaxf(tops4[0], tops4[1]), fmaxf(tops4[2], tops4[3]));
#pragma unroll
      for (int bit = 1; bit < 8; bit <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, bit));
      const float inverse = __fdividef(LIMB_MAX, top);
      u32 b[KEY_STEPS * 2];
#pragma unroll
      for (int j = 0; j < KEY_STEPS; j++) {
        u32 v[4];  // low 16 bits: limb value + 128, so that byte 1 is the high limb and byte 0 the low limb + 128
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = __float_as_uint(fmaf(a[4 * j + e], inverse, 12582912.f + 128.f));
        u32 x = __byte_perm(v[0], v[1], 0x5140), y = __byte_perm(v[2], v[3], 0x5140);
        u32 own = __byte_perm(x, y, keep_bytes), other = __byte_perm(x, y, give_bytes);
        other = __shfl_xor_sync(~0u, other, 4);
        b[2 * j] = (limb ? other : own) ^ flip;
        b[2 * j + 1] = (limb ? own : other) ^ flip;
      }
      const float offset_dot = __uint_as_float(shared32(dots_at));
      own_scales += SCALE_BYTES, dots_at += sizeof facts[0];
      const float step = __shfl_sync(~0u, top, 8 * c) * (1.f / LIMB_MAX);
      float s[2 * TILES], largest = LOWEST;  // no score is lower: where a row sees nothing its weights are 2^-infinity
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        int d[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};  // two chains: half the latency
#pragma unroll
        for (int j = 0; j < KEY_STEPS; j++) {
          mma_s8(d[j & 1], shared128(codes + (t * KEY_STEPS + j) * LANES * 16 + lane * 16), b[2 * j], b[2 * j + 1]);
        }
        s[2 * t] = fmaf((float)((d[0][0] + d[1][0]) * 256 + d[0][1] + d[1][1]), step, offset_dot) * scale;
        s[2 * t + 1] = fmaf((float)((d[0][2] + d[1][2]) * 256 + d[0][3] + d[1][3]), step, offset_dot) * scale;
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
      float sums[4] = {0.f, 0.f, 0.f, 0.f}, mass = 0.f;
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        u32 b[2], used[2], plain[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float w = exp2_approx(s[2 * t + half] - largest);  // which is zero from 2^-126 down
          s[2 * t + half] = w, mass += w;
          if (NAIVE) continue;
          b[half] = transposed(bf16_pair(w, w * w));
          const uint2 both = shared64(codes + BLOCK * KEY_DIM + (t * TILE + half * 8) * 4 + c * 8);  // of tokens 2c and 2c + 1
          u32 norm = __byte_perm(both.x, both.y, norm_bytes);
          if (IN_UNITS) norm = bf16_largest(bf16_products(norm, units), FLOORS);
          used[half] = bf16_products(norm, (norm & square) | (ONES & ~square)), plain[half] = (norm & error) | (ONES & ~error);
        }
        if (!NAIVE) mma_bf16(sums, used[0], plain[0], used[1], plain[1], b[0], b[1]);
        store_kept(weights + t * WEIGHT_FLOATS, s[2 * t], s[2 * t + 1], kept);
      }
#pragma unroll
      for (int bit = 4; bit < 32; bit <<= 1) mass += __shfl_xor_sync(~0u, mass, bit);
      const float mine = NAIVE || r == SUM ? mass : sums[0];
      running = fmaf(running, keep, mine * take);
      if (tops_weights) store_kept(top_of_weights, largest, kept);
      values.keep(s, largest);
      if (!NAIVE) {
        if (r == i - begin) own_step = step;
        const float upper = r == SUM_SQUARES ? sums[3] : r == SUM_ERROR ? sums[2] : r == TOP ? largest : mine;
        const float lower = r == SUM_SQUARES ? sums[1] : sums[0];
        store_kept(statistics + word_at(first + i, r), word_of(upper * of_upper, lower * of_lower, halves), kept);
      }
      statistics += STATISTIC_WORDS, weights += TILES * WEIGHT_FLOATS, top_of_weights += TILES * WEIGHT_FLOATS;
      __syncwarp();
      if (i + SCORE_STAGES < count) issue(i + SCORE_STAGES, i % SCORE_STAGES);
      else values.codes_are_free(i);
    }
    if (NAIVE || begin + r >= count) continue;
    // What is known of scores: by a lane for block r, where a lane for word r of each block took ten instructions more.
    const BlockFacts fact = facts[r][c];
    const float(&notes)[4] = notes_of[warp][r], eps = fmaf(notes[3] * own_step, size * (0.5f * (1.f + 64.f * U32F)), fact.eps);
    float *of_block = of_blocks + (begin + r) * STATISTIC_WORDS;
    store_kept(of_block + word_at(first + begin + r, DELTA_WORD), fmaf(STORE, eps, fact.delta * STORE), kept);
    store_kept(of_block + word_at(first + begin + r, D_AND_NOTE), both_above(fmaf(BLOCK_ROOT * STORE, eps, fact.d_norm * STORE), notes[c]), kept);
  }
  __shared__ float tops[WARPS][ROW_TILE], runs[WARPS][8][ROW_TILE];
  if (r == 0) tops[warp][c] = highest;
  runs[warp][r][c] = running;
  __syncthreads();
  const int place_of_split = split * per + threadIdx.x;
  if (threadIdx.x < per && place_of_split < full) call.marks[(i64)(h * tiles + tile) * full + place_of_split] = 0;
  if (h == 0 && tile == 0) {  // for all tiles: words that begin with a record of the split
    const int records = 2 * heads, end = (min((split + 1) * per, full) * records + 31) / 32;
    for (int i = (split * per * records + 31) / 32 + threadIdx.x; i < end; i += WARPS * LANES) call.reads[i] = 0;
  }
  float reference = LOWEST, sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) reference = fmaxf(reference, tops[w][c]);
  if (warp || (r != SUM && r != SUM_NORM)) return reference;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum = fmaf(runs[w][r][c], exp2_approx(tops[w][c] - reference), sum);
  float *out = call.partials + ((i64)(h * tiles + tile) * (splits + 1) + split) * PARTIALS * ROW_TILE + c;
  out[(r != SUM ? RUN_NORM : NAIVE ? MASS : RUN_MASS) * ROW_TILE] = r == SUM || IN_UNITS ? sum : sum * unit;
  if (r == SUM) out[SPLIT_TOP * ROW_TILE] = reference;
  return reference;
}
