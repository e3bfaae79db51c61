// Rungs 3 and 4: rows that are due, from the originals, in double. One thread block a tile of rows and a split: keys first, the scores stay
// in shared memory, then values, so that nothing is scaled twice. The thread block of a tile that ends last puts the splits together.
extern "C" __global__ void __launch_bounds__(WARPS *LANES) dense(const Call *calls, int heads, int group) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, split = blockIdx.y;
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE;
  if (blockIdx.x >= heads * tiles) return;
  const int h = blockIdx.x / tiles, tile = blockIdx.x % tiles, base = h * tiles + tile;
  const int first = split * call.per, last = split == call.splits ? (call.tokens + BLOCK - 1) / BLOCK : min(first + call.per, call.full);
  const int begin = split == call.splits ? call.full : first, count = (last - begin) * BLOCK;
  if (split > call.splits || begin >= last) return;
  const int index = tile * ROW_TILE + lane % ROW_TILE, *state = call.state + h * rows + min(index, rows - 1);
  wait_for_previous();
  if (!__ballot_sync(~0u, index < rows && *state == DUE)) return;
  double *scores = (double *)shared;                         // [ROW_TILE][SPLIT_TOKENS]
  float *x = (float *)(scores + ROW_TILE * SPLIT_TOKENS);    // [BLOCK][D + 1]
  __shared__ float q[ROW_TILE][D + 1];
  __shared__ double of_row[ROW_TILE][DENSE_FACTS];
  int seen[ROW_TILE];
  for (int row = 0; row < ROW_TILE; row++) seen[row] = query_row(call, h, group, tile * ROW_TILE + row).seen;
  for (int i = threadIdx.x; i < ROW_TILE * D; i += WARPS * LANES) {
    const Row query = query_row(call, h, group, tile * ROW_TILE + i / D);
    q[i / D][i % D] = query.real ? as_float(call.q, query.at + i % D) : 0.f;
  }
  double key2 = 0., value2 = 0.;  // of this thread's tokens
  const i64 own = (i64)h * ORIGINAL_BYTES;
  for (int b = begin; b < last; b++) {
    const int here = min(BLOCK, call.tokens - b * BLOCK);
    __syncthreads();
    load_record(x, call.originals + call.original[b] + own, here, WARPS * LANES);
    __syncthreads();
    for (int i = threadIdx.x; i < ROW_TILE * BLOCK; i += WARPS * LANES) {
      const int row = i % ROW_TILE, token = i / ROW_TILE;
      const float *k = x + token * (D + 1);
      double s = -INFINITY;
      if (token < here && b * BLOCK + token < seen[row]) {
        s = product(k, [&](int c) { return q[row][c]; }).sum * call.scale;
        key2 = fmax(key2, product(k, [&](int c) { return k[c]; }).sum);
      }
      scores[row * SPLIT_TOKENS + (b - begin) * BLOCK + token] = s;
    }
  }
  __syncthreads();
  double top = -INFINITY, largest = 0.;  // a warp a row
  for (int t = lane; t < count; t += LANES) {
    const double s = scores[warp * SPLIT_TOKENS + t];
    top = fmax(top, s);
    if (s > -INFINITY) largest = fmax(largest, fabs(s));
  }
  for (int bit = 1; bit < 32; bit <<= 1) top = fmax(top, __shfl_xor_sync(~0u, top, bit)), largest = fmax(largest, __shfl_xor_sync(~0u, largest, bit));
  double mass = 0.;
  for (int t = lane; t < count; t += LANES) {
    double &s = scores[warp * SPLIT_TOKENS + t];
    s = s > -INFINITY ? exp(s - top) : 0.;
    mass += s;
  }
  for (int bit = 1; bit < 32; bit <<= 1) mass += __shfl_xor_sync(~0u, mass, bit);
  if (lane == 0) of_row[warp][DENSE_TOP] = top, of_row[warp][DENSE_MASS] = mass, of_row[warp][DENSE_SCORE] = largest;

  constexpr int CHANNELS = (D + WARPS * LANES - 1) / (WARPS * LANES);
  double sums[CHANNELS][ROW_TILE] = {}, norm = 0.;
  __shared__ double norms[BLOCK];
  for (int b = begin; b < last; b++) {
    const int here = min(BLOCK, call.tokens - b * BLOCK);
    __syncthreads();
    load_record(x, call.originals + call.original[b] + (i64)heads * ORIGINAL_BYTES + own, here, WARPS * LANES);
    __syncthreads();
    if (threadIdx.x < here) {
      const float *v = x + threadIdx.x * (D + 1);
      const double square = product(v, [&](int c) { return v[c]; }).sum;
      norms[threadIdx.x] = sqrt(square), value2 = fmax(value2, square);
    }
    __syncthreads();
    const double *w = scores + (b - begin) * BLOCK;
    for (int t = lane; t < here; t += LANES) norm += w[warp * SPLIT_TOKENS + t] * norms[t];
#pragma unroll
    for (int k = 0; k < CHANNELS; k++) {
      const int channel = k * WARPS * LANES + threadIdx.x;
      if (channel >= D) continue;
      for (int t = 0; t < here; t++)
#pragma unroll
        for (int row = 0; row < ROW_TILE; row++) sums[k][row] += w[row * SPLIT_TOKENS + t] * wide(x[t * (D + 1) + channel]);
    }
  }
  for (int bit = 1; bit < 32; bit <<= 1) {
    norm += __shfl_xor_sync(~0u, norm, bit);
    key2 = fmax(key2, __shfl_xor_sync(~0u, key2, bit)), value2 = fmax(value2, __shfl_xor_sync(~0u, value2, bit));
  }
  __shared__ double largest2[2][WARPS];
  if (lane == 0) of_row[warp][DENSE_NORM] = norm, largest2[0][warp] = key2, largest2[1][warp] = value2;
  __syncthreads();
  for (int w = 0; w < WARPS; w++) key2 = fmax(key2, largest2[0][w]), value2 = fmax(value2, largest2[1][w]);
  double *out = call.dense + ((i64)base * (call.splits + 1) + split) * ROW_TILE * (DENSE_FACTS + D);
  if (threadIdx.x < ROW_TILE) {
    of_row[threadIdx.x][DENSE_KEY] = key2, of_row[threadIdx.x][DENSE_VALUE] = value2;
    for (int k = 0; k < DENSE_FACTS; k++) out[threadIdx.x * (DENSE_FACTS + D) + k] = of_row[threadIdx.x][k];
  }
#pragma unroll
  for (int k = 0; k < CHANNELS; k++) {
    const int channel = k * WARPS * LANES + threadIdx.x;
    if (channel < D)
      for (int row = 0; row < ROW_TILE; row++) out[row * (DENSE_FACTS + D) + DENSE_FACTS + channel] = sums[k][row];
  }
  const int parts = (call.full ? call.splits : 0) + (call.tokens > call.full * BLOCK);
  if (!ends_last(call.tickets + heads * (2 + tiles) + base, parts)) return;
  finish_rows(call, heads, group, h, tile);
}
