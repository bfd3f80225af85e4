// The causal pass from sm_80 on: one block of threads a head, a segment and a tile of values.
//
//     o_t = read * (a_t q_t S + sum_j write * L[j, t] (q_t . k_j) v_j)    S <- r S + write * (b k)' v
//
// The state is held transposed, S' (V, D) in float32 registers: warp w has its rows 16 w .. 16 w + 15.
// A chunk of W tokens, all operands q, k, v as they are stored, in blocks of 16 x 16 (block.cuh):
//
//     P = lower(Q K')  [W, W]    O = a * (Q S) + P V  [W, V]    S' = r S' + V' (b K)  [V, D]
//
// Every product is x y' of blocks whose sums run along rows: Q and S', P and V', V' and K'. So S' is an
// operand as it is, without an exchange; V' is loaded once for both of its products. P goes through
// shared memory, its blocks shared out among the warps, while the chunk before is multiplied: one barrier
// a chunk. A warp's O leaves through memory of its own. Chunks are copied STAGES - 1 ahead by cp.async;
// rows that are not aligned, or of another dtype, element by element.
//
// Weights. With c_t the sum of the log gate over the chunk up to t and e_t the same without t itself
// (what a strict pass reads), L = exp(c_t - c_j), a = exp(c_t), b = exp(c_last - c_j); the reverse pass
// exchanges a and b and transposes L. One warp sums two chunks ahead, in float64; c is kept as two floats, so
// that differences have float32's digits whatever the gate. A reset is a gate of -1e6.
//
// Bytes a token and head, D = V = 128, bfloat16: q, k, v and o once, 1024 (768 where v is k): 0.18 ms at
// 3.0 TB/s for B = 8, T = 4096, H = 16. mma.sync: 2 (1.25 W + 2 D) V operations, 76 k at W = 32. One H100
// took 0.24 ms for linear (74% of its bytes' time): each block that is read from shared memory serves one
// product of a warp, 4 KB a token. 8 warps of < 255 registers, 120 KB: one block of threads a
// multiprocessor.
//
// Of one launch: `BOTH` adds the pass with k and v exchanged, of one state; `DOTS` 1 writes sum_v x (read a_t q_t S), 2 also the sums over the pairs of a chunk
// (derivations 5); `KEEP` writes the state before every period of tokens but the first.
#include "ptx.cuh"
#include "arrays.cuh"
#include "block.cuh"

enum { Q, K, V, O, X, START, END, GATE, SUMS, STATES, OPERANDS };
struct Pass {
    u8* at[OPERANDS];
    Operand of[OPERANDS];
    double read, write, power;
    i64 tokens, segment, keys, values, heads1, heads2, strict, log, tiles, period;
};

constexpr int WARPS = BV > 64 ? BV / 16 : 4, THREADS = 32 * WARPS;
constexpr int KEYS = BD / 16, BLOCKS = W / 16;
constexpr int PITCH = BD + PAD, PITCH_V = BV + PAD, PITCH_P = W + PAD;
constexpr int TILE = W * PITCH, TILE_V = W * PITCH_V;
constexpr bool OWN_V = UPDATE && !V_IS_K;
constexpr int AT_K = READ ? TILE : 0, AT_V = AT_K + (UPDATE ? TILE : 0);
constexpr int AT_X = AT_V + (OWN_V ? TILE_V : 0), STAGE = AT_X + (DOTS ? TILE_V : 0);
constexpr int PITCH_OF_V = V_IS_K ? PITCH : PITCH_V;
constexpr int NUMBERS = 6 * W + 4;  // of a chunk's weights
constexpr bool PAIRS = READ && UPDATE;
constexpr int SQUARES = BOTH ? 2 : 1;  // of pairs a chunk
constexpr int AHEAD = PAIRS && STAGES > 2;  // a chunk's pairs are multiplied while the last one runs
constexpr int WEIGHER = WARPS > 4 ? REVERSE ? 3 : 4 : 0;  // a warp with no pairs, where there is one
#if ADD || TYPE_O == 2
typedef float Out;
#else
typedef u16 Out;
#endif
typedef SUM_TYPE Dot;
template <int N> struct Number {
    static constexpr int value = N;
};

DEVICE u8* start_of(const Pass& p, int i, const i64 (&head)[3], i64 segment, i64 row, i64 column) {
    const Operand& x = p.of[i];
    i64 at = head[0] * x.head[0] + head[1] * x.head[1] + head[2] * x.head[2];
    at += segment * x.segment + row * x.row + column * x.column;
    return p.at[i] + at * width_of((int)x.type);
}

// Copy the rows of a chunk into a tile, zeros behind its last row and column.
// ASYNC: 1 by copies, 2 of 16-bit numbers that become float32, eight at once, 0 one by one.
template <int COLUMNS, int PITCH, int ASYNC>
DEVICE void fetch(Element* tile, const u8* from, const Operand& x, i64 first, int rows, int columns) {
    constexpr int PIECE = ASYNC == 2 ? 8 : 16 / sizeof(Element), PIECES = COLUMNS / PIECE;
    if (ASYNC == 2) {
#pragma unroll 4
        for (int i = threadIdx.x; i < W * PIECES; i += THREADS) {
            int row = i / PIECES, column = i % PIECES * PIECE;
            uint4 all = {0, 0, 0, 0};
            if (row < rows && column < columns)
                all = *(const uint4*)((const u16*)from + (first + row) * x.row + column);
            const u32 pairs[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const u16 one = (u16)(pairs[n / 2] >> n % 2 * 16);
                tile[row * PITCH + column + n] = element(x.type == 1 ? of_f16(one) : of_bf16(one));
            }
        }
    } else if (ASYNC) {
#if NARROW
#pragma unroll
#else
#pragma unroll 1  // its addresses would take registers that the sums need
#endif
        for (int i = threadIdx.x; i < W * PIECES; i += THREADS) {
            int row = i / PIECES, column = i % PIECES * PIECE;
            bool there = row < rows && column < columns;
            const Element* p = (const Element*)from + (there ? (first + row) * x.row + column : 0);
            copy16(shared_address(tile) + (row * PITCH + column) * (int)sizeof(Element), p, there ? 16 : 0);
        }
    } else {
        for (int i = threadIdx.x; i < W * COLUMNS; i += THREADS) {
            int row = i / COLUMNS, column = i % COLUMNS;
            bool there = row < rows && column < columns;
            float found = there ? get(from, (first + row) * x.row + column * x.column, (int)x.type) : 0.f;
            tile[row * PITCH + column] = element(found);
        }
    }
}

// The log gate of a token; of a decay its logarithm.
DEVICE double log_gate(const Pass& p, const u8* gate, i64 token) {
    double a = get(gate, token * p.of[GATE].row, (int)p.of[GATE].type);
    if (!p.log) a = log(a < 1e-30 ? 1e-30 : a);  // not fmax, which would drop a NaN
    a *= p.power;
    return a < -1e6 ? -1e6 : a;
}

// Weights of a chunk by one warp: of a pair exp(row + column), of rows, of columns, of the state.
struct Weights {
    float2 row[W], column[W];
    float into[W], out[W], total, unused[3];
};
static_assert(sizeof(Weights) == NUMBERS * sizeof(float), "numbers of a chunk");

DEVICE float2 two_floats(double x) {
    float high = (float)x;
    return make_float2(high, (float)(x - high));
}

DEVICE void weigh(const Pass& p, Weights& w, const double (&a)[W / 32]) {
    int lane = threadIdx.x & 31;
    double sum = 0., before;
#pragma unroll
    for (int i = 0; i < W / 32; i++) sum += a[i];
    double upto = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        double other = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += other;
    }
    before = upto - sum;
    double last = __shfl_sync(~0u, upto, 31);
#pragma unroll
    for (int i = 0; i < W / 32; i++) {
        int t = lane * (W / 32) + i;
        double c = before + a[i], up = p.strict ? before : c;
        before = c;
        w.row[t] = two_floats(REVERSE ? -c : up);
        w.column[t] = two_floats(REVERSE ? up : -c);
        float in = expf((float)up), out = expf((float)(last - c));
        w.into[t] = REVERSE ? out : in;
        w.out[t] = (REVERSE ? in : out) * (float)p.write;
    }
    if (lane == 0) w.total = expf((float)last);
}

DEVICE bool legal(int query, int key, int strict) {
    return REVERSE ? key - query >= strict : query - key >= strict;
}
DEVICE bool legal_blocks(int query, int key) { return REVERSE ? key >= query : query >= key; }

extern "C" __global__ void __launch_bounds__(THREADS) pass_kernel(const __grid_constant__ Pass p) {
    extern __shared__ __align__(128) u8 memory[];
    Element* stages = (Element*)memory;
    Element* pairs = stages + STAGES * STAGE;
    Out* outs = (Out*)(pairs + (PAIRS ? 2 * SQUARES * W * PITCH_P : 0));
    Weights* weights = (Weights*)(outs + (READ ? W * PITCH_V : 0));
    Dot* sums = (Dot*)(weights + (GATED ? 3 : 0));  // reads (2, WARPS, W), pairs (3, by key and query)

    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, j = 2 * (lane & 3);
    i64 head[3], index = blockIdx.x, segment = 0;
    const int tile = (int)(index % p.tiles);
    index /= p.tiles;
    i64 count = p.tokens, first = 0, segments = 1;
    if (p.segment) {
        segments = (p.tokens + p.segment - 1) / p.segment;
        segment = index % segments, index /= segments, first = segment * p.segment;
        count = count - first < p.segment ? count - first : p.segment;
    }
    head[2] = index % p.heads2, index /= p.heads2;
    head[1] = index % p.heads1, head[0] = index / p.heads1;
    const i64 v0 = tile * BV;
    const int keys = (int)p.keys, values = p.values - v0 < BV ? (int)(p.values - v0) : BV;
    const int chunks = (int)((count + W - 1) / W), strict = (int)p.strict;

    const u8 *p_q = 0, *p_k = 0, *p_v = 0, *p_x = 0, *p_gate = 0;
    u8* p_o = 0;
    if (READ) p_q = start_of(p, Q, head, 0, first, 0), p_o = start_of(p, O, head, 0, first, v0);
    if (UPDATE) p_k = start_of(p, K, head, 0, first, 0);
    if (OWN_V) p_v = start_of(p, V, head, 0, first, v0);
    if (DOTS) p_x = start_of(p, X, head, 0, first, v0);
    if (GATED) p_gate = start_of(p, GATE, head, 0, first, 0);

    auto rows_of = [&](int chunk) {  // first token and tokens of a chunk, in the order of the pass
        return i64(REVERSE ? chunks - 1 - chunk : chunk) * W;
    };
    auto tokens_of = [&](i64 row) { return count - row < W ? int(count - row) : W; };
    auto fetch_chunk = [&](int chunk) {
        Element* to = stages + chunk % STAGES * STAGE;
        i64 row = rows_of(chunk);
        int n = tokens_of(row);
        if (READ) fetch<BD, PITCH, ASYNC_Q>(to, p_q, p.of[Q], row, n, keys);
        if (UPDATE) fetch<BD, PITCH, ASYNC_K>(to + AT_K, p_k, p.of[K], row, n, keys);
        if (OWN_V) fetch<BV, PITCH_V, ASYNC_V>(to + AT_V, p_v, p.of[V], row, n, values);
        if (DOTS) fetch<BV, PITCH_V, ASYNC_X>(to + AT_X, p_x, p.of[X], row, n, values);
    };

    Sum S[KEYS];  // S' (V, D)
    const int mine = warp * 16;  // first row of this warp
    const bool holds = mine < values;
    auto each = [&](int operand, i64 at, auto&& visit) {  // the elements of S' in a matrix
        if (!holds) return;
        const Operand& x = p.of[operand];
        u8* base = start_of(p, operand, head, at, 0, 0);
#pragma unroll
        for (int d = 0; d < KEYS; d++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int row = mine + g + (i >> 1 & 1) * 8, column = 16 * d + j + (i & 1) + (i >> 2) * 8;
                if (row < values && column < keys)
                    visit(base, (v0 + row) * x.row + column * x.column, (int)x.type, S[d].x[i]);
            }
    };
#pragma unroll
    for (int d = 0; d < KEYS; d++) S[d].clear();
    if (p.at[START])
        each(START, segment, [](u8* base, i64 at, int type, float& x) { x = get(base, at, type); });
    auto keep = [&](i64 row) {
        if (KEEP && first + row && (first + row) % p.period == 0)
            each(STATES, (first + row) / p.period - 1,
                 [](u8* base, i64 at, int type, float& x) { put(base, at, type, x); });
    };

#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < chunks) fetch_chunk(i);
        copies_commit();
    }
    double a[W / 32];  // gates of the chunk whose weights are next
    const double decay = GATED && !p.log ? log_gate(p, p_gate, 0) : 0.;
    auto read_gates = [&](int chunk) {
        i64 row = rows_of(chunk);
#pragma unroll
        for (int i = 0; i < W / 32; i++) {
            i64 t = row + lane * (W / 32) + i;
            a[i] = chunk >= chunks || t >= count ? 0. : p.log ? log_gate(p, p_gate, t) : decay;
        }
    };
    auto weigh_chunk = [&](int chunk) {  // whose gates were read; and read those of the next
        if (chunk < chunks && (p.log || chunk < 6 || tokens_of(rows_of(chunk)) < W))
            weigh(p, weights[chunk % 3], a);
        read_gates(chunk + 1);
    };

    auto pair_up = [&](int chunk) {  // P of a chunk, and the sums over it
        const Element* q = stages + chunk % STAGES * STAGE;
        const Element *k = q + AT_K, *v = V_IS_K ? k + v0 : q + AT_V, *x = q + AT_X;
        const Weights* w = weights + (GATED ? chunk % 3 : 0);
        Element* to = pairs + (chunk & 1) * SQUARES * W * PITCH_P;
#pragma unroll 1
        for (int i = warp; i < BLOCKS * BLOCKS; i += WARPS) {
            const int t0 = i % BLOCKS * 16, s0 = i / BLOCKS * 16;
            if (!legal_blocks(t0, s0)) continue;
            Sum A, other;
            A.clear(), other.clear();
#if NARROW
#pragma unroll
#else
#pragma unroll 2
#endif
            for (int d = 0; d < BD; d += 16)  // two sums: half as long a chain
                multiply(d & 16 ? other : A, load<PITCH>(q, t0, d), second<PITCH>(k, s0, d));
#pragma unroll
            for (int e = 0; e < 8; e++) A.x[e] += other.x[e];
            Sum M;
            M.clear();
            if (BOTH || DOTS == 2)
#pragma unroll 2  // of all at once the operands spill
                for (int d = 0; d < BV; d += 16)
                    multiply(M, BOTH ? load<PITCH>(q, t0, d) : load<PITCH_V>(x, t0, d),
                             second<PITCH_OF_V>(v, s0, d));
            Dot by_query[2] = {0, 0}, by_key[4] = {0, 0, 0, 0};
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int r = e >> 1 & 1, h = (e & 1) + (e >> 2) * 2;
                const int t = t0 + g + 8 * r, s = s0 + j + (e & 1) + (e >> 2) * 8;
                float weight = WRITE ? (float)p.write : 1.f;
                const bool able = legal(t, s, strict);
                if (GATED) {
                    float2 one = w->row[t], two = w->column[s];
                    weight *= expf(able ? (one.x + two.x) + (one.y + two.y) : 0.f);
                }
                A.x[e] = able ? A.x[e] * weight : 0.f;
                if (DOTS == 2 && able && t != s) {
                    Dot found = (Dot)(A.x[e] * (float)p.read * M.x[e]);
                    by_query[r] += found, by_key[h] += found;
                }
                M.x[e] = able ? M.x[e] * weight : 0.f;
            }
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    Element* at = to + (t0 + g + 8 * r) * PITCH_P + s0 + j + 8 * h;
                    put_pair(at, A.x[4 * h + 2 * r], A.x[4 * h + 2 * r + 1]);
                    if (BOTH) put_pair(at + W * PITCH_P, M.x[4 * h + 2 * r], M.x[4 * h + 2 * r + 1]);
                }
            if (DOTS == 2) {
                Dot* own = sums + (2 * WARPS + chunk % 3 * 2 * BLOCKS) * W;
                Dot *keyed = own + (t0 / 16) * W + s0, *queried = own + (BLOCKS + s0 / 16) * W + t0;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    Dot all = by_query[r];
                    all += __shfl_xor_sync(~0u, all, 1);
                    all += __shfl_xor_sync(~0u, all, 2);
                    if (j == 0) queried[g + 8 * r] = all;
                }
#pragma unroll
                for (int h = 0; h < 4; h++) {
                    Dot all = by_key[h];
                    all += __shfl_xor_sync(~0u, all, 4);
                    all += __shfl_xor_sync(~0u, all, 8);
                    all += __shfl_xor_sync(~0u, all, 16);
                    if (g == 0) keyed[j + (h & 1) + (h >> 1) * 8] = all;
                }
            }
        }
    };

    auto leave = [&](i64 row) {  // a warp's columns of o, from where it alone has put them
        const int n = tokens_of(row);
        const Operand& x = p.of[O];
        const Out* from = outs + mine;
        __syncwarp();
        if (ASYNC_O) {
            constexpr int PIECE = 16 / sizeof(Out), PIECES = 16 / PIECE;
#pragma unroll
            for (int i = lane; i < W * PIECES; i += 32) {
                int t = i / PIECES, v = i % PIECES * PIECE;
                if (t >= n || mine + v >= values) continue;
                const i64 at = (row + t) * x.row + mine + v;
                const Out* piece = from + t * PITCH_V + v;
#if ADD && TYPE_O == 2
                float4 *to = (float4*)((float*)p_o + at), old = *to, more = *(const float4*)piece;
                *to = float4{old.x + more.x, old.y + more.y, old.z + more.z, old.w + more.w};
#elif ADD && TYPE_O == 0
                uint2 *to = (uint2*)((u16*)p_o + at), old = *to;
                float4 more = *(const float4*)piece;
                *to = uint2{bf16_pair(of_bf16(old.x) + more.x, of_bf16_high(old.x) + more.y),
                            bf16_pair(of_bf16(old.y) + more.z, of_bf16_high(old.y) + more.w)};
#elif ADD
                for (int e = 0; e < PIECE; e++) put(p_o, at + e, TYPE_O, get(p_o, at + e, TYPE_O) + piece[e]);
#else
                *(uint4*)((Out*)p_o + at) = *(const uint4*)piece;
#endif
            }
            return;
        }
        for (int i = lane; i < W * 16; i += 32) {
            int t = i / 16, v = i % 16;
            if (t >= n || mine + v >= values) continue;
            i64 at = (row + t) * x.row + (mine + v) * x.column;
            Out found = from[t * PITCH_V + v];
#if ADD
            put(p_o, at, TYPE_O, found + get(p_o, at, TYPE_O));
#elif TYPE_O == 2
            ((float*)p_o)[at] = found;
#else
            ((u16*)p_o)[at] = found;
#endif
        }
    };

    auto leave_sums = [&](int chunk) {  // of what is read, with that of pairs by query, and by key
        const i64 row = rows_of(chunk);
        for (int t = threadIdx.x; t < W && t < tokens_of(row); t += THREADS) {
            const Dot* pairs = sums + (2 * WARPS + chunk % 3 * 2 * BLOCKS) * W + t;
            Dot read = 0, by_key = 0;
            for (int n = 0; n < WARPS; n++) read += sums[((chunk & 1) * WARPS + n) * W + t];
            if (BOTH) read *= (Dot).5;  // it is of both operands
            if (DOTS == 2)
                for (int n = 0; n < BLOCKS; n++) {
                    if (legal_blocks(n, t / 16)) by_key += pairs[n * W];
                    if (legal_blocks(t / 16, n)) read += pairs[(BLOCKS + n) * W];
                }
            u8* to = start_of(p, SUMS, head, 0, first + row + t, 0);
            const i64 at = tile * p.of[SUMS].segment;
            put(to, at, (int)p.of[SUMS].type, read);
            if (DOTS == 2) put(to, at + p.tokens, (int)p.of[SUMS].type, by_key);
        }
    };

    if (GATED && warp == WEIGHER) {
        read_gates(0);
        weigh_chunk(0);
        weigh_chunk(1);
    }
    if (PAIRS && chunks) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        pair_up(0);
    }

    for (int c = 0; c < chunks; c++) {
        copies_wait<STAGES - 2 - AHEAD>();
        __syncthreads();  // this chunk is there and its pairs, the next one too; nobody reads the last
        if (c + STAGES - 1 < chunks) fetch_chunk(c + STAGES - 1);
        copies_commit();
        if (DOTS && c > 0) leave_sums(c - 1);
        const Element* q = stages + c % STAGES * STAGE;
        const Element *k = q + AT_K, *v = V_IS_K ? k + v0 : q + AT_V, *x = q + AT_X;
        const i64 row = rows_of(c);
        const Weights* w = weights + (GATED ? c % 3 : 0);
        if (!REVERSE) keep(row);

        Sum o[READ ? BLOCKS : 1];
        if (READ && holds) {
#pragma unroll
            for (int t = 0; t < BLOCKS; t++) o[t].clear();
#pragma unroll
            for (int d = 0; d < KEYS; d++) {
                Block s = block_of(S[d]);
#pragma unroll
                for (int t = 0; t < BLOCKS; t++) multiply(o[t], load<PITCH>(q, 16 * t, 16 * d), s);
            }
            if (GATED)
#pragma unroll
                for (int t = 0; t < BLOCKS; t++)
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        o[t].x[i] *= w->into[16 * t + g + (i >> 1 & 1) * 8];
        }
        if (DOTS)
#pragma unroll
            for (int t = 0; t < BLOCKS; t++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    Dot all = 0;
                    const Element* mate = x + (16 * t + g + 8 * r) * PITCH_V + mine + j;
                    if (holds)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            all += (Dot)(o[t].x[(i >> 1) * 4 + 2 * r + (i & 1)] * (float)p.read
                                         * value(mate[(i >> 1) * 8 + (i & 1)]));
                    all += __shfl_xor_sync(~0u, all, 1);
                    all += __shfl_xor_sync(~0u, all, 2);
                    if (j == 0) sums[((c & 1) * WARPS + warp) * W + 16 * t + g + 8 * r] = all;
                }
        if (UPDATE && holds) {
            const float total = GATED ? w->total : 1.f;
            auto update = [&](const Element* v, auto pitch_v, const Element* k, auto pitch, const Element* P) {
                constexpr int PITCH_1 = decltype(pitch_v)::value, PITCH_2 = decltype(pitch)::value;
                Block b[BLOCKS];
#pragma unroll
                for (int s = 0; s < BLOCKS; s++) b[s] = load_turned<PITCH_1>(v, 16 * s, mine);
                if (READ)
#pragma unroll
                    for (int t = 0; t < BLOCKS; t++)
#pragma unroll
                        for (int s = 0; s < BLOCKS; s++)
                            if (legal_blocks(t, s)) multiply(o[t], load<PITCH_P>(P, 16 * t, 16 * s), b[s]);
                if (GATED) {
#pragma unroll
                    for (int s = 0; s < BLOCKS; s++) b[s] = weighed(b[s], w->out + 16 * s);
                } else if (WRITE) {
#pragma unroll
                    for (int s = 0; s < BLOCKS; s++) b[s] = scaled(b[s], (float)p.write);
                }
#pragma unroll
                for (int d = 0; d < KEYS; d++)
#pragma unroll
                    for (int s = 0; s < BLOCKS; s++)
                        multiply(S[d], b[s], second_turned<PITCH_2>(k, 16 * s, 16 * d));
            };
            if (GATED)
#pragma unroll
                for (int d = 0; d < KEYS; d++)
#pragma unroll
                    for (int i = 0; i < 8; i++) S[d].x[i] *= total;
            const Element* P = pairs + (c & 1) * SQUARES * W * PITCH_P;
            update(v, Number<PITCH_OF_V>(), k, Number<PITCH>(), P);
            if (BOTH)  // the same with k and v exchanged
                update(k, Number<PITCH>(), v, Number<PITCH_OF_V>(), P + W * PITCH_P);
        }
        if (REVERSE) keep(row);
        if (READ && holds) {
#pragma unroll
            for (int t = 0; t < BLOCKS; t++)
#pragma unroll
                for (int i = 0; i < 8; i += 2) {
                    Out* to = outs + (16 * t + g + (i >> 1 & 1) * 8) * PITCH_V + mine + j + (i >> 2) * 8;
                    float one = o[t].x[i] * (float)p.read, two = o[t].x[i + 1] * (float)p.read;
#if ADD || TYPE_O == 2
                    *(float2*)to = make_float2(one, two);
#elif TYPE_O == 1
                    *(u32*)to = to_f16(one) | (u32)to_f16(two) << 16;
#else
                    *(u32*)to = bf16_pair(one, two);
#endif
                }
            leave(row);
        }
        if (PAIRS && !AHEAD && c + 1 < chunks) {
            copies_wait<0>();
            __syncthreads();
        }
        if (PAIRS && c + 1 < chunks) pair_up(c + 1);
        if (GATED && warp == WEIGHER) weigh_chunk(c + 2);
    }
    if (DOTS && chunks) {
        __syncthreads();
        leave_sums(chunks - 1);
    }
    if (p.at[END]) {  // of the heads that share a state, those along a stride of 0, the first writes it
        const Operand& x = p.of[END];
        bool later = false;
        for (int i = 0; i < 3; i++) later |= x.head[i] == 0 && head[i] > 0;
        if (!later)
            each(END, segment, [](u8* base, i64 at, int type, float& x) { put(base, at, type, x); });
    }
}
