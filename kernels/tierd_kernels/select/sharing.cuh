// How thread blocks share promotion. A tile of rows and a split have one each, but few tiles have a row that needs originals: the thread
// blocks of the others take a part of what those have. All open tiles are shared alike, by as many thread blocks of the same split as there
// are to each; a part is every so many-th of the split's promoted blocks. (Of 1 % at 131,072 tokens three of eight KV heads have all, four to
// eight blocks a split. On an H100 the step takes 154.3 us for 155.8 there, 57.0 for 58.8 at 32,768 tokens, and as long as before where nothing is
// promoted.)
//
// Who has what follows from the rows' states alone, and parts are added up in their order, by the thread block that ends last: the same call
// has the same bits.
// Blocks, so that a part saves what it takes to join it: with two, three, four 155.2, 155.3, 156.2 us at 131,072 tokens, 37.7, 37.6, 37.5 at 8,192.
constexpr int PART_LEAST = 2;
constexpr int STEPS = (D + THREADS - 1) / THREADS;  // channels of a thread
typedef float Channels[STEPS][ROW_TILE];
static_assert(ROW_TILE == 4, "a channel of all rows is one load");

// A tile of rows, its KV head, and of up to how many `parts` of its promoted blocks this thread block has which; thread blocks of two parts are
// `step` apart; and what weight its rows' blocks are promoted from, NaN where none is. tile -1: none.
struct Share { int tile, head, part, parts, step; float limits[ROW_TILE]; };

// Made before what is waited for, asked after it; by whole warps, in which a lane looks at a tile. Where there are more tiles than lanes each
// thread block has its own.
struct Sharing {
  int from, number;  // of the tiles that are looked at, of all KV heads; of so many thread blocks, too
  int head, rows_here;  // of the lane's
  bool coverage;
  const int *states;
  const float *limits;
  __device__ __forceinline__ Sharing(const Call &call, int heads, int rows, int tiles) {
    const int all = heads * tiles;
    from = all > LANES ? blockIdx.x : 0, number = all > LANES ? 1 : all;
    const int tile = from + min((int)threadIdx.x % LANES, number - 1);
    head = quotient(tile, tiles);
    const int first = (tile - head * tiles) * ROW_TILE, at = head * rows + first;
    rows_here = min(rows - first, ROW_TILE), coverage = call.coverage;
    states = call.state + at, limits = call.facts + (i64)at * ROW_FACTS + ROW_LIMIT;
  }
  __device__ __forceinline__ Share own() const {
    int state[ROW_TILE];
    float limit[ROW_TILE];
#pragma unroll
    for (int i = 0; i < ROW_TILE; i++) {  // all on their way at once
      const int row = min(i, rows_here - 1);
      state[i] = states[row], limit[i] = limits[row * ROW_FACTS];
    }
    bool open = false;
#pragma unroll
    for (int i = 0; i < ROW_TILE; i++) {  // of the coverage policy's rows, and of those that are not open, nothing has chosen it
      const bool open_row = i < rows_here & state[i] == OPEN, chosen = open_row & !coverage & limit[i] < INFINITY;
      open |= open_row & coverage | chosen, limit[i] = chosen ? limit[i] : NAN;
    }
    const int lane = threadIdx.x % LANES, place = blockIdx.x - from;
    open &= lane < number;
    const u32 mask = __ballot_sync(~0u, open);
    if (!mask) return {-1};
    const int tiles_open = __popc(mask), parts = quotient(number, tiles_open), part = quotient(place, tiles_open);
    if (part >= parts) return {-1};
    const u32 mine = __ballot_sync(~0u, open && __popc(mask & ((1u << lane) - 1)) == place - part * tiles_open);
    const int its_lane = __ffs(mine) - 1;
    Share share = {from + its_lane, __shfl_sync(~0u, head, its_lane), part, parts, tiles_open};
#pragma unroll
    for (int i = 0; i < ROW_TILE; i++) share.limits[i] = __shfl_sync(~0u, limit[i], its_lane);
    return share;
  }
};

// Leaves a part's changes where exact sums will be; the thread block that ends last of the `parts` that have any adds up all of them. For all
// threads. Returns whether this is the last. `back`: a warp's, of its row, in lane TOP. n blocks in p parts are n / p + p sums one after the
// other, no more than one thread block takes and one: what the bound allows for rounding stays.
__device__ __forceinline__ bool join_parts(const Call &call, int heads, int all, int split, const Share &share, int parts, Channels &change,
                                           float &back) {
  constexpr int PART = D + 1;  // of four numbers each, the last the rows' `back`
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  float4 *own = (float4 *)call.dense + ((i64)split * all + blockIdx.x) * PART;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int channel = step * THREADS + threadIdx.x;
    if (channel < D) own[channel] = {change[step][0], change[step][1], change[step][2], change[step][3]};
  }
  if (lane == TOP) ((float *)(own + D))[warp] = back;
  if (!ends_last(call.tickets + 2 * (heads + all) + share.tile * call.splits + split, parts)) return false;
  const float4 *from = own - share.part * share.step * PART;
  back = 0.f;
#pragma unroll
  for (int step = 0; step < STEPS; step++)
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++) change[step][row] = 0.f;
#pragma unroll 2
  for (int part = 0; part < parts; part++, from += share.step * PART) {
    back += __ldcg((const float *)(from + D) + warp);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int channel = step * THREADS + threadIdx.x;
      if (channel >= D) continue;
      const float4 x = __ldcg(from + channel);
      change[step][0] += x.x, change[step][1] += x.y, change[step][2] += x.z, change[step][3] += x.w;
    }
  }
  return true;
}
