// Adjoint of ahla on Hopper, last token first: the gradients of u, v and k.
//
//     R = sum q do'    du = R' k
//     Z = sum q du'    dv = Z' k    dk = R u + Z v
//
// A block of threads does a head. The first warpgroup owns R, which it reads both ways round from a
// bfloat16 copy: du takes do's place once R has it, and R's part of dk u's. The second owns Z as blocks
// of 64 x 64: dk' is read from registers, and dv, half of its columns at a time, from copies of two
// blocks in v's place, which dv then takes. The third warpgroup stores that and loads the next chunk
// there. By chunks of W = 64 tokens, of pairs up (lo) whose row is not later (not earlier) than the column:
//
//     dU = K R + up(K Q') dO      dK = U R' + up(U dO') Q                  R += Q' dO
//     dV = K Z + up(K Q') dU      dK' += Z V' + Q' lo(dU V')               Z += Q' dU
//
// A gate's weights lie beside a chunk: see hopper.cu and hopper_reverse.cu; powers are 1.
//
// Bytes a token and head, D = V = 128: 8 rows of 256, 0.358 ms for B = 8, T = 4096, H = 16 at 3.0 TB/s; one
// H100 took 0.476 (75%), 0.195 for D = V = 64. What the owner of Z does one after the other binds: 80
// products of 64 x 64 x 16 or more and four copies of two blocks a chunk.
//
// Not READ, of segments: du is made of q, k and do, and forgotten.
//
// Compiled for each READ (du, dv and dk are requested, not Z alone), B (tiles of 64 or 128 keys and values),
// GATE (0 none, 1 decay, 2 log gate), FAST, WHOLE and SHARED as hopper.cu.
#include "ptx.cuh"
#include "arrays.cuh"
#include "warpgroup.cuh"

#define BD B
constexpr bool SPLIT = false;
constexpr int TILE = W * B * 2, TILE_W = W * W * 2, STAGES = 2;
constexpr int GROUPS = 1, POWER = 1;
constexpr double POWERS[] = {1};

// Shared memory
constexpr int QS = 0, KS = QS + STAGES * TILE, VS = KS + STAGES * TILE, GS = VS + STAGES * TILE;
constexpr int US = GS + STAGES * TILE, COPY = US + STAGES * TILE, TILES = COPY + B * B * 2;
constexpr int WEIGHTS = TILES + 3 * TILE_W, ENDS = WEIGHTS + (GATE ? 2 : 0) * LISTS, FULL = ENDS + 8;
constexpr int DU_THERE = FULL + 16, PART_THERE = DU_THERE + 16, DONE_WITH = PART_THERE + 16;
constexpr int ONE = DONE_WITH + 16;
static_assert(ONE + 4 <= SHARED, "more shared memory than a block is given");
constexpr int R_REGISTERS = 224, Z_REGISTERS = 224, MOVER_REGISTERS = 56;

enum { AT_Q, AT_K, AT_V, AT_G, AT_U, AT_DU, AT_DV, AT_DK, AT_GATE, AT_R, AT_Z, AT_END, AT_END_Z, OPERANDS };
#include "sweep.cuh"
#include "owners.cuh"
#include "reverse.cuh"

// Own R, rows of keys and columns of values; make du, and R's part of dk.
DEVICE void own_r(const Sweep &p, u32 base) {
    int chunks = Head(p).chunks();
    float scale = (float)p.factors[0], R[HALVES][B / 2];
    u32 copy = base + COPY, tile1 = base + TILES, tile2 = tile1 + TILE_W;
    load_reverse(R, p, AT_R);
    put_copy(copy, R);
    Ring<STAGES> at;
    #pragma unroll 1
    for (int i = 0; i < chunks; i++, at.next()) {
        int slot = weights_at(at.i, i == 0, 0);
        u32 weights = base + WEIGHTS + slot * LISTS, end = base + ENDS + slot * 4, here = base + at.i * TILE;
        u32 q = here + QS, k = here + KS, g = here + GS, u = here + US;
        float o[B / 2] = {}, e[B / 2] = {};
        u32 du[B / 4];
        barrier_wait(base + FULL + 8 * at.i, at.turn);
        fence_async();
        if (READ) put_pair(tile2, u, g, weights + UNTIL);  // before du is where do was
        make_pairs(tile1, k, q, weights + UNTIL, 1);  // fences the copy too
        read_rows<false>(o, k, copy, weights + AFTER);
        read_pairs(o, tile1, g);
        UNROLL for (int j = 0; j < B / 4; j++) du[j] = bf16_pair(o[2 * j] * scale, o[2 * j + 1] * scale);
        write_rows(R, q, g, weights + BEFORE, end);
        group_sync(1);
        put_rows<B>(g, du);
        fence_async();
        arrive(base + DU_THERE + 8 * at.i);
        if (READ) {
            read_rows<true>(e, u, copy, weights + AFTER);
            read_pairs(e, tile2, q);
            group_sync(1);
            put_rows<B>(u, e, scale);
            arrive(base + PART_THERE + 8 * at.i);
        }
        put_copy(copy, R);
    }
    store_reverse(R, p, AT_END);
}

// Z in blocks, by rows of keys
typedef float Blocks[HALVES][HALVES][32];

// Make 64 columns of dk: rows of Z from 64 H on, and what R's owner has left. Blocks of Z are rounded times
// one, from shared memory: else the assembler would round them all at once, long before.
template <int H> DEVICE void make_dk(
    const float (&Z)[HALVES][32], u32 q, u32 v, u32 tile, u32 left, u32 after, u32 there, u32 turn, float scale,
    u32 one) {
    float o[32] = {};  // else the assembler would take it for that of other products
    UNROLL for (int h = 0; h < HALVES; h++) {
        u32 a[16];
        operand(a, Z[h], load_float(one));
        products();
        UNROLL for (int j = 0; j < 4; j++) multiply<0>(o, a + 4 * j, v + h * PANEL + j * 32, h + j > 0);
        products_begun();
        products_done(o);
        unchanged(a);
    }
    if (GATE) weigh_columns(o, after);
    products();
    UNROLL for (int j = 0; j < 4; j++) multiply<1, 1>(o, q + H * PANEL + j * 2048, tile + j * 2048, true);
    products_begun();
    products_done(o);
    UNROLL for (int j = 0; j < 32; j++) o[j] *= scale;
    if (H == 0) barrier_wait(there, turn);
    add_left(o, left + H * PANEL);
    leave(left + H * PANEL, o);
}

// Return 64 columns of dv, of blocks of Z that are copied to shared memory.
DEVICE void make_dv(
    float (&o)[32], const Blocks &Z, int columns, u32 k, u32 room, u32 tile, u32 du, u32 after, u32 one) {
    UNROLL for (int h = 0; h < HALVES; h++) put_rows<64>(room + h * PANEL, Z[h][columns], load_float(one));
    fence_async();
    group_sync(2);
    products();
    UNROLL for (int j = 0; j < B / 16; j++)
        multiply<0, 1>(o, k + j / 4 * PANEL + j % 4 * 32, room + j * 2048, j > 0);
    if (GATE) {
        products_begun();
        int t = thread_of_group(), row = t / 32 * 16 + t % 32 / 4;
        float w = load_float(after + row * 4), x = load_float(after + row * 4 + 32);
        products_done(o);
        UNROLL for (int i = 0; i < 32; i++) o[i] *= i & 2 ? x : w;
        products();
    }
    UNROLL for (int j = 0; j < W / 16; j++) multiply<0, 1>(o, tile + j * 32, du + j * 2048, true);
    products_begun();
    products_done(o);
    group_sync(2);
}

// Own Z; make dv, and dk of its part and that of R.
DEVICE void own_z(const Sweep &p, u32 base) {
    int chunks = Head(p).chunks();
    float scale = (float)p.factors[0];
    u32 tile = base + TILES + 2 * TILE_W;
    Blocks Z;
    UNROLL for (int h = 0; h < HALVES; h++) UNROLL for (int e = 0; e < HALVES; e++) {
        load_state(Z[h][e], p, AT_Z, h * 64, p.keys, p.values, e * 64);
        UNROLL for (int i = 0; i < 32; i++) Z[h][e][i] *= (float)p.factors[1];
    }
    Ring<STAGES> at;
    #pragma unroll 1
    for (int i = 0; i < chunks; i++, at.next()) {
        int slot = weights_at(at.i, i == 0, 0);
        u32 weights = base + WEIGHTS + slot * LISTS, end = base + ENDS + slot * 4, here = base + at.i * TILE;
        u32 q = here + QS, k = here + KS, v = here + VS, du = here + GS, part = here + US;
        barrier_wait(base + FULL + 8 * at.i, at.turn);
        barrier_wait(base + DU_THERE + 8 * at.i, at.turn);
        fence_async();
        if (READ) {
            make_pairs<false>(tile, du, v, weights + UNTIL, 2);
            u32 there = base + PART_THERE + 8 * at.i;
            make_dk<0>(Z[0], q, v, tile, part, weights + AFTER, there, at.turn, scale, base + ONE);
            if constexpr (HALVES == 2) make_dk<1>(Z[1], q, v, tile, part, weights + AFTER, there, at.turn, scale, base + ONE);
            group_sync(2);
            put_pair(tile, k, q, weights + UNTIL);
            float o[32] = {};
            u32 dv[16];
            make_dv(o, Z, 0, k, v, tile, du, weights + AFTER, base + ONE);
            UNROLL for (int j = 0; j < 16; j++) dv[j] = bf16_pair(o[2 * j] * scale, o[2 * j + 1] * scale);
            if constexpr (HALVES == 2) {
                float e[32] = {};
                make_dv(e, Z, 1, k, v, tile, du + PANEL, weights + AFTER, base + ONE);
                put_rows<64>(v + PANEL, e, scale);
            }
            put_rows<64>(v, dv);
        }
        UNROLL for (int h = 0; h < HALVES; h++) {
            u32 a[16];
            if (GATE) {
                weigh(a, q + h * PANEL, weights + BEFORE);
                UNROLL for (int e = 0; e < HALVES; e++) fade(Z[h][e], end);
            }
            if (GATE || h == 0) products();
            UNROLL for (int j = 0; j < W / 16; j++) UNROLL for (int e = 0; e < HALVES; e++) {
                if (GATE)
                    multiply<1>(Z[h][e], a + 4 * j, du + e * PANEL + j * 2048, true);
                else
                    multiply<1, 1>(Z[h][e], q + h * PANEL + j * 2048, du + e * PANEL + j * 2048, true);
            }
            if (GATE) {
                products_begun();
                if constexpr (HALVES == 2)
                    products_done(Z[h][0], Z[h][1]);
                else
                    products_done(Z[h][0]);
                unchanged(a);
            }
        }
        if (!GATE) {
            products_begun();
            if constexpr (HALVES == 2)
                products_done(Z[0][0], Z[0][1], Z[1][0], Z[1][1]);
            else
                products_done(Z[0][0]);
        }
        arrive(base + DONE_WITH + 8 * at.i);
    }
    UNROLL for (int h = 0; h < HALVES; h++) UNROLL for (int e = 0; e < HALVES; e++) {
        UNROLL for (int i = 0; i < 32; i++) Z[h][e][i] *= scale;
        store_state(Z[h][e], p, AT_END_Z, h * 64, p.keys, p.values, true, e * 64);
    }
}

// Load what the owners read; store what they leave in its place.
DEVICE void move(const Sweep &p, u32 base) {
    Head head(p);
    int T = (int)head.tokens, chunks = head.chunks(), D = (int)p.keys, V = (int)p.values;
    Copies<B, -1> q(p, AT_Q, head, D), k(p, AT_K, head, D), v(p, AT_V, head, V), g(p, AT_G, head, V);
    Copies<B, -1> u(p, AT_U, head, V);
    Copies<B, -1, DU_BYTES> du(p, AT_DU, head, V);
    Copies<B, -1, DV_BYTES> dv(p, AT_DV, head, V);
    Copies<B, -1, DK_BYTES> dk(p, AT_DK, head, D);
    LogGate gate(p, head, (chunks - 1) * (i64)W);
    Ring<STAGES> at;
    #pragma unroll 1
    for (int i = 0; i < chunks + STAGES; i++, at.next()) {
        int row = (chunks - 1 - i) * W, left = T - row;
        u32 here = base + at.i * TILE;
        bool loads = i < chunks, stores = i >= STAGES;
        if (stores) {
            barrier_wait(base + DU_THERE + 8 * at.i, at.turn ^ 1);
            if (READ) du.store(here + GS, left - STAGES * W);
            barrier_wait(base + DONE_WITH + 8 * at.i, at.turn ^ 1);
        }
        if (loads) k.load(here + KS, left), q.load(here + QS, left), g.load(here + GS, left);
        if (READ && stores) dk.store(here + US, left - STAGES * W);
        if (READ && loads) u.load(here + US, left);
        if (READ && stores) dv.store(here + VS, left - STAGES * W);
        if (loads) {
            if (READ) v.load(here + VS, left);
            v.arrive(base + FULL + 8 * at.i);
            if (GATE == 2) gate.put(base, at.i, row - W, base + FULL + 8 * at.i);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) hopper_ahla_kernel(const __grid_constant__ Sweep p) {
    extern __shared__ __align__(1024) u8 memory[];
    u32 base = shared_address(memory);
    if (threadIdx.x == 0) {
        store_float(base + ONE, 1.0f);
        begin(base + FULL, STAGES, 128 + (GATE == 2)), begin(base + DU_THERE, STAGES, 4);
        begin(base + PART_THERE, STAGES, 4), begin(base + DONE_WITH, STAGES, 4);
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
