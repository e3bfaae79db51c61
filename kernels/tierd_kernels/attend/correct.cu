// Promoted values: adds weight * (original - what the codes gave) to their splits' sums, in the value pass's own arithmetic. One thread
// block a tile of rows and a split, threads by channel.
extern "C" __global__ void __launch_bounds__(WARPS *LANES) correct(const Call *calls, int heads, int group) {
  const Call &call = calls[blockIdx.z];
  const int tiles = (group * call.n + ROW_TILE - 1) / ROW_TILE, split = blockIdx.y;
  if (blockIdx.x >= heads * tiles || split >= call.splits || call.exact_only) return;
  const int h = blockIdx.x / tiles, tile = blockIdx.x % tiles, base = h * tiles + tile;
  const int first = split * call.per, count = min(call.per, call.full - first);
  const u32 *marks = call.marks + (i64)base * call.full + first;
  if (!__syncthreads_or(threadIdx.x < count && marks[min((int)threadIdx.x, count - 1)] >> 4)) return;
  __shared__ float tops[ROW_TILE], w[ROW_TILE][BLOCK];
  row_tops(call, base, tops);
  constexpr int CHANNELS = (D + WARPS * LANES - 1) / (WARPS * LANES);
  float sums[CHANNELS][ROW_TILE];
#pragma unroll
  for (int k = 0; k < CHANNELS; k++)
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++) sums[k][row] = 0.f;
  for (int b = 0; b < count; b++) {
    const u32 mark = marks[b] >> 4;
    if (!mark) continue;
    const unsigned char *values = located(call, call.value_at, heads, h, first + b);
    const unsigned char *record = call.pool + call.hot[first + b] + (i64)h * RECORD_BYTES + SCORE_BYTES;
    const float *weights = call.weights + ((i64)base * (call.full + 1) + first + b) * TILES * WEIGHT_FLOATS;
    __syncthreads();
    for (int i = threadIdx.x; i < ROW_TILE * BLOCK; i += WARPS * LANES) {
      const int row = i / BLOCK, t = i % BLOCK;
      const float *x = weights + t / TILE * WEIGHT_FLOATS;
      w[row][t] = mark >> row & 1 ? x[row * TILE + t % TILE] * exp2_approx(x[TOPS_AT + row] - tops[row]) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < CHANNELS; k++) {
      const int channel = k * WARPS * LANES + threadIdx.x;
      if (channel >= D) continue;
      float of_block[ROW_TILE] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int at = 0; at < BLOCK; at += TILE) {
        float original[TILE];  // all on their way at once
#pragma unroll
        for (int t = 0; t < TILE; t++) original[t] = as_float(values, (i64)(at + t) * D + channel);
        const unsigned char *part = record + at / TILE * VALUE_BYTES;
#pragma unroll
        for (int t = 0; t < TILE; t++) {
          const u32 word = ((const u32 *)part)[channel / 16 * LANES + channel % 8 * 4 + t % 8 / 2];
          const u32 code = word >> (8 * (channel % 16 / 8) + 4 * (t / 8) + 16 * (t & 1)) & 15;
          const __half *pair = (const __half *)(part + VALUE_SCALES_AT) + (channel / GROUP * 4 + t % 8 / 2) * 8 + (t >= 8 ? 2 : 0) + t % 2;
          const float difference = original[t] - __half2float(__hfma(__uint2half_rn(code), pair[0], pair[4]));
#pragma unroll
          for (int row = 0; row < ROW_TILE; row++) of_block[row] = fmaf(w[row][at + t], difference, of_block[row]);
        }
      }
#pragma unroll
      for (int row = 0; row < ROW_TILE; row++) sums[k][row] += of_block[row];
    }
  }
  float *out = call.sums + ((i64)base * (call.splits + 1) + split) * ROW_TILE * D;
#pragma unroll
  for (int k = 0; k < CHANNELS; k++) {
    const int channel = k * WARPS * LANES + threadIdx.x;
    if (channel < D)
      for (int row = 0; row < ROW_TILE; row++) out[row * D + channel] += sums[k][row];
  }
}
