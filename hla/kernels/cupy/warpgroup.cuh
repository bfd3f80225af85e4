// Instructions of Hopper beyond ptx.cuh: products of warpgroups, barriers, fences, registers.
//
// A matrix in shared memory has panels of 64 rows of 64 columns, 8 KB, of which row r has its i-th
// 16 bytes at (i ^ r % 8): as products take it with its columns or its rows as what they sum over.

constexpr int W = 64, PANEL = W * 128;  // tokens in a chunk
constexpr int LISTS = W * 12;           // bytes of a chunk's weights: three lists

// ---- Barriers

DEVICE void barrier_init(u32 bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals));
}

DEVICE void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra AGAIN;\n}" ::"r"(bar), "r"(parity) : "memory");
}

DEVICE void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// One arrival, counted in advance, when the copies that this thread has begun are there.
DEVICE void barrier_arrive_copies(u32 bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

// ---- Bulk copies of whole 16 bytes, which another unit does

DEVICE u64 evicted_first() {  // what their lines are in the second-level cache
    u64 found;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(found));
    return found;
}

// To shared memory; a barrier, of which this is an arrival, waits for its bytes too.
DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 bar, u64 policy) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}

// From shared memory, a group by itself.
DEVICE void bulk_store(void* to, u32 from, u32 bytes, u64 policy) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;"
                 ::"l"(to), "r"(from), "r"(bytes), "l"(policy) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// All but the last N of this thread's stores have read what they store.
template <int N> DEVICE void bulk_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }

// What threads have written to shared memory, for products and bulk copies to read.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void group_sync(int name) { asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory"); }

template <int N> DEVICE void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> DEVICE void registers_less() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- Products: d += a b of 64 rows and N columns, 16 terms each

#define D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(d, i) D4(d, i), D4(d, i + 4), D4(d, i + 8), D4(d, i + 12)
#define D32(d) D16(d, 0), D16(d, 16)
#define D64(d) D32(d), D16(d, 32), D16(d, 48)
#define A4(a, i) "+r"(a[i]), "+r"(a[i + 1]), "+r"(a[i + 2]), "+r"(a[i + 3])
#define A16(a) A4(a, 0), A4(a, 4), A4(a, 8), A4(a, 12)
#define A32(a) A16(a), A4(a, 16), A4(a, 20), A4(a, 24), A4(a, 28)
#define TEXT32                                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "               \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TEXT64                                                                             \
    TEXT32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
           "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "   \
           "%62, %63"
#define WGMMA(N) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "

// A place in a matrix as products take it: 8 rows after 1024 bytes, 64 columns after a panel.
DEVICE u64 described(u32 place, int panel = PANEL) {
    return (u64)(64u | 1u << 30) << 32 | (place >> 4 | (u32)(panel >> 4) << 16);
}

// Of matrices in shared memory; TA and TB: of which the columns are a's rows or b's columns; PB:
// bytes of a panel of b.
template <int TA, int TB, int PB = PANEL>
DEVICE void multiply(float (&d)[32], u32 a, u32 b, bool more) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" WGMMA(64) "{" TEXT32 "}, "
        "%32, %33, p, 1, 1, %35, %36;\n}"
        : D32(d) : "l"(described(a)), "l"(described(b)), "r"((int)more), "n"(TA), "n"(TB));
}

template <int TA, int TB, int PB = PANEL>
DEVICE void multiply(float (&d)[64], u32 a, u32 b, bool more) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" WGMMA(128) "{" TEXT64 "}, "
        "%64, %65, p, 1, 1, %67, %68;\n}"
        : D64(d)
        : "l"(described(a)), "l"(described(b, PB)), "r"((int)more), "n"(TA), "n"(TB));
}

// The same with a in registers.
template <int TB> DEVICE void multiply(float (&d)[32], const u32 *a, u32 b, bool more) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" WGMMA(64) "{" TEXT32 "}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
        : D32(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(described(b)), "r"((int)more), "n"(TB));
}

template <int TB> DEVICE void multiply(float (&d)[64], const u32 *a, u32 b, bool more) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n" WGMMA(128) "{" TEXT64 "}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
        : D64(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(described(b)), "r"((int)more), "n"(TB));
}

// Before the first of products, after registers they take have changed.
DEVICE void products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void products_begun() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All products are done. What they made and what they took changes neither before nor meanwhile.
#define DONE "wgmma.wait_group.sync.aligned 0;"
DEVICE void products_done(float (&d)[32]) { asm volatile(DONE : D32(d)::"memory"); }
DEVICE void products_done(float (&d)[64]) { asm volatile(DONE : D64(d)::"memory"); }
DEVICE void products_done(float (&d)[32], float (&e)[32]) { asm volatile(DONE : D32(d), D32(e)::"memory"); }
DEVICE void products_done(float (&d)[32], float (&e)[32], float (&f)[32]) {
    asm volatile(DONE : D32(d), D32(e), D32(f)::"memory");
}
DEVICE void products_done(float (&d)[64], float (&e)[64]) { asm volatile(DONE : D64(d), D64(e)::"memory"); }

DEVICE void products_done(float (&d)[32], float (&e)[32], float (&f)[32], float (&g)[32]) {
    asm volatile(DONE : D32(d), D32(e), D32(f), D32(g)::"memory");
}

DEVICE void unchanged(u32 (&a)[16]) { asm volatile("" : A16(a)::"memory"); }
DEVICE void unchanged(u32 (&a)[32]) { asm volatile("" : A32(a)::"memory"); }

// ---- Shared memory

// Four blocks of 8 x 8 at the places of their rows, a row by each lane; transposed.
DEVICE void store_blocks(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

DEVICE void store_blocks_turned(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
