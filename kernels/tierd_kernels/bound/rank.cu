// Ranking (CERTIFICATE.md, section "Ranking"): whether a set of blocks outweighs all others under exact scores too. One thread block a row.
//
// Before the value pass (`again` 0), where a call requires it: the set of the heaviest block alone. After promotion under the coverage
// policy: that set, and the promoted one. A row that fails is due to be computed exactly.
constexpr int RANK_WARPS = 8, THREADS = RANK_WARPS * LANES;
constexpr double RANK_ROUNDING = 84. * U32F * (1. + 1e-4), UNITS = 2. * U32F;  // as in bound/cpu.py::certify_set

// The least, or the largest, over the thread block.
__device__ double extreme(double x, bool largest) {
  __shared__ double of_warp[RANK_WARPS];
  for (int bit = 1; bit < 32; bit <<= 1) {
    const double y = __shfl_xor_sync(~0u, x, bit);
    x = largest ? fmax(x, y) : fmin(x, y);
  }
  __syncthreads();
  if (threadIdx.x % LANES == 0) of_warp[threadIdx.x / LANES] = x;
  __syncthreads();
  for (int w = 0; w < RANK_WARPS; w++) x = largest ? fmax(x, of_warp[w]) : fmin(x, of_warp[w]);
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) rank(const Call *calls, int heads, int group, int again) {
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  wait_for_previous();
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, h = blockIdx.y, index = blockIdx.x, row = index % ROW_TILE;
  if (index >= rows || call.exact_only || !(again ? call.coverage : call.require_rank)) return;
  int *state = call.state + h * rows + index;
  if (again && *state != OPEN) return;
  const int base = h * tiles + index / ROW_TILE, blocks = call.full + (call.tokens > call.full * BLOCK);
  const float *statistics = call.statistics + (i64)base * (call.full + 1) * STATISTIC_WORDS;
  const u32 *marks = call.marks + (i64)base * call.full;
  auto stat = [&](int b, int k) { return (double)statistic(statistics + (i64)b * STATISTIC_WORDS, b, row, k); };

  double top = -INFINITY, reach = 0.;
  for (int b = threadIdx.x; b < blocks; b += THREADS)
    if (stat(b, SUM) > 0.) top = fmax(top, stat(b, TOP)), reach = fmax(reach, fabs(stat(b, TOP)));
  top = extreme(top, true), reach = extreme(reach, true);
  double heaviest = 0.;
  for (int b = threadIdx.x; b < blocks; b += THREADS) heaviest = fmax(heaviest, stat(b, SUM) > 0. ? exp2(stat(b, TOP) - top) * stat(b, SUM) : 0.);
  heaviest = extreme(heaviest, true);
  const double widen = RANK_ROUNDING + UNITS * (reach + 5.);  // scores in binary units are the larger ones

  bool certified = true;
  for (int set = 0; set < (again && call.coverage == 2 ? 2 : 1); set++) {
    double least = INFINITY, most = -INFINITY, wrong = 0.;
    for (int b = threadIdx.x; b < blocks; b += THREADS) {
      const double sum = stat(b, SUM), delta = stat(b, DELTA);
      if (!(sum > 0.)) continue;
      const double mass = exp2(stat(b, TOP) - top) * sum, x = fmin(delta, sqrt(stat(b, SUM_SQUARES)) * stat(b, D_NORM) / sum);
      const bool chosen = b < call.full ? marks[b] >> row & 1 : call.facts[(i64)(h * rows + index) * ROW_FACTS + ROW_TAIL] > 0.f;
      // A NaN is at home on either side: nothing lies below it, and it lies below nothing.
      if (!(delta + stat(b, D_NORM) < INFINITY)) wrong = 1.;
      // Of several heaviest ones none can be certified, so that it does not matter which is meant.
      if (set ? chosen : mass == heaviest) least = fmin(least, mass * exp(-x - 2. * widen));
      else most = fmax(most, mass * (1. + (delta > 1e-8 ? expm1(delta) / delta : 1. + delta) * x));
    }
    least = extreme(least, false), most = extreme(most, true), wrong = extreme(wrong, true);
    if (set == 0) {  // several of one mass: they cannot all be the heaviest
      double count = 0.;
      for (int b = threadIdx.x; b < blocks; b += THREADS)
        if (stat(b, SUM) > 0. && exp2(stat(b, TOP) - top) * stat(b, SUM) == heaviest) count += 1.;
      __shared__ int ties;
      if (threadIdx.x == 0) ties = 0;
      __syncthreads();
      if (count > 0.) atomicAdd(&ties, (int)count);
      __syncthreads();
      if (ties > 1) wrong = 1.;
    }
    certified = certified && wrong == 0. && least > most;
  }
  if (threadIdx.x) return;
  call.fields[(i64)RANKED * heads * rows + h * rows + index] = certified;
  if (again && !certified) *state = DUE;
}
