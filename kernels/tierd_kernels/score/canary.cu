// The canary (CERTIFICATE.md, section "Canary"): chosen blocks scored from codes and from originals, both in double. They may differ by
// what the stored annotations allow. One thread block a block and KV head.
extern "C" __global__ void __launch_bounds__(WARPS *LANES) canary(const Call *calls, int heads, int group) {
  extern __shared__ __align__(128) unsigned char shared[];
  float *x = (float *)shared;  // [BLOCK][D + 1]
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  wait_for_previous();
  const int h = blockIdx.y;
  if ((int)blockIdx.x >= call.num_canaries) return;
  const int b = call.canaries[blockIdx.x];
  const Place place = place_of(call, heads, h, b);
  const unsigned char *record = place.record;
  const float *notes = (const float *)(record + NOTES_AT);
  unsigned char *failure = call.failures + blockIdx.x * heads + h;
  if (__float_as_uint(notes[KEYS_RAW])) {
    if (threadIdx.x == 0) *failure = 0;
    return;
  }
  load_record(x, place.keys, BLOCK, WARPS * LANES);
  __syncthreads();
  const __half *scales = (const __half *)(record + KEY_SCALE_AT), *offsets = (const __half *)(record + KEY_OFFSET_AT);
  bool good = true;
  for (int i = threadIdx.x; i < group * call.n * BLOCK; i += WARPS * LANES) {
    const Row query = query_row(call, h, group, i / BLOCK);
    const int token = i % BLOCK, in = token % TILE;
    if (b * BLOCK + token >= query.seen) continue;
    double stored = 0., original = 0., norm1 = 0., norm2 = 0., q1 = 0.;
    for (int c = 0; c < D; c++) {
      const int lane = in % 8 * 4 + c % 32 / 8, part = c % 8 / 4 * 2 + in / 8;
      const signed char code = (signed char)record[KEY_CODES_AT + (((token / TILE * KEY_STEPS + c / 32) * LANES + lane) * 4 + part) * 4 + c % 4];
      const double q = wide(as_float(call.q, query.at + c)), scale = __half2float(scales[c]);
      stored += q * (code * scale + (double)__half2float(offsets[c])), original += q * wide(x[token * (D + 1) + c]);
      norm1 += fabs(q * scale), norm2 += q * scale * (q * scale), q1 += fabs(q);
    }
    // Quantisation takes subnormal keys for zero.
    const double allowed = fmin(notes[H] * norm1, notes[RK] * sqrt(norm2)) * (1. + 0x1p-40) + 0x1p-40 * (fabs(stored) + fabs(original)) + 0x1p-125 * q1;
    good = good && fabs(stored - original) <= allowed;
  }
  const bool failed = __syncthreads_or(!good);
  if (threadIdx.x == 0) *failure = failed;
}
