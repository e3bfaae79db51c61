// out [D][D] = x^T x of matrix `blockIdx.y` of x [matrices][rows][D], in double; of a symmetric matrix that is its square. Of an x that is
// a Gram matrix itself, `before` are its facts: it is divided by its trace first. A thread block computes tile (i, j) of out, i <= j, and
// mirrors it; facts [matrices][tiles][2]: what the tile adds to the trace of out, and to the sum of the squares of all its entries.
constexpr int SIDE = 64, DEPTH = 16, EACH = 4, ACROSS = SIDE / EACH, THREADS = ACROSS * ACROSS, GRAM_WARPS = THREADS / LANES;
constexpr int SIDES = (D + SIDE - 1) / SIDE, GRAM_TILES = SIDES * (SIDES + 1) / 2;

extern "C" __global__ void __launch_bounds__(THREADS) gram(const double *x, const double *before, double *out, double *facts, int rows) {
  __shared__ double left[DEPTH][SIDE], right[DEPTH][SIDE], sums[2][GRAM_WARPS];
  int i = 0, j = blockIdx.x;
  for (; j >= SIDES - i; i++) j -= SIDES - i;
  j += i;
  double trace = 0., scale = 1.;
  if (before) {
    for (int k = 0; k < GRAM_TILES; k++) trace += before[((i64)blockIdx.y * GRAM_TILES + k) * 2];
    scale = 1. / trace;
  }
  x += (i64)blockIdx.y * rows * D, out += (i64)blockIdx.y * D * D;
  const int t = threadIdx.x, row = t / ACROSS * EACH, column = t % ACROSS;  // a thread has columns ACROSS apart: its warp reads them side by side
  double sum[EACH][EACH] = {};
  for (int first = 0; first < rows; first += DEPTH) {
    __syncthreads();
    for (int k = t; k < DEPTH * SIDE; k += THREADS) {
      const int at = first + k / SIDE, a = i * SIDE + k % SIDE, b = j * SIDE + k % SIDE;
      left[k / SIDE][k % SIDE] = at < rows && a < D ? x[(i64)at * D + a] * scale : 0.;
      right[k / SIDE][k % SIDE] = at < rows && b < D ? x[(i64)at * D + b] * scale : 0.;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < DEPTH; k++)
#pragma unroll
      for (int p = 0; p < EACH; p++)
#pragma unroll
        for (int q = 0; q < EACH; q++) sum[p][q] += left[k][row + p] * right[k][column + q * ACROSS];
  }
  double diagonal = 0., squares = 0.;
  for (int p = 0; p < EACH; p++)
    for (int q = 0; q < EACH; q++) {
      const int a = i * SIDE + row + p, b = j * SIDE + column + q * ACROSS;
      if (a >= D || b >= D) continue;
      out[a * D + b] = out[b * D + a] = sum[p][q];
      if (a == b) diagonal += sum[p][q];
      squares += (i == j ? 1. : 2.) * sum[p][q] * sum[p][q];
    }
  for (int bit = 16; bit; bit >>= 1) diagonal += __shfl_xor_sync(~0u, diagonal, bit), squares += __shfl_xor_sync(~0u, squares, bit);
  if (t % LANES == 0) sums[0][t / LANES] = diagonal, sums[1][t / LANES] = squares;
  __syncthreads();
  if (t < 2) {
    double total = 0.;
    for (int w = 0; w < GRAM_WARPS; w++) total += sums[t][w];
    facts[((i64)blockIdx.y * GRAM_TILES + blockIdx.x) * 2 + t] = total;
  }
}
