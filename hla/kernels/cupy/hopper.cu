// The causal forward on Hopper by two state owners.
//
//     hla2: y = pass(q, k, k)   o = pass^2(q, y, v)
//     ahla: u = pass(q, k, v)   o = pass(q, k, u)
//     hla3: y = pass(q, k, k)   u = pass(q, k, v)   o = pass^3(q, y, u)
//
// A block of threads does a head by three warpgroups. Two own a state each, transposed, in float32
// registers: the first makes y (of ahla u), up to two chunks ahead of the second, which makes o; only
// y passes between them, in shared memory. The third loads q, k and v, each into a ring of its own,
// and stores y, u and o. A chunk of W = 64 tokens, of keys K and values X of either pass:
//
//     A' = upper(K Q')  [W, W]    O' = S' Q' + X' A'  [V, W]    S' = S' + X' K  [V, D]
//
// All operands lie as they are in memory. S' enters its product from registers, in bfloat16 and by
// halves of 64 values: a half is read and its O' stored before the other is touched. ahla has one A',
// which the first owner hands over. Three states of hla3 fill more than the registers: a block has 64
// values there, the first owner S, and the second P' and F' of 64 values, which makes u and o.
//
// A gate's weights lie beside a chunk as lists: c_t, the sum of its logarithms in base 2 up to t,
// exp2(c_t), exp2(c_last - c_t), and apart exp2(c_last); of each pass's power. Sums are float64;
// what no float32 holds counts as 2^-160, so that a reset subtracts like any gate.
//
// Barriers: a ring's "full" counts the loader's 128 threads, whose copies arrive; "free" each warp
// that reads. "There" is y, made by the first owner, "taken" by all that read it; o is "ready" to be
// stored, and "stored".
//
// Bytes a token and head, D = V = 128: q, k, v and o once, 1024 (y too: 1280): 0.179 ms for B = 8,
// T = 4096, H = 16 at 3.0 TB/s (0.224); operations 197 k, 0.130 ms at 790 TFLOP/s, of hla3 393 k,
// 0.26 ms. One H100 took 0.185 (a copy of the same bytes 0.181; with y 0.269), ahla 0.184, hla3 0.30,
// with four chunks of q and a decay 0.226, a log gate 0.257. No atomics; bits depend on nothing but the
// head's data.
//
// Compiled for each OPERATOR (1 ahla, 2 hla2, 3 hla3), BD and BV (tiles of 64 or 128 keys and values;
// of hla3 64 values), GATE (0 none, 1 decay, 2 log gate), READ (o is requested, not the states alone)
// and WIDE (in float32), KEEP (y, or u of ahla, is stored), KEEP_U (u of hla3), types of first states,
// FAST (rows are of whole 16 bytes; else they are copied by elements), WHOLE (tiles have no columns
// that are not there) and SHARED, bytes of shared memory.
#include "ptx.cuh"
#include "arrays.cuh"
#include "warpgroup.cuh"

constexpr bool AHLA = OPERATOR == 1, HLA3 = OPERATOR == 3, SPLIT = HLA3, HANDS = AHLA || HLA3;  // A' to the second
constexpr int BY = AHLA ? BV : BD;
constexpr int TILE_D = W * BD * 2, TILE_V = W * BV * 2, TILE_Y = W * BY * 2, TILE_W = W * W * 2;
// Chunks of q, k and v in shared memory, and by how many a buffer of k and v is free again later than
// that of q: the first pass is a chunk ahead. More of them were no faster, but of hla3.
constexpr int CHUNKS_Q = HLA3 ? 4 : 3, CHUNKS_K = HLA3 && !GATE ? 4 : CHUNKS_Q - 1;
constexpr int CHUNKS_V = HLA3 ? 3 : 2;
constexpr int K_LATER = CHUNKS_Q - CHUNKS_K - (HANDS ? 0 : 1);
constexpr int V_LATER = CHUNKS_Q - CHUNKS_V - (AHLA ? 1 : 0);
constexpr int GROUPS = AHLA ? 1 : 2;  // of lists of weights: one for each power
constexpr double POWERS[] = {1, OPERATOR};
constexpr int SLOTS = GATE == 2 ? CHUNKS_Q * GROUPS : GATE == 1 ? 2 * GROUPS : 0;

// Shared memory
constexpr int QS = 0, KS = QS + CHUNKS_Q * TILE_D, VS = KS + CHUNKS_K * TILE_D;
constexpr int MADE = VS + CHUNKS_V * TILE_V, US = MADE + 2 * TILE_Y, OUT = US + (HLA3 ? TILE_V : 0);
constexpr int TILES = OUT + TILE_V, WEIGHTS = TILES + (HLA3 ? 3 : 2) * TILE_W;
constexpr int ENDS = WEIGHTS + SLOTS * LISTS, Q_FULL = ENDS + (SLOTS + 1) / 2 * 8;
constexpr int Q_FREE = Q_FULL + 8 * CHUNKS_Q, K_FULL = Q_FREE + 8 * CHUNKS_Q;
constexpr int K_FREE = K_FULL + 8 * CHUNKS_K, V_FULL = K_FREE + 8 * CHUNKS_K;
constexpr int V_FREE = V_FULL + 8 * CHUNKS_V, THERE = V_FREE + 8 * CHUNKS_V, TAKEN = THERE + 16;
constexpr int READY = TAKEN + 16, STORED = READY + 8, U_THERE = STORED + 8, U_TAKEN = U_THERE + 8;
static_assert(U_TAKEN + 8 <= SHARED, "more shared memory than a block is given");
constexpr int OWNER_REGISTERS = 224, MOVER_REGISTERS = 56;

enum { AT_Q, AT_K, AT_V, AT_Y, AT_U, AT_O, AT_GATE, AT_START, AT_END = AT_START + 3, OPERANDS = AT_END + 3 };
#include "sweep.cuh"
#include "owners.cuh"

// ---- The warpgroups

// Store it as float32, of the tokens that there are and values from the first on.
DEVICE void put_wide(const Sweep &p, const float (&o)[32], i64 token, int first) {
    Head head(p);
    const Operand &x = p.of[AT_O];
    int t = thread_of_group(), v = first + t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    float *to = (float *)p.at[AT_O] + head.offset(x, 0, head.first + token + column, v);
    UNROLL for (int i = 0; i < 32; i++) {
        int after = i / 4 * 8 + (i & 1), down = (i & 2) * 4;
        if (token + column + after < head.tokens && v + down < p.values) to[after * x.row + down * x.column] = o[i];
    }
}

// Own the state of one pass: of the first, which makes y, or of the second, which makes o.
template <int PASS> DEVICE void own(const Sweep &p, u32 base) {
    constexpr bool FIRST = PASS == 1, READS = FIRST || READ;
    constexpr int HALVES = (FIRST ? BY : BV) / 64;
    int chunks = Head(p).chunks(), V = (int)(FIRST && !AHLA ? p.keys : p.values);
    float scale = (float)p.factors[PASS - 1], S[HALVES][BD / 2];
    UNROLL for (int h = 0; h < HALVES; h++)
        load_state(S[h], p, AT_START + PASS - 1, h * 64, V, p.keys);
    Ring<CHUNKS_Q> i_q;
    Ring<CHUNKS_K> i_k;
    Ring<CHUNKS_V> i_v;
    Ring<2> i_y;
    #pragma unroll 1
    for (int c = 0; c < chunks; c++) {
        int at = weights_at(i_q.i, c == chunks - 1, FIRST ? 0 : GROUPS - 1);
        u32 weights = base + WEIGHTS + at * LISTS, last = base + ENDS + at * 4;
        u32 q = base + QS + i_q.i * TILE_D, k = base + KS + i_k.i * TILE_D;
        u32 v = base + VS + i_v.i * TILE_V, y = base + MADE + i_y.i * TILE_Y;
        u32 keys = FIRST || AHLA ? k : y;
        u32 values = FIRST ? (AHLA ? v : k) : (AHLA ? y : v);
        u32 tile = base + TILES + (HANDS ? i_y.i : (u32)(PASS - 1)) * TILE_W;
        u32 made = FIRST ? y : base + OUT;
        barrier_wait(base + Q_FULL + 8 * i_q.i, i_q.turn);
        if (FIRST) {
            barrier_wait(base + K_FULL + 8 * i_k.i, i_k.turn);
            if (HANDS) barrier_wait(base + TAKEN + 8 * i_y.i, i_y.turn ^ 1);
        } else {
            barrier_wait(base + THERE + 8 * i_y.i, i_y.turn);
        }
        fence_async();
        if (READS && (FIRST || !AHLA)) make_pairs(tile, keys, q, weights + UNTIL, PASS);
        if (FIRST ? AHLA : !AHLA) {
            barrier_wait(base + V_FULL + 8 * i_v.i, i_v.turn);
            fence_async();
        }
        if (FIRST && !HANDS) barrier_wait(base + TAKEN + 8 * i_y.i, i_y.turn ^ 1);
        if (!FIRST && READ && !WIDE) barrier_wait(base + STORED, (c & 1) ^ 1);
        UNROLL for (int h = 0; h < HALVES; h++) {
            if (READS) {
                float o[32];
                read(o, S[h], q, values + h * PANEL, tile, weights + BEFORE, last, scale);
                if (!FIRST && WIDE)
                    put_wide(p, o, c * (i64)W, h * 64);
                else
                    leave(made + h * PANEL, o);
            } else if (GATE) {
                fade(S[h], last);
            }
        }
        if (FIRST) {
            fence_async();
            arrive(base + THERE + 8 * i_y.i);
        } else if (READ && !WIDE) {
            arrive(base + READY);
        }
        if (!FIRST && GATE < 2) arrive(base + Q_FREE + 8 * i_q.i);
        update(S, values, keys, weights + AFTER);
        if (FIRST || GATE == 2) arrive(base + Q_FREE + 8 * i_q.i);
        if (FIRST || AHLA) arrive(base + K_FREE + 8 * i_k.i);
        if (FIRST ? AHLA : !AHLA) arrive(base + V_FREE + 8 * i_v.i);
        if (!FIRST) arrive(base + TAKEN + 8 * i_y.i);
        i_q.next(), i_k.next(), i_v.next(), i_y.next();
    }
    UNROLL for (int h = 0; h < HALVES; h++)
        store_state(S[h], p, AT_END + PASS - 1, h * 64, V, p.keys, Head(p).tile == 0);
}

// Own P and F of hla3, the states of the second pass, which makes u, and of the third.
DEVICE void own_both(const Sweep &p, u32 base) {
    int first = Head(p).tile * 64, V = (int)p.values, chunks = Head(p).chunks();
    float P[BD / 2], F[BD / 2];
    load_state(P, p, AT_START + 1, first, V, p.keys);
    load_state(F, p, AT_START + 2, first, V, p.keys);
    Ring<CHUNKS_Q> i_q;
    Ring<CHUNKS_K> i_k;
    Ring<CHUNKS_V> i_v;
    Ring<2> i_y;
    #pragma unroll 1
    for (int c = 0; c < chunks; c++) {
        int at = weights_at(i_q.i, c == chunks - 1, 0);
        u32 weights = base + WEIGHTS + at * LISTS, last = base + ENDS + at * 4;
        u32 q = base + QS + i_q.i * TILE_D, k = base + KS + i_k.i * TILE_D;
        u32 v = base + VS + i_v.i * TILE_V, y = base + MADE + i_y.i * TILE_Y, u = base + US;
        u32 tile = base + TILES + i_y.i * TILE_W, own = base + TILES + 2 * TILE_W;
        float o[32];
        barrier_wait(base + Q_FULL + 8 * i_q.i, i_q.turn);
        barrier_wait(base + V_FULL + 8 * i_v.i, i_v.turn);
        barrier_wait(base + THERE + 8 * i_y.i, i_y.turn);
        fence_async();
        if (KEEP_U) barrier_wait(base + U_TAKEN, (c & 1) ^ 1);
        read(o, P, q, v, tile, weights + BEFORE, last, (float)p.factors[1]);
        leave(u, o);
        if (READ) {
            make_pairs(own, y, q, weights + LISTS + UNTIL, 2);  // fences u too
        } else {
            fence_async();
            group_sync(2);
        }
        if (KEEP_U) arrive(base + U_THERE);
        if (READ) {
            if (!WIDE) barrier_wait(base + STORED, (c & 1) ^ 1);
            read(o, F, q, u, own, weights + LISTS + BEFORE, last + 4, (float)p.factors[2]);
            if (WIDE)
                put_wide(p, o, c * (i64)W, first);
            else
                leave(base + OUT, o), arrive(base + READY);
        } else if (GATE) {
            fade(F, last + 4);
        }
        if (GATE < 2) arrive(base + Q_FREE + 8 * i_q.i);
        update(P, v, k, weights + AFTER, F, u, y, weights + LISTS + AFTER);
        if (GATE == 2) arrive(base + Q_FREE + 8 * i_q.i);
        arrive(base + K_FREE + 8 * i_k.i);
        arrive(base + V_FREE + 8 * i_v.i);
        arrive(base + TAKEN + 8 * i_y.i);
        i_q.next(), i_k.next(), i_v.next(), i_y.next();
    }
    first = Head(p).tile * 64;
    store_state(P, p, AT_END + 1, first, V, p.keys, true);
    store_state(F, p, AT_END + 2, first, V, p.keys, true);
}

// Load what the owners read, in the order in which they free it; store what they make.
DEVICE void move(const Sweep &p, u32 base) {
    Head head(p);
    int T = (int)head.tokens, chunks = head.chunks(), first = head.tile * 64;
    int D = (int)p.keys, V = (int)p.values;
    Copies<BD> q(p, AT_Q, head, D), k(p, AT_K, head, D);
    Copies<BV> v(p, AT_V, head, V, first), u(p, AT_U, head, V, first), o(p, AT_O, head, V, first);
    Copies<BY> y(p, AT_Y, head, AHLA ? V : D);
    int T_y = head.is_first(p.of[AT_Y]) && head.tile == 0 ? T : 0, T_u = head.is_first(p.of[AT_U]) ? T : 0;
    Ring<CHUNKS_Q> i_q;
    Ring<CHUNKS_K> i_k;
    Ring<CHUNKS_V> i_v;
    Ring<2> i_y;
    LogGate gate(p, head, 0);
    #pragma unroll 1
    for (int c = 0; c < chunks + CHUNKS_Q; c++) {
        if (c >= K_LATER && c < chunks + K_LATER) {
            barrier_wait(base + K_FREE + 8 * i_k.i, i_k.turn ^ 1);
            k.load(base + KS + i_k.i * TILE_D, T - (c - K_LATER) * W);
            k.arrive(base + K_FULL + 8 * i_k.i);
            i_k.next();
        }
        if (c < chunks) {
            barrier_wait(base + Q_FREE + 8 * i_q.i, i_q.turn ^ 1);
            q.load(base + QS + i_q.i * TILE_D, T - c * W);
            q.arrive(base + Q_FULL + 8 * i_q.i);
            if (GATE == 2) gate.put(base, i_q.i, (c + 1) * (i64)W, base + Q_FULL + 8 * i_q.i);
            i_q.next();
        }
        if (c >= CHUNKS_Q) {
            int e = c - CHUNKS_Q;
            if (READ && !WIDE) {
                barrier_wait(base + READY, e & 1);
                o.store(base + OUT, T - e * W);
                arrive(base + STORED);
            }
            if (KEEP) {
                barrier_wait(base + THERE + 8 * i_y.i, i_y.turn);
                y.store(base + MADE + i_y.i * TILE_Y, T_y - e * W);
                arrive(base + TAKEN + 8 * i_y.i);
                i_y.next();
            }
            if (KEEP_U) {
                barrier_wait(base + U_THERE, e & 1);
                u.store(base + US, T_u - e * W);
                arrive(base + U_TAKEN);
            }
        }
        if (c >= V_LATER && c < chunks + V_LATER) {
            barrier_wait(base + V_FREE + 8 * i_v.i, i_v.turn ^ 1);
            v.load(base + VS + i_v.i * TILE_V, T - (c - V_LATER) * W);
            v.arrive(base + V_FULL + 8 * i_v.i);
            i_v.next();
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) hopper_kernel(const __grid_constant__ Sweep p) {
    extern __shared__ __align__(1024) u8 memory[];
    u32 base = shared_address(memory);
    if (threadIdx.x == 0) {
        begin(base + Q_FULL, CHUNKS_Q, 128 + (GATE == 2)), begin(base + Q_FREE, CHUNKS_Q, 8);
        begin(base + K_FULL, CHUNKS_K, 128), begin(base + K_FREE, CHUNKS_K, HANDS ? 8 : 4);
        begin(base + V_FULL, CHUNKS_V, 128), begin(base + V_FREE, CHUNKS_V, 4);
        begin(base + THERE, 2, 4), begin(base + TAKEN, 2, KEEP ? 8 : 4);
        begin(base + READY, 4, 4);  // and those behind it
        fence_async();
    }
    put_decay_of(p, base);
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in a warp, which it shows
    if (group == 0) {
        registers_more<OWNER_REGISTERS>();
        own<1>(p, base);
    } else if (group == 1) {
        registers_more<OWNER_REGISTERS>();
        if constexpr (HLA3)
            own_both(p, base);
        else
            own<2>(p, base);
    } else {
        registers_less<MOVER_REGISTERS>();
        move(p, base);
    }
}
