// A CUDA device for tests, on one x86-64 core: what ptx.cuh and CUDA's own headers give the kernels, in plain C++.
//
// A thread block's threads are fibers that run in turn until they wait for one another: lanes of a warp at shuffles and MMAs, all threads at
// barriers. Where none can go on the launch ends with an error: a barrier that some threads never reach is found here, and a wait on one of
// copies that the thread's warp has not initialised, unless all threads have met since. What is faithful:
// the order of operations, flushing of FP32 subnormals, FP16 rounding, copies that arrive no earlier than the wait for them (their target
// holds NaN before), alignment of vectors (a trap), memory of exited lanes. What is not: speed, memory consistency between threads,
// `ex2.approx`'s own bits (it errs here by nearly as much as the bounds allow, in a direction that depends on the argument) and the order of an
// MMA's sum (exact, then truncated).
//
// A kernel takes as long to build as its headers do: all of immintrin.h would add half a second to each.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <xmmintrin.h>

#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { u32 x, y, z; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

#define __device__
#define __global__ __attribute__((visibility("default")))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((__noinline__))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static

namespace emulator {

constexpr int LANES = 32, THREADS_MAX = 1024, SHARED_BYTES = 228 << 10;
// A power of two would put what is used of each stack in the same few sets of the processor's caches: a switch takes up to twice as long.
constexpr int STACK_BYTES = (64 << 10) + 448;
alignas(128) static unsigned char dynamic[SHARED_BYTES];

// Threads that wait for one another, and what they exchange meanwhile: two buffers in turn, so that a slow reader is never overwritten.
struct Group {
  int live, arrived;
  u32 turn;
  u64 slots[2][LANES][4];
  int any[2];
};
struct Fiber { void *at; dim3 index; bool done; };
struct Copy { void *to; const void *from; u32 bytes; u64 *bar; };
struct Initialised { u64 *bar; int warp; u32 turn; };  // by a thread of that warp, at that turn of the block's barrier

static Fiber fibers[THREADS_MAX];
static char *stacks;
static Group warps[THREADS_MAX / LANES], block;
static std::vector<Copy> copies;
static std::vector<Initialised> initialised;
static const char *fault;  // of the block that runs, if it has one
static Fiber *current;
static void *scheduler;
static dim3 block_index;
static u64 progress;  // anything that may let another thread go on
static void (*body)(u64, u64, u64, u64, u64, u64);
static u64 arguments[6];

extern "C" void emulator_switch(void **from, void *to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  pop %rcx
  jmp *%rcx  # as a return it would be foretold wrongly
)");

static void pause() { emulator_switch(&current->at, scheduler); }
static __forceinline__ int warp_index() { return current->index.x / LANES; }
static __forceinline__ Group &warp() { return warps[warp_index()]; }
static __forceinline__ int lane() { return current->index.x % LANES; }
static void leave(Group &group) {
  progress++;
  if (--group.live == group.arrived && group.live) group.arrived = 0, group.turn++, group.any[group.turn & 1] = 0;
}

// Waits until all live threads of the group are here; returns which buffer they exchanged.
static int meet(Group &group) {
  const u32 turn = group.turn;
  progress++;
  if (++group.arrived == group.live) {
    group.arrived = 0, group.turn++, group.any[group.turn & 1] = 0;
  } else {
    while (group.turn == turn) pause();
  }
  return turn & 1;
}
static void run() {
  body(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
  current->done = true;
  leave(warp());
  leave(block);
  pause();
}

// What the lanes of the warp gave: up to four words each.
static const u64 (*exchange(u64 a, u64 b = 0, u64 c = 0, u64 d = 0))[4] {
  u64(*given)[4] = warp().slots[warp().turn & 1];
  const u64 words[4] = {a, b, c, d};
  memcpy(given[lane()], words, sizeof words);
  meet(warp());
  return given;
}
template <typename T>
static T shuffle(T x, int source) {
  u64(*given)[4] = warp().slots[warp().turn & 1];
  memcpy(given[lane()], &x, sizeof x);
  meet(warp());
  memcpy(&x, given[source & (LANES - 1)], sizeof x);
  return x;
}

// The least step from x on that leads to all of so many.
static u32 step_of(u32 x, u32 number) {
  u32 a = x, b = number;
  while (b) { const u32 rest = a % b; a = b, b = rest; }
  return a == 1 ? x : step_of(x + 1, number);
}
// So many in an order of `seed`; as they are numbered with seed 0.
struct Order {
  u32 number, from, step;
  Order(u32 number, u32 seed) : number(number), from(seed % number), step(seed ? step_of(from * 2654435761u % number, number) : 1) {}
  u32 operator[](u32 k) const { return (from + (u64)k * step) % number; }
};

// Without a seed all threads go on side by side. With one each warp goes on as far as it can alone, and the next one then: what they
// leave for each other without a barrier is there in some orders and not in others.
static bool run_block(int threads, u32 seed) {
  memset(dynamic, 0xff, sizeof dynamic);
  copies.clear(), initialised.clear(), fault = nullptr;
  memset(&block, 0, sizeof block);
  block.live = threads;
  const int protection = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (!stacks) stacks = (char *)mmap(nullptr, THREADS_MAX * STACK_BYTES, protection, kind, -1, 0);
  for (int t = 0; t < threads; t++) {
    if (t % LANES == 0) memset(&warps[t / LANES], 0, sizeof(Group)), warps[t / LANES].live = threads - t < LANES ? threads - t : LANES;
    Fiber &fiber = fibers[t];
    void **top = (void **)(stacks + (t + 1) * STACK_BYTES) - 2;
    *top = (void *)run;
    fiber.at = top - 6, fiber.done = false, fiber.index = {(u32)t, 0, 0};
  }
  const Order in_turn((threads + LANES - 1) / LANES, seed);
  for (int left = threads; left;) {
    const u64 before = progress;
    left = 0;
    for (u32 k = 0; k < in_turn.number; k++) {
      const int first = in_turn[k] * LANES, lanes = threads - first < LANES ? threads - first : LANES;
      u64 by_itself;
      int here;
      do {
        by_itself = progress, here = 0;
        for (int i = 0; i < lanes; i++) {
          current = &fibers[first + (seed & 1 ? lanes - 1 - i : i)];
          if (!current->done) emulator_switch(&scheduler, current->at), here += !current->done;
        }
      } while (seed && !fault && here && progress != by_itself);
      left += here;
    }
    if (!fault && left && progress == before) fault = "wait for others that never come";
    if (fault) return false;
  }
  return true;
}
// Whether the warp can know that the barrier is there.
static bool is_ready(u64 *bar) {
  for (size_t i = initialised.size(); i--;)
    if (initialised[i].bar == bar) return initialised[i].warp == warp_index() || initialised[i].turn != block.turn;
  return false;
}

// Runs a grid, in another order of thread blocks and of their warps for each number that TIERD_EMULATOR_ORDER may be; returns a text that says what went wrong, or null. Arguments are integers and addresses: six at most.
extern "C" __global__ const char *emulator_launch(void *kernel, u32 gx, u32 gy, u32 gz, u32 threads, u32 shared, const u64 *values) {
  static char text[160];
  if (threads > THREADS_MAX || shared > SHARED_BYTES) return "more threads or shared memory than a device has";
  body = (decltype(body))kernel;
  memcpy(arguments, values, sizeof arguments);
  const u32 mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040);  // FP32 subnormals count as zero, as in what CuPy builds
  bool good = true;
  const char *order = getenv("TIERD_EMULATOR_ORDER");
  const u32 seed = order ? atoi(order) : 0;
  const Order in_turn(gx * gy * gz, seed);
  for (u32 k = 0; k < in_turn.number && good; k++) {
    const u32 at = in_turn[k];
    block_index = {at % gx, at / gx % gy, at / gx / gy}, good = run_block(threads, seed);
  }
  _mm_setcsr(mode);
  if (good) return nullptr;
  snprintf(text, sizeof text, "threads of block (%u, %u, %u) %s", block_index.x, block_index.y, block_index.z, fault);
  return text;
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define __shfl_xor_sync(mask, x, bit) emulator::shuffle(x, emulator::lane() ^ (bit))
#define __shfl_sync(mask, x, source) emulator::shuffle(x, source)
inline void __syncwarp() { emulator::meet(emulator::warp()); }
inline void __syncthreads() { emulator::meet(emulator::block); }
inline int __syncthreads_or(int x) {
  emulator::block.any[emulator::block.turn & 1] |= x != 0;
  return emulator::block.any[emulator::meet(emulator::block)];
}
inline u32 __ballot_sync(u32, bool x) {
  const u64(*given)[4] = emulator::exchange(x);
  u32 bits = 0;
  for (int i = 0; i < 32; i++) bits |= (u32)(given[i][0] & 1) << i;
  return bits;
}
inline void __threadfence() {}
inline u32 atomicOr(u32 *p, u32 x) { u32 old = *p; *p |= x; return old; }
inline u32 atomicAdd(u32 *p, u32 x) { u32 old = *p; *p += x; return old; }
inline int atomicAdd(int *p, int x) { int old = *p; *p += x; return old; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <typename To, typename From> inline To bits_as(From x) { To y; static_assert(sizeof x == sizeof y, ""); memcpy(&y, &x, sizeof x); return y; }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __uint_as_float(u32 x) { return bits_as<float>(x); }
inline u32 __float_as_uint(float x) { return bits_as<u32>(x); }
inline double __hiloint2double(int high, int low) { return bits_as<double>((u64)(u32)high << 32 | (u32)low); }
inline int __ffs(u32 x) { return __builtin_ffs((int)x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((u32)x) : 32; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }  // contraction is off
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
  const u64 both = (u64)y << 32 | x;
  u32 out = 0;
  for (int i = 0; i < 4; i++) out |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}

// Rounding of a double to FP32, down, up or to odd: what is rounded to odd can be rounded again to fewer bits as if it were the double.
inline float towards(double x, bool up) {
  float y = (float)x;
  if (x != x || (double)y == x) return y;
  return ((double)y < x) == up ? nextafterf(y, up ? INFINITY : -INFINITY) : y;
}
inline float __double2float_ru(double x) { return towards(x, true); }
inline float __double2float_rd(double x) { return towards(x, false); }
inline float to_odd(double x) {
  const float low = towards(x, false), high = towards(x, true);
  return low == high || __float_as_uint(low) & 1 ? low : high;
}

struct __half { unsigned short bits; };
struct __half2 { __half x, y; };
struct __nv_bfloat16 { unsigned short bits; };
typedef float four_floats __attribute__((vector_size(16)));
typedef short eight_halves __attribute__((vector_size(16)));
enum Rounding { TO_NEAREST, DOWN, UP };  // as the instruction has it
template <Rounding mode> inline __half as_half(float x) { return {(unsigned short)__builtin_ia32_vcvtps2ph((four_floats){x}, mode)[0]}; }
inline __half __float2half(float x) { return as_half<TO_NEAREST>(x); }
inline __half __float2half_ru(float x) { return as_half<UP>(x); }
inline __half __float2half_rd(float x) { return as_half<DOWN>(x); }
inline __half __double2half(double x) { return __float2half(to_odd(x)); }
inline float __half2float(__half x) { return __builtin_ia32_vcvtph2ps((eight_halves){(short)x.bits})[0]; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline __half __uint2half_rn(u32 x) { return __float2half((float)x); }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half __hfma(__half a, __half b, __half c) { return __double2half((double)__half2float(a) * __half2float(b) + __half2float(c)); }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) {
  return {__float2half(__half2float(a.x) - __half2float(b.x)), __float2half(__half2float(a.y) - __half2float(b.y))};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {__float2half(__half2float(a.x) * __half2float(b.x)), __float2half(__half2float(a.y) * __half2float(b.y))};
}
inline __nv_bfloat16 __double2bfloat16(double x) {
  const u32 bits = __float_as_uint(to_odd(x));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((u32)x.bits << 16); }

// What follows stands for ptx.cuh. A shared address is the distance from the dynamic part.
inline u32 shared_at(const void *p) { return (u32)((const char *)p - (const char *)emulator::dynamic); }
inline unsigned char *from_shared(u32 at) { return emulator::dynamic + (int)at; }
inline u32 shared32(u32 at) { u32 x; memcpy(&x, from_shared(at), sizeof x); return x; }
inline uint2 shared64(u32 at) { uint2 x; memcpy(&x, from_shared(at), sizeof x); return x; }
inline uint4 shared128(u32 at) { uint4 x; memcpy(&x, from_shared(at), sizeof x); return x; }

// A barrier: the phase in its last bit, arrivals that are missing in the next, bytes that are missing above.
inline void barrier_init(u64 *bar) {
  *bar = 2;
  emulator::initialised.push_back({bar, emulator::warp_index(), emulator::block.turn});
}
inline void barriers_ready() { __syncwarp(); }
inline void barrier_expect(u64 *bar, u32 bytes) { *bar = (*bar & ~2ull) + ((u64)bytes << 8); }
inline void bulk_copy(void *to, const void *from, u32 bytes, u64 *bar) {
  if ((u64)to % 16 || (u64)from % 16 || bytes % 16) fprintf(stderr, "a bulk copy is not aligned\n"), __builtin_trap();
  memset(to, 0xff, bytes);
  emulator::copies.push_back({to, from, bytes, bar});
}
template <typename T> inline T __ldcg(const T *p) { return *p; }
inline u64 stream_policy() { return 0; }
inline u64 keep_policy() { return 0; }
inline void store_kept(float *at, float x, u64) { *at = x; }
inline void store_kept(float *at, float x, float y, u64) { at[0] = x, at[1] = y; }
inline void copy16(u32 to, const void *from, u64) { bulk_copy(from_shared(to), from, 16, (u64 *)emulator::current); }
inline void copies_wait() {
  for (size_t i = 0; i < emulator::copies.size();) {
    const emulator::Copy copy = emulator::copies[i];
    if (copy.bar != (u64 *)emulator::current) { i++; continue; }
    memcpy(copy.to, copy.from, copy.bytes);
    emulator::copies.erase(emulator::copies.begin() + i);
  }
  __syncwarp();
}
inline void let_next_begin() {}
inline void wait_for_previous() {}
inline void bulk_stream(void *to, const void *from, u32 bytes, u64 *bar, u64) { bulk_copy(to, from, bytes, bar); }
inline void bulk_stream(u32 to, const void *from, u32 bytes, u32 bar, u64) { bulk_copy(from_shared(to), from, bytes, (u64 *)from_shared(bar)); }
inline void barrier_expect(u32 bar, u32 bytes) { barrier_expect((u64 *)from_shared(bar), bytes); }
inline u32 in_register(u32 x) { return x; }
inline void barrier_wait(u64 *bar, u32 parity) {
  if (!emulator::is_ready(bar)) emulator::fault = "wait on a barrier that may not be initialised yet", emulator::pause();
  for (size_t i = 0; i < emulator::copies.size();) {
    const emulator::Copy copy = emulator::copies[i];
    if (copy.bar != bar) { i++; continue; }
    memcpy(copy.to, copy.from, copy.bytes);
    *bar -= (u64)copy.bytes << 8;
    emulator::copies.erase(emulator::copies.begin() + i);
    emulator::progress++;
  }
  if ((*bar & ~1ull) == 0) *bar = (*bar ^ 1) | 2, emulator::progress++;
  while ((*bar & 1) == parity) emulator::pause();
}
inline void barrier_wait(u32 bar, u32 parity) { barrier_wait((u64 *)from_shared(bar), parity); }

inline float exp2_approx(float x) {
  if (x == 0.f) return 1.f;
  const float y = (float)(exp2((double)x) * (__float_as_uint(x) * 2654435761u >> 31 ? 1. + 0x1.3p-24 : 1. - 0x1.3p-24));
  return y < 0x1p-126f ? 0.f : y;
}
inline float sqrt_approx(float x) { return (float)(sqrt((double)x) * (__float_as_uint(x) * 2654435761u >> 31 ? 1. + 0x1p-22 : 1. - 0x1p-22)); }
inline u32 either(u32 w, u32 mask, u32 magic) { return (w & mask) | magic; }

inline float truncated(double x) { return fabs(x) < 0x1p-126 ? 0.f : towards(x, x < 0.); }
template <typename Read>
inline void mma_16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, Read read) {
  const u64(*given)[4] = emulator::exchange((u64)a1 << 32 | a0, (u64)a3 << 32 | a2, (u64)b1 << 32 | b0);
  const int r = emulator::lane() / 4, c = emulator::lane() % 4;
  double sums[4] = {d[0], d[1], d[2], d[3]};
  for (int k = 0; k < 16; k++) {
    const int from = k % 8 / 2, upper = k / 8, odd = 16 * (k % 2);
    for (int i = 0; i < 4; i++) {
      const u64 a = given[4 * r + from][upper] >> (32 * (i / 2) + odd), b = given[4 * (2 * c + i % 2) + from][2] >> (32 * upper + odd);
      sums[i] += read((unsigned short)a) * read((unsigned short)b);
    }
  }
  for (int i = 0; i < 4; i++) d[i] = truncated(sums[i]);
}
inline double half_of(unsigned short bits) { return __half2float({bits}); }
inline double bf16_of(unsigned short bits) { return __bfloat162float({bits}); }
inline void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { mma_16(d, a0, a1, a2, a3, b0, b1, half_of); }
inline void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { mma_16(d, a0, a1, a2, a3, b0, b1, bf16_of); }
inline u32 transposed(u32 x) {
  const u64(*given)[4] = emulator::exchange(x, 0, 0);
  const int r = emulator::lane() / 4, c = emulator::lane() % 4, odd = 16 * (r % 2);
  return ((u32)given[8 * c + r / 2][0] >> odd & 0xffffu) | ((u32)given[8 * c + 4 + r / 2][0] >> odd & 0xffffu) << 16;
}
inline u32 bf16_pair(float lower, float upper) { return (u32)__double2bfloat16(upper).bits << 16 | __double2bfloat16(lower).bits; }
inline u32 bf16_products(u32 x, u32 y) {
  const auto product = [](u32 x, u32 y) { return (u32)__double2bfloat16(bf16_of((unsigned short)x) * bf16_of((unsigned short)y)).bits; };
  return product(x >> 16, y >> 16) << 16 | product(x, y);
}
inline u32 bf16_largest(u32 x, u32 y) {
  const auto larger = [](u32 x, u32 y) { return (u32)__double2bfloat16(fmax(bf16_of((unsigned short)x), bf16_of((unsigned short)y))).bits; };
  return larger(x >> 16, y >> 16) << 16 | larger(x, y);
}
inline void mma_s8(int (&d)[4], uint4 x, u32 b0, u32 b1) {
  const u64(*given)[4] = emulator::exchange((u64)x.y << 32 | x.x, (u64)x.w << 32 | x.z, (u64)b1 << 32 | b0);
  const int r = emulator::lane() / 4, c = emulator::lane() % 4;
  for (int k = 0; k < 32; k++) {
    const int from = k % 16 / 4, upper = k / 16, byte = 8 * (k % 4);
    for (int i = 0; i < 4; i++) {
      const u64 a = given[4 * r + from][upper] >> (32 * (i / 2) + byte), b = given[4 * (2 * c + i % 2) + from][2] >> (32 * upper + byte);
      d[i] += (int)(signed char)a * (int)(signed char)b;
    }
  }
}
