// Weights times values, by tiles of tokens.
//
// Sixteen channels are the M of mma.m16n8k16 and sixteen tokens its K. A value is code * scale + offset, rounded once to FP16
// (`E_out` has that rounding); the weights, times 2^14, are the B operand as FP16 high and low parts: columns 2 * row + part, so that a lane's products
// are those of the row whose scores it has. Codes lie in fragment order, scales and offsets by token pairs as lanes want them: no conversion, no shuffle.
constexpr float WEIGHT_SCALE = 16384.f;

// Two codes, as FP16 with `bias` added, to values.
__device__ __forceinline__ u32 dequantise(u32 biased, __half2 bias, u32 scale, u32 offset) {
  return as_bits(__hfma2(__hsub2(as_half2(biased), bias), as_half2(scale), as_half2(offset)));
}

// Of a lane's weight of token r for row c, column r of tokens 2c and 2c + 1: a register of the B operand.
__device__ __forceinline__ u32 weight_parts(float weight) {
  const float x = weight * WEIGHT_SCALE, high = __half22float2(__floats2half2_rn(x, x)).x;
  return transposed(as_bits(__floats2half2_rn(x, x - high)));
}

// Of a warp's tiles so far: of row c, in its high and low parts, channels r and r + 8 of each sixteen.
struct Products {
  float acc[VALUE_TILES][4] = {};

  __device__ __forceinline__ void rescale(float keep) {
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++)
#pragma unroll
      for (int k = 0; k < 4; k++) acc[m][k] *= keep;
  }
  // A tile of tokens, whose codes lie in shared memory.
  __device__ __forceinline__ void add(u32 at, u32 b0, u32 b1) {
    const int lane = threadIdx.x % LANES, c = lane % 4;
    const __half2 thousand = __half2half2(__ushort_as_half(0x6400)), sixty = __half2half2(__ushort_as_half(0x5400));  // 1024 and 64
    const u32 codes = at + lane * 4, scales = at + VALUE_SCALES_AT + c * 16;
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
  }
  // All warps', times a factor, to `shared`: of each D numbers a row.
  __device__ __forceinline__ void leave(unsigned char *shared, float factor) const {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, r = lane / 4, c = lane % 4;
    float *out = (float *)shared + (warp * ROW_TILE + c) * D + r;
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++) out[m * 16] = (acc[m][0] + acc[m][1]) * factor, out[m * 16 + 8] = (acc[m][2] + acc[m][3]) * factor;
  }
};
// What they left, to the split's `sums`.
__device__ __forceinline__ void write_values(float *sums, const unsigned char *shared) {
  for (int i = threadIdx.x; i < ROW_TILE * D; i += WARPS * LANES) {
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) x += ((const float *)shared)[w * ROW_TILE * D + i];
    sums[i] = x * (1.f / WEIGHT_SCALE);
  }
}

// The trailing block's, from originals and the `weights` that `score_tail` has left, which are relative to the split's largest score already.
__device__ __forceinline__ void value_tail(const Call &call, int heads, int h, int base, const float *weights) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, full = call.full, count = call.tokens - full * BLOCK;
  const i64 split = (i64)base * (call.splits + 1) + call.splits;
  const unsigned char *values = call.originals + call.original[full] + (i64)(heads + h) * ORIGINAL_BYTES;
  float *sums = call.sums + split * ROW_TILE * D;
  for (int i = lane; i < D; i += LANES) {
    float sum = 0.f;
    for (int t = 0; t < count; t++) sum = fmaf(weights[warp * BLOCK + t], as_float(values, t * D + i), sum);
    sums[warp * D + i] = sum;
  }
}
