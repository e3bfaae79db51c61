// Which blocks come near needing their originals, for whoever copies them ahead of need: of every KV head the at most `candidates_max`
// blocks whose keys, and whose values, have the largest share of the bound in any of its rows, relative to what selection aims at
// (threshold.cuh), and in a row that promoted to the share from which on it did, if that is less: 1 is where promotion begins. It runs once
// the host has the answers, where the policy looks at one of them; nobody waits for it.
//
// What any row promoted is none of them: that it was read is known from the marks, and of a KV head that promotes many it would leave no
// place to others. The coverage policy promotes by mass: its rows' shares stay as they are.
//
// A thread block reduces a part of the blocks over all rows of a KV head, of keys or of values; the last of them to end sees all shares and
// chooses. It holds as many as it can in registers: 17 us at 131,072 tokens, where reading them anew for each pass, one after the other, made
// it 59, and letting parts choose for themselves before it 27. Its threshold is found by counting, a digit of the float's bits a pass:
// positive floats are ordered as integers. Of equal scores at the threshold the first blocks are taken. Sums are of integers, and maxima
// depend on no order: the same bits each time, whoever is last.
constexpr int CANDIDATE_PARTS = 16, CANDIDATE_WARPS = 16, THREADS = CANDIDATE_WARPS * LANES;
constexpr int HELD = 16, AT_ONCE = THREADS * HELD;                         // shares of a thread, and of all, under way together
constexpr int DIGITS = 4, DIGIT_BITS = 8, DIGIT_VALUES = 1 << DIGIT_BITS;  // of 32 bits, the sign's zero
constexpr float SHARE_MAX = 3e38f;                                         // an infinite share is a large one
constexpr float PROMOTED = 3.4e38f;                                        // until all rows are seen: none

constexpr float LIMIT_MIN = 1e-30f;  // a row may promote whatever has a share

// From which share on a row promotes.
__device__ __forceinline__ float limit_of(const Call &call, int at_row) {
  // Without promotions there may be no threshold: the row was not open to selection.
  const bool promoted = call.counts[2 * at_row] | call.counts[2 * at_row + 1];
  return promoted && !call.coverage ? fmaxf(fminf(call.facts[(i64)at_row * ROW_FACTS + ROW_LIMIT], 1.f), LIMIT_MIN) : 1.f;
}

// Shares of the blocks [first, last), of keys or of values, to `shares` [full], the largest over all rows of the KV head.
__device__ __forceinline__ void reduce_rows(const Call &call, int kind, int h, int rows, int tiles, int first, int last, float *shares) {
  const int row = threadIdx.x % ROW_TILE;
  for (int tile = 0; tile < tiles; tile++) {
    const int base = h * tiles + tile, index = tile * ROW_TILE + row;
    const RowState own(RowPlace(call, h, rows, min(index, rows - 1)));
    const float aim = own.target * limit_of(call, h * rows + min(index, rows - 1));
    for (int start = first; start < last; start += THREADS / ROW_TILE) {
      const int b = start + threadIdx.x / ROW_TILE;
      float share = 0.f;
      if (b < last && index < rows && own.target > 0.f) {
        const u32 mark = call.marks[(i64)base * call.full + b];
        const Shares found = ::shares(seen(call, base, b, row), own);
        share = fminf(fmaxf((kind ? found.value : found.key) / aim, 0.f), SHARE_MAX);  // a NaN is 0
        if (mark >> row & (kind ? 16 : 1)) share = PROMOTED;
      }
#pragma unroll
      for (int bit = 1; bit < ROW_TILE; bit <<= 1) share = fmaxf(share, __shfl_xor_sync(~0u, share, bit));
      if (row || b >= last) continue;
      if (tile) share = fmaxf(shares[b], share);
      shares[b] = share <= (tile == tiles - 1 ? SHARE_MAX : PROMOTED) ? share : 0.f;
    }
  }
}

// A thread's shares, every THREADS-th of all: held for good where that is all of them, else read anew wherever they are gone through. Past
// the first cache, where another multiprocessor's are not seen.
struct Held {
  const float *shares;
  int count;
  bool all;
  float own[HELD];
  __device__ __forceinline__ Held(const float *shares, int count) : shares(shares), count(count), all(count <= AT_ONCE) {
    if (all) read(0);
  }
  __device__ __forceinline__ void read(int from) {
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      const int b = from + k * THREADS + threadIdx.x;
      own[k] = b < count ? __ldcg(shares + b) : 0.f;
    }
  }
  // Calls `visit(from)` with those of a thread from each multiple of AT_ONCE on, in turn.
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) {
#pragma unroll 1
    for (int from = 0; from < count; from += AT_ONCE) {
      if (!all) read(from);
      visit(from);
    }
  }
};

struct Cut { u32 bits; int ties; };  // taken: what lies above `bits`, and the first `ties` of what has them

// Above which bits at most `most` shares lie.
__device__ __forceinline__ Cut cut_at(Held &held, int most) {
  __shared__ int counts[DIGIT_VALUES], digit, above;
  const int lane = threadIdx.x % LANES;
  Cut cut = {0, most};
#pragma unroll 1
  for (int pass = DIGITS - 1; pass >= 0; pass--) {
    __syncthreads();
    if (threadIdx.x < DIGIT_VALUES) counts[threadIdx.x] = 0;
    if (threadIdx.x == 0) digit = -1;
    __syncthreads();
    held.each([&](int) {
#pragma unroll
      for (int k = 0; k < HELD; k++) {
        const u32 bits = __float_as_uint(held.own[k]), value = bits >> pass * DIGIT_BITS & (DIGIT_VALUES - 1);
        if (bits && (u64)bits >> (pass + 1) * DIGIT_BITS == cut.bits) atomicAdd(&counts[value], 1);
      }
    });
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
    if (digit < 0) break;  // fewer than that are positive, as only the first pass can find: what is above zero is taken
    cut.bits = cut.bits << DIGIT_BITS | digit, cut.ties -= above;
  }
  return cut;
}

// The blocks that `cut` takes, in order; -1 and zero behind them.
__device__ __forceinline__ void write_taken(Held &held, int most, Cut cut, int *blocks, float *scores) {
  // By round and warp: how many lie above the cut before, and at it, in the upper half.
  __shared__ u32 before[HELD * CANDIDATE_WARPS], all;
  static_assert(AT_ONCE < 1 << 16 && HELD * CANDIDATE_WARPS == 8 * LANES, "halves of a word; a lane has eight");
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  int above = 0, ties = 0;  // before this visit's
  held.each([&](int from) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      const u32 bits = __float_as_uint(held.own[k]);
      const u32 overs = __ballot_sync(~0u, bits > cut.bits), equals = __ballot_sync(~0u, bits && bits == cut.bits);
      if (lane == 0) before[k * CANDIDATE_WARPS + warp] = __popc(overs) | __popc(equals) << 16;
    }
    __syncthreads();
    if (warp == 0) {
      u32 own[8], sum = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) own[i] = sum, sum += before[lane * 8 + i];
      u32 upto = sum;
#pragma unroll
      for (int step = 1; step < LANES; step <<= 1) {
        const u32 other = __shfl_sync(~0u, upto, (lane + LANES - step) % LANES);
        if (lane >= step) upto += other;
      }
#pragma unroll
      for (int i = 0; i < 8; i++) before[lane * 8 + i] = own[i] + upto - sum;
      if (lane == LANES - 1) all = upto;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      const u32 bits = __float_as_uint(held.own[k]), lower = (1u << lane) - 1, of_warp = before[k * CANDIDATE_WARPS + warp];
      const bool over = bits > cut.bits, tie = bits && bits == cut.bits;
      const u32 overs = __ballot_sync(~0u, over), equals = __ballot_sync(~0u, tie);
      const int rank = ties + (of_warp >> 16) + __popc(equals & lower);
      const int place = above + (of_warp & 0xffff) + __popc(overs & lower) + min(rank, cut.ties);
      if (over || (tie && rank < cut.ties)) blocks[place] = from + k * THREADS + threadIdx.x, scores[place] = held.own[k];
    }
    above += all & 0xffff, ties += all >> 16;
  });
  for (int i = above + min(ties, cut.ties) + threadIdx.x; i < most; i += THREADS) blocks[i] = -1, scores[i] = 0.f;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) candidates(const Call *calls, int heads, int group) {
  const Call &call = calls[blockIdx.z];
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, h = blockIdx.x / 2, kind = blockIdx.x % 2;
  const int full = call.full, most = call.candidates_max, each = (full + CANDIDATE_PARTS - 1) / CANDIDATE_PARTS;
  const int first = min(blockIdx.y * each, full), last = min(first + each, full);
  float *shares = call.shares + ((i64)h * 2 + kind) * full;
  if (!most) return;
  if (!call.exact_only) reduce_rows(call, kind, h, rows, tiles, first, last, shares);
  if (!ends_last(call.tickets + blockIdx.x, CANDIDATE_PARTS)) return;
  const i64 at = ((i64)kind * heads + h) * most;
  Held held(shares, call.exact_only ? 0 : full);  // of an exact row no share is known
  write_taken(held, most, cut_at(held, most), call.candidate_blocks + at, call.candidate_scores + at);
}
