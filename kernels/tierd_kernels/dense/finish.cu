// Puts a due row together from its splits, and states its bound (CERTIFICATE.md, section "Exact heads"). One thread block a row, a thread
// a channel.
constexpr double U64 = 1.1102230246251565e-16, SAFETY = 1. + 1. / 1024, SQUARE_FLOOR = 0x1p-511;  // as in step.py

__device__ double block_sum(double x) {
  __shared__ double of_warp[D / LANES + 1];
  for (int bit = 1; bit < 32; bit <<= 1) x += __shfl_xor_sync(~0u, x, bit);
  __syncthreads();
  if (threadIdx.x % LANES == 0) of_warp[threadIdx.x / LANES] = x;
  __syncthreads();
  x = 0.;
  for (int w = 0; w < (D + LANES - 1) / LANES; w++) x += of_warp[w];
  return x;
}

extern "C" __global__ void __launch_bounds__((D + LANES - 1) / LANES *LANES) dense_finish(const Call *calls, int heads, int group) {
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  wait_for_previous();
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, h = blockIdx.y, index = blockIdx.x, c = threadIdx.x;
  if (index >= rows) return;
  int *state = call.state + h * rows + index;
  if (*state != DUE) return;
  const int base = h * tiles + index / ROW_TILE, begin = call.full ? 0 : call.splits;
  const int end = call.splits + (call.tokens > call.full * BLOCK);
  const double *of_row = call.dense + ((i64)base * (call.splits + 1) * ROW_TILE + index % ROW_TILE) * (DENSE_FACTS + D);
  auto fact = [&](int s, int k) { return of_row[(i64)s * ROW_TILE * (DENSE_FACTS + D) + k]; };
  double top = -INFINITY, mass = 0., norm = 0., largest = 0., key2 = 0., value2 = 0., y = 0.;
  for (int s = begin; s < end; s++) top = fmax(top, fact(s, DENSE_TOP));
  for (int s = begin; s < end; s++) {
    if (!(fact(s, DENSE_MASS) > 0.)) continue;  // the row sees nothing of it
    const double f = exp(fact(s, DENSE_TOP) - top);
    mass += f * fact(s, DENSE_MASS), norm += f * fact(s, DENSE_NORM);
    largest = fmax(largest, fact(s, DENSE_SCORE)), key2 = fmax(key2, fact(s, DENSE_KEY)), value2 = fmax(value2, fact(s, DENSE_VALUE));
    if (c < D) y += f * fact(s, DENSE_FACTS + c);
  }
  y /= mass, norm /= mass;
  const i64 at = ((i64)(h * group + index / call.n) * call.n + index % call.n) * D + c;
  double stored = 0., off = 0., q = 0.;
  if (c < D) stored = store(call.output, at, y), off = stored - y, q = wide(as_float(call.q, at));
  const double output = sqrt(block_sum(stored * stored)), rounded = sqrt(block_sum(off * off)), q_norm = sqrt(block_sum(q * q));
  if (c) return;
  // d products and sums, the scale, differences from two maxima, and exp's own ulp, twice, all doubled.
  const double eps = 2. * U64 * ((D + 8.) * fabs(call.scale) * q_norm * sqrt(key2) + 4. * largest + 16.);
  const double most = sqrt(value2), rounding = (call.tokens + D + 32.) * U64 * (norm + output) + rounded * (1. + 1e-12) + sqrt((double)D) * SQUARE_FLOOR;
  const double bound = fmin(exp(eps) * (expm1(eps) * (norm + output) + rounding + call.tokens * 1e-300 * most) * SAFETY, (most + output) * SAFETY);
  const double budget = fmin((call.atol + call.rtol * (call.relative_to_output ? output : norm)) * (1. - 1. / 1048576), BUDGET_MAX);
  double *out = call.fields + h * rows + index;
  const i64 stride = (i64)heads * rows;
  const double candidate = (most + output) * SAFETY;
  out[BOUND * stride] = out[ARITH_ERROR * stride] = bound;
  out[BUDGET * stride] = budget;
  out[KEY_ERROR * stride] = out[VALUE_ERROR * stride] = out[SKIP_ERROR * stride] = out[SKIPPED * stride] = 0.;
  out[VALUE_NORM * stride] = norm, out[OUTPUT_NORM * stride] = output, out[SCORE_TOP * stride] = largest, out[RANKED * stride] = 1.;
  if (call.exact_only) out[CANDIDATE * stride] = candidate, out[KEYS * stride] = out[VALUES * stride] = 0., out[PAPER_KEY_BOUND * stride] = NAN;
  else {
    const int *counts = call.counts + 2 * (h * rows + index);
    out[CANDIDATE * stride] = fmin(out[CANDIDATE * stride], candidate), out[KEYS * stride] = counts[0], out[VALUES * stride] = counts[1];
  }
  *state = EXACT;
}
