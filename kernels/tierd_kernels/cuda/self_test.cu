// What the bounds assume of the hardware (CERTIFICATE.md, "An MMA"), tried on drawn numbers: the largest error of an FP16 or BF16 MMA over its
// terms' absolute sum and of ex2.approx over its value, in units of 2^-24, and whether an INT8 MMA or a transposition was ever not exact. One
// warp; `worst` [3].
__device__ u32 drawn(u32 &state) {
  state = state * 1664525u + 1013904223u;
  u32 x = state;
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
// FP16 of either sign over `octaves` octaves below 2^8.
__device__ u32 drawn_half(u32 &state, u32 octaves) {
  const u32 x = drawn(state);
  return (x & 0x83ffu) | (22u - (x >> 16) % octaves) << 10;
}
__device__ float largest_of_warp(float x) {
  for (int bit = 1; bit < 32; bit <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, bit));
  return x;
}

extern "C" __global__ void __launch_bounds__(LANES) self_test(float *worst, int rounds) {
  const int lane = threadIdx.x, r = lane / 4, c = lane % 4;
  u32 state = 2463534242u + lane * 7919u;
  __shared__ u32 a[4][LANES], b[2][LANES];
  float of_mma = 0.f, of_exp = 0.f, of_int = 0.f;
  for (int round = 0; round < rounds; round++) {
    const u32 octaves = 1 + round % 22;
    __syncwarp();
    for (int i = 0; i < 4; i++) a[i][lane] = drawn_half(state, octaves) | drawn_half(state, octaves) << 16;
    for (int i = 0; i < 2; i++) b[i][lane] = drawn_half(state, octaves) | drawn_half(state, octaves) << 16;
    __syncwarp();
    for (int type = 0; type < 2; type++) {  // the same bits as FP16 and as BF16
      auto number = [&](u32 word, int upper) { return type ? __uint_as_float(upper ? word & 0xffff0000u : word << 16) : half_bits(word, upper); };
      float d[4];
      double exact[4], size[4];
      for (int i = 0; i < 4; i++) {
        const int row = i / 2, column = 2 * c + i % 2;
        d[i] = number(drawn_half(state, octaves), 0) * (round % 3 ? 100.f : 1.f);
        exact[i] = d[i], size[i] = fabs((double)d[i]);
        for (int k = 0; k < 16; k++) {
          const double x = number(a[row + 2 * (k / 8)][4 * r + k % 8 / 2], k % 2), y = number(b[k / 8][4 * column + k % 8 / 2], k % 2);
          exact[i] += x * y, size[i] += fabs(x * y);
        }
      }
      if (type) mma_bf16(d, a[0][lane], a[1][lane], a[2][lane], a[3][lane], b[0][lane], b[1][lane]);
      else mma_f16(d, a[0][lane], a[1][lane], a[2][lane], a[3][lane], b[0][lane], b[1][lane]);
      for (int i = 0; i < 4; i++) of_mma = fmaxf(of_mma, (float)(fabs(d[i] - exact[i]) / (size[i] * U32F)));
    }
    const u32 turned = transposed(a[0][lane]), odd = 16 * (r % 2);
    for (int i = 0; i < 2; i++)
      if ((turned >> 16 * i & 0xffffu) != (a[0][4 * (2 * c + i) + r / 2] >> odd & 0xffffu)) of_int = 1.f;
    int sums[4] = {0, 0, 0, 0}, whole[4];
    for (int i = 0; i < 4; i++) {
      const int row = i / 2, column = 2 * c + i % 2;
      whole[i] = 0;
      for (int k = 0; k < 32; k++) {
        const u32 x = a[row + 2 * (k / 16)][4 * r + k % 16 / 4] >> 8 * (k % 4), y = b[k / 16][4 * column + k % 16 / 4] >> 8 * (k % 4);
        whole[i] += (int)(signed char)x * (int)(signed char)y;
      }
    }
    mma_s8(sums, make_uint4(a[0][lane], a[1][lane], a[2][lane], a[3][lane]), b[0][lane], b[1][lane]);
    for (int i = 0; i < 4; i++) of_int = sums[i] != whole[i] ? 1.f : of_int;
    const float x = -124.f * (drawn(state) >> 8) * 0x1p-24f, y = exp2_approx(x);
    of_exp = fmaxf(of_exp, (float)(fabs(y / exp2((double)x) - 1.) / U32F));
  }
  of_mma = largest_of_warp(of_mma), of_exp = largest_of_warp(of_exp), of_int = largest_of_warp(of_int);
  if (lane == 0) worst[0] = of_mma, worst[1] = of_exp, worst[2] = of_int;
}
