// Codes, scales and annotations of full blocks: one thread block a block, KV head, and keys or values. Codes, scales and offsets are those
// of quantise/reference.py bit for bit; a value is dequantised with one rounding to FP16, as the value pass does it, and all annotations
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

// A thread block's: the originals of a half in double, [BLOCK][ROW], later the residuals; and in FP32, in the room that Gram matrices take
// afterwards; scales and offsets; the record's notes.
struct Room {
  double *x, *a, *b, *scratch;
  float *raw, *notes;
  double (&norms)[2][BLOCK];
  __half *scales, *offsets;
};

// A scale and an offset per channel.
__device__ __forceinline__ void quantise_keys(const Room &room, unsigned char *record) {
  const int t = threadIdx.x;
  double *x = room.x, *a = room.a, *b = room.b, *scratch = room.scratch, (&norms)[2][BLOCK] = room.norms;
  float *raw = room.raw, *notes = room.notes;
  __half *scales = room.scales, *offsets = room.offsets;
  const double key_norm = row_norms(x, norms[0], scratch);
  double wrong = 0., offset2 = 0.;
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
  const bool usable = reduce(wrong, true, scratch) == 0.;
  offset2 = reduce(offset2, false, scratch);
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
    ((u32 *)(record + KEY_CODES_AT))[word] = packed;
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
  if (t == 0) notes[KEY_NORM_MAX] = f32_above(key_norm), notes[KEYS_RAW] = __uint_as_float(!usable);
}

// A scale and an offset per token and group of channels. Returns the largest norm.
__device__ __forceinline__ float quantise_values(const Room &room, unsigned char *record) {
  const int t = threadIdx.x;
  double *x = room.x, *a = room.a, *b = room.b, *scratch = room.scratch, (&norms)[2][BLOCK] = room.norms;
  float *raw = room.raw, *notes = room.notes;
  __half *scales = room.scales, *offsets = room.offsets;
  const double value_norm = row_norms(x, norms[0], scratch);
  double wrong = 0.;
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
  const bool usable = reduce(wrong, true, scratch) == 0.;
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
  const float norm = f32_above(value_norm);
  if (t == 0) notes[VALUE_NORM_MAX] = norm, notes[VALUES_RAW] = __uint_as_float(!usable);
  return norm;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantise(const unsigned char *originals, unsigned char *hot, const i64 *original_at, const i64 *hot_at, float *norms_out, int heads) {
  extern __shared__ __align__(128) unsigned char shared[];
  double *x = (double *)shared, *a = x + BLOCK * ROW;
  float *raw = (float *)a;
  constexpr int SCALES = BLOCK * VALUE_GROUPS > KEY_DIM ? BLOCK * VALUE_GROUPS : KEY_DIM;
  __shared__ double scratch[QUANTISE_WARPS], norms[2][BLOCK];
  __shared__ float notes[16];
  __shared__ __half scales[SCALES], offsets[SCALES];
  const Room room = {x, a, a + BLOCK * BLOCK, scratch, raw, notes, norms, scales, offsets};
  const int h = blockIdx.y, t = threadIdx.x, values = blockIdx.z;
  const unsigned char *half = originals + original_at[blockIdx.x] + (i64)(values * heads + h) * ORIGINAL_BYTES;
  unsigned char *record = hot + hot_at[blockIdx.x] + (i64)h * RECORD_BYTES;
  if (t < 16) notes[t] = t < KEYS_RAW ? INFINITY : 0.f;
  for (int i = t; i < BLOCK * D; i += THREADS) x[i / D * ROW + i % D] = raw[i / D * ROW + i % D] = as_float(half, i);
  __syncthreads();
  if (!values) {
    quantise_keys(room, record);
  } else {
    const float norm = quantise_values(room, record);
    if (t == 0) norms_out[blockIdx.x * heads + h] = norm;
  }
  __syncthreads();
  const bool of_keys = t == H || t == RK || t == SK || t == C1 || t == KEY_NORM_MAX || t == OFFSET_NORM || t == KEYS_RAW;
  if (t < 16 && of_keys != (bool)values) ((float *)(record + NOTES_AT))[t] = notes[t];
}
