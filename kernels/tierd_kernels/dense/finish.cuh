// Puts a tile's due rows together from their splits, and states their bounds (CERTIFICATE.md, section "Exact heads"). A warp a row, of whose
// channels a lane has every 32nd.
constexpr double U64 = 1.1102230246251565e-16, SAFETY = 1. + 1. / 1024, SQUARE_FLOOR = 0x1p-511;  // as in step.py
constexpr int PER_LANE = (D + LANES - 1) / LANES;

__device__ __forceinline__ double warp_total(double x) {
  for (int bit = 1; bit < LANES; bit <<= 1) x += __shfl_xor_sync(~0u, x, bit);
  return x;
}
__device__ __forceinline__ double warp_largest(double x) {
  for (int bit = 1; bit < LANES; bit <<= 1) x = fmax(x, __shfl_xor_sync(~0u, x, bit));
  return x;
}

// Splits are read past the first cache, where another multiprocessor's are not seen.
__device__ __forceinline__ void finish_rows(const Call &call, int heads, int group, int h, int tile) {
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, lane = threadIdx.x % LANES, index = tile * ROW_TILE + threadIdx.x / LANES;
  if (index >= rows) return;
  int *state = call.state + h * rows + index;
  if (*state != DUE) return;
  const int base = h * tiles + tile, begin = call.full ? 0 : call.splits, end = call.splits + (call.tokens > call.full * BLOCK);
  const volatile double *of_row = call.dense + ((i64)base * (call.splits + 1) * ROW_TILE + index % ROW_TILE) * (DENSE_FACTS + D);
  auto fact = [&](int s, int k) { return of_row[(i64)s * ROW_TILE * (DENSE_FACTS + D) + k]; };
  double top = -INFINITY, mass = 0., norm = 0., largest = 0., key2 = 0., value2 = 0., y[PER_LANE] = {};
  for (int s = begin + lane; s < end; s += LANES) top = fmax(top, fact(s, DENSE_TOP));
  top = warp_largest(top);
  for (int first = begin; first < end; first += LANES) {
    const int s = first + lane;
    const double its_mass = s < end ? fact(s, DENSE_MASS) : 0.;
    double f = 0.;
    if (its_mass > 0.) {  // else the row sees nothing of it
      f = exp(fact(s, DENSE_TOP) - top);
      mass += f * its_mass, norm += f * fact(s, DENSE_NORM);
      largest = fmax(largest, fact(s, DENSE_SCORE)), key2 = fmax(key2, fact(s, DENSE_KEY)), value2 = fmax(value2, fact(s, DENSE_VALUE));
    }
    for (int k = 0; k < min(LANES, end - first); k++) {
      const double here = __shfl_sync(~0u, f, k);
      if (!(here > 0.)) continue;
      for (int i = 0; i < PER_LANE; i++)
        if (i * LANES + lane < D) y[i] += here * fact(first + k, DENSE_FACTS + i * LANES + lane);
    }
  }
  mass = warp_total(mass), norm = warp_total(norm) / mass;
  largest = warp_largest(largest), key2 = warp_largest(key2), value2 = warp_largest(value2);
  const i64 at = ((i64)(h * group + index / call.n) * call.n + index % call.n) * D;
  double output2 = 0., off2 = 0., q2 = 0.;
  for (int i = 0; i < PER_LANE; i++) {
    const int c = i * LANES + lane;
    if (c >= D) continue;
    const double exact = y[i] / mass, stored = store(call.output, at + c, exact), off = stored - exact, q = wide(as_float(call.q, at + c));
    output2 += stored * stored, off2 += off * off, q2 += q * q;
  }
  const double output = sqrt(warp_total(output2)), rounded = sqrt(warp_total(off2)), q_norm = sqrt(warp_total(q2));
  if (lane) return;
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
