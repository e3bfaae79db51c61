// Selection under the hard budget: for a row that missed it, the fewest blocks whose keys or values, read as originals, are predicted to
// bring it within.
//
// A key and a value record cost the same bytes, so one threshold on both shares ranks them (as select/reference.py's cheapest_within does). A
// record that has a copy counts as if its share were `preference` times as large: to read it costs nothing of the link.
// What is promoted counts as without error, which a target below the budget makes up for. Selection may be wrong at will: only what finish
// computes from what was used opens the gate.
//
// One pass tries all thresholds: a thread block takes groups of 1024 tokens, two side by side, and sorts their blocks' terms into the bins
// between thresholds; what lies above each threshold is a running sum over bins, what stays is the group's total less that,
// and from it comes the group's part of the bound. The thread block of a tile that ends last adds the parts up and chooses; promotion finds the
// blocks' weights where they were written. Bins are integers, in parts of the total: their sums depend on no order.
constexpr int PICK_WARPS = 8, THREADS = PICK_WARPS * LANES, EACH = BINS / LANES;
constexpr int SIDE_BY_SIDE = PICK_WARPS / ROW_TILE;  // groups: a warp has one group and row
enum { OF_T1, OF_G, OF_SPREAD, OF_SQUARES, OF_VALUE, OF_CODED, SORTED };  // the last two by the weight of values, the others of keys
constexpr float UNITS = 0x1p24f;  // in a total
// A group whose total is infinite, for blocks that stay original until they are promoted, or so many targets that what is left below a
// threshold would be lost in it, is counted in these parts of the target instead, at most so many a block: 128 blocks' then fit 32 bits.
constexpr float TOTAL_MAX = 0x1p10f, UNITS_OF_TARGET = 0x1p16f, MOST_UNITS = 0x1p24f;
// Between two thresholds the predicted bound is taken to be linear where it is no more than this above 1 at the upper one: with 2, rows missed
// their budgets.
constexpr float NEAR = 1.04f;

struct __align__(16) Room {
  u32 bins[SIDE_BY_SIDE][ROW_TILE][SORTED][BINS];  // the first: of blocks above all thresholds, for those below them are not sorted
  float to_units[SIDE_BY_SIDE][ROW_TILE][SORTED];
  float beside[2][ROW_TILE][BINS], ratio[ROW_TILE][BINS], target[ROW_TILE], fixed[ROW_TILE];
};
// What is foreseen of a group and row. Of sums whose total is known (`keys`, `values`) what stays below a threshold is `rest` less what is
// sorted above, in parts of `unit`; else `rest` and what is sorted below.
struct Foreseen { float rest[SORTED], unit[SORTED], spread_factor, low_share; float2 norms; bool keys, values; };
__device__ __forceinline__ bool of_values(int k) { return k >= OF_VALUE; }

struct Preference { int heads, h, times; };  // times 1 where there are no copies
// What is found of a block and row; with bits of which one says whether its original keys, or values, have a copy.
struct Found { Seen seen; u32 copied[2]; };
__device__ __forceinline__ Found find(const Call &call, const Preference &preference, int base, int b, int row) {
  Found found = {seen(call, base, b, row), {0, 0}};
  if (preference.times > 1)
#pragma unroll
    for (int kind = 0; kind < 2; kind++) found.copied[kind] = copied_with(call, record_of(kind, preference.heads, preference.h, b));
  return found;
}
// Sorts it into bins; returns what its keys and values count.
__device__ __forceinline__ float2 sort(const Found &found, const Preference &preference, int b, const RowState &own, const Bins &scale,
                                       const float (&to_units)[SORTED], u32 (&bins)[SORTED][BINS]) {
  const Shares s = shares(found.seen, own);
  auto times = [&](int kind) {
    const u32 record = record_of(kind, preference.heads, preference.h, b);
    return found.copied[kind] >> record % 32 & 1 ? (float)preference.times : 1.f;
  };
  const float key = weight(s.key * times(0), own.target), value = weight(s.value * times(1), own.target);
  const int key_bin = scale.of(key), value_bin = scale.of(value);
  const float terms[SORTED] = {s.terms.t1, s.terms.g, s.terms.spread, s.terms.squares, s.terms.value, s.terms.coded};
#pragma unroll
  for (int k = 0; k < SORTED; k++) {
    const int bin = of_values(k) ? value_bin : key_bin;
    if (bin) atomicAdd(&bins[k][bin % BINS], (u32)(fminf(terms[k] * to_units[k], MOST_UNITS) + 0.5f));
  }
  return make_float2(key, value);
}

// Of group k, whose blocks are `count`. A warp's.
__device__ __forceinline__ Foreseen foresee(const Call &call, const Groups &groups, int k, bool trailing, int count, int h, int rows, int index, int base,
                                            const RowState &own, const Bins &scale, float2 norms, float (&to_units)[SORTED]) {
  const int lane = threadIdx.x % LANES, own_split = groups.split_of(k, lane);
  Group all = {};
  float low = 0.f;
  if (own_split >= 0) {
    const float *p = call.partials + ((i64)base * (call.splits + 1) + own_split) * PARTIALS * ROW_TILE + index % ROW_TILE;
    auto part = [&](int x) { return p[x * ROW_TILE]; };
    const float f = __fdividef(exp2_approx(part(SPLIT_TOP) - own.top), own.mass);
    add_split(all, f, part);
    low = f * part(LOW), all.dot = call.dots[(i64)(h * rows + index) * (call.splits + 1) + own_split];
  }
  Foreseen to;
  to.norms = norms;
#pragma unroll 1
  for (int bit = 1; bit < groups.together; bit <<= 1) {  // all runs of lanes that share a group do the same
    all.join(bit);
    low += __shfl_xor_sync(~0u, low, bit);
  }
  // Where a total is not known, T1 and the blocks' own value errors are foreseen, summed over what stays.
  const float most = TOTAL_MAX * own.target;
  to.keys = trailing || (all.t1 + own.output * all.g < most && all.squares + all.spread < INFINITY);
  to.values = trailing || (all.coded < most && all.a2 < INFINITY);
  to.spread_factor = spread_factor(all, own.output);
  to.low_share = to.keys && all.g > 0.f ? __fdividef(low, all.g) : 1.f;
  const float totals[SORTED] = {all.t1, all.g, all.spread, all.squares, all.coded, all.a2};
  const float below = (float)count * scale.edge(0) * own.target;  // all that lies below the lowest threshold, at most
  float of_lane = 0.f;
#pragma unroll
  for (int x = 0; x < SORTED; x++) {
    const bool total = of_values(x) ? to.values : to.keys;
    const float scaled = total ? totals[x] : own.target * (UNITS / UNITS_OF_TARGET);
    to.rest[x] = total ? totals[x] : x == OF_T1 || x == OF_VALUE ? below : x == OF_G ? 0.f : INFINITY, to.unit[x] = scaled * (1.f / UNITS);
    of_lane = lane == x ? scaled : of_lane;
  }
  if (lane < SORTED) to_units[lane] = of_lane > 0x1p-100f ? __fdividef(UNITS, of_lane) : 0.f;
  return to;
}

// What stays of a group below each of this lane's thresholds: its part of the bound, and of the denominator's loss. A warp's.
__device__ __forceinline__ void add_group(const Foreseen &of, const RowState &own, const u32 (&bins)[SORTED][BINS], float (&bound)[EACH],
                                          float (&lost)[EACH]) {
  const int lane = threadIdx.x % LANES;
  float stays[SORTED][EACH];
#pragma unroll
  for (int x = 0; x < SORTED; x++) {
    u32 until[EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) until[i] = sum += lane + i ? bins[x][lane * EACH + i] : 0u;
    u32 before = sum;
#pragma unroll
    for (int step = 1; step < LANES; step <<= 1) {
      const u32 other = __shfl_sync(~0u, before, (lane - step) & (LANES - 1));
      if (lane >= step) before += other;
    }
    const u32 all = __shfl_sync(~0u, before, LANES - 1) + bins[x][0];
    const bool total = of_values(x) ? of.values : of.keys;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const u32 below = before - sum + until[i];
      const float x_stays = total ? of.rest[x] - of.unit[x] * (float)(all - below) : of.rest[x] + of.unit[x] * (float)below;
      stays[x][i] = x_stays < 0.f ? 0.f : x_stays;  // which leaves a NaN
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    Group x = {};
    x.t1 = stays[OF_T1][i], x.g = stays[OF_G][i], x.spread = stays[OF_SPREAD][i], x.squares = stays[OF_SQUARES][i];
    x.coded = stays[OF_VALUE][i], x.a2 = stays[OF_CODED][i];
    const float2 found = group_terms(x, of.spread_factor, of.norms, own.output);
    bound[i] += found.x + found.y, lost[i] += of.low_share * x.g;
  }
}

// Of each row the largest threshold with which it is within, from all parts, to its facts; infinite where none does. For all threads: one a
// row and bin. `own`: of row threadIdx.x, of the tile's first threads.
__device__ __forceinline__ void choose(const Call &call, int h, int rows, int index, const RowState &own, const float2 *picks, int parts, const Bins &scale,
                                       Room &room) {
  static_assert(THREADS == ROW_TILE * BINS, "a thread a row and bin");
  const int row = threadIdx.x / BINS, bin = threadIdx.x % BINS;
  float2 of[PICK_PARTS];  // all on their way at once, however few there are
#pragma unroll
  for (int part = 0; part < PICK_PARTS; part++) of[part] = part < parts ? __ldcg(picks + part * THREADS + threadIdx.x) : make_float2(0.f, 0.f);
  float terms = 0.f, low = 0.f;
#pragma unroll
  for (int part = 0; part < PICK_PARTS; part++) terms += of[part].x, low += of[part].y;
  const float denominator = 1.f - low * LOW_ROUNDING, bound = __fdividef((terms + room.fixed[row]) * ((1.f + THETA) * SAFETY), denominator);
  room.ratio[row][bin] = denominator > 1e-4f ? weight(bound, room.target[row]) : INFINITY;
  __syncthreads();
  if (threadIdx.x < ROW_TILE && index < rows) {
    const float *ratio = room.ratio[threadIdx.x];
    int fits = 0;  // how many do: the lowest ones
    for (int step = BINS / 2; step; step >>= 1)
      if (fits + step <= BINS && ratio[fits + step - 1] <= 1.f) fits += step;
    if (fits == BINS - 1 && ratio[BINS - 1] <= 1.f) fits = BINS;
    float limit = INFINITY;
    if (own.joins && fits) {
      limit = scale.edge(fits - 1);
      if (fits < BINS && ratio[fits] <= NEAR) limit += (scale.edge(fits) - limit) * (1.f - ratio[fits - 1]) / (ratio[fits] - ratio[fits - 1]);
    }
    call.facts[(i64)(h * rows + index) * ROW_FACTS + ROW_LIMIT] = limit;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) pick(const Call *calls, int heads, int group, int parts_max) {
  __shared__ Room room;
  let_next_begin();
  const Call &call = own_call<THREADS>(calls);
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  if (blockIdx.x >= heads * tiles) return;
  const int h = quotient(blockIdx.x, tiles), tile = blockIdx.x - h * tiles, base = blockIdx.x;
  const Groups groups(call);
  const int parts = min((groups.count + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE, parts_max), per_group = groups.together * call.per;
  if (call.exact_only || blockIdx.y >= parts) return;
  if (call.coverage) return wait_for_previous();  // a kernel waits for the one ahead of it alone, not for what that has not waited for
  const int side = warp / ROW_TILE, row = warp % ROW_TILE, index = tile * ROW_TILE + row;
  const bool tail = call.tokens > call.full * BLOCK;
  auto trailing = [&](int k) { return tail && k == groups.count - 1; };
  auto blocks_of = [&](int k) { return k >= groups.count || trailing(k) ? 0 : min(per_group, call.full - k * per_group); };
  auto clear = [&] { for (int i = threadIdx.x; i < SIDE_BY_SIDE * ROW_TILE * SORTED * BINS; i += THREADS) (&room.bins[0][0][0][0])[i] = 0; };
  clear();
  const GroupNorms ahead(call, groups, blockIdx.y + side * parts, heads, h);  // which no kernel of the step writes
  const RowPlace own_place(call, h, rows, tile * ROW_TILE + threadIdx.x % ROW_TILE), summed_place(call, h, rows, index);
  const Preference preference = {heads, h, call.copied ? call.preference : 1};
  wait_for_previous();
  const RowState own(own_place), summed(summed_place);
  if (!__ballot_sync(~0u, own.open)) return;
  if (threadIdx.x < ROW_TILE) room.target[threadIdx.x] = own.target, room.fixed[threadIdx.x] = own.fixed;
  const Bins scale(call.full);
  const u32 joining = __ballot_sync(~0u, own.joins) & (1u << ROW_TILE) - 1;
  // All threads look at blocks for the rows that join: for one, as it most often is, or two; for all where there are more.
  const int joined = __popc(joining), doublings = joined > 2 ? 2 : joined / 2, which = threadIdx.x & (1 << doublings) - 1;
  const int looked_for = joined > 2 ? which : max(0, __ffs(which ? joining & joining - 1 : joining) - 1);
  const RowState state = own.of(looked_for);
  float2 *weights = call.row_weights + (i64)base * call.full * ROW_TILE + looked_for;
  float bound[EACH] = {0.f}, lost[EACH] = {0.f};
  for (int begin = blockIdx.y; begin < groups.count; begin += SIDE_BY_SIDE * parts) {
    const int beside = begin + parts, count = blocks_of(begin), total = state.joins ? count + blocks_of(beside) << doublings : 0;
    auto block_of = [&](int pair) { return (pair >> doublings < count ? begin * per_group : beside * per_group - count) + (pair >> doublings); };
    Found next;
    if (threadIdx.x < total) next = find(call, preference, base, block_of(threadIdx.x), looked_for);
    const int mine = begin + side * parts;
    const bool sums = mine < groups.count && index < rows, again = begin != blockIdx.y;
    if (again) clear();
    Foreseen foreseen;  // while the blocks are on their way
    if (sums) {
      const float2 norms = (again ? GroupNorms(call, groups, mine, heads, h) : ahead).in_units(unit_factor(call.unit));
      foreseen = foresee(call, groups, mine, trailing(mine), blocks_of(mine), h, rows, index, base, summed, scale, norms, room.to_units[side][row]);
    }
    __syncthreads();
#pragma unroll 1
    for (int pair = threadIdx.x; pair < total; pair += THREADS) {
      const Found found = next;
      if (pair + THREADS < total) next = find(call, preference, base, block_of(pair + THREADS), looked_for);
      const int b = block_of(pair), of = pair >> doublings >= count;
      weights[b * ROW_TILE] = sort(found, preference, b, state, scale, room.to_units[of][looked_for], room.bins[of][looked_for]);
    }
    __syncthreads();
    if (sums) add_group(foreseen, summed, room.bins[side][row], bound, lost);
    __syncthreads();
  }
  if (side) {
#pragma unroll
    for (int i = 0; i < EACH; i++) room.beside[0][row][lane * EACH + i] = bound[i], room.beside[1][row][lane * EACH + i] = lost[i];
  }
  __syncthreads();
  float2 *picks = (float2 *)call.picks + (i64)base * parts * ROW_TILE * BINS;
  if (!side)
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int at = lane * EACH + i;
      picks[(blockIdx.y * ROW_TILE + row) * BINS + at] = make_float2(bound[i] + room.beside[0][row][at], lost[i] + room.beside[1][row][at]);
    }
  if (!ends_last(call.tickets + 2 * heads + base, parts)) return;
  choose(call, h, rows, tile * ROW_TILE + threadIdx.x, own, picks, parts, scale, room);
}
