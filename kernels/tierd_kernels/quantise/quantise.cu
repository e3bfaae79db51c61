// Codes, scales and annotations of full blocks: one thread block a block and KV head. Codes, scales and offsets are those of
// quantise/reference.py bit for bit; a value is dequantised with one rounding to FP16, as the value pass does it, and all annotations
// are measured from that, in double, rounded up.
constexpr int QUANTISE_WARPS = 16, THREADS = QUANTISE_WARPS * LANES, ROW = D + 1;
constexpr double SUM_ROOM = 1. + 1e-12, SPECTRAL_ROOM = 1. + 1e-9, LEAST_SCALE = 6.103515625e-05;  // 2^-14, FP16's smallest normal

// Never subnormal, which would be flushed to zero.
__device__ __forceinline__ float f32_above(double x) { return x < INFINITY ? __double2float_ru(x > 0. ? fmax(x, 0x1p-126) : x) : INFINITY; }
__device__ __forceinline__ u32 bf16_above(double x) {
  u32 bits = __float_as_uint(f32_above(x));
  return (bits + 0xffffu) >> 16;
}
__device__ __forceinline__ __half f16_above(double x) { return __float2half_ru(__double2float_ru(x)); }
__device__ __forceinline__ __half f16_below(double x) {
  return x >= 65536. ? __ushort_as_half(0x7c00) : __float2half_rd(__double2float_rd(x));
}

__device__ __forceinline__ double reduce(double x, bool largest, double *shared) {
  for (int bit = 16; bit; bit >>= 1) {
    double y = __shfl_xor_sync(~0u, x, bit);
    x = largest ? (x != x || y != y ? NAN : fmax(x, y)) : x + y;
  }
  __syncthreads();
  if (threadIdx.x % LANES == 0) shared[threadIdx.x / LANES] = x;
  __syncthreads();
  x = shared[threadIdx.x % QUANTISE_WARPS];
  for (int bit = QUANTISE_WARPS / 2; bit; bit >>= 1) {
    double y = __shfl_xor_sync(~0u, x, bit);
    x = largest ? (x != x || y != y ? NAN : fmax(x, y)) : x + y;
  }
  return x;
}

// The lesser of the Frobenius and the Schatten-16 norm of x [BLOCK][ROW]; `a`, `b` are room for BLOCK x BLOCK each.
__device__ double spectral_above(const double *x, double *a, double *b, double *shared) {
  __syncthreads();
  for (int k = threadIdx.x; k < BLOCK * BLOCK; k += THREADS) {
    const double *p = x + k / BLOCK * ROW, *q = x + k % BLOCK * ROW;
    double sum[4] = {0., 0., 0., 0.};  // four chains, a quarter of the latency
    for (int i = 0; i < D; i += 4)
      for (int j = 0; j < 4; j++) sum[j] += p[i + j] * q[i + j];
    a[k] = sum[0] + sum[1] + (sum[2] + sum[3]);
  }
  __syncthreads();
  double trace = reduce(threadIdx.x < BLOCK ? a[threadIdx.x * (BLOCK + 1)] : 0., false, shared);
  if (trace == 0.) return 0.;
  if (!(trace < INFINITY)) return INFINITY;
  for (int k = threadIdx.x; k < BLOCK * BLOCK; k += THREADS) a[k] /= trace;
  double total = 0.;
  for (int step = 0; step < 2; step++) {  // the Gram matrix squared, and again; both are symmetric
    const double *from = step ? b : a;
    __syncthreads();
    for (int k = threadIdx.x; k < BLOCK * BLOCK; k += THREADS) {
      double sum = 0.;
      for (int i = 0; i < BLOCK; i++) sum += from[i * BLOCK + k / BLOCK] * from[i * BLOCK + k % BLOCK];
      if (step) total += sum * sum; else b[k] = sum;
    }
  }
  return sqrt(trace * fmin(1., pow(reduce(total, false, shared), 0.125))) * SPECTRAL_ROOM;
}

// Norms of the rows of x [BLOCK][ROW], rounded up, to `norms`; returns the largest. A warp takes a row.
__device__ double row_norms(const double *x, double *norms, double *shared) {
  double largest = 0.;
  for (int t = threadIdx.x / LANES; t < BLOCK; t += QUANTISE_WARPS) {
    double sum = 0.;
    for (int i = threadIdx.x % LANES; i < D; i += LANES) sum += x[t * ROW + i] * x[t * ROW + i];
    for (int bit = 16; bit; bit >>= 1) sum += __shfl_xor_sync(~0u, sum, bit);
    sum = sqrt(sum) * SUM_ROOM;
    if (threadIdx.x % LANES == 0) norms[t] = sum;
    largest = sum != sum || largest != largest ? NAN : fmax(largest, sum);
  }
  return reduce(largest, true, shared);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantise(const unsigned char *originals, unsigned char *hot, const i64 *original_at, const i64 *hot_at, float *norms_out, int heads) {
  extern __shared__ __align__(128) unsigned char shared[];
  double *x = (double *)shared, *a = x + BLOCK * ROW, *b = a + BLOCK * BLOCK;
  float *raw = (float *)a;  // [BLOCK][ROW], done with before `a` and `b` are used
  __shared__ double scratch[QUANTISE_WARPS], norms[2][BLOCK];
  __shared__ float notes[16];
  __shared__ __half scales[BLOCK * VALUE_GROUPS > KEY_DIM ? BLOCK * VALUE_GROUPS : KEY_DIM], offsets[BLOCK * VALUE_GROUPS > KEY_DIM ? BLOCK * VALUE_GROUPS : KEY_DIM];
  const int h = blockIdx.y, t = threadIdx.x;
  const unsigned char *keys = originals + original_at[blockIdx.x] + (i64)h * ORIGINAL_BYTES, *values = keys + (i64)heads * ORIGINAL_BYTES;
  unsigned char *record = hot + hot_at[blockIdx.x] + (i64)h * RECORD_BYTES;
  u32 flags = 0;
  if (t < 16) notes[t] = INFINITY;

  // Values are asked for at once with the keys: both come over the host link.
  constexpr int EACH = (BLOCK * D + THREADS - 1) / THREADS;
  float ahead[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) ahead[i] = i * THREADS + t < BLOCK * D ? as_float(values, i * THREADS + t) : 0.f;

  // Keys: a scale and an offset per channel.
  for (int i = t; i < BLOCK * D; i += THREADS) x[i / D * ROW + i % D] = raw[i / D * ROW + i % D] = as_float(keys, i);
  __syncthreads();
  double key_norm = row_norms(x, norms[0], scratch), wrong = 0., offset2 = 0.;
  for (int c = t; c < KEY_DIM; c += THREADS) {
    __half scale = __double2half(0.), offset = scale;
    if (c < D) {
      double least = INFINITY, most = -INFINITY;
      for (int i = 0; i < BLOCK; i++) {
        double y = raw[i * ROW + c];
        if (!(fabs(y) < INFINITY)) wrong = 1.;
        least = fmin(least, y), most = fmax(most, y);
      }
      offset = __double2half(0.5 * (least + most) + 0.);
      double middle = __half2float(offset);
      scale = f16_above(fmax(fmax(most - middle, middle - least) / 127., LEAST_SCALE));
      if (!(fabs(middle) < INFINITY) || !(__half2float(scale) < INFINITY)) wrong = 1.;
      offset2 += middle * middle;
    }
    scales[c] = scale, offsets[c] = offset;
  }
  bool usable = reduce(wrong, true, scratch) == 0.;
  offset2 = reduce(offset2, false, scratch);
  if (!usable) flags |= RAW_KEYS;
  for (int c = t; c < KEY_DIM; c += THREADS) {
    ((__half *)(record + KEY_SCALE_AT))[c] = usable ? scales[c] : __double2half(c < D ? LEAST_SCALE : 0.);
    ((__half *)(record + KEY_OFFSET_AT))[c] = usable ? offsets[c] : __double2half(0.);
  }
  double largest = 0., code_sum = 0.;
  for (int word = t; word < BLOCK * KEY_DIM / 4; word += THREADS) {  // fragment order of the A operand: 4 channels a word
    int reg = word % 4, lane = word / 4 % LANES, step = word / 128;
    int token = step / KEY_STEPS * TILE + lane / 4 + (reg & 1) * 8, channel = step % KEY_STEPS * 32 + lane % 4 * 8 + (reg >> 1) * 4;
    u32 packed = 0;
    for (int i = 0; i < 4 && channel < D && usable; i++) {
      double scale = __half2float(scales[channel + i]), offset = __half2float(offsets[channel + i]), y = raw[token * ROW + channel + i];
      double code = rint((y - offset) / scale), left = (y - (code * scale + offset)) / scale;
      x[token * ROW + channel + i] = left;
      raw[token * ROW + channel + i] = (float)fabs(code);
      largest = fmax(largest, fabs(left));
      packed |= ((u32)(int)code & 255u) << (8 * i);
    }
    ((u32 *)record)[word] = packed;
  }
  __syncthreads();
  if (usable) {
    for (int k = t / LANES; k < BLOCK; k += QUANTISE_WARPS) {
      double sum = 0.;
      for (int i = t % LANES; i < D; i += LANES) sum += raw[k * ROW + i];
      for (int bit = 16; bit; bit >>= 1) sum += __shfl_xor_sync(~0u, sum, bit);
      code_sum = fmax(code_sum, sum);
    }
    code_sum = reduce(code_sum, true, scratch);
    largest = reduce(largest, true, scratch);
    double norm = row_norms(x, norms[0], scratch), spectral = spectral_above(x, a, b, scratch);
    if (t == 0) {
      notes[H] = f32_above(largest * SUM_ROOM), notes[RK] = f32_above(norm), notes[SK] = f32_above(spectral);
      notes[C1] = (float)code_sum, notes[OFFSET_NORM] = f32_above(sqrt(offset2) * SUM_ROOM);
    }
  }
  if (t == 0) notes[KEY_NORM_MAX] = f32_above(key_norm);
  __syncthreads();

  // Values: a scale and an offset per token and group of channels.
#pragma unroll
  for (int k = 0; k < EACH; k++) {
    const int i = k * THREADS + t;
    if (i < BLOCK * D) x[i / D * ROW + i % D] = raw[i / D * ROW + i % D] = ahead[k];
  }
  __syncthreads();
  const double value_norm = row_norms(x, norms[0], scratch);
  wrong = 0.;
  for (int k = t; k < BLOCK * VALUE_GROUPS; k += THREADS) {
    int token = k / VALUE_GROUPS, first = k % VALUE_GROUPS * GROUP, last = min(first + GROUP, D);
    double least = INFINITY, most = -INFINITY;
    for (int i = first; i < last; i++) {
      double y = raw[token * ROW + i];
      if (!(fabs(y) < INFINITY)) wrong = 1.;
      least = fmin(least, y), most = fmax(most, y);
    }
    __half offset = f16_below(least + 0.);
    __half scale = f16_above(fmax((most - (double)__half2float(offset)) / 15., LEAST_SCALE));
    if (!(fabsf(__half2float(offset)) < INFINITY) || !(__half2float(scale) < INFINITY)) wrong = 1.;
    scales[k] = scale, offsets[k] = offset;
  }
  usable = reduce(wrong, true, scratch) == 0.;
  if (!usable) flags |= RAW_VALUES;
  for (int k = t; k < BLOCK * VALUE_GROUPS; k += THREADS) {
    int token = k / VALUE_GROUPS, group = k % VALUE_GROUPS, in = token % TILE;
    __half *pair = (__half *)(record + SCORE_BYTES + token / TILE * VALUE_BYTES + VALUE_SCALES_AT) + (group * 4 + in % 8 / 2) * 8;
    int place = (in >= 8 ? 2 : 0) + in % 2;
    pair[place] = usable ? scales[k] : __double2half(LEAST_SCALE);
    pair[4 + place] = usable ? offsets[k] : __double2half(0.);
  }
  for (int word = t; word < BLOCK * D / 8; word += THREADS) {  // fragment order: two channels, four tokens a word
    int lane = word % LANES, step = word / LANES, channel = step % VALUE_TILES * 16 + lane / 4, token = step / VALUE_TILES * TILE + lane % 4 * 2;
    u32 packed = 0;
    for (int k = 0; k < 8 && usable; k++) {
      int i = channel + (k & 1) * 8, at = token + (k >> 1 & 1) * 8 + (k >> 2), group = at * VALUE_GROUPS + i / GROUP;
      double scale = __half2float(scales[group]), offset = __half2float(offsets[group]), y = raw[at * ROW + i];
      double code = rint((y - offset) / scale);
      x[at * ROW + i] = y - (double)__half2float(__double2half(code * scale + offset));
      packed |= (u32)(int)code << (8 * (k & 1) + 4 * (k >> 1 & 1) + 16 * (k >> 2));
    }
    ((u32 *)(record + SCORE_BYTES + step / VALUE_TILES * VALUE_BYTES))[step % VALUE_TILES * LANES + lane] = packed;
  }
  __syncthreads();
  if (usable) {
    row_norms(x, norms[1], scratch);
    double spectral = spectral_above(x, a, b, scratch), amplitude = 0.;
    if (t < BLOCK) {
      for (int k = 0; k < VALUE_GROUPS; k++) {
        double most = 15. * __half2float(scales[t * VALUE_GROUPS + k]) + fabs((double)__half2float(offsets[t * VALUE_GROUPS + k]));
        amplitude += most * most * min(GROUP, D - k * GROUP);
      }
    }
    amplitude = reduce(sqrt(amplitude) * SUM_ROOM, true, scratch);
    if (t == 0) notes[SV] = f32_above(spectral), notes[AMP] = f32_above(amplitude * (1. + 1. / 1024));  // a value is rounded to FP16
  }
  if (t < BLOCK) ((u32 *)(record + NORMS_AT))[t] = bf16_above(norms[0][t]) | bf16_above(usable ? norms[1][t] : INFINITY) << 16;
  if (t == 0) {
    notes[VALUE_NORM_MAX] = norms_out[blockIdx.x * heads + h] = f32_above(value_norm);
    notes[FLAGS] = __uint_as_float(flags);
  }
  __syncthreads();
  if (t < 16) ((float *)(record + NOTES_AT))[t] = t > FLAGS ? 0.f : notes[t];
}
