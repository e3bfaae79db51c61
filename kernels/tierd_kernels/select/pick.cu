// Selection under the hard budget: for a row that missed it, the fewest blocks whose keys or values, read as originals, are predicted to
// bring it within.
//
// A key and a value record cost the same bytes, so one threshold on both shares ranks them (as select/reference.py's cheapest_within does).
// What is promoted counts as without error, which a target below the budget makes up for. Selection may be wrong at will: only what finish
// computes from what was used opens the gate.
//
// One pass tries all thresholds: a thread block takes groups of 1024 tokens, one after the other, and sorts their blocks' terms into the
// bins between thresholds; what stays below each threshold is a running sum over bins, and from it comes the group's part of the bound. The
// thread block of a tile that ends last adds the parts up and chooses; promotion finds the blocks' weights where they were written. Bins
// are integers, in parts of the largest term relative to its bin's edge: their sums depend on no order.
constexpr int PICK_WARPS = 8, THREADS = PICK_WARPS * LANES, EACH = BINS / LANES, ROUNDS = (SPLIT_BLOCKS * ROW_TILE + THREADS - 1) / THREADS;
enum { OF_T1, OF_G, OF_SPREAD, OF_SQUARES, OF_LOW, OF_VALUE, OF_CODED, SORTED };  // the last two by the weight of values, the others of keys
constexpr float UNITS = 0x1p24f;  // 128 blocks of a group, in 32 bits
// Between two thresholds the predicted bound is taken to be linear where they are this near.
constexpr float NEAR = 1.04f;

__device__ __forceinline__ bool of_values(int k) { return k >= OF_VALUE; }
// Terms grow with the weight, and squares with its square: what makes them near constant.
__device__ __forceinline__ float against(int k, float edge) { return k == OF_SQUARES || k == OF_CODED ? edge * edge : edge; }

struct __align__(16) Room {
  u32 bins[ROW_TILE][SORTED][BINS];
  float of_warp[PICK_WARPS][SORTED][ROW_TILE], most[SORTED][ROW_TILE];
  float ratio[ROW_TILE][BINS];
  bool last;
};

// Of the full blocks [first, end): a thread has a row of every 64th block.
__device__ __forceinline__ void read_blocks(const Call &call, int base, int first, int end, const RowState &own, Seen (&blocks)[ROUNDS]) {
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int b = first + (threadIdx.x + i * THREADS) / ROW_TILE;
    if (b < end && own.joins) blocks[i] = seen(call, base, b, threadIdx.x % ROW_TILE);
  }
}
// Sorts them into bins. For all threads.
__device__ __forceinline__ void sort_blocks(const Call &call, int base, int first, int end, const RowState &own, const Bins &scale, const Seen (&blocks)[ROUNDS],
                                            Room &room) {
  const int row = threadIdx.x % ROW_TILE, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  float2 *weights = call.row_weights + (i64)base * call.full * ROW_TILE;
  for (int i = threadIdx.x; i < ROW_TILE * SORTED * BINS; i += THREADS) (&room.bins[0][0][0])[i] = 0;
  float terms[ROUNDS][SORTED], most[SORTED] = {0.f};
  int bins[ROUNDS][2];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int b = first + (threadIdx.x + i * THREADS) / ROW_TILE;
    const bool joins = b < end && own.joins;
    Shares s = {0.f, 0.f, {}};
    if (joins) s = shares(blocks[i], own);
    const float found[SORTED] = {s.terms.t1, s.terms.g, s.terms.spread, s.terms.squares, s.terms.low, s.terms.value, s.terms.coded};
    const float key = weight(s.key, own.target), value = weight(s.value, own.target);
    bins[i][0] = joins ? scale.of(key) : BINS, bins[i][1] = joins ? scale.of(value) : BINS;
    if (joins) weights[b * ROW_TILE + row] = make_float2(key, value);
#pragma unroll
    for (int k = 0; k < SORTED; k++) {
      const int bin = bins[i][of_values(k)];
      terms[i][k] = bin < BINS ? __fdividef(found[k], against(k, scale.edge(bin))) : 0.f;
      most[k] = fmaxf(most[k], terms[i][k]);
    }
  }
#pragma unroll
  for (int k = 0; k < SORTED; k++) {
#pragma unroll
    for (int bit = ROW_TILE; bit < LANES; bit <<= 1) most[k] = fmaxf(most[k], __shfl_xor_sync(~0u, most[k], bit));
    if (lane < ROW_TILE) room.of_warp[warp][k][row] = most[k];
  }
  __syncthreads();
  if (threadIdx.x < SORTED * ROW_TILE) {
    float largest = 0.f;
    for (int w = 0; w < PICK_WARPS; w++) largest = fmaxf(largest, room.of_warp[w][threadIdx.x / ROW_TILE][row]);
    room.most[threadIdx.x / ROW_TILE][row] = largest;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ROUNDS; i++)
#pragma unroll
    for (int k = 0; k < SORTED; k++) {
      const float largest = room.most[k][row];
      if (bins[i][of_values(k)] < BINS && terms[i][k] > 0.f)
        atomicAdd(&room.bins[row][k][bins[i][of_values(k)]], (u32)(terms[i][k] * __fdividef(UNITS, largest)) + 1);
    }
  __syncthreads();
}

// What promotion does not change of a group; of the trailing block, everything.
struct Fixed { Group all; float low; float2 norms; };

// Of group k. A warp a row.
__device__ __forceinline__ Fixed fixed_part(const Call &call, const Groups &groups, int k, bool trailing, int heads, int h, int rows, int index, int base,
                                            const RowState &own) {
  const int row = index % ROW_TILE, lane = threadIdx.x % LANES;
  const int first = min(k * groups.together, call.splits), end = trailing ? first + 1 : min(first + groups.together, call.splits);
  Group all = {};
  float all_low = 0.f;
  int share = 1;  // lanes that share the group's splits; all such runs of lanes do the same
  while (!trailing && share < LANES && share < groups.together) share <<= 1;
  for (int i = first + lane % share; i < end; i += share) {
    const float *p = call.partials + ((i64)base * (call.splits + 1) + i) * PARTIALS * ROW_TILE + row;
    auto part = [&](int x) { return p[x * ROW_TILE]; };
    const float f = __fdividef(exp2_approx(part(SPLIT_TOP) - own.top), own.mass);
    all.used += f * part(USED), all.error += f * part(ERROR2), all.amplitude += f * part(AMPLITUDE), all.rho += f * part(MASS);
    all.dot += call.dots[(i64)(h * rows + index) * (call.splits + 1) + i];
    if (trailing) {
      all.t1 = f * part(T1), all.g = f * part(MASS_ERROR), all.spread = f * part(SPREAD), all.squares = f * f * part(KEY_SQUARES);
      all_low = f * part(LOW);
    }
  }
  const float2 norms = group_norms<true>(call, groups, k, heads, h);
#pragma unroll 1
  for (int bit = 1; bit < share; bit <<= 1) {
    float *sums[] = {&all.used, &all.error, &all.amplitude, &all.rho, &all.dot};
#pragma unroll
    for (float *sum : sums) *sum += __shfl_xor_sync(~0u, *sum, bit);
  }
  return {all, all_low, norms};
}

// What stays of a group below each of this lane's thresholds: its part of the bound, and of the denominator's loss. A warp a row.
__device__ __forceinline__ void add_group(const Fixed &fixed, bool trailing, int row, const RowState &own, const Bins &scale, const Room &room,
                                          float (&bound)[EACH], float (&lost)[EACH]) {
  const int lane = threadIdx.x % LANES;
  float below[SORTED][EACH];
#pragma unroll
  for (int x = 0; x < SORTED; x++) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int bin = lane * EACH + i;
      if (!trailing) sum += (float)room.bins[row][x][bin] * (room.most[x][row] * (1.f / UNITS)) * against(x, scale.edge(bin));
      below[x][i] = sum;
    }
    float before = sum;
#pragma unroll
    for (int step = 1; step < LANES; step <<= 1) {
      const float other = __shfl_sync(~0u, before, (lane - step) & (LANES - 1));
      if (lane >= step) before += other;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) below[x][i] += before - sum;
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    Group x = fixed.all;
    x.t1 += below[OF_T1][i], x.g += below[OF_G][i], x.spread += below[OF_SPREAD][i], x.squares += below[OF_SQUARES][i];
    x.coded = below[OF_VALUE][i], x.a2 = below[OF_CODED][i];
    const float2 found = group_terms<true>(x, fixed.norms, own.output);
    bound[i] += found.x + found.y, lost[i] += fixed.low + below[OF_LOW][i];
  }
}

// Of each row the largest threshold with which it is within, from all parts, to its facts; infinite where none does. For all threads: one a
// row and bin.
__device__ __forceinline__ void choose(const Call &call, int h, int rows, int tile, const volatile float *picks, int parts, const Bins &scale, Room &room) {
  static_assert(THREADS == ROW_TILE * BINS, "a thread a row and bin");
  const int row = threadIdx.x / BINS, bin = threadIdx.x % BINS;
  const RowState own(call, h, rows, tile * ROW_TILE + row);
  float terms = 0.f, low = 0.f;
#pragma unroll 16
  for (int part = 0; part < parts; part++) {
    terms += picks[part * 2 * THREADS + threadIdx.x], low += picks[(part * 2 + 1) * THREADS + threadIdx.x];
  }
  const float denominator = 1.f - low * LOW_ROUNDING, bound = (terms + own.fixed) * ((1.f + THETA) * SAFETY) / denominator;
  room.ratio[row][bin] = denominator > 1e-4f && bound < INFINITY ? bound / own.target : INFINITY;
  __syncthreads();
  const int index = tile * ROW_TILE + threadIdx.x;
  if (threadIdx.x < ROW_TILE && index < rows) {
    const RowState mine(call, h, rows, index);
    const float *ratio = room.ratio[threadIdx.x];
    int fits = 0;  // how many do: the lowest ones
    for (int step = BINS / 2; step; step >>= 1)
      if (fits + step <= BINS && ratio[fits + step - 1] <= 1.f) fits += step;
    if (fits == BINS - 1 && ratio[BINS - 1] <= 1.f) fits = BINS;
    float limit = INFINITY;
    if (mine.joins && fits) {
      limit = scale.edge(fits - 1);
      if (fits < FINE && ratio[fits] <= NEAR) limit += (scale.edge(fits) - limit) * (1.f - ratio[fits - 1]) / (ratio[fits] - ratio[fits - 1]);
    }
    call.facts[(i64)(h * rows + index) * ROW_FACTS + ROW_LIMIT] = limit;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) pick(const Call *calls, int heads, int group) {
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  if (blockIdx.x >= heads * tiles) return;
  const int h = blockIdx.x / tiles, tile = blockIdx.x % tiles, base = blockIdx.x;
  const Groups groups(call);
  const int parts = min(groups.count, PICK_PARTS), per_group = groups.together * call.per;
  if (call.exact_only || call.coverage || blockIdx.y >= parts) return;
  const int index = tile * ROW_TILE + warp;  // of warps that have a row
  const bool tail = call.tokens > call.full * BLOCK;
  wait_for_previous();
  const RowState own(call, h, rows, tile * ROW_TILE + threadIdx.x % ROW_TILE), summed(call, h, rows, index);
  if (!__ballot_sync(~0u, own.open)) return;
  __shared__ Room room;
  const Bins scale(call.full);
  float bound[EACH] = {0.f}, lost[EACH] = {0.f};
  for (int k = blockIdx.y; k < groups.count; k += PICK_PARTS) {
    const bool trailing = tail && k == groups.count - 1;
    const int first = k * per_group, end = trailing ? first : min(first + per_group, call.full);
    Seen blocks[ROUNDS];
    read_blocks(call, base, first, end, own, blocks);
    Fixed fixed = {};  // while these are on their way
    if (warp < ROW_TILE && index < rows) fixed = fixed_part(call, groups, k, trailing, heads, h, rows, index, base, summed);
    if (!trailing) sort_blocks(call, base, first, end, own, scale, blocks, room);
    if (warp < ROW_TILE && index < rows) add_group(fixed, trailing, warp, summed, scale, room, bound, lost);
    __syncthreads();
  }
  float *picks = call.picks + (i64)base * parts * 2 * THREADS;
  if (warp < ROW_TILE)
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      float *out = picks + blockIdx.y * 2 * THREADS + warp * BINS + lane * EACH + i;
      out[0] = bound[i], out[THREADS] = lost[i];
    }
  __threadfence();
  __syncthreads();
  int *ticket = call.tickets + heads + base;
  if (threadIdx.x == 0) {
    room.last = atomicAdd(ticket, 1) == parts - 1;
    if (room.last) *ticket = 0;  // for another launch of the same step
  }
  __syncthreads();
  if (!room.last) return;
  __threadfence();
  choose(call, h, rows, tile, picks, parts, scale, room);
}
