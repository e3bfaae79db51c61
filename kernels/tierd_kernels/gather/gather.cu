// Copies records of `nbytes`, a multiple of 16, to scratch from pinned host memory, which a device reads over the link at the speed of one large
// copy; and from there back to `back`, one behind the other, which is pinned memory too: what the host is told of is what arrived. One thread
// block a record. Offsets are from `source` and `target`. One launch does both ways: a second took the host 10 us.
constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    gather(const unsigned char *source, unsigned char *target, unsigned char *back, const i64 *source_at, const i64 *target_at, int nbytes) {
  const uint4 *from = (const uint4 *)(source + source_at[blockIdx.x]);
  uint4 *to = (uint4 *)(target + target_at[blockIdx.x]), *home = (uint4 *)(back + (i64)blockIdx.x * nbytes);
#pragma unroll 4  // loads that are under way together
  for (int i = threadIdx.x; i < nbytes / 16; i += THREADS) to[i] = from[i];
  __threadfence();  // from memory, not from a register; each thread reads what it has written itself
#pragma unroll 4
  for (int i = threadIdx.x; i < nbytes / 16; i += THREADS) home[i] = __ldcg(to + i);
}
