// Twin of ptx.cuh for a C++ compiler of the host: every thread of a block is a fiber.
//
// What a warp does together (ldmatrix, mma.sync, shuffles) is done when its last lane arrives. A copy
// to shared memory arrives when it is waited for; until then its place holds NaN. Lists are arrays:
// g++ spends more on one of the standard library's containers than on most kernels.
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE inline
#define UNROLL
#define QUICK __attribute__((optimize("O2")))  // most of what a kernel runs
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
inline u32 __float_as_uint(float x) { u32 y; memcpy(&y, &x, 4); return y; }
extern "C" {
alignas(1024) u8 memory[256 << 10];
}

struct Index { unsigned x, y = 0, z = 0; };
struct Copy { u32 to, bytes; const void* from; };
inline void fail(const char* why) { fprintf(stderr, "%s\n", why); abort(); }
template <class T, int N> struct List {
    T all[N];
    int count;
    void add(const T& x) { if (count == N) fail("a list is full"); all[count++] = x; }
    void drop(int n) { count -= n; memmove(all, all + n, count * sizeof(T)); }
};
struct Fiber {
    ucontext_t first;
    jmp_buf at;
    bool begun, done;
    List<Copy, 512> copies;  // that have not arrived
    List<int, 64> groups;    // how many copies each that is committed has
    int open;                // copies since
};
struct Meeting { unsigned arrived = 0, generation = 0; };
static Index threadIdx, blockIdx;
constexpr int MOST_THREADS = 1024;
static Fiber fibers[MOST_THREADS];
static unsigned block_threads;
static jmp_buf scheduler;
static unsigned idle;
static Meeting warps[32], everybody;
static u8 given[2][MOST_THREADS][64];

inline void yield() {
    unsigned me = threadIdx.x;
    if (++idle > 4 * block_threads + 8) fail("all threads wait");
    if (!_setjmp(fibers[me].at)) _longjmp(scheduler, 1);
}
inline void meet(Meeting& m, unsigned count) {
    unsigned generation = m.generation;
    if (++m.arrived == count) { m.arrived = 0; m.generation++; idle = 0; return; }
    while (m.generation == generation) yield();
}
inline void __syncthreads() { meet(everybody, block_threads); }

// Give a value to the lanes of the warp; return what a lane gave, once all have.
template <class T> struct Exchange {
    T (*from)[1];
    const u8 (*all)[64];
    T of(unsigned lane) const { T x; memcpy(&x, all[lane], sizeof(T)); return x; }
};
template <class T> Exchange<T> exchange(const T& x) {
    static_assert(sizeof(T) <= 64, "a lane's value");
    unsigned me = threadIdx.x, warp = me / 32;
    u8 (*half)[64] = given[warps[warp].generation & 1];
    memcpy(half[me], &x, sizeof(T));
    meet(warps[warp], 32);
    return {0, half + warp * 32};
}
template <class T> T __shfl_xor_sync(u32, T x, int mask) {
    auto all = exchange(x);
    return all.of((threadIdx.x & 31) ^ mask);
}
template <class T> T __shfl_up_sync(u32, T x, int by) {
    auto all = exchange(x);
    int lane = threadIdx.x & 31;
    return all.of(lane >= by ? lane - by : lane);
}
template <class T> T __shfl_sync(u32, T x, int from) {
    auto all = exchange(x);
    return all.of(from);
}
inline void __syncwarp() { exchange(0); }

inline u32 shared_address(const void* p) { return (u32)((const u8*)p - memory); }

QUICK inline void matrices(u32 (&x)[4], u32 row, bool turned) {
    if (row % 16) fail("a row of ldmatrix is not aligned");
    auto rows = exchange(row);
    int lane = threadIdx.x & 31;
    for (int m = 0; m < 4; m++)
        for (int i = 0; i < 2; i++) {
            int r = lane / 4, c = lane % 4 * 2 + i;
            u16 found;
            memcpy(&found, memory + rows.of(8 * m + (turned ? c : r)) + 2 * (turned ? r : c), 2);
            x[m] = i ? x[m] | (u32)found << 16 : found;
        }
}
inline void ldmatrix(u32 (&x)[4], u32 row) { matrices(x, row, false); }
inline void ldmatrix_turned(u32 (&x)[4], u32 row) { matrices(x, row, true); }

inline float of_bf16(u32 x) { return __uint_as_float(x << 16); }
inline float of_bf16_high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
struct Factors { u32 a[4], b[2]; };
QUICK inline void mma_bf16(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
    auto all = exchange(Factors{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    int g = (threadIdx.x & 31) / 4, j = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, column = 2 * j + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; k++) {
            u32 x = all.of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
            u32 y = all.of(column * 4 + k % 8 / 2).b[k / 8];
            sum += (double)(k & 1 ? of_bf16_high(x) : of_bf16(x)) * (k & 1 ? of_bf16_high(y) : of_bf16(y));
        }
        c[i] = (float)sum;
    }
}
QUICK inline void mma_tf32(float* c, const u32* a, u32 b0, u32 b1) {
    auto all = exchange(Factors{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    int g = (threadIdx.x & 31) / 4, j = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, column = 2 * j + i % 2;
        double sum = c[i];
        for (int k = 0; k < 8; k++)
            sum += (double)__uint_as_float(all.of(row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2])
                   * __uint_as_float(all.of(column * 4 + k % 4).b[k / 4]);
        c[i] = (float)sum;
    }
}

inline void copy16(u32 to, const void* from, u32 bytes) {
    if (to % 16 || ((u64)from % 16 && bytes)) fail("a copy is not aligned");
    memset(memory + to, 0xff, 16);
    Fiber& f = fibers[threadIdx.x];
    f.copies.add({to, bytes, from});
    f.open++;
}
inline void copies_commit() {
    Fiber& f = fibers[threadIdx.x];
    f.groups.add(f.open);
    f.open = 0;
}
inline void copies_arrive(int but) {
    Fiber& f = fibers[threadIdx.x];
    int groups = f.groups.count - but, copies = 0;
    if (groups <= 0) return;
    for (int i = 0; i < groups; i++) copies += f.groups.all[i];
    for (int i = 0; i < copies; i++) {
        Copy& c = f.copies.all[i];
        memset(memory + c.to, 0, 16);
        memcpy(memory + c.to, c.from, c.bytes);
    }
    f.copies.drop(copies);
    f.groups.drop(groups);
}
template <int N> void copies_wait() { copies_arrive(N); }

inline u32 half_up(float x) {  // bfloat16
    u32 bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 bf16_pair(float low, float high) { return half_up(low) | half_up(high) << 16; }
inline float of_f16(u16 x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
inline u16 to_f16(float x) { _Float16 y = (_Float16)x; u16 z; memcpy(&z, &y, 2); return z; }
inline u32 to_tf32(float x) { return x == x ? __float_as_uint(x) + 0x1000 & ~0x1fffu : 0x7fffffff; }

inline float power_of_2(float x) { return exp2f(x); }
inline u32 block_index() { return blockIdx.x; }
inline uint4 load16(u32 from) { uint4 x; memcpy(&x, memory + from, 16); return x; }
inline void store16(u32 to, uint4 x) { memcpy(memory + to, &x, 16); }
inline float load_float(u32 from) { float x; memcpy(&x, memory + from, 4); return x; }
inline float2 load_floats(u32 from) { return {load_float(from), load_float(from + 4)}; }
inline void store_float(u32 to, float x) { memcpy(memory + to, &x, 4); }
inline void store4(u32 to, u32 x) { memcpy(memory + to, &x, 4); }
static Meeting named[16];
inline void threads_sync(int name, int threads) { meet(named[name], threads); }

static void (*entry)();
static void begin() {
    entry();
    fibers[threadIdx.x].done = true;
    idle = 0;
    _longjmp(scheduler, 1);
}
static void run_block(unsigned block, unsigned threads, void (*kernel)()) {
    static char* stacks[MOST_THREADS];
    if (threads > MOST_THREADS) fail("too many threads");
    entry = kernel, blockIdx.x = block, block_threads = threads, idle = 0, everybody = Meeting();
    for (auto& w : warps) w = Meeting();
    memset(memory, 0xff, sizeof(memory));
    for (unsigned i = 0; i < threads; i++) {
        if (!stacks[i]) stacks[i] = (char*)malloc(256 << 10);
        fibers[i].begun = fibers[i].done = false;
        fibers[i].copies.count = fibers[i].groups.count = fibers[i].open = 0;
        getcontext(&fibers[i].first);
        fibers[i].first.uc_stack = {stacks[i], 0, 256 << 10};
        makecontext(&fibers[i].first, begin, 0);
    }
    volatile unsigned left = threads;
    while (left)
        for (volatile unsigned i = 0; i < threads; i = i + 1) {
            if (fibers[i].done) continue;
            threadIdx.x = i;
            if (!_setjmp(scheduler)) {
                if (fibers[i].begun) _longjmp(fibers[i].at, 1);
                fibers[i].begun = true;
                setcontext(&fibers[i].first);
            }
            if (fibers[i].done) left = left - 1;
        }
}
