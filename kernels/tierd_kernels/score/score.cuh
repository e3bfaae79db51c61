// Scores of quantised keys, and of the trailing block's originals.
//
// Codes are the A operand of mma.m16n8k32.s8 as stored; B holds q times the block's scale, in units of its largest entry / 32512, as two int8
// limbs: columns 2 * row + limb. A lane prepares the four channels of each step that its limb names, for both limbs, and gives the other limb's
// bytes to its neighbour. int32 sums are exact, D <= 512. What depends on a block's scales and offsets alone, q . offset and the norms of q
// * scale, comes from MMAs over CHUNK blocks at once: 40 instructions a block where sums by lanes took 110.
constexpr int CHUNK = 8, SCALE_BYTES = 2 * KEY_DIM;  // of a block; its offsets take as much
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
// Of such a scale the size in natural units, rounded up.
__device__ __forceinline__ float natural_size(float scale) { return fabsf(scale) * 0.69314724f; }

// Of a block and row, ready for the scores: q . offset, and Delta, D and eps but for the limbs' part of eps.
struct BlockFacts { float offset_dot, delta, d_norm, eps; };
struct RowSize { float size, q_norm; };  // `natural_size` of the row's scale; ||q||

__device__ __forceinline__ u32 halves(float x, float y) { return as_bits(__floats2half2_rn(x, y)); }
// x, y >= 0 in FP16, not below: the factor is worth more than rounding, the sum more than a subnormal's.
__device__ __forceinline__ u32 halves_above(float x, float y) { return halves(fmaf(x, 1.001f, 1.2e-7f), fmaf(y, 1.001f, 1.2e-7f)); }
// (64 s)^2 in FP16, not below; infinite from s = 4 on.
__device__ __forceinline__ u32 scale_squares(u32 s) {
  const __half2 x = __hmul2(as_half2(s), __half2half2(__float2half(64.125f)));
  return as_bits(__hmul2(x, x));
}

// The B operands of what MMAs make of scales and offsets: columns are rows of the tile, of parts q in a high and a low FP16 part, of sizes |q| and
// q^2 from above, twice: nobody asks for their second columns. All warps of a thread block use the same: each prepares some of the steps, of sizes
// where they are asked for.
typedef uint2 Parts[KEY_STEPS][2][LANES], Sizes[KEY_STEPS][2][2][LANES / 2];
__device__ __forceinline__ int size_of(int lane) { return lane / 8 * 4 + lane % 4; }  // of both lanes of a row, which of `Sizes`
__device__ __forceinline__ void prepare_operands(Parts &parts, Sizes *sizes, const float (&q)[KEY_STEPS * 4], int warp, int lane, int limb) {
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
        up[i] = halves_above(fabsf(u), fabsf(v));
        squares[i] = halves_above(u * u, v * v);
        u32 high = halves(u, v);
        float2 back = __half22float2(as_half2(high));
        b[i] = limb ? halves(u - back.x, v - back.y) : high;
      }
      parts[j][k][lane] = make_uint2(b[0], b[1]);
      if (limb || !sizes) continue;
      (*sizes)[j][k][0][size_of(lane)] = make_uint2(up[0], up[1]);
      (*sizes)[j][k][1][size_of(lane)] = make_uint2(squares[0], squares[1]);
    }
  }
}

// Offsets of the block whose record's head lies there in shared memory, of this lane's eight channels of step j.
__device__ __forceinline__ uint4 offsets_of(u32 head, int j, int c) { return shared128(head + SCALE_BYTES + 2 * (32 * j + 8 * c)); }
// Adds q . offset of blocks r and row c over half k of a step, its parts apart: rows of A are blocks, the upper eight none. An accumulator of its own:
// one MMA's rounding, not that of a chain.
__device__ __forceinline__ void add_offsets(float (&dot)[2], const uint4 &z, int k, uint2 parts) {
  float part[4] = {0.f, 0.f, 0.f, 0.f};
  mma_f16(part, k ? z.z : z.x, 0, k ? z.w : z.y, 0, parts.x, parts.y);
  dot[0] += part[0], dot[1] += part[1];
}

// Facts of block r of a chunk, whose head lies there, for row c of the tile.
__device__ __forceinline__ BlockFacts block_facts(u32 head, const Parts &parts, const Sizes &sizes, int c, int lane, const RowSize &row) {
  float dot[2] = {0.f, 0.f}, l1[4] = {0.f, 0.f, 0.f, 0.f}, l2[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int j = 0; j < KEY_STEPS; j++) {
    const uint4 s = shared128(head + 2 * (32 * j + 8 * c)), z = offsets_of(head, j, c);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const u32 a0 = k ? s.z : s.x, a2 = k ? s.w : s.y;
      const uint2 up = sizes[j][k][0][size_of(lane)], squares = sizes[j][k][1][size_of(lane)];
      add_offsets(dot, z, k, parts[j][k][lane]);
      if (NAIVE) continue;
      mma_f16(l1, a0, 0, a2, 0, up.x, up.y);
      mma_f16(l2, scale_squares(a0), 0, scale_squares(a2), 0, squares.x, squares.y);
    }
  }
  BlockFacts facts = {dot[0] + dot[1], 0.f, 0.f, 0.f};
  if (NAIVE) return facts;
  auto note = [&](int i) { return __uint_as_float(shared32(head + NOTES_AT + 4 * i)); };
  const float norm1 = l1[0] * NORM_ROOM;  // no norm is above it, where a square was infinite
  const float norm2 = fminf(sqrt_approx(l2[0]) * (NORM_ROOM / 64.f), norm1);
  facts.delta = row.size * fminf(note(H) * norm1, note(RK) * norm2);
  facts.d_norm = row.size * note(SK) * norm2;
  facts.eps = row.size * (norm1 * (128.f * (16.f * U32F + SCORE_ROUNDINGS)) +
                          row.q_norm * note(OFFSET_NORM) * (OFFSET_ROUNDINGS + SCORE_ROUNDINGS) + PRODUCT_FLOOR) + EXP_ERROR;
  return facts;
}

// The B operand of a block's scores.
struct Limbs {
  u32 b[KEY_STEPS * 2];
  float top;  // of this lane's row, the largest |q * scale|
  // From where the block's scales lie in shared memory, from this lane's channels on, and the same channels of its row's query, `apart` bytes from
  // step to step; for limb `limb`.
  template <int apart>
  __device__ __forceinline__ void prepare(u32 scales_at, u32 query_at, int limb) {
    const u32 keep_bytes = limb ? 0x5410 : 0x7632, give_bytes = limb ? 0x7632 : 0x5410;
    const u32 flip = limb ? 0x80808080u : 0u;  // a low limb is stored + 128
    float a[KEY_STEPS * 4], tops[4] = {1e-30f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < KEY_STEPS; j++) {
      const uint2 s = shared64(scales_at + 64 * j);
      const uint4 query = shared128(query_at + j * apart);
      const float own[4] = {__uint_as_float(query.x), __uint_as_float(query.y), __uint_as_float(query.z), __uint_as_float(query.w)};
      const float2 x = __half22float2(as_half2(s.x)), y = __half22float2(as_half2(s.y));
      const float scales[4] = {x.x, x.y, y.x, y.y};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        a[4 * j + e] = own[e] * scales[e];
        tops[e] = fmaxf(tops[e], fabsf(a[4 * j + e]));
      }
    }
    top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
#pragma unroll
    for (int bit = 1; bit < 8; bit <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, bit));
    const float inverse = __fdividef(LIMB_MAX, top);
#pragma unroll
    for (int j = 0; j < KEY_STEPS; j++) {
      u32 v[4];  // low 16 bits: limb value + 128, so that byte 1 is the high limb and byte 0 the low limb + 128
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] = __float_as_uint(fmaf(a[4 * j + e], inverse, 12582912.f + 128.f));
      const u32 x = __byte_perm(v[0], v[1], 0x5140), y = __byte_perm(v[2], v[3], 0x5140);
      const u32 own = __byte_perm(x, y, keep_bytes), other = __shfl_xor_sync(~0u, __byte_perm(x, y, give_bytes), 4);
      b[2 * j] = (limb ? other : own) ^ flip;
      b[2 * j + 1] = (limb ? own : other) ^ flip;
    }
  }
  // In units of which row c's limbs count; lane 8 c has that row.
  __device__ __forceinline__ float step(int c) const { return __shfl_sync(~0u, top, 8 * c) * (1.f / LIMB_MAX); }
};

// Codes times limbs, of a tile of sixteen tokens whose codes, so many bytes, lie in shared memory.
constexpr int TILE_CODES = TILE * KEY_DIM;
struct CodeProducts {
  int d[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};  // two chains: half the latency
  __device__ __forceinline__ CodeProducts(u32 codes, const Limbs &limbs, int lane) {
#pragma unroll
    for (int j = 0; j < KEY_STEPS; j++) mma_s8(d[j & 1], shared128(codes + j * LANES * 16 + lane * 16), limbs.b[2 * j], limbs.b[2 * j + 1]);
  }
  // Of row c the score of token r, or with `half` of token r + 8, in binary units. What promotion takes back must be what rung 0 has summed, to the
  // bit: nothing here is left to a compiler's contraction.
  __device__ __forceinline__ float score(int half, float step, float offset_dot, float scale) const {
    const int high = d[0][2 * half] + d[1][2 * half], low = d[0][2 * half + 1] + d[1][2 * half + 1];
    return __fmul_rn(fmaf((float)(high * 256 + low), step, offset_dot), scale);
  }
};

// The trailing block, from its originals: a split of its own, one warp a row. Scores in double; leaves `weights` [ROW_TILE][BLOCK].
__device__ __noinline__ void score_tail(const Call *at_call, int heads, int group, int h, int tile, int tiles, float *x, float *weights) {
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
  float *statistics = call.statistics + block * STATISTIC_WORDS + row;
  auto word = [&](int k) -> float & { return statistics[word_at(call.full, k)]; };
  RowSums sum;
  float norm_top = 0.f;
  for (int k = 0; k < (BLOCK + 31) / 32; k++) {
    float y = s[k] - largest, w = y >= LOG2_MIN ? exp2_approx(y) : 0.f;
    const int token = k * 32 + lane;
    if (token < BLOCK) weights[row * BLOCK + token] = w;
    if (k * 32 + lane < seen) norm_top = fmaxf(norm_top, norms[k]);
    sum.add(w, norms[k], 0.f);
  }
  norm_top = warp_max(norm_top);
#pragma unroll
  for (int k = 0; k < TOP; k++) sum.v[k] = warp_sum(sum.v[k]);
  if (lane) return;
  const float eps = exact_epsilon(magnitude, size), d = BLOCK_ROOT * eps * STORE;
  for (int k = 0; k < D_AND_NOTE; k++) word(k) = sum.v[k];
  word(SUM_SQUARES) = both_above(sum.v[SUM_SQUARES], sum.v[SUM_SQUARES_NORM]);
  word(SUM_ERROR) = both_above(sum.v[SUM_ERROR], sum.v[SUM_SQUARE_ERROR]);
  word(DELTA_WORD) = eps, word(D_AND_NOTE) = both_above(d, 0.f);  // nobody asks for a trailing block's notes
  word(TOP) = largest;
  const float mass = sum.v[SUM], phi = 1.f + eps, a2 = sqrtf(sum.v[SUM_SQUARES]), g = phi * mass * eps, c = phi * a2 * eps;
  const float parts[PARTIALS] = {mass, mass * eps, phi * eps * sum.v[SUM_NORM], g, phi * phi * mass * eps * eps, sum.v[SUM_SQUARE_VALUE], 0.f,
                                 mass * norm_top, c * c, 0.f, 0.f, sum.v[SUM_NORM], largest, eps, norm_top, 0.f * (eps + sum.v[SUM_NORM] + mass), norm_top};
  float *out = call.partials + ((i64)(h * tiles + tile) * (call.splits + 1) + call.splits) * PARTIALS * ROW_TILE + row;
  for (int k = 0; k < PARTIALS; k++) out[k * ROW_TILE] = parts[k];
}
