// Shared by all kernels of the CUDA backend. A build fixes D (head dimension), BLOCK (tokens of a block), GROUP (channels of a value
// group) and DTYPE (originals: 0 FP16, 1 BF16, 2 FP32); record.py has the same offsets.
//
// Lanes of a warp are named as the MMA instructions name them: r = lane / 4, c = lane % 4. A tile of rows is ROW_TILE query rows of
// one KV head; a split is the run of blocks that one thread block handles.
#ifndef NAIVE  // rung 0 without what only the certificate needs, for a benchmark of its cost
#define NAIVE 0
#endif
// Bytes that global memory is read by. A copy that puts them on the wrong side of such a boundary in shared memory reads them twice:
// sixteen bytes off, records of the host's memory came at 28 GB/s instead of 51.
constexpr int LINE = 128;
constexpr int SPLITS_MAX = 2048, ROW_TILE = 4, WARPS = 4, LANES = 32, TILE = 16;
constexpr int KEY_STEPS = (D + 31) / 32, KEY_DIM = 32 * KEY_STEPS;  // channels of the score MMA, padded with zeros
constexpr int SPLIT_TOKENS = 2048, SPLIT_BLOCKS = SPLIT_TOKENS / BLOCK;  // at most
constexpr int SPLIT_TOKENS_SHORT = 512;                                  // a split of fewer tokens is short
constexpr int TILES = BLOCK / TILE, VALUE_TILES = D / 16, VALUE_GROUPS = (D + GROUP - 1) / GROUP;

constexpr int KEY_SCALE_AT = 0, KEY_OFFSET_AT = 2 * KEY_DIM, NOTES_AT = 4 * KEY_DIM, KEY_CODES_AT = NOTES_AT + 64;
constexpr int NORMS_AT = KEY_CODES_AT + BLOCK * KEY_DIM, SCORE_BYTES = NORMS_AT + 4 * BLOCK;
constexpr int VALUE_SCALES_AT = 8 * D, VALUE_BYTES = VALUE_SCALES_AT + 64 * VALUE_GROUPS;  // of a tile
constexpr int RECORD_BYTES = SCORE_BYTES + TILES * VALUE_BYTES;
constexpr bool LINED = RECORD_BYTES % LINE == 0;  // else lines begin elsewhere in every other head's records, and to follow them gains nothing
constexpr int ITEM = DTYPE == 2 ? 4 : 2, ORIGINAL_BYTES = BLOCK * D * ITEM;
enum { H, RK, SK, SV, AMP, C1, VALUE_NORM_MAX, KEY_NORM_MAX, OFFSET_NORM, KEYS_RAW, VALUES_RAW };  // the last two: 1 or 0, as integers

// Statistics of a row and a block, see bound/statistics.py; SUM_SQUARE_VALUE is sum w nu^2, TOP the largest score in log2 units. Behind them the
// block's sV, amp and largest norm.
enum { SUM, SUM_SQUARES, SUM_NORM, SUM_SQUARES_NORM, SUM_ERROR, SUM_SQUARE_VALUE, SUM_SQUARE_ERROR, TOP, DELTA, D_NORM, STATISTICS };
typedef float Stats[STATISTICS + 3];
// As they lie: [8][ROW_TILE], one line of the cache a block and tile of rows. What bounds only grow with is kept in BF16, from above, two to a
// word: of words SUM_SQUARES, SUM_ERROR and D_AND_NOTE the upper and the lower half; of the block's notes each row has one. Words change
// places by the block, so that the same ones of eight blocks lie in different banks of shared memory.
constexpr int STATISTIC_WORDS = 8 * ROW_TILE, DELTA_WORD = SUM_SQUARES_NORM, D_AND_NOTE = SUM_SQUARE_ERROR;
constexpr float BF16_ABOVE = 1.00788f;  // then cutting to seven bits of mantissa stays above
constexpr u32 BOTH_UPPER = 0x7632, BOTH_LOWER = 0x5410, THE_OTHER = 0x7654;  // of two words: a word of their upper, or lower, halves; the second one
__device__ __forceinline__ float word_of(float upper, float lower, u32 halves) {
  return __uint_as_float(__byte_perm(__float_as_uint(lower), __float_as_uint(upper), halves));
}
__device__ __forceinline__ float both_above(float upper, float lower) { return word_of(upper * BF16_ABOVE, lower * BF16_ABOVE, BOTH_UPPER); }
__device__ __forceinline__ int word_at(int block, int word) { return (word ^ (block & 7)) * ROW_TILE; }
// Rung 0 takes its sums, but for that of weights, over weights or their squares in BF16, and of squares of norms in BF16: one rounding to
// nearest, or two, and those of an MMA for each tile of tokens. SUM_NORM is off by one either way, the others are from above.
constexpr float ONCE_ABOVE = 1.f + 1.f / 256 + 1.f / 65536, TWICE_ABOVE = 1.f + 1.f / 128 + 1.f / 32768;
// Which word holds a statistic, and what of the word it is.
__device__ __forceinline__ int word_with(int k) {
  return k == SUM_SQUARES_NORM ? SUM_SQUARES : k == SUM_SQUARE_ERROR ? SUM_ERROR : k == DELTA ? DELTA_WORD : k >= D_NORM ? D_AND_NOTE : k;
}
__device__ __forceinline__ float part_of(float word, int k) {
  const bool lower = k == SUM_SQUARES_NORM || k == SUM_SQUARE_ERROR || k >= STATISTICS, upper = k == SUM_SQUARES || k == SUM_ERROR || k == D_NORM;
  const u32 x = __float_as_uint(word);
  return __uint_as_float(lower ? x << 16 : upper ? x & 0xffff0000u : x);
}
// One of `Stats`, of a block and the tile's row, where the block's words lie.
__device__ __forceinline__ float statistic(const float *words, int block, int row, int k) {
  return part_of(words[word_at(block, word_with(k)) + (k >= STATISTICS ? k - STATISTICS : row)], k);
}
// Sums over a split's blocks, relative to its largest score, from which a row's bound is put together: [PARTIALS][ROW_TILE].
enum { MASS, LOW, T1, MASS_ERROR, SPREAD, USED, ERROR2, AMPLITUDE, KEY_SQUARES, VALUE, SQUARES, NORM, SPLIT_TOP, DELTA_MAX, NORM_TOP, ERROR, AMPLITUDE_TOP,
       PARTIALS };

constexpr int PLACE_BYTES = 64;  // `UNIT` of in_scratch.py
constexpr float LOWEST = -3e38f;       // below all scores; its difference to -infinity is no NaN
constexpr double BUDGET_MAX = 1e250;  // keeps a budget finite in any unit
constexpr float U32F = 5.9604644775390625e-8f;
constexpr float NORM_FLOOR = 8.8817841970012523e-16f;  // 2^-50: squares stay far from underflow, and the bound only grows
constexpr float LOG2_MIN = -124.f;                     // a weight below 2^-124 of its block's largest counts as zero

// One session and layer. Offsets are bytes: hot [full] in the device pool, original [blocks] in the host pool. What of the
// full blocks lies in scratch is told as in_scratch.py has it; nothing is where nothing does. What rung 0 needs first lies together, in
// one line of the cache: at 8,192 tokens a kernel is waiting for its call for a tenth of its time.
struct Call {
  int n, tokens, full, splits, per, groups;        // per: blocks of a split, a power of two; groups: complete ones
  int unit;                                        // within [-60, 120]: norms are counted in units of 2^unit
  int relative_to_output, exact_only, num_canaries, require_rank, coverage, k_min, k_max;  // coverage: 2 where the boundary is checked
  int preference;                                  // how many times its share an original counts of which there is a copy
  int candidates_max;
  double scale;
  const void *q;  // raw [Hq][n][D]
  const i64 *hot;
  const unsigned char *pool;
  float *statistics, *partials;                    // by tile of rows: [full + 1 blocks], [splits + 1]
  u32 *marks;                                      // [tiles][full]: promoted keys, a bit a row, and values, the next four bits
  const unsigned char *scratch, *originals;
  void *output;   // raw [Hq][n][D]
  const i64 *original;
  const u64 *copied;                               // of 32 records each, a bit for each that has a copy, above them the number of copies before
  const u32 *copies;                               // their places in scratch, in units of PLACE_BYTES
  const float *group_values, *group_errors;        // [groups][Hkv]: SV and SR of complete groups of 1024 tokens
  float *sums;                                     // as partials
  double *fields;                                  // [FIELDS][Hkv * rows]
  float *facts, *dots;                             // [Hkv * rows][ROW_FACTS]; o_G . O of each split, [Hkv * rows][splits + 1]
  int *state;                                      // [Hkv * rows]
  int *counts;                                     // [Hkv * rows][2]: promoted keys, values
  float *picks;                                    // [tiles][parts][ROW_TILE][BINS][2], at most PICK_PARTS parts: see select/pick.cu
  double *dense;                                   // [tiles][splits + 1][ROW_TILE][DENSE_FACTS + D]
  const int *canaries;                             // [num_canaries] full blocks
  unsigned char *failures;                         // [num_canaries][Hkv]
  float *shares;                                   // [Hkv][2][full]: see select/candidates.cu
  int *tickets;                                    // [2 Hkv], then [tiles] twice, zero between launches; of up to 32 tiles, [tiles][splits]
  int *candidate_blocks;                           // [2][Hkv][candidates_max]
  float *candidate_scores;
  float2 *row_weights;                             // [tiles][full][ROW_TILE]: what keys and values count, in targets of the row
  u32 *reads;                                      // of all records of full blocks, as `copied` has them, a bit: some row has read it
  int *cold;                                       // [Hkv * rows]: of the records that the row has read, those without a copy
  double rtol, atol;
  double tau_cov, key_bound_max, v_tol;            // of the coverage policy
  double unused[3];                                // the next call begins with a line too
};
static_assert(sizeof(Call) == 384, "as in launch.py");

// A row is open until finish has certified it, at first or after promotion; else it is due to be computed exactly.
enum { OPEN, CERTIFIED, DUE, EXACT };
enum { BOUND, BUDGET, KEY_ERROR, VALUE_ERROR, SKIP_ERROR, ARITH_ERROR, VALUE_NORM, OUTPUT_NORM, SKIPPED, CANDIDATE, KEYS, VALUES, SCORE_TOP, RANKED,
       PAPER_KEY_BOUND, FIELDS };
// What finish leaves for selection: largest score, mass, ||O||, the budget, and what promotion does not change of the numerator; in units.
// From selection: whether the trailing block is one of those that cover the mass; the weight from which on its blocks are promoted,
// infinite where none is.
enum { ROW_TOP, ROW_MASS, ROW_NORM, ROW_BUDGET, ROW_FIXED, ROW_TAIL, ROW_LIMIT, ROW_FACTS };
// Of a split, exactly: largest score, sum of weights, of weights times norms, largest |score|, squares of the largest norms.
enum { DENSE_TOP, DENSE_MASS, DENSE_NORM, DENSE_SCORE, DENSE_KEY, DENSE_VALUE, DENSE_FACTS };

// Records of original keys (kind 0) and values (1) of full blocks, as they are numbered.
__device__ __forceinline__ u32 record_of(int kind, int heads, int h, int block) { return (2 * block + kind) * heads + h; }
// Of the records that `copied` tells of together with this one; the record's own bit is `record % 32`.
__device__ __forceinline__ u32 copied_with(const Call &call, u32 record) { return (u32)call.copied[record / 32]; }
// Where among all copies' places that of a record stands, by the word that tells of it; -1 where it has no copy.
__device__ __forceinline__ i64 copy_of(u64 word, u32 record) {
  const u32 bit = 1u << record % 32;
  return (u32)word & bit ? (i64)(word >> 32) + __popc((u32)word & (bit - 1)) : -1;
}

// Where records of a full block lie: as they were quantised, and the original keys and values or their copies.
struct Place { const unsigned char *record, *keys, *values; };
__device__ __forceinline__ Place place_of(const Call &call, int heads, int h, int block) {
  const i64 hot = call.hot[block], original = call.original[block];
  u64 words[2];  // loads side by side: of keys and of values what tells of the copy, then where that is
  const unsigned char *lies[2];
#pragma unroll
  for (int kind = 0; kind < 2; kind++) words[kind] = call.copied ? call.copied[record_of(kind, heads, h, block) / 32] : 0;
#pragma unroll
  for (int kind = 0; kind < 2; kind++) {
    const i64 copy = copy_of(words[kind], record_of(kind, heads, h, block));
    lies[kind] = copy < 0 ? call.originals + original + (i64)(kind * heads + h) * ORIGINAL_BYTES : call.scratch + (i64)call.copies[copy] * PLACE_BYTES;
  }
  return {call.pool + hot + (i64)h * RECORD_BYTES, lies[0], lies[1]};
}

__device__ __forceinline__ float as_float(const void *p, i64 i) {
  if (DTYPE == 0) return __half2float(((const __half *)p)[i]);
  if (DTYPE == 1) return __uint_as_float((u32)((const unsigned short *)p)[i] << 16);
  return ((const float *)p)[i];
}

// Four neighbouring numbers as they are stored, the first at a multiple of four: one load.
struct __align__(4 * ITEM) Four { u32 words[ITEM]; };
__device__ __forceinline__ Four four_of(const void *p, i64 i) { return *(const Four *)((const unsigned char *)p + i * ITEM); }

// CuPy compiles with flush-to-zero: subnormals take their way to and from double by their bits.
__device__ __forceinline__ double wide(float x) {
  const u32 bits = __float_as_uint(x);
  if (DTYPE == 0 || bits & 0x7f800000u) return x;
  return copysign((bits & 0x7fffffu) * 0x1p-149, bits >> 31 ? -1. : 1.);
}
// Rounds to the originals' type; returns what was stored.
__device__ __forceinline__ double store(void *p, i64 i, double x) {
  if (DTYPE == 0) return __half2float(((__half *)p)[i] = __double2half(x));
  if (fabs(x) < 0x1p-126) {
    const double step = DTYPE == 1 ? 0x1p-133 : 0x1p-149;
    const u32 count = (u32)rint(fabs(x) / step), sign = x < 0.;
    if (DTYPE == 1) ((unsigned short *)p)[i] = (unsigned short)(count | sign << 15);
    else ((u32 *)p)[i] = count | sign << 31;
    return copysign(count * step, x);
  }
  if (DTYPE == 1) return __bfloat162float(((__nv_bfloat16 *)p)[i] = __double2bfloat16(x));
  return ((float *)p)[i] = (float)x;
}

// x 2^-e in two steps, e within [-128, 128]: it may lie outside FP32's exponents where x does not.
__device__ __forceinline__ float downscale(float x, int e) { return x * __int_as_float((127 - e / 2) << 23) * __int_as_float((127 - (e - e / 2)) << 23); }
// The least e with x < 2^e, of a finite x that FP32 does not flush; 0 of zero.
__device__ __forceinline__ int exponent_above(float x) { return x > 0.f ? (int)(__float_as_uint(x) >> 23) - 126 : 0; }
// x / y, of numbers below 2^20, so that half a unit is more than the division errs by; the workspace has room for fewer tiles. What the compiler makes
// of a quotient of integers is thirty instructions, each waiting for the one before; and most often y is 1.
__device__ __forceinline__ int quotient(int x, int y) { return y == 1 ? x : (int)__fdividef(x + 0.5f, (float)y); }
// 2^-unit, for a unit within [-60, 120]. Norms that no such unit brings near 1 leave a bound that is too large to certify anything.
__device__ __forceinline__ float unit_factor(int unit) { return __int_as_float((127 - unit) << 23); }
__device__ __forceinline__ double power_of_two(int e) { return __hiloint2double((1023 + e) << 20, 0); }
__device__ __forceinline__ u32 as_bits(__half2 x) { return *(u32 *)&x; }
__device__ __forceinline__ __half2 as_half2(u32 x) { return *(__half2 *)&x; }

__device__ __forceinline__ float half_bits(u32 w, int upper) { return __half2float(__ushort_as_half((unsigned short)(upper ? w >> 16 : w))); }

// Parts of a tile's blocks that selection looks at side by side, at most.
constexpr int PICK_PARTS = 32;

// The thread block's own copy of its call, made before what is waited for: behind it the first look at each line of the call takes 0.6 us, as long
// as a look at what was waited for. For all of so many threads.
template <int threads>
__device__ __forceinline__ const Call &own_call(const Call *calls) {
  __shared__ Call own;
  for (int i = threadIdx.x; i < (int)(sizeof(Call) / sizeof(u64)); i += threads) ((u64 *)&own)[i] = ((const u64 *)(calls + blockIdx.z))[i];
  __syncthreads();
  return own;
}

// Whether this thread block is the last of `parts` to come here, by a ticket that is zero before and after all have; it sees what the others
// have written before. For all threads.
__device__ __forceinline__ bool ends_last(int *ticket, int parts) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // behind the barrier: what all threads have written comes before the ticket
    last = atomicAdd(ticket, 1) == parts - 1;
    if (last) *ticket = 0;  // for another launch of the same step
    __threadfence();
  }
  __syncthreads();
  return last;
}
