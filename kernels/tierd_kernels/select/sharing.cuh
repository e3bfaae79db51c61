// How thread blocks share promotion. A tile of rows and a split have one each, but few tiles have a row that needs originals, and of those one needs
// ten times as many as another: the thread blocks of a split share what all of its tiles promote. A tile's promoted blocks go in parts no larger than the
// least size with which all tiles' parts are no more than the thread blocks; a part is every so many-th of them. (Where all tiles that need some were
// shared alike, an H200's step of 131,072 tokens took 153 us for 144 with 5 % promoted, 115.5 for 114 with 1 %.)
//
// Who has what follows from what selection has left alone, and parts are added up in their order, by the thread block that ends last: the same call
// has the same bits.
constexpr int STEPS = (D + THREADS - 1) / THREADS;  // channels of a thread
typedef float Channels[STEPS][ROW_TILE];
static_assert(ROW_TILE == 4, "a channel of all rows is one load");

// The tiles that share, as the lanes of whole warps see them, a tile each. Made before what is waited for, asked after it. Where there are more tiles than
// lanes, or splits are short and promote few blocks, each thread block has its own, and looks at no other.
struct Sharing {
  int from, number;  // of the tiles that are looked at, of all KV heads; of so many thread blocks, too
  int head, rows_here;  // of the lane's
  bool coverage;
  const int *states;
  const float *limits;
  __device__ __forceinline__ Sharing(const Call &call, int heads, int rows, int tiles) {
    const int all = heads * tiles;
    const bool own = all > LANES || call.per * BLOCK < SPLIT_TOKENS_SHORT;
    from = own ? blockIdx.x : 0, number = own ? 1 : all;
    const int tile = from + min((int)threadIdx.x % LANES, number - 1);
    head = quotient(tile, tiles);
    const int first = (tile - head * tiles) * ROW_TILE, at = head * rows + first;
    rows_here = min(rows - first, ROW_TILE), coverage = call.coverage;
    states = call.state + at, limits = call.facts + (i64)at * ROW_FACTS + ROW_LIMIT;
  }
  // Of the tiles that may promote something a bit each; and from what weight the rows of this lane's do, NaN where none is.
  __device__ __forceinline__ u32 open(float (&limit)[ROW_TILE]) const {
    int state[ROW_TILE];
#pragma unroll
    for (int i = 0; i < ROW_TILE; i++) {  // all on their way at once
      const int row = min(i, rows_here - 1);
      state[i] = states[row], limit[i] = limits[row * ROW_FACTS];
    }
    bool some = false;
#pragma unroll
    for (int i = 0; i < ROW_TILE; i++) {  // of the coverage policy's rows, and of those that are not open, nothing has chosen it
      const bool open_row = i < rows_here & state[i] == OPEN, chosen = open_row & !coverage & limit[i] < INFINITY;
      some |= open_row & coverage | chosen, limit[i] = chosen ? limit[i] : NAN;
    }
    return __ballot_sync(~0u, some & (int)threadIdx.x % LANES < number);
  }
};

// What says in which rows of a tile a block is promoted: weights, or what the coverage policy has left.
struct Chosen {
  float4 weights[ROW_TILE / 2];
  u32 left;
  __device__ __forceinline__ void read(const Call &call, int tile, int block, bool coverage) {
    const i64 at = (i64)tile * call.full + block;
    if (coverage) left = call.marks[at];
    else
#pragma unroll
      for (int i = 0; i < ROW_TILE / 2; i++) weights[i] = ((const float4 *)(call.row_weights + at * ROW_TILE))[i];
  }
  // As `marks` has it: a bit each for keys, and above them for values.
  __device__ __forceinline__ u32 mark(const float (&limits)[ROW_TILE], bool coverage) const {
    if (coverage) return left & 255u;
    u32 mark = 0;
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++) {
      const float4 &two = weights[row / 2];
      const float key = row % 2 ? two.z : two.x, value = row % 2 ? two.w : two.y;
      mark |= (key >= limits[row] ? 1u : 0u) << row | (value >= limits[row] ? 16u : 0u) << row;
    }
    return mark;
  }
};

// A tile of rows, its KV head, and which part of its promoted blocks this thread block has; the number of those, and of what warps before this one
// have of them; and its rows' limits. tile -1: none.
struct Share { int tile, head, part, parts, number, before; float limits[ROW_TILE]; };

// Parts' sizes are multiples of it, of which each lane tries one: of short blocks as many as are staged.
constexpr int SIZE_STEP = (SPLIT_BLOCKS + LANES - 1) / LANES;
// Tiles whose weights are under way together. (With four a step is as long at 131,072 tokens, at 8,192 and 32,768 0.3 us longer: it is all executed once,
// and instructions have to come from somewhere.)
constexpr int AT_ONCE = 2;
// For all threads. `block`: the thread's, one of the split's where `inside`. `numbers` [WARPS][LANES]: room, until the next barrier.
__device__ __forceinline__ Share share_out(const Call &call, const Sharing &tiles, int block, bool inside, int (*numbers)[LANES]) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, place = blockIdx.x - tiles.from;
  float limits[ROW_TILE];
  const u32 open = tiles.open(limits);
  if (!open) return {-1};
  auto limits_of = [&](int which, float (&of)[ROW_TILE]) {
#pragma unroll
    for (int i = 0; i < ROW_TILE; i++) of[i] = __shfl_sync(~0u, limits[i], which);
  };
  int number = 0;  // of the lane's tile: how many blocks it promotes, at first of this warp's
#pragma unroll 1
  for (u32 left = open; left;) {
    Chosen chosen[AT_ONCE];
    int which[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++, left &= left - 1) {
      which[i] = __ffs(left) - 1;
      if (left) chosen[i].read(call, tiles.from + which[i], block, tiles.coverage);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (which[i] < 0) break;
      float of[ROW_TILE];
      limits_of(which[i], of);
      const u32 some = __ballot_sync(~0u, inside && chosen[i].mark(of, tiles.coverage));
      number = lane == which[i] ? __popc(some) : number;
    }
  }
  numbers[warp][lane] = number;
  __syncthreads();
  number = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) number += numbers[w][lane];
  auto parts_of = [](int number, int size) { return quotient(number + size - 1, size); };
  int wanted = 0;
  for (u32 left = open; left; left &= left - 1) wanted += parts_of(__shfl_sync(~0u, number, __ffs(left) - 1), (lane + 1) * SIZE_STEP);
  const int parts = parts_of(number, __ffs(__ballot_sync(~0u, wanted <= tiles.number)) * SIZE_STEP);
  int upto = parts;  // one tile's behind the other's
#pragma unroll
  for (int step = 1; step < LANES; step <<= 1) {
    const int before = __shfl_sync(~0u, upto, (lane - step) & (LANES - 1));
    if (lane >= step) upto += before;
  }
  const u32 mine = __ballot_sync(~0u, upto - parts <= place && place < upto);
  if (!mine) return {-1};
  const int which = __ffs(mine) - 1;
  auto its = [&](int x) { return __shfl_sync(~0u, x, which); };
  Share share = {tiles.from + which, its(tiles.head), place - its(upto - parts), its(parts), its(number), 0};
#pragma unroll
  for (int w = 0; w < WARPS; w++) share.before += w < warp ? numbers[w][which] : 0;
  limits_of(which, share.limits);
  return share;
}

// Leaves a part's changes where exact sums will be; the thread block that ends last of the `parts` that have any adds up all of them. For all
// threads. Returns whether this is the last. `back`: a warp's, of its row, in lane TOP. n blocks in p parts are n / p + p sums one after the
// other, no more than one thread block takes and one: what the bound allows for rounding stays.
__device__ __forceinline__ bool join_parts(const Call &call, int heads, int all, int split, const Share &share, Channels &change, float &back) {
  constexpr int PART = D + 1;  // of four numbers each, the last the rows' `back`
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  float4 *own = (float4 *)call.dense + ((i64)split * all + blockIdx.x) * PART;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int channel = step * THREADS + threadIdx.x;
    if (channel < D) own[channel] = {change[step][0], change[step][1], change[step][2], change[step][3]};
  }
  if (lane == TOP) ((float *)(own + D))[warp] = back;
  if (!ends_last(call.tickets + 2 * (heads + all) + share.tile * call.splits + split, share.parts)) return false;
  const float4 *from = own - share.part * PART;
  back = 0.f;
#pragma unroll
  for (int step = 0; step < STEPS; step++)
#pragma unroll
    for (int row = 0; row < ROW_TILE; row++) change[step][row] = 0.f;
#pragma unroll 2
  for (int part = 0; part < share.parts; part++, from += PART) {
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
