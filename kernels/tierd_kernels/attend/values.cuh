// Weights times values, by tiles of tokens: what the value pass and the passes in one kernel have in common.
//
// Sixteen channels are the M of mma.m16n8k16 and sixteen tokens its K. A value is code * scale + offset, rounded once to FP16
// (`E_out` has that rounding); the weights, times 2^14, are the B operand as FP16 high and low parts: columns part * 4 + row.
// Codes lie in fragment order, scales and offsets by token pairs as lanes want them: no conversion, no shuffle.
constexpr float WEIGHT_SCALE = 16384.f;
// Of a split, at most, of which nothing is left out, so that both passes may be one kernel: a warp has copies of half of its blocks under way before
// masses are known.
constexpr int JOINT_TOKENS = 512;

// Two codes, as FP16 with `bias` added, to values.
__device__ __forceinline__ u32 dequantise(u32 biased, __half2 bias, u32 scale, u32 offset) {
  return as_bits(__hfma2(__hsub2(as_half2(biased), bias), as_half2(scale), as_half2(offset)));
}

// Two neighbouring tokens' weights as high or low FP16 parts (`low` is 0 or 1).
__device__ __forceinline__ u32 part(float x, float y, float low) {
  float2 high = __half22float2(__floats2half2_rn(x, y));
  return as_bits(__floats2half2_rn(fmaf(-low, high.x, x), fmaf(-low, high.y, y)));
}

// Of a tile of tokens: where its codes lie in shared memory; of row r % 4 the block's largest score, and weights of tokens 2c, 2c + 8, 2c + 1 and 2c + 9.
struct Tile { u32 codes; float top; uint4 weights; };
typedef float Products[VALUE_TILES][4];

// Adds up a warp's tiles; `tile(i)` waits for the i-th one, `done(i)` hears that its memory is free. `top`: of row r % 4 the split's largest score.
template <typename Next, typename Done>
__device__ __forceinline__ void add_values(Products &acc, int items, float top, Next tile, Done done) {
  const int lane = threadIdx.x % LANES, r = lane / 4, c = lane % 4;
#pragma unroll
  for (int m = 0; m < VALUE_TILES; m++)
#pragma unroll
    for (int k = 0; k < 4; k++) acc[m][k] = 0.f;
  const float low = r < 4 ? 0.f : 1.f;
  const __half2 thousand = __half2half2(__ushort_as_half(0x6400)), sixty = __half2half2(__ushort_as_half(0x5400));  // 1024 and 64
#pragma unroll 1
  for (int i = 0; i < items; i++) {
    const Tile x = tile(i);
    const float factor = exp2_approx(x.top - top) * WEIGHT_SCALE;
    auto weight = [&](u32 bits) { return __uint_as_float(bits) * factor; };
    const u32 b0 = part(weight(x.weights.x), weight(x.weights.z), low), b1 = part(weight(x.weights.y), weight(x.weights.w), low);
    const u32 codes = x.codes + lane * 4, scales = x.codes + VALUE_SCALES_AT + c * 16;
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++) {
      const u32 code = shared32(codes + m * LANES * 4), upper = code >> 8;
      const uint4 s = shared128(scales + m * 16 / GROUP * 64);  // scales of tokens (2c, 2c+1), (2c+8, 2c+9), then their offsets
      const u32 a0 = dequantise(either(code, 0x000f000fu, 0x64006400u), thousand, s.x, s.z);
      const u32 a1 = dequantise(either(upper, 0x000f000fu, 0x64006400u), thousand, s.x, s.z);
      const u32 a2 = dequantise(either(code, 0x00f000f0u, 0x54005400u), sixty, s.y, s.w);
      const u32 a3 = dequantise(either(upper, 0x00f000f0u, 0x54005400u), sixty, s.y, s.w);
      mma_f16(acc[m], a0, a1, a2, a3, b0, b1);
    }
    __syncwarp();
    done(i);
  }
}

// All warps', to `shared`: of each D numbers a row.
__device__ __forceinline__ void leave_values(const Products &acc, unsigned char *shared) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, r = lane / 4, c = lane % 4;
  float *out = (float *)shared + warp * ROW_TILE * D;
#pragma unroll
  for (int m = 0; m < VALUE_TILES; m++) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float x = acc[m][k] + __shfl_xor_sync(~0u, acc[m][k], 2);  // high and low parts: columns n and n + 4
      if (c < 2) out[(2 * c + (k & 1)) * D + m * 16 + r + (k >> 1) * 8] = x;
    }
  }
}
// What they left, to the split's `sums`.
__device__ __forceinline__ void write_values(float *sums, const unsigned char *shared) {
  for (int i = threadIdx.x; i < ROW_TILE * D; i += WARPS * LANES) {
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) x += ((const float *)shared)[w * ROW_TILE * D + i];
    sums[i] = x * (1.f / WEIGHT_SCALE);
  }
}

// The trailing block's, from originals and the weights of the score pass, which are relative to the split's largest score already.
__device__ __forceinline__ void value_tail(const Call &call, int heads, int h, int base) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, full = call.full, count = call.tokens - full * BLOCK;
  const i64 split = (i64)base * (call.splits + 1) + call.splits;
  const unsigned char *values = call.originals + call.original[full] + (i64)(heads + h) * ORIGINAL_BYTES;
  const float *w = call.weights + ((i64)base * (full + 1) + full) * TILES * WEIGHT_FLOATS;
  float *sums = call.sums + split * ROW_TILE * D;
  if (threadIdx.x < SKIPS * ROW_TILE) call.skips[split * SKIPS * ROW_TILE + threadIdx.x] = 0.f;
  for (int i = lane; i < D; i += LANES) {
    float sum = 0.f;
    for (int t = 0; t < count; t++) sum = fmaf(w[t / TILE * WEIGHT_FLOATS + weight_at(warp, t % TILE)], as_float(values, t * D + i), sum);
    sums[warp * D + i] = sum;
  }
}
