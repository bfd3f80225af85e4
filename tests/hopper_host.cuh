// Twin of warpgroup.cuh, behind cuda_host.cuh: barriers, copies and products of warpgroups.
//
// A product is done when it is waited for, of what shared memory and registers hold then. A wait for a
// barrier that nothing will reach ends as "all threads wait".
constexpr int W = 64, PANEL = 8192, LISTS = W * 12;

struct Barrier { int arrivals, left; u32 phase; };
static Barrier barriers[sizeof(memory) / 8];
inline Barrier& barrier(u32 bar) {
    Barrier& b = barriers[bar / 8];
    if (bar % 8 || !b.arrivals) fail("no barrier is there");
    return b;
}
inline void barrier_init(u32 bar, int arrivals) { barriers[bar / 8] = {arrivals, arrivals, 0}; }
inline void barrier_wait(u32 bar, u32 parity) { while (barrier(bar).phase % 2 == parity) yield(); }
inline void barrier_arrive(u32 bar) {
    Barrier& b = barrier(bar);
    if (--b.left == 0) b.left = b.arrivals, b.phase++, idle = 0;
}
inline void barrier_arrive_copies(u32 bar) {
    copies_commit();
    copies_wait<0>();
    barrier_arrive(bar);
}
inline void fence_async() {}
inline u64 evicted_first() { return 0; }
inline void bulk(void* to, const void* from, u32 bytes) {
    if ((u64)to % 16 || (u64)from % 16 || bytes % 16) fail("a bulk copy is not aligned");
    memcpy(to, from, bytes);
}
inline void bulk_load(u32 to, const void* from, u32 bytes, u32 bar, u64) {
    bulk(memory + to, from, bytes);
    barrier_arrive(bar);
}
inline void bulk_store(void* to, u32 from, u32 bytes, u64) {
    bulk(to, memory + from, bytes);
    memset(memory + from, 0xff, bytes);  // its place is free
}
template <int N> void bulk_read() {}
static Meeting groups[8];
inline void group_sync(int name) { threads_sync(name, 128); }
template <int N> void registers_more() {}
template <int N> void registers_less() {}

inline float bf16_at(u32 place) {
    place ^= (place >> 7 & 7) << 4;  // the swizzle, of address bits
    u16 found;
    memcpy(&found, memory + place, 2);
    return of_bf16(found);
}
// Element (row, term) of an operand; turned: its rows are the matrix's columns.
inline float operand_at(u32 place, int row, int term, bool turned, int panel = PANEL) {
    return bf16_at(place + (turned ? row / 64 * panel + term * 128 + row % 64 * 2 : row * 128 + term * 2));
}

struct Product { int columns, panel; bool ta, tb, more; u32 a, b; const u32* from[128]; float* to[128]; };
static Product coming[8];
static List<Product, 32> begun[8];
inline void product(int columns, bool ta, bool tb, u32 a, const u32* from, u32 b, bool more, float* d, int panel = PANEL) {
    int group = threadIdx.x / 128, t = threadIdx.x % 128;
    Product& p = coming[group];
    p.columns = columns, p.panel = panel, p.ta = ta, p.tb = tb, p.more = more, p.a = a, p.b = b;
    p.from[t] = from, p.to[t] = d;
    meet(groups[group], 128);
    if (t == 0) begun[group].add(p);
    meet(groups[group], 128);
}
template <int TA, int TB, int PB = PANEL, int N> void multiply(float (&d)[N], u32 a, u32 b, bool more) {
    product(2 * N, TA, TB, a, 0, b, more, d, PB);
}
template <int TB, int N> void multiply(float (&d)[N], const u32* a, u32 b, bool more) {
    product(2 * N, false, TB, 0, a, b, more, d);
}
inline void products() {}
inline void products_begun() {}
QUICK inline void finish(const Product& p) {
    static float a[64][16], b[128][16];
    for (int k = 0; k < 16; k++) {
        for (int m = 0; m < 64; m++) {
            if (p.from[0]) {
                u32 x = p.from[m / 16 * 32 + m % 8 * 4 + k % 8 / 2][m / 8 % 2 + k / 8 * 2];
                a[m][k] = k % 2 ? of_bf16_high(x) : of_bf16(x);
            } else {
                a[m][k] = operand_at(p.a, m, k, p.ta);
            }
        }
        for (int n = 0; n < p.columns; n++) b[n][k] = operand_at(p.b, n, k, p.tb, p.panel);
    }
    for (int m = 0; m < 64; m++)
        for (int n = 0; n < p.columns; n++) {
            float* d = p.to[m / 16 * 32 + m % 8 * 4 + n % 8 / 2] + n / 8 * 4 + m / 8 % 2 * 2 + n % 2;
            float sum = p.more ? *d : 0.f;
            for (int k = 0; k < 16; k++) sum += a[m][k] * b[n][k];
            *d = sum;
        }
}
inline void products_end() {
    int group = threadIdx.x / 128;
    meet(groups[group], 128);
    if (threadIdx.x % 128 == 0) {
        for (int i = 0; i < begun[group].count; i++) finish(begun[group].all[i]);
        begun[group].count = 0;
    }
    meet(groups[group], 128);
}
template <class... D> void products_done(D&...) { products_end(); }
template <class A> void unchanged(A&) {}

struct Rows { u32 to, x[4]; };
inline void put_blocks(Rows mine, bool turned) {
    auto all = exchange(mine);
    int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; m++)
        for (int i = 0; i < 2; i++) {
            int row = lane / 4, column = lane % 4 * 2 + i;
            u16 x = (u16)(mine.x[m] >> 16 * i);
            u32 to = all.of(8 * m + (turned ? column : row)).to;
            memcpy(memory + to + 2 * (turned ? row : column), &x, 2);
        }
    __syncwarp();
}
inline void store_blocks(u32 to, u32 a, u32 b, u32 c, u32 d) { put_blocks({to, {a, b, c, d}}, false); }
inline void store_blocks_turned(u32 to, u32 a, u32 b, u32 c, u32 d) { put_blocks({to, {a, b, c, d}}, true); }
