// Copies records of `nbytes`, a multiple of 16, between memories that the device can address: pinned host memory too, which it reads and
// writes over the link at the speed of one large copy. One thread block a record. Offsets are from `source` and `target`.
constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    gather(const unsigned char *source, unsigned char *target, const i64 *source_at, const i64 *target_at, int nbytes) {
  const uint4 *from = (const uint4 *)(source + source_at[blockIdx.x]);
  uint4 *to = (uint4 *)(target + target_at[blockIdx.x]);
#pragma unroll 4  // loads that are under way together
  for (int i = threadIdx.x; i < nbytes / 16; i += THREADS) to[i] = from[i];
}
