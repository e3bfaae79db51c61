// The values of full blocks, and what their quantised form is off by, in double: record `blockIdx.x` of one KV head, at `original_at` and
// `hot_at`. `per` records after one another are a group: out [group][2][per * BLOCK][D], V and then V - V_hat, with V_hat as the value pass
// sees it; zero where the values stay original.
constexpr int THREADS = 256;

__device__ __forceinline__ double decoded(const unsigned char *record, int token, int channel) {
  const unsigned char *part = record + SCORE_BYTES + token / TILE * VALUE_BYTES;
  const int c = token % 8 / 2, upper = token % TILE / 8, odd = token % 2, half = channel % 16 / 8;
  const u32 word = ((const u32 *)part)[channel / 16 * LANES + channel % 8 * 4 + c];
  const __half *pair = (const __half *)(part + VALUE_SCALES_AT) + (channel / GROUP * 4 + c) * 8 + 2 * upper + odd;
  const double code = word >> (16 * odd + 8 * half + 4 * upper) & 15;
  return __half2float(__double2half(code * __half2float(pair[0]) + __half2float(pair[4])));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    widen(const unsigned char *originals, const unsigned char *hot, const i64 *original_at, const i64 *hot_at, double *out, int per) {
  extern __shared__ __align__(16) unsigned char raw[];
  const uint4 *from = (const uint4 *)(originals + original_at[blockIdx.x]);  // over the link: in large pieces, and once
  for (int i = threadIdx.x; i < ORIGINAL_BYTES / 16; i += THREADS) ((uint4 *)raw)[i] = from[i];
  __syncthreads();
  const unsigned char *record = hot + hot_at[blockIdx.x];
  const bool usable = ((const u32 *)(record + NOTES_AT))[VALUES_RAW] == 0;
  const i64 size = (i64)per * BLOCK * D;
  double *values = out + (i64)(blockIdx.x / per) * 2 * size + (i64)(blockIdx.x % per) * BLOCK * D;
  for (int i = threadIdx.x; i < BLOCK * D; i += THREADS) {
    const double x = wide(as_float(raw, i));
    values[i] = x;
    values[size + i] = usable ? x - decoded(record, i / D, i % D) : 0.;
  }
}
