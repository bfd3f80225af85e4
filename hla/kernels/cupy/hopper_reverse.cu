// Adjoint of hla2 and hla3 on Hopper, last token first: the gradients of y, v and k.
//
//     hla2: R = sum q do' (power 2), Z = sum q dy' + dy q'    dy = R v, dv = R' y, dk = Z k
//     hla3: R = sum q do' (power 3)                           dy = R u, du = R' y
//           R = sum q du', Z = sum q dy' + dy q'              dv = R' k, dk = R v + Z k
//     ahla with a gate: R = sum q do'                         dk = R u, du = R' k
//           R = sum q du'                                     dk += R v, dv = R' k
//
// A block of threads does a head. The first warpgroup owns R, the second Z, which is symmetric: of its
// four blocks of 64 three are kept, and the one beside the diagonal is read the other way round from a
// copy in shared memory. R is read both ways round, from a bfloat16 copy. The third warpgroup stores
// what the owners leave in the place of an operand that nobody reads any more (dy takes v's, dv y's,
// dk k's) and loads the next chunk there. In hla3's second sweep k and dy come where y and k do in
// hla2's, the part of dk that is R's takes v's place, and dv k's once the owner of Z has read it; that
// owner adds its part. By chunks of W = 64 tokens, of pairs up (lo) whose row is not
// later (not earlier) than the column:
//
//     dY = V R' + up(V dO') Q     dV = Y R + up(Y Q') dO                 R += Q' dO
//     dK' = Z K' + dY' lo(Q K') + Q' lo(dY K')                          Z += Q' dY + dY' Q
//
// A gate's weights lie beside a chunk: see hopper.cu. Here states are read by the weights of what is
// left of a chunk, and written by those of what came before; there is one list, raised by the power.
//
// With DOTS the owners leave for a gate's gradient (gate.cu) d = y . (R v) and d = k . (Z k) / 2, to which
// the products of the two tiles of pairs that each makes are added by key; their sums by query lie behind.
// In both a token with itself is, and cancels. What warps sum by column meets in lines of shared memory:
// those of R two by two, as there is not memory for more. Before each period R and Z are kept.
//
// Bytes a token and head, D = V = 128: 8 rows of 256, 0.358 ms for B = 8, T = 4096, H = 16 at 3.0 TB/s;
// one H100 took 0.391 (92%). hla3's sweeps have 6 and 7 rows, 0.268 and 0.313 ms: 0.282 (95%) and 0.338 (93%).
// With DOTS the owners' work takes longer than bytes: hla2 0.60 with a log gate, 0.59 with a decay.
//
// Not READ, of segments: the third row that is read is v, dy is made and forgotten, and half of Z is left,
// which Z begins from with its transpose.
//
// Compiled for each R_POWER, Z (whether there is that state), READ (dy, dv and dk are requested, not Z
// alone), CUT (a head has segments), ADDS (dy, here dk, to what is there), B (tiles of 64 or 128 keys and
// values), GATE (0 none, 1 decay, 2 log gate), DOTS (also leaves what a gate's gradient is made of), the
// bytes of each result's elements, FAST, WHOLE and SHARED as hopper.cu.
#include "ptx.cuh"
#include "arrays.cuh"
#include "warpgroup.cuh"

#define BD B
constexpr bool SPLIT = false;
constexpr bool SUM = Z && R_POWER == 1;
constexpr int TILE = W * B * 2, TILE_W = W * W * 2, STAGES = 2;
constexpr int GROUPS = 1, POWER = R_POWER;
constexpr double POWERS[] = {1};

// Shared memory
constexpr int QS = 0, KS = QS + STAGES * TILE, VS = KS + STAGES * TILE, GS = VS + STAGES * TILE;
constexpr int YS = GS + STAGES * TILE, COPY = YS + STAGES * TILE, TILES = COPY + B * B * 2;
constexpr int CROSS = TILES + 3 * TILE_W, WEIGHTS = CROSS + TILE_W;
constexpr int ENDS = WEIGHTS + (GATE ? 2 : 0) * LISTS, FULL = ENDS + 8;
constexpr int DY_THERE = FULL + 16, DV_THERE = DY_THERE + 16, DK_THERE = DV_THERE + 16;
constexpr int K_READ = DK_THERE + 16, LINES_R = K_READ + 16, LINES_Z = LINES_R + 512;
static_assert((DOTS ? LINES_Z + 768 : LINES_R) <= SHARED, "more shared memory than a block is given");
constexpr int R_REGISTERS = 240, Z_REGISTERS = DOTS ? 224 : 216, MOVER_REGISTERS = DOTS ? 40 : 48;

enum { AT_Q, AT_K, AT_V, AT_G, AT_Y, AT_DY, AT_DV, AT_DK, AT_GATE, AT_R, AT_Z, AT_END, AT_END_Z,
       AT_DOTS_R, AT_DOTS_Z, AT_KEPT_R, AT_KEPT_Z, OPERANDS };
#include "sweep.cuh"
#include "owners.cuh"

#include "reverse.cuh"
#include "dots.cuh"

// Own R, rows of keys and columns of values; make dy and dv.
DEVICE void own_r(const Sweep &p, u32 base) {
    int chunks = Head(p).chunks(), last = (CUT ? Head(p).earlier() : 0) + chunks - 1;
    float scale = (float)p.factors[0], R[HALVES][B / 2];
    u32 copy = base + COPY, tile = base + TILES, lines = base + LINES_R;
    float *dots = DOTS ? dots_of(p, AT_DOTS_R, 0) : 0;
    int warp = thread_of_group() / 32;
    load_reverse(R, p, AT_R);
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
        make_pairs<true, POWER>(tile, v, g, weights + UNTIL, 1);  // fences the copy too
        read_rows<true>(o, v, copy, weights + AFTER);
        float by_key[2] = {};
        if (DOTS) add_by_row(by_key, o, y);
        read_pairs(o, tile, q);
        group_sync(1);
        put_rows<B>(v, o, scale);
        fence_async();
        arrive(base + DY_THERE + 8 * at.i);
        int row = (last - i) * W, left = (int)p.tokens - row;
        float2 by_query;
        if (DOTS) {
            float columns[16] = {};
            add_pairs<true, POWER>(tile, y, q, weights + UNTIL, tile, by_key, columns);
            put_by_row(dots + row, by_key, scale, left);
            by_query = of_warp(columns);
            if (warp % 2) put_line(lines + warp / 2 * 256, by_query);
            group_sync(1);
            if (warp % 2 == 0) add_line(by_query, lines + warp / 2 * 256);
            if (warp == 2) put_line(lines + 256, by_query);
        } else if (READ) {
            make_pairs<true, POWER>(tile, y, q, weights + UNTIL, 1);
        }
        if (READ) {
            read_rows<false>(o, y, copy, weights + AFTER);
            read_pairs(o, tile, g);
            group_sync(1);
        }
        if (DOTS && warp == 0) {
            add_line(by_query, lines + 256);
            put_by_column(dots + p.tokens + row, by_query, scale, left);
        }
        if (SUM) barrier_wait(base + K_READ + 8 * at.i, at.turn);
        if (READ) put_rows<B>(y, o, scale);
        write_rows(R, q, g, weights + BEFORE, end);
        arrive(base + DV_THERE + 8 * at.i);
        put_copy(copy, R);
        if (is_kept(last - i))
            UNROLL for (int h = 0; h < HALVES; h++) keep(kept_of(p, AT_KEPT_R, last - i, h * 64), R[h], scale);
    }
    store_reverse(R, p, AT_END);
}

// Visit a thread's elements of a block of a matrix, or of its transpose: see each.
template <bool TURNED, class Visit>
DEVICE void each_of_block(const Sweep &p, int operand, int row, int column, Visit visit) {
    Head head(p);
    Operand x = p.of[operand];
    if (!p.at[operand]) return;
    if (TURNED) x.row = p.of[operand].column, x.column = p.of[operand].row;
    float *at = (float *)p.at[operand] + head.offset(x, head.segment, 0, column);
    each<32>(at, x, row, (int)p.keys, (int)p.keys - column, visit);
}

// Return a block of Z after the last token, of the sum of a matrix and its transpose.
DEVICE void load_block(float (&block)[32], const Sweep &p, int row, int column) {
    UNROLL for (int i = 0; i < 32; i++) block[i] = 0.0f;
    auto add = [&](int i, const float *at, bool there) {
        if (there) block[i] += *at * (float)p.factors[1];
    };
    each_of_block<false>(p, AT_Z, row, column, add);
    each_of_block<true>(p, AT_Z, row, column, add);
}

// Store a block of half of Z, or its transpose.
template <bool TURNED = false>
DEVICE void store_block(const float (&block)[32], const Sweep &p, int row, int column) {
    if (!Head(p).is_first(p.of[AT_END_Z])) return;
    each_of_block<TURNED>(p, AT_END_Z, row, column, [&](int i, float *at, bool there) {
        if (there) *at = block[i] * (0.5f * (float)p.factors[0]);
    });
}

// Own Z, of whose four blocks three; make dk.
DEVICE void own_z(const Sweep &p, u32 base) {
    int chunks = Head(p).chunks(), last = (CUT ? Head(p).earlier() : 0) + chunks - 1;
    float scale = (float)p.factors[0], Z00[32], Z01[32], Z11[32];
    u32 tile1 = base + TILES + TILE_W, tile2 = tile1 + TILE_W, cross = base + CROSS, lines = base + LINES_Z;
    float *dots = DOTS ? dots_of(p, AT_DOTS_Z, 0) : 0;
    int warp = thread_of_group() / 32;
    load_block(Z00, p, 0, 0);
    load_block(Z01, p, 0, 64);  // zeros where there are 64 keys
    load_block(Z11, p, 64, 64);
    if (READ && HALVES == 2) put_rows<64>(cross, Z01, 1.0f);
    Ring<STAGES> at;
    #pragma unroll 1
    for (int i = 0; i < chunks; i++, at.next()) {
        int slot = weights_at(at.i, i == 0, 0);
        u32 weights = base + WEIGHTS + slot * LISTS, end = base + ENDS + slot * 4, here = base + at.i * TILE;
        u32 q = here + QS, k = here + (SUM ? YS : KS), dy = here + (SUM ? KS : VS), out = here + (SUM ? VS : KS);
        float o[32];
        u32 a[16], first[16];
        barrier_wait(base + FULL + 8 * at.i, at.turn);
        fence_async();
        if (READ) put_pair<false>(tile1, q, k, weights + UNTIL);
        if (!SUM) barrier_wait(base + DY_THERE + 8 * at.i, at.turn);
        int row = (last - i) * W, left = (int)p.tokens - row;
        float2 by_key;
        if (DOTS) {
            float by_query[2] = {}, columns[16] = {};
            add_pairs<false>(tile2, dy, k, weights + UNTIL, tile1, by_query, columns);
            by_key = of_warp(columns);
            put_by_row(dots + p.tokens + row, by_query, scale, left);
            group_sync(2);
        } else if (READ) {
            make_pairs<false>(tile2, dy, k, weights + UNTIL, 2);
        } else {
            fence_async();
        }
        if (READ) UNROLL for (int h = 0; h < HALVES; h++) {
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
                if (DOTS) {  // Z has a gradient and its transpose
                    float2 x = by_column(o, k + h * PANEL);
                    by_key.x += 0.5f * x.x, by_key.y += 0.5f * x.y;
                }
                products();
            }
            UNROLL for (int j = 0; j < 4; j++) multiply<1, 1>(o, dy + h * PANEL + j * 2048, tile1 + j * 2048, true);
            UNROLL for (int j = 0; j < 4; j++) multiply<1, 1>(o, q + h * PANEL + j * 2048, tile2 + j * 2048, true);
            products_begun();
            products_done(o);
            unchanged(a);
            if (HALVES == 2 && !h) unchanged(b);
            UNROLL for (int j = 0; j < 32; j++) o[j] *= scale;
            if (SUM) {
                if (h == HALVES - 1) arrive(base + K_READ + 8 * at.i);
                if (h == 0) barrier_wait(base + DY_THERE + 8 * at.i, at.turn);
                add_left(o, out + h * PANEL);
            }
            if (HALVES == 2 && !h) operand(first, o);
        }
        if (DOTS && warp) put_line(lines + (warp - 1) * 256, by_key);
        if (READ) group_sync(2);
        if (DOTS && warp == 0) {
            UNROLL for (int n = 0; n < 3; n++) add_line(by_key, lines + n * 256);
            put_by_column(dots + row, by_key, scale, left);
        }
        if (READ && HALVES == 2) {
            leave(out + PANEL, o);
            leave(out, first);
        } else if (READ) {
            leave(out, o);
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
        if (READ && HALVES == 2) put_rows<64>(cross, Z01, 1.0f);
        if (is_kept(last - i)) {  // what lies above the diagonal for what lies below, too
            u8 *to = kept_of(p, AT_KEPT_Z, last - i, 0);
            keep(to, Z00, 0.5f * scale);
            if (HALVES == 2) keep(to + PANEL, Z01, scale), keep(to + 3 * PANEL, Z11, 0.5f * scale);
        }
    }
    if (READ) return;
    store_block(Z00, p, 0, 0);
    if (HALVES == 2) store_block(Z01, p, 0, 64), store_block<true>(Z01, p, 0, 64), store_block(Z11, p, 64, 64);
}

// Load what the owners read; store what they leave in its place.
DEVICE void move(const Sweep &p, u32 base) {
    Head head(p);
    int T = (int)head.tokens, chunks = head.chunks(), D = (int)p.keys, V = (int)p.values;
    Copies<B, -1> q(p, AT_Q, head, D), k(p, AT_K, head, D), v(p, AT_V, head, V), g(p, AT_G, head, V);
    Copies<B, -1> y(p, AT_Y, head, D);
    Copies<B, -1, DY_BYTES> dy(p, AT_DY, head, D);
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
            if (READ && !SUM) {
                barrier_wait(base + DY_THERE + 8 * at.i, at.turn ^ 1);
                dy.store<ADDS>(here + VS, left - STAGES * W);
            }
            barrier_wait(base + DV_THERE + 8 * at.i, at.turn ^ 1);
            if (READ) dv.store(here + YS, left - STAGES * W);
        }
        if (loads && READ) y.load(here + YS, left);
        if (loads) g.load(here + GS, left);
        if (stores && Z) {
            barrier_wait(base + DK_THERE + 8 * at.i, at.turn ^ 1);
            if (READ) dk.store(here + (SUM ? VS : KS), left - STAGES * W);
        }
        if (loads) {
            if (Z && READ) k.load(here + KS, left);
            q.load(here + QS, left), v.load(here + VS, left);
            q.arrive(base + FULL + 8 * at.i);
            if (GATE == 2) gate.put(base, at.i, row - W, base + FULL + 8 * at.i);
        }
    }
}

extern "C" __global__ void __launch_bounds__(Z ? 384 : 256, 1) hopper_reverse_kernel(const __grid_constant__ Sweep p) {
    extern __shared__ __align__(1024) u8 memory[];
    u32 base = shared_address(memory);
    if (threadIdx.x == 0) {
        begin(base + FULL, STAGES, 128 + (GATE == 2)), begin(base + DY_THERE, STAGES, 4);
        begin(base + DV_THERE, STAGES, 4), begin(base + DK_THERE, STAGES, 4);
        begin(base + K_READ, STAGES, 4);
        fence_async();
    }
    put_decay_of(p, base);
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in a warp, which it shows
    if (group == 0) {
        if (Z) registers_more<R_REGISTERS>();
        own_r(p, base);
    } else if (Z && group == 1) {
        registers_more<Z_REGISTERS>();
        own_z(p, base);
    } else {
        if (Z) registers_less<MOVER_REGISTERS>();
        move(p, base);
    }
}
