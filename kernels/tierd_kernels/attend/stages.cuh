// What a warp of `attend` has of its blocks in shared memory, or on its way there: key codes and norms of KEY_STAGES tiles of tokens and value codes of
// VALUE_STAGES by bulk copies, and of CHUNK blocks the heads of their records, scales, offsets and notes, whose places are taken by those of the chunk
// behind it as they are used.
//
// A thread block has a quarter of a multiprocessor's shared memory.
constexpr int KEY_STAGES = 2, VALUE_STAGES = 2;
// Of values so many are under way before the first of them has been used. Where a block is one tile they are asked for together with keys, by one branch:
// of 131,072 tokens rung 0 takes an H200 87.6 us for 88.2. Keys and values by one copy: 88.1 for 86.8, of 8,192 tokens 15.5 for 14.6.
constexpr int VALUES_AHEAD = TILES == 1 ? 1 : VALUE_STAGES;
constexpr int HEAD_BYTES = KEY_CODES_AT;
constexpr int TILE_NORMS = 4 * TILE, KEY_BYTES = TILE_CODES + TILE_NORMS;
// Where lines can be kept, what begins in the middle of one does so in shared memory too.
constexpr int lines(int bytes) { return LINED ? (bytes + LINE - 1) / LINE * LINE : bytes; }
constexpr int KEYS_EACH = lines(KEY_BYTES), KEYS_SHIFT = LINED ? KEY_CODES_AT % LINE : 0;
constexpr int VALUES_EACH = lines(VALUE_BYTES), VALUES_SHIFT = LINED ? SCORE_BYTES % LINE : 0;
constexpr int HEADS_AT = KEY_STAGES * KEYS_EACH, VALUES_AT = HEADS_AT + CHUNK * HEAD_BYTES;
constexpr int STAGED_BYTES = VALUES_AT + VALUE_STAGES * VALUES_EACH + lines(VALUES_SHIFT);  // of a warp
static_assert(!LINED || KEYS_SHIFT + KEY_BYTES <= KEYS_EACH, "the last stage of keys ends with its lines");

struct Stages {
  u32 keys, heads, values, bars, records;
  int items;  // tiles of tokens
  u64 policy;
  // For `count` blocks; what lies where: the warp's room, a barrier for each stage of keys, then of values, and the records' addresses.
  __device__ __forceinline__ Stages(u32 room, u32 bars_at, u32 records_at, int count)
      : keys(in_register(room + KEYS_SHIFT)), heads(in_register(room + HEADS_AT)), values(in_register(room + VALUES_AT + VALUES_SHIFT)),
        bars(in_register(bars_at)), records(in_register(records_at)), items(count * TILES), policy(stream_policy()) {}

  __device__ __forceinline__ u64 record(int block) const {
    const uint2 at = shared64(records + 8 * block);
    return (u64)at.y << 32 | at.x;
  }
  __device__ __forceinline__ void copy(u32 to, u64 from, u32 bytes, u32 bar) const { bulk_stream(to, (const void *)from, bytes, bar, policy); }
  __device__ __forceinline__ u32 key_bar(int i) const { return bars + 8 * (i % KEY_STAGES); }
  __device__ __forceinline__ u32 value_bar(int i) const { return bars + 8 * (KEY_STAGES + i % VALUE_STAGES); }

  __device__ __forceinline__ void issue_keys(int i) const {
    if (i >= items || threadIdx.x % LANES) return;
    const u64 from = record(i / TILES) + KEY_CODES_AT;
    const u32 to = keys + i % KEY_STAGES * KEYS_EACH, bar = key_bar(i);
    barrier_expect(bar, KEY_BYTES);
    copy(to, from + i % TILES * TILE_CODES, TILES == 1 ? KEY_BYTES : TILE_CODES, bar);
    if (TILES > 1) copy(to + TILE_CODES, from + BLOCK * KEY_DIM + i % TILES * TILE_NORMS, TILE_NORMS, bar);
  }
  __device__ __forceinline__ void issue_values(int i) const {
    if (i >= items || threadIdx.x % LANES) return;
    barrier_expect(value_bar(i), VALUE_BYTES);
    copy(values + i % VALUE_STAGES * VALUES_EACH, record(i / TILES) + SCORE_BYTES + i % TILES * VALUE_BYTES, VALUE_BYTES, value_bar(i));
  }
  __device__ __forceinline__ u32 head(int block) const { return heads + block % CHUNK * HEAD_BYTES; }
  __device__ __forceinline__ void fetch_head(int block) const {
    const u64 from = record(block);
    const u32 to = head(block);
#pragma unroll
    for (int first = 0; first < HEAD_BYTES; first += 16 * LANES) {
      const int at = first + threadIdx.x % LANES * 16;
      if (at < HEAD_BYTES) copy16(to + at, (const void *)(from + at), policy);
    }
  }
  // Waits for tile i; returns where its codes lie: of keys, and behind them its norms; of values.
  __device__ __forceinline__ u32 keys_here(int i) const {
    barrier_wait(key_bar(i), i / KEY_STAGES & 1);
    return keys + i % KEY_STAGES * KEYS_EACH;
  }
  __device__ __forceinline__ u32 values_here(int i) const {
    barrier_wait(value_bar(i), i / VALUE_STAGES & 1);
    return values + i % VALUE_STAGES * VALUES_EACH;
  }
};
