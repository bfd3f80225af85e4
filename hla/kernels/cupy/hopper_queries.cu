// Adjoint on Hopper, first token first: the gradient of q.
//
//     hla2: F = sum y v' (power 2), S = sum k k'    dq = F do + S dy
//     ahla: F = sum k u', S = sum k v'              dq = F do + S du
//     hla3: F = sum k v', S = sum k k'              dq = F du + S dy
//           F = sum y u' (power 3)                  dq += F do
//
// A block of threads does a head. Of 128 keys two warpgroups own 64 rows each of F and of S, in
// float32 registers, so that dq is one accumulator and rounded once; both make the two tiles of pairs.
// The last warpgroup loads, and stores dq. By chunks of W = 64 tokens, with X, Z and L for v, k and y
// (of ahla u, v and k):
//
//     dQ' = F dO' + L' up(X dO') + S dY' + K' up(Z dY')    F += L' X    S += K' Z
//
// A gate's weights lie beside a chunk: see hopper.cu; there is one list, which F's power raises.
//
// With DOTS q is read too, and dq left in its place. For a gate's gradient (gate.cu) each owner leaves c = q .
// (F do), weighed, and of q . (S dy) the same, of its columns; and of its rows before each period the
// products with what the reverse sweep has kept there.
//
// Bytes a token and head, D = V = 128: 6 rows of 256, 0.268 ms for B = 8, T = 4096, H = 16 at 3.0 TB/s;
// one H100 took 0.281 for hla2 (95%), 0.298 for ahla. hla3's have 5 rows, 0.224 ms: 0.232 without a result
// to add to, 0.276 of F alone, which reads what it adds to. With DOTS 7 rows, 0.313 ms: 0.50 and 0.47.
//
// Compiled for each AHLA, F_POWER, ONE (there is F alone) and ADDS (to what dq holds), B (tiles of 64
// or 128 keys and values), GATE (0 none, 1 decay, 2 log gate), DOTS (also leaves what a gate's gradient is
// made of), the bytes of an element of dq, FAST, WHOLE and SHARED as hopper.cu.
#include "ptx.cuh"
#include "arrays.cuh"
#include "warpgroup.cuh"

#define BD B
constexpr bool SPLIT = false;
constexpr int TILE = W * B * 2, TILE_W = W * W * 2, STAGES = 2, OWNERS = B / 64;
constexpr int GROUPS = 1, POWER = F_POWER;
constexpr double POWERS[] = {1};

// Shared memory
constexpr int KS = 0, VS = KS + STAGES * TILE, GS = VS + STAGES * TILE, YS = GS + STAGES * TILE;
constexpr int ES = YS + STAGES * TILE, OUTS = ES + STAGES * TILE, TILES = OUTS + 2 * TILE;
constexpr int WEIGHTS = TILES + 2 * OWNERS * TILE_W, ENDS = WEIGHTS + (GATE ? 2 : 0) * LISTS;
constexpr int FULL = ENDS + 8, FREE = FULL + 16, THERE = FREE + 16, STORED = THERE + 16;
static_assert(STORED + 16 <= SHARED, "more shared memory than a block is given");
constexpr int OWNER_REGISTERS = 224, MOVER_REGISTERS = 56;

enum { AT_K, AT_V, AT_G, AT_Y, AT_E, AT_DQ, AT_Q, AT_GATE, AT_S, AT_F,
       AT_DOTS_F, AT_DOTS_S, AT_KEPT_F, AT_KEPT_S, AT_MET_F, AT_MET_S, OPERANDS };
#include "sweep.cuh"
#include "owners.cuh"
#include "dots.cuh"

// Store a chunk's sums of F and of both states, weighed: warps leave theirs in the place of queries that
// each alone has read.
DEVICE void store_sums(
    float *to_f, float *to_s, u32 q, u32 before, float2 of_f, float2 of_both, int name, float scale, int left) {
    int t = thread_of_group(), warp = t / 32, token = t % 32 * 2;
    u32 at = q + token * 128, unit = warp * 2 ^ token % 8;
    store_float(at + unit * 16, of_f.x), store_float(at + 128 + (unit ^ 1) * 16, of_f.y);
    if (!ONE) store_float(at + unit * 16 + 4, of_both.x), store_float(at + 128 + (unit ^ 1) * 16 + 4, of_both.y);
    group_sync(name);
    if (t < W) {
        float w = load_float(before + t * 4);
        float2 sum = {};
        UNROLL for (int i = 0; i < 4; i++) {
            float2 x = load_floats(q + t * 128 + (i * 2 ^ t % 8) * 16);
            sum.x += x.x, sum.y += x.y;
        }
        sum.x *= raised<POWER>(w) * scale;
        if (t < left) to_f[t] = sum.x;
        if (!ONE && t < left) to_s[t] = sum.y * (w * scale) - sum.x;
    }
    group_sync(name);  // then dq comes there
}

// Add the product of 64 columns of rows and a tile of pairs.
DEVICE void read_pairs(float (&o)[32], u32 rows, u32 tile) {
    UNROLL for (int i = 0; i < W / 16; i++) multiply<1, 1>(o, rows + i * 2048, tile + i * 2048, true);
}

// Own rows of F and S from 64 H on.
template <int H> DEVICE void own(const Sweep &p, u32 base) {
    int chunks = Head(p).chunks(), earlier = Head(p).earlier();
    float scale = (float)p.factors[0], F[B / 2], S[B / 2];
    float *dots_f = DOTS ? dots_of(p, AT_DOTS_F, H) : 0, *dots_s = DOTS && !ONE ? dots_of(p, AT_DOTS_S, H) : 0;
    load_state(F, p, AT_F, H * 64, p.keys, p.values);
    if (!ONE) load_state(S, p, AT_S, H * 64, p.keys, AHLA ? p.values : p.keys);
    Ring<STAGES> at;
    #pragma unroll 1
    for (int c = 0; c < chunks; c++, at.next()) {
        int slot = weights_at(at.i, c == chunks - 1, 0);
        u32 weights = base + WEIGHTS + slot * LISTS, end = base + ENDS + slot * 4, here = at.i * TILE;
        u32 k = base + KS + here, v = base + VS + here, g = base + GS + here, e = base + ES + here;
        u32 y = base + YS + here, x = AHLA ? y : v, z = AHLA ? v : k, l = AHLA ? k : y;
        u32 tile = base + TILES + 2 * H * TILE_W, out = base + OUTS + (c & 1) * TILE + H * PANEL;
        u32 k_h = k + H * PANEL, l_h = l + H * PANEL;
        auto sums = [&](float2 of_f, float2 of_both) {  // while products run
            int row = (earlier + c) * W, left = (int)p.tokens - row;
            if (DOTS) store_sums(dots_f + row, dots_s + row, out, weights + BEFORE, of_f, of_both, 1 + H, scale, left);
        };
        float o[32];
        float2 of_f, of_both;
        barrier_wait(base + FULL + 8 * at.i, at.turn);
        fence_async();
        if (!ONE) put_pair(tile + TILE_W, z, e, weights + UNTIL);
        make_pairs<true, POWER>(tile, x, g, weights + UNTIL, 1 + H);
        u32 a[B / 4];
        UNROLL for (int i = 0; i < B / 4; i++) a[i] = bf16_pair(F[2 * i], F[2 * i + 1]);
        products();
        UNROLL for (int i = 0; i < B / 16; i++) multiply<0>(o, a + 4 * i, g + i / 4 * PANEL + i % 4 * 32, i > 0);
        if (GATE) {
            products_begun();
            fade<POWER>(F, end);
            products_done(o);
            if (DOTS) of_f = by_column(o, out);
            if (ONE || POWER > 1) weigh_columns<ONE ? POWER : POWER - 1>(o, weights + BEFORE);
            products();
        }
        if (ONE || !GATE) {
            read_pairs(o, l_h, tile);
            if (!ONE) read_pairs(o, k_h, tile + TILE_W);
            products_begun();
            sums(of_f, of_both);
            products_done(o);
        }
        unchanged(a);
        if (!ONE) {
            UNROLL for (int i = 0; i < B / 4; i++) a[i] = bf16_pair(S[2 * i], S[2 * i + 1]);
            products();
            UNROLL for (int i = 0; i < B / 16; i++) multiply<0>(o, a + 4 * i, e + i / 4 * PANEL + i % 4 * 32, true);
            products_begun();
            if (GATE) fade(S, end);
            products_done(o);
            unchanged(a);
            if (GATE) {
                if (DOTS) of_both = by_column(o, out);
                weigh_columns(o, weights + BEFORE);
                products();
                read_pairs(o, l_h, tile);
                read_pairs(o, k_h, tile + TILE_W);
                products_begun();
                sums(of_f, of_both);
                products_done(o);
            }
        }
        if (!DOTS) barrier_wait(base + STORED + 8 * (c & 1), (c >> 1 & 1) ^ 1);
        UNROLL for (int i = 0; i < 32; i++) o[i] *= scale;
        leave(out, o);
        arrive(base + THERE + 8 * (c & 1));
        if (ONE)
            update<POWER>(F, l_h, x, weights + AFTER);
        else
            update<POWER>(F, l_h, x, weights + AFTER, S, k_h, z, weights + AFTER);
        arrive(base + FREE + 8 * at.i);
        int next = earlier + c + 1;
        if (is_kept(next) && next * (i64)W < p.tokens) {
            meet(p, AT_MET_F, next, 4 * H, F, kept_of(p, AT_KEPT_F, next, H * 64), 0);
            if (!ONE) meet(p, AT_MET_S, next, 4 * H, S, kept_of(p, AT_KEPT_S, next, H * 64), AHLA ? 0 : H * 64);
        }
    }
}

// Load what the owners read, two chunks ahead; store dq, which with DOTS they leave in the place of q.
DEVICE void move(const Sweep &p, u32 base) {
    Head head(p);
    int T = (int)head.tokens, chunks = head.chunks(), D = (int)p.keys, V = (int)p.values;
    Copies<B> k(p, AT_K, head, D), v(p, AT_V, head, V), g(p, AT_G, head, V), y(p, AT_Y, head, AHLA ? V : D);
    Copies<B> e(p, AT_E, head, AHLA ? V : D), q(p, AT_Q, head, D);
    Copies<B, 1, DQ_BYTES> dq(p, AT_DQ, head, D);
    LogGate gate(p, head, 0);
    Ring<STAGES> at;
    #pragma unroll 1
    for (int c = 0; c < chunks + STAGES; c++, at.next()) {
        int left = T - c * W;
        u32 here = base + at.i * TILE, full = base + FULL + 8 * at.i;
        auto loaded = [&] {
            v.arrive(full);
            if (GATE == 2) gate.put(base, at.i, (c + 1) * (i64)W, full);
        };
        if (c < chunks) {
            barrier_wait(base + FREE + 8 * at.i, at.turn ^ 1);
            if (!ONE) k.load(here + KS, left), e.load(here + ES, left);
            v.load(here + VS, left), g.load(here + GS, left), y.load(here + YS, left);
            if (!DOTS) loaded();
        }
        if (c >= STAGES) {
            barrier_wait(base + THERE + 8 * at.i, at.turn ^ 1);
            dq.store<ADDS>(base + OUTS + at.i * TILE, left + STAGES * W);
            if (!DOTS) arrive(base + STORED + 8 * at.i);
        }
        if (DOTS && c < chunks) {
            q.load(base + OUTS + at.i * TILE, left);
            loaded();
        }
    }
}

extern "C" __global__ void __launch_bounds__(128 * OWNERS + 128, 1)
hopper_queries_kernel(const __grid_constant__ Sweep p) {
    extern __shared__ __align__(1024) u8 memory[];
    u32 base = shared_address(memory);
    if (threadIdx.x == 0) {
        begin(base + FULL, STAGES, 128 + (GATE == 2)), begin(base + FREE, STAGES, 4 * OWNERS);
        begin(base + THERE, 2, 4 * OWNERS), begin(base + STORED, 2, 4);
        fence_async();
    }
    put_decay_of(p, base);
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in a warp, which it shows
    if (group == OWNERS) {
        registers_less<MOVER_REGISTERS>();
        move(p, base);
    } else {
        registers_more<OWNER_REGISTERS>();
        if (OWNERS == 2 && group == 1)
            own<OWNERS - 1>(p, base);
        else
            own<0>(p, base);
    }
}
