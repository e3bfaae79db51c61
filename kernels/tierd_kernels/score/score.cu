// The score pass as a kernel: one thread block a tile of rows and split, or trailing block.
struct NoValues {
  static constexpr bool ONE_CHUNK = false;
  __device__ __forceinline__ void begin(int, u32, u32) {}
  __device__ __forceinline__ void offsets_are_free() {}
  __device__ __forceinline__ void codes_are_free(int) {}
  __device__ __forceinline__ void keep(const float (&)[2 * TILES], float) {}
};

extern "C" __global__ void __launch_bounds__(WARPS *LANES, D <= 128 ? 4 : 2) score(const Call *calls, int heads, int group) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  const int tiles = (group * call.n + ROW_TILE - 1) / ROW_TILE, split = blockIdx.y;
  if (blockIdx.x >= heads * tiles || split > call.splits || call.exact_only) return;
  const int h = quotient(blockIdx.x, tiles), tile = blockIdx.x - h * tiles;
  if (split == call.splits) {
    if (call.tokens > call.full * BLOCK) score_tail(calls + blockIdx.z, heads, group, h, tile, tiles, (float *)shared);
    return;
  }
  NoValues none;
  score_split(call, heads, group, h, tile, tiles, split, shared, none);
}
