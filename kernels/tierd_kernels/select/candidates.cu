// Which blocks come near needing their originals, for whoever copies them ahead of need: of every KV head the at most `candidates_max`
// blocks whose keys, and whose values, have the largest share of the bound in any of its rows, relative to what selection aims at
// (threshold.cuh), and in a row that promoted to the share from which on it did, if that is less: 1 is where promotion begins. It runs when
// the answers are on their way to the host already; nobody waits for it.
//
// What any row promoted is none of them: that it was read is known from the marks, and of a KV head that promotes many it would leave no
// place to others. A skipped block has no share: it can spend none. The coverage policy promotes by mass: its rows' shares stay as they are.
//
// A thread block reduces a part of the blocks over all rows of a KV head; the last of them to end sees all shares and chooses. Its
// threshold is found by counting, a digit of the float's bits a pass: positive floats are ordered as integers. Of equal scores at the
// threshold the first blocks are taken. Sums are of integers, and maxima depend on no order: the same bits each time, whoever is last.
constexpr int CANDIDATE_PARTS = 16, CANDIDATE_WARPS = 16, THREADS = CANDIDATE_WARPS * LANES;
constexpr int DIGITS = 4, DIGIT_BITS = 8, DIGIT_VALUES = 1 << DIGIT_BITS;  // of 32 bits, the sign's zero
constexpr float SHARE_MAX = 3e38f;                                 // an infinite share is a large one
constexpr float PROMOTED = 3.4e38f;                                // until all rows are seen: none

constexpr float LIMIT_MIN = 1e-30f;  // a row may promote whatever has a share

// From which share on a row promotes.
__device__ __forceinline__ float limit_of(const Call &call, int at_row) {
  // Without promotions there may be no threshold: the row was not open to selection.
  const bool promoted = call.counts[2 * at_row] | call.counts[2 * at_row + 1];
  return promoted && !call.coverage ? fmaxf(fminf(call.facts[(i64)at_row * ROW_FACTS + ROW_LIMIT], 1.f), LIMIT_MIN) : 1.f;
}

// Shares of the blocks [first, last) to `shares` [2][full], the largest over all rows of the KV head.
__device__ __forceinline__ void reduce_rows(const Call &call, int h, int rows, int tiles, int first, int last, float *shares) {
  const int row = threadIdx.x % ROW_TILE;
  for (int tile = 0; tile < tiles; tile++) {
    const int base = h * tiles + tile, index = tile * ROW_TILE + row;
    const RowState own(call, h, rows, min(index, rows - 1));
    const float aim = own.target * limit_of(call, h * rows + min(index, rows - 1));
    for (int start = first; start < last; start += THREADS / ROW_TILE) {
      const int b = start + threadIdx.x / ROW_TILE;
      float key = 0.f, value = 0.f;
      if (b < last && index < rows && own.target > 0.f) {
        const Seen block = seen(call, base, b, row);
        const u32 mark = block.mark >> row;
        const Shares found = ::shares(block, own);
        key = fminf(fmaxf(found.key / aim, 0.f), SHARE_MAX), value = fminf(fmaxf(found.value / aim, 0.f), SHARE_MAX);  // a NaN is 0
        if (mark & 1) key = PROMOTED;
        if (mark & 16) value = PROMOTED;
      }
#pragma unroll
      for (int bit = 1; bit < ROW_TILE; bit <<= 1) {
        key = fmaxf(key, __shfl_xor_sync(~0u, key, bit)), value = fmaxf(value, __shfl_xor_sync(~0u, value, bit));
      }
      if (row || b >= last) continue;
      if (tile) key = fmaxf(shares[b], key), value = fmaxf(shares[call.full + b], value);
      const float most = tile == tiles - 1 ? SHARE_MAX : PROMOTED;
      shares[b] = key <= most ? key : 0.f, shares[call.full + b] = value <= most ? value : 0.f;
    }
  }
}

struct Cut { u32 bits; int ties; };  // taken: what lies above `bits`, and the first `ties` of what has them

// Above which bits at most `most` shares lie. Shares are read past the first cache, where another multiprocessor's are not seen.
__device__ __forceinline__ Cut cut_at(const volatile float *shares, int full, int most) {
  __shared__ int counts[DIGIT_VALUES], digit, above;
  const int lane = threadIdx.x % LANES;
  Cut cut = {0, most};
  for (int pass = DIGITS - 1; pass >= 0; pass--) {
    __syncthreads();
    if (threadIdx.x < DIGIT_VALUES) counts[threadIdx.x] = 0;
    if (threadIdx.x == 0) digit = -1;
    __syncthreads();
    for (int b = threadIdx.x; b < full; b += THREADS) {
      const u32 bits = __float_as_uint(shares[b]);
      if (bits && (u64)bits >> (pass + 1) * DIGIT_BITS == cut.bits) atomicAdd(&counts[bits >> pass * DIGIT_BITS & (DIGIT_VALUES - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x < LANES) {  // a lane has neighbouring bins, and looks for the one in which the count is reached from above
      int own = 0;
      for (int i = 0; i < DIGIT_VALUES / LANES; i++) own += counts[lane * (DIGIT_VALUES / LANES) + i];
      int higher = own;
      for (int step = 1; step < LANES; step <<= 1) {
        const int next = __shfl_sync(~0u, higher, (lane + step) % LANES);
        if (lane + step < LANES) higher += next;
      }
      higher -= own;
      if (higher < cut.ties && cut.ties <= higher + own) {
        int bin = (lane + 1) * (DIGIT_VALUES / LANES) - 1;
        while (higher + counts[bin] < cut.ties) higher += counts[bin--];
        digit = bin, above = higher;
      }
    }
    __syncthreads();
    if (digit < 0) return {0, 0};  // fewer than that are positive; only the first pass can find this
    cut.bits = cut.bits << DIGIT_BITS | digit, cut.ties -= above;
  }
  return cut;
}

// The blocks that `cut` takes, in order; -1 and zero behind them.
__device__ __forceinline__ void write_taken(const volatile float *shares, int full, int most, Cut cut, int *blocks, float *scores) {
  __shared__ int of_warp[CANDIDATE_WARPS][2];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  int above = 0, ties = 0;  // before this round's
  for (int first = 0; first < full; first += THREADS) {
    const int b = first + threadIdx.x;
    const float share = b < full ? shares[b] : 0.f;
    const u32 bits = __float_as_uint(share), lower = (1u << lane) - 1;
    const bool over = bits > cut.bits, tie = bits && bits == cut.bits;
    const u32 overs = __ballot_sync(~0u, over), equals = __ballot_sync(~0u, tie);
    __syncthreads();
    if (lane == 0) of_warp[warp][0] = __popc(overs), of_warp[warp][1] = __popc(equals);
    __syncthreads();
    int before = above + __popc(overs & lower), rank = ties + __popc(equals & lower);
    for (int w = 0; w < CANDIDATE_WARPS; w++) {
      if (w < warp) before += of_warp[w][0], rank += of_warp[w][1];
      above += of_warp[w][0], ties += of_warp[w][1];
    }
    if (!over && !(tie && rank < cut.ties)) continue;
    blocks[before + min(rank, cut.ties)] = b, scores[before + min(rank, cut.ties)] = share;
  }
  for (int i = above + min(ties, cut.ties) + threadIdx.x; i < most; i += THREADS) blocks[i] = -1, scores[i] = 0.f;
}

extern "C" __global__ void __launch_bounds__(THREADS) candidates(const Call *calls, int heads, int group) {
  const Call &call = calls[blockIdx.z];
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, h = blockIdx.x, full = call.full, most = call.candidates_max;
  const int each = (full + CANDIDATE_PARTS - 1) / CANDIDATE_PARTS, first = blockIdx.y * each;
  float *shares = call.shares + (i64)h * 2 * full;
  if (!most) return;
  if (!call.exact_only) reduce_rows(call, h, rows, tiles, first, min(first + each, full), shares);
  if (!ends_last(call.tickets + h, CANDIDATE_PARTS)) return;
  for (int kind = 0; kind < 2; kind++) {
    const int count = call.exact_only ? 0 : full;  // of an exact row no share is known
    int *blocks = call.candidate_blocks + ((i64)kind * heads + h) * most;
    float *scores = call.candidate_scores + ((i64)kind * heads + h) * most;
    write_taken(shares + (i64)kind * full, count, most, cut_at(shares + (i64)kind * full, count, most), blocks, scores);
  }
}
