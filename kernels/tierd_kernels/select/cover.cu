// Selection by the coverage policy (CERTIFICATE.md, section "Policies"): keys of the heaviest blocks until tau_cov of the mass, between
// k_min and k_max blocks, twice as many where the paper's key bound is above key_bound_max; values by the error that their block may make.
// One thread block a row. A mass is found among all by the bits of its float: positive ones are ordered as integers.
constexpr int COVER_WARPS = 16, THREADS = COVER_WARPS * LANES;

struct Heap { double mass; int count; };

__device__ Heap added(double mass, int count) {
  __shared__ double masses[COVER_WARPS];
  __shared__ int counts[COVER_WARPS];
  for (int bit = 1; bit < 32; bit <<= 1) mass += __shfl_xor_sync(~0u, mass, bit), count += __shfl_xor_sync(~0u, count, bit);
  __syncthreads();
  if (threadIdx.x % LANES == 0) masses[threadIdx.x / LANES] = mass, counts[threadIdx.x / LANES] = count;
  __syncthreads();
  mass = 0., count = 0;
  for (int w = 0; w < COVER_WARPS; w++) mass += masses[w], count += counts[w];
  return {mass, count};
}

extern "C" __global__ void __launch_bounds__(THREADS) cover(const Call *calls, int heads, int group) {
  let_next_begin();
  const Call &call = calls[blockIdx.z];
  wait_for_previous();
  const int rows = group * call.n, tiles = (rows + ROW_TILE - 1) / ROW_TILE, h = blockIdx.y, index = blockIdx.x, row = index % ROW_TILE;
  if (index >= rows || call.exact_only || !call.coverage) return;
  if (call.state[h * rows + index] != OPEN) return;
  const int base = h * tiles + index / ROW_TILE, full = call.full, blocks = full + (call.tokens > full * BLOCK), lane = threadIdx.x % LANES;
  const float *statistics = call.statistics + (i64)base * (full + 1) * STATISTIC_WORDS;
  float *facts = call.facts + (i64)(h * rows + index) * ROW_FACTS;
  const float top = facts[ROW_TOP];
  auto weight = [&](int b) {
    const float *x = statistics + (i64)b * STATISTIC_WORDS;
    const float sum = statistic(x, b, row, SUM);
    return sum > 0.f ? exp2_approx(statistic(x, b, row, TOP) - top) * sum : 0.f;
  };
  // Of blocks whose mass is at least that of these bits.
  auto above = [&](u32 bits) {
    double mass = 0.;
    int count = 0;
    for (int b = threadIdx.x; b < blocks; b += THREADS) {
      const float w = weight(b);
      if (__float_as_uint(w) >= bits) mass += w, count++;
    }
    return added(mass, count);
  };
  // The largest bits for which `enough` still holds.
  auto search = [&](auto enough) {
    u32 bits = 0;
    for (int bit = 30; bit >= 0; bit--)
      if (enough(above(bits | 1u << bit))) bits |= 1u << bit;
    return bits;
  };

  const Heap all = above(1);  // those with any mass
  const double wanted = call.tau_cov * all.mass;
  const u32 at = search([&](const Heap &x) { return x.count > 0 && x.mass >= wanted; });
  const Heap over = above(at + 1);
  const double each = __uint_as_float(at);
  int count = over.count + (each > 0. ? max(1, (int)fmin(ceil((wanted - over.mass) / each), 1e9)) : 0);
  count = min(min(max(count, call.k_min), call.k_max), all.count);

  float delta = 0.f, norm = 0.f;
  for (int b = threadIdx.x; b < blocks; b += THREADS) {
    const float *x = statistics + (i64)b * STATISTIC_WORDS;
    if (statistic(x, b, row, SUM) > 0.f) delta = fmaxf(delta, statistic(x, b, row, DELTA));
  }
  // The paper's bound is held against a threshold: norms as they are, not those of the statistics, which are above.
  const float per_unit = unit_factor(call.unit);
  for (int b = threadIdx.x; b < full; b += THREADS)
    norm = fmaxf(norm, ((const float *)(call.pool + call.hot[b] + (i64)h * RECORD_BYTES + NOTES_AT))[VALUE_NORM_MAX] * per_unit);
  const float *of_tail = call.partials + ((i64)base * (call.splits + 1) + call.splits) * PARTIALS * ROW_TILE + row;
  if (blocks > full) norm = fmaxf(norm, of_tail[NORM_TOP * ROW_TILE]);
  __shared__ float largest[2][COVER_WARPS];
  delta = warp_max(delta), norm = warp_max(norm);
  if (lane == 0) largest[0][threadIdx.x / LANES] = delta, largest[1][threadIdx.x / LANES] = norm;
  __syncthreads();
  for (int w = 0; w < COVER_WARPS; w++) delta = fmaxf(delta, largest[0][w]), norm = fmaxf(norm, largest[1][w]);

  // The `count` heaviest: those above a mass, and the first of those that have it.
  u32 least = 0;
  Heap heavier = {};
  double bound = 0.;
  for (int round = 0; round < 2; round++) {
    least = count ? search([&](const Heap &x) { return x.count >= count; }) : 0x7f800000u;
    heavier = above(least + 1);
    const double share = (all.mass - heavier.mass - (count - heavier.count) * (double)__uint_as_float(count ? least : 0)) / all.mass;
    const double tail = count < all.count ? fmax(share, 0.) : 0., d = delta;
    bound = tail > 0. && norm > 0.f ? 2. * norm * power_of_two(call.unit) * exp(3. * d) * expm1(2. * d) * tail : 0.;
    if (round || !(bound > call.key_bound_max)) break;
    count = min(2 * count, all.count);
  }

  __shared__ int before, in_warp[COVER_WARPS];
  if (threadIdx.x == 0) before = 0;
  int keys = 0, values = 0;
  const double unit = power_of_two(call.unit);
  for (int first = 0; first < blocks; first += THREADS) {
    const int b = first + threadIdx.x;
    const float w = b < blocks ? weight(b) : 0.f;
    const u32 bits = __float_as_uint(w);
    const bool tie = count && w > 0.f && bits == least;
    const u32 ties = __ballot_sync(~0u, tie);
    __syncthreads();
    if (lane == 0) in_warp[threadIdx.x / LANES] = __popc(ties);
    __syncthreads();
    int rank = before + __popc(ties & ((1u << lane) - 1));
    for (int k = 0; k < (int)threadIdx.x / LANES; k++) rank += in_warp[k];
    __syncthreads();
    if (threadIdx.x == 0)
      for (int k = 0; k < COVER_WARPS; k++) before += in_warp[k];
    const bool key = count && w > 0.f && (bits > least || (tie && rank < count - heavier.count));
    if (b == full && b < blocks) facts[ROW_TAIL] = key;
    if (b >= full) continue;
    float eta = 0.f;  // raw values err nowhere
    const unsigned char *record = call.pool + call.hot[b] + (i64)h * RECORD_BYTES;
    if (!((const u32 *)(record + NOTES_AT))[VALUES_RAW])
      for (int t = 0; t < BLOCK; t++) eta = fmaxf(eta, __uint_as_float(((const u32 *)(record + NORMS_AT))[t] & 0xffff0000u));
    const bool value = w / all.mass * eta > call.v_tol;
    if (key | value) atomicOr(call.marks + (i64)base * full + b, (key ? 1u : 0u) << row | (value ? 16u : 0u) << row);
    keys += key, values += value;
  }
  const Heap counted = added(0., keys), others = added(0., values);
  if (threadIdx.x) return;
  double *out = call.fields + h * rows + index;
  const i64 stride = (i64)heads * rows;
  call.counts[2 * (h * rows + index)] = counted.count, call.counts[2 * (h * rows + index) + 1] = others.count;
  out[PAPER_KEY_BOUND * stride] = bound;
}
