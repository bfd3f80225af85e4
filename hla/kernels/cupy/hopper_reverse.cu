// Adjoint of hla2 on Hopper, last token first: the gradients of y, v and k.
//
//     R = sum q do' (power 2)        dy = R v, dv = R' y
//     Z = sum q dy' + dy q'          dk = Z k
//
// A block of threads does a head. The first warpgroup owns R, the second Z, which is symmetric: of its
// four blocks of 64 three are kept, and the one beside the diagonal is read the other way round from a
// copy in shared memory. R is read both ways round, from a bfloat16 copy. The third warpgroup stores
// what the owners leave in the place of an operand that nobody reads any more (dy takes v's, dv y's,
// dk k's) and loads the next chunk there. By chunks of W = 64 tokens, of pairs up (lo) whose row is not
// later (not earlier) than the column:
//
//     dY = V R' + up(V dO') Q     dV = Y R + up(Y Q') dO                 R += Q' dO
//     dK' = Z K' + dY' lo(Q K') + Q' lo(dY K')                          Z += Q' dY + dY' Q
//
// A gate's weights lie beside a chunk: see hopper.cu. Here states are read by the weights of what is
// left of a chunk, and written by those of what came before; there is one list, raised by the power.
//
// Bytes a token and head, D = V = 128: 8 rows of 256, 0.358 ms for B = 8, T = 4096, H = 16 at 3.0
// TB/s; with hopper_queries.cu, 0.627, one H100 took 0.697 (90%).
//
// Compiled for each B (tiles of 64 or 128 keys and values), GATE (0 none, 1 decay, 2 log gate), FAST,
// WHOLE and SHARED as hopper.cu.
#include "ptx.cuh"
#include "arrays.cuh"
#include "warpgroup.cuh"

#define BD B
constexpr bool SPLIT = false;
constexpr int TILE = W * B * 2, TILE_W = W * W * 2, STAGES = 2, HALVES = B / 64;
constexpr int GROUPS = 1, POWER_R = 2;
constexpr double POWERS[] = {1};
constexpr int ROWS_R = B * 128;  // bytes of a panel of R's copy: B rows of 64 columns

// Shared memory
constexpr int QS = 0, KS = QS + STAGES * TILE, VS = KS + STAGES * TILE, GS = VS + STAGES * TILE;
constexpr int YS = GS + STAGES * TILE, COPY = YS + STAGES * TILE, TILES = COPY + B * B * 2;
constexpr int CROSS = TILES + 3 * TILE_W, WEIGHTS = CROSS + TILE_W;
constexpr int ENDS = WEIGHTS + (GATE ? 2 : 0) * LISTS, FULL = ENDS + 8;
constexpr int DY_THERE = FULL + 16, DV_THERE = DY_THERE + 16, DK_THERE = DV_THERE + 16;
static_assert(DK_THERE + 16 <= SHARED, "more shared memory than a block is given");
constexpr int R_REGISTERS = 240, Z_REGISTERS = 216, MOVER_REGISTERS = 48;

enum { AT_Q, AT_K, AT_V, AT_G, AT_Y, AT_DY, AT_DV, AT_DK, AT_GATE, AT_R, AT_Z, AT_END, OPERANDS };
#include "owners.cuh"

// Return a R [64, B], a by rows; turned: a R'.
template <bool TURNED> DEVICE void read_rows(float (&o)[B / 2], u32 a, u32 copy, u32 after) {
    products();
    UNROLL for (int i = 0; i < B / 16; i++) {
        u32 at = a + i / 4 * PANEL + i % 4 * 32;
        if (TURNED)
            multiply<0, 0>(o, at, copy + i / 4 * ROWS_R + i % 4 * 32, i > 0);
        else
            multiply<0, 1, ROWS_R>(o, at, copy + i * 2048, i > 0);
    }
    if (GATE) {
        products_begun();
        int t = thread_of_group(), row = t / 32 * 16 + t % 32 / 4;
        float w = raised<POWER_R>(load_float(after + row * 4)), x = raised<POWER_R>(load_float(after + row * 4 + 32));
        products_done(o);
        UNROLL for (int i = 0; i < B / 2; i++) o[i] *= i & 2 ? x : w;
        products();
    }
}

// Add the product of a tile of pairs and rows.
DEVICE void read_pairs(float (&o)[B / 2], u32 tile, u32 rows) {
    UNROLL for (int i = 0; i < W / 16; i++) multiply<0, 1>(o, tile + i * 32, rows + i * 2048, true);
    products_begun();
    products_done(o);
}

DEVICE void put_copy(u32 copy, const float (&R)[HALVES][B / 2]) {
    UNROLL for (int h = 0; h < HALVES; h++) put_rows<B, ROWS_R>(copy + h * PANEL, R[h], 1.0f);
}

// Own R, rows of keys and columns of values; make dy and dv.
DEVICE void own_r(const Sweep &p, u32 base) {
    int chunks = Head(p).chunks();
    float scale = (float)p.factors[0], R[HALVES][B / 2];
    u32 copy = base + COPY, tile = base + TILES;
    UNROLL for (int h = 0; h < HALVES; h++) {
        load_state(R[h], p, AT_R, h * 64, p.keys, p.values);
        UNROLL for (int i = 0; i < B / 2; i++) R[h][i] *= (float)p.factors[1];
    }
    put_copy(copy, R);
    Ring<STAGES> at;
    #pragma unroll 1
    for (int i = 0; i < chunks; i++, at.next()) {
        int slot = weights_at(at.i, i == 0, 0);
        u32 weights = base + WEIGHTS + slot * LISTS, end = base + ENDS + slot * 4, here = base + at.i * TILE;
        u32 q = here + QS, v = here + VS, g = here + GS, y = here + YS;
        float o[B / 2];
        barrier_wait(base + FULL + 8 * at.i, at.turn);
        fence_async();
        make_pairs<true, POWER_R>(tile, v, g, weights + UNTIL, 1);  // fences the copy too
        read_rows<true>(o, v, copy, weights + AFTER);
        read_pairs(o, tile, q);
        group_sync(1);
        put_rows<B>(v, o, scale);
        fence_async();
        arrive(base + DY_THERE + 8 * at.i);
        make_pairs<true, POWER_R>(tile, y, q, weights + UNTIL, 1);
        read_rows<false>(o, y, copy, weights + AFTER);
        read_pairs(o, tile, g);
        group_sync(1);
        put_rows<B>(y, o, scale);
        if (GATE) {
            UNROLL for (int h = 0; h < HALVES; h++) {
                u32 a[16];
                weigh<POWER_R>(a, q + h * PANEL, weights + BEFORE);
                fade<POWER_R>(R[h], end);
                products();
                UNROLL for (int j = 0; j < W / 16; j++) multiply<1>(R[h], a + 4 * j, g + j * 2048, true);
                products_begun();
                products_done(R[h]);
                unchanged(a);
            }
        } else {
            products();
            UNROLL for (int h = 0; h < HALVES; h++)
                UNROLL for (int j = 0; j < W / 16; j++)
                    multiply<1, 1>(R[h], q + h * PANEL + j * 2048, g + j * 2048, true);
            products_begun();
            if constexpr (HALVES == 2)
                products_done(R[0], R[1]);
            else
                products_done(R[0]);
        }
        arrive(base + DV_THERE + 8 * at.i);
        put_copy(copy, R);
    }
    UNROLL for (int h = 0; h < HALVES; h++) {
        UNROLL for (int i = 0; i < B / 2; i++) R[h][i] *= scale;
        store_state(R[h], p, AT_END, h * 64, p.keys, p.values, true);
    }
}

// Return a block of Z after the last token, of the sum of a matrix and its transpose.
DEVICE void load_block(float (&Z)[32], const Sweep &p, int row, int column) {
    UNROLL for (int i = 0; i < 32; i++) Z[i] = 0.0f;
    if (!p.at[AT_Z]) return;
    Head head(p);
    const Operand &x = p.of[AT_Z];
    const float *from = (const float *)p.at[AT_Z] + head.offset(x, head.segment, 0, 0);
    Operand turned = x;
    turned.row = x.column, turned.column = x.row;
    int D = (int)p.keys;
    each<32>(from + column * x.column, x, row, D, D - column, [&](int i, const float *at, bool there) {
        if (there) Z[i] += *at * (float)p.factors[1];
    });
    each<32>(from + column * x.row, turned, row, D, D - column, [&](int i, const float *at, bool there) {
        if (there) Z[i] += *at * (float)p.factors[1];
    });
}

DEVICE void operand(u32 (&a)[16], const float (&Z)[32]) {
    UNROLL for (int i = 0; i < 16; i++) a[i] = bf16_pair(Z[2 * i], Z[2 * i + 1]);
}

// Own Z, of whose four blocks three; make dk.
DEVICE void own_z(const Sweep &p, u32 base) {
    int chunks = Head(p).chunks();
    float scale = (float)p.factors[0], Z00[32], Z01[32], Z11[32];
    u32 tile1 = base + TILES + TILE_W, tile2 = tile1 + TILE_W, cross = base + CROSS;
    load_block(Z00, p, 0, 0);
    load_block(Z01, p, 0, 64);  // zeros where there are 64 keys
    load_block(Z11, p, 64, 64);
    if (HALVES == 2) put_rows<64>(cross, Z01, 1.0f);
    Ring<STAGES> at;
    #pragma unroll 1
    for (int i = 0; i < chunks; i++, at.next()) {
        int slot = weights_at(at.i, i == 0, 0);
        u32 weights = base + WEIGHTS + slot * LISTS, end = base + ENDS + slot * 4, here = base + at.i * TILE;
        u32 q = here + QS, k = here + KS, dy = here + VS;
        float o[32];
        u32 a[16], first[16];
        barrier_wait(base + FULL + 8 * at.i, at.turn);
        fence_async();
        put_pair<false>(tile1, q, k, weights + UNTIL);
        barrier_wait(base + DY_THERE + 8 * at.i, at.turn);
        make_pairs<false>(tile2, dy, k, weights + UNTIL, 2);
        UNROLL for (int h = 0; h < HALVES; h++) {
            u32 b[16];
            operand(a, h ? Z11 : Z00);
            if (HALVES == 2 && !h) operand(b, Z01);
            products();
            UNROLL for (int j = 0; j < 4; j++) multiply<0>(o, a + 4 * j, k + h * PANEL + j * 32, j > 0);
            if (HALVES == 2) UNROLL for (int j = 0; j < 4; j++) {
                if (h)
                    multiply<1, 0>(o, cross + j * 2048, k + j * 32, true);
                else
                    multiply<0>(o, b + 4 * j, k + PANEL + j * 32, true);
            }
            if (GATE) {
                products_begun();
                products_done(o);
                weigh_columns(o, weights + AFTER);
                products();
            }
            UNROLL for (int j = 0; j < 4; j++) multiply<1, 1>(o, dy + h * PANEL + j * 2048, tile1 + j * 2048, true);
            UNROLL for (int j = 0; j < 4; j++) multiply<1, 1>(o, q + h * PANEL + j * 2048, tile2 + j * 2048, true);
            products_begun();
            products_done(o);
            unchanged(a);
            if (HALVES == 2 && !h) unchanged(b);
            UNROLL for (int j = 0; j < 32; j++) o[j] *= scale;
            if (HALVES == 2 && !h) operand(first, o);
        }
        group_sync(2);
        if (HALVES == 2) {
            leave(k + PANEL, o);
            leave(k, first);
        } else {
            leave(k, o);
        }
        if (GATE) {
            UNROLL for (int h = 0; h < HALVES; h++) {
                u32 b[16];
                weigh(a, q + h * PANEL, weights + BEFORE);
                weigh(b, dy + h * PANEL, weights + BEFORE);
                fade(h ? Z11 : Z00, end);
                if (HALVES == 2 && !h) fade(Z01, end);
                products();
                UNROLL for (int j = 0; j < 4; j++) {
                    u32 down = h * PANEL + j * 2048;
                    multiply<1>(h ? Z11 : Z00, a + 4 * j, dy + down, true);
                    multiply<1>(h ? Z11 : Z00, b + 4 * j, q + down, true);
                    if (HALVES == 2 && !h) {
                        multiply<1>(Z01, a + 4 * j, dy + PANEL + j * 2048, true);
                        multiply<1>(Z01, b + 4 * j, q + PANEL + j * 2048, true);
                    }
                }
                products_begun();
                products_done(Z00, Z01, Z11);
                unchanged(a);
                unchanged(b);
            }
        } else {
            products();
            UNROLL for (int h = 0; h < 2 * HALVES - 1; h++)  // blocks 00, 11, 01
                UNROLL for (int j = 0; j < 4; j++) {
                    u32 left = h % 2 * PANEL + j * 2048, right = (h > 0) * PANEL + j * 2048;
                    multiply<1, 1>(h == 0 ? Z00 : h == 1 ? Z11 : Z01, q + left, dy + right, true);
                    multiply<1, 1>(h == 0 ? Z00 : h == 1 ? Z11 : Z01, dy + left, q + right, true);
                }
            products_begun();
            products_done(Z00, Z01, Z11);
        }
        arrive(base + DK_THERE + 8 * at.i);
        if (HALVES == 2) put_rows<64>(cross, Z01, 1.0f);
    }
}

// Load what the owners read; store what they leave in its place.
DEVICE void move(const Sweep &p, u32 base) {
    Head head(p);
    int T = (int)head.tokens, chunks = head.chunks(), D = (int)p.keys, V = (int)p.values;
    Copies<B, -1> q(p, AT_Q, head, D), k(p, AT_K, head, D), v(p, AT_V, head, V), g(p, AT_G, head, V);
    Copies<B, -1> y(p, AT_Y, head, D), dy(p, AT_DY, head, D), dv(p, AT_DV, head, V), dk(p, AT_DK, head, D);
    LogGate gate(p, head, (chunks - 1) * (i64)W);
    Ring<STAGES> at;
    #pragma unroll 1
    for (int i = 0; i < chunks + STAGES; i++, at.next()) {
        int row = (chunks - 1 - i) * W, left = T - row;
        u32 here = base + at.i * TILE;
        bool loads = i < chunks, stores = i >= STAGES;
        if (stores) {
            barrier_wait(base + DY_THERE + 8 * at.i, at.turn ^ 1);
            dy.store(here + VS, left - STAGES * W);
            barrier_wait(base + DV_THERE + 8 * at.i, at.turn ^ 1);
            dv.store(here + YS, left - STAGES * W);
        }
        if (loads) y.load(here + YS, left), g.load(here + GS, left);
        if (stores) {
            barrier_wait(base + DK_THERE + 8 * at.i, at.turn ^ 1);
            dk.store(here + KS, left - STAGES * W);
        }
        if (loads) {
            k.load(here + KS, left), q.load(here + QS, left), v.load(here + VS, left);
            k.arrive(base + FULL + 8 * at.i);
            if (GATE == 2) gate.put(base, at.i, row - W, base + FULL + 8 * at.i);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) hopper_reverse_kernel(const __grid_constant__ Sweep p) {
    extern __shared__ __align__(1024) u8 memory[];
    u32 base = shared_address(memory);
    if (threadIdx.x == 0) {
        begin(base + FULL, STAGES, 128 + (GATE == 2)), begin(base + DY_THERE, STAGES, 4);
        begin(base + DV_THERE, STAGES, 4), begin(base + DK_THERE, STAGES, 4);
        fence_async();
    }
    put_decay_of(p, base);
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in a warp, which it shows
    if (group == 0) {
        registers_more<R_REGISTERS>();
        own_r(p, base);
    } else if (group == 1) {
        registers_more<Z_REGISTERS>();
        own_z(p, base);
    } else {
        registers_less<MOVER_REGISTERS>();
        move(p, base);
    }
}
