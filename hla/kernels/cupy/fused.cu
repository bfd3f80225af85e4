// The causal forward from sm_80 on, all states of a head in one block of threads.
//
//     hla2: y = pass(q, k, k)   o = pass^2(q, y, v)
//     ahla: u = pass(q, k, v)   o = pass(q, k, u)
//     hla3: y = pass(q, k, k)   u = pass(q, k, v)   o = pass^3(q, y, u)
//
// The states are held transposed, S' (V, D) in float32 registers: a warp has 32 rows of one. Warps of the
// first part make y (of ahla u), those of the middle one hla3's u, those of the last part o, one chunk
// later: y and u pass between them in shared memory. Of hla3 a block has 64 values, and S anew. A chunk of W
// tokens, of keys K and values X of each pass, in blocks of 16 x 16 (block.cuh):
//
//     P = lower(Q K')  [W, W]    O = Q S + P X  [W, V]    S' = S' + X' K  [V, D]
//
// Every block that is read from shared memory serves two products, of a warp's two rows of blocks. A part's
// P is made by its warps before they read their states, and read after a barrier of that part; ahla's
// serves both, hla3's first that of y and u. There is one barrier of all threads a chunk. Chunks are copied
// STAGES - 2 ahead by cp.async; rows of no whole 16 bytes element by element.
//
// A gate's weights lie beside a chunk as lists: see hopper.cu. They are of power 1, which a pass raises.
//
// Bytes a token and head, D = V = 128: q, k, v and o once, 1024 (y too: 1280): 0.179 ms for B = 8,
// T = 4096, H = 16 at 3.0 TB/s. Of a chunk of 32 a warp does about 152 products of 16 x 8 x 16 and reads 55
// times 512 bytes: 128 chunks take 0.14 ms of the matrix units and 0.13 ms of shared memory. One H100 took
// 0.266 ms for hla2 (67% of its bytes' time), 0.224 for ahla (80%), 0.500 for hla3, 0.126 for hla2 with
// D = V = 64; chunks of 16 tokens 0.31. 727 instructions a warp and chunk; what is left is latency: a
// scheduler has two warps.
//
// Compiled for each OPERATOR (1 ahla, 2 hla2, 3 hla3), B (tiles of 64 or 128 keys and values), GATE (0 none,
// 1 decay, 2 log gate), READ (o is requested, not the states alone) and WIDE (in float32), KEEP (y, or u of
// ahla, is stored), KEEP_U (u of hla3), FAST (rows are of whole 16 bytes), WHOLE (tiles have no columns that
// are not there), W and STAGES.
#define NARROW 1
#include "ptx.cuh"
#include "arrays.cuh"
#include "block.cuh"

constexpr bool AHLA = OPERATOR == 1, HLA3 = OPERATOR == 3, SPLIT = HLA3;
constexpr int BV = HLA3 ? 64 : B, KEYS = B / 16, BLOCKS = W / 16;
constexpr int FIRST = B / 32, MIDDLE = HLA3 ? 2 : 0, LAST = BV / 32, THREADS = 32 * (FIRST + MIDDLE + LAST);
constexpr int PITCH = (B + PAD) * 2, TILE = W * PITCH, PITCH_P = (W + PAD) * 2, TILE_P = W * PITCH_P;
constexpr int WEIGHER = FIRST - 1;  // the warp that makes weights

// Shared memory
constexpr int STAGE = 3 * TILE, MADE = STAGES * STAGE, US = MADE + 2 * TILE, OUT = US + (HLA3 ? 2 * TILE : 0);
constexpr int TILES = OUT + TILE, WEIGHTS = TILES + (AHLA ? 2 : 4) * TILE_P;
constexpr int UNTIL = 0, BEFORE = W * 4, AFTER = W * 8, WHOLE_CHUNK = W * 12, LISTS = W * 12 + 16;

enum { AT_Q, AT_K, AT_V, AT_Y, AT_U, AT_O, AT_GATE, AT_START, AT_END = AT_START + 3, OPERANDS = AT_END + 3 };
#include "sweep.cuh"

// ---- Copies of a chunk's rows: rows and columns that are not there are zeros

DEVICE uint4 gathered(const u16 *p, i64 step, int left) {
    u32 pair[4] = {};
    UNROLL for (int i = 0; i < 8; i++)
        if (i < left) pair[i / 2] |= (u32)p[i * step] << (i % 2 * 16);
    return {pair[0], pair[1], pair[2], pair[3]};
}

DEVICE void scattered(u16 *p, i64 step, int left, uint4 x) {
    u32 pair[4] = {x.x, x.y, x.z, x.w};
    UNROLL for (int i = 0; i < 8; i++)
        if (i < left) p[i * step] = (u16)(pair[i / 2] >> (i % 2 * 16));
}

template <int WIDTH> struct Copies {
    static constexpr int IN_ROW = WIDTH / 8, APART = THREADS / IN_ROW;
    const u8 *from;  // of this thread's first row in the chunk that is next
    i64 step, right;
    u32 to;
    int row, left;  // columns from this thread's first one on

    DEVICE Copies(const Sweep &p, int operand, const Head &head, int columns, int first) {
        const Operand &x = p.of[operand];
        int column = threadIdx.x % IN_ROW * 8;
        row = threadIdx.x / IN_ROW, left = columns - first - column, step = x.row * 2, right = x.column;
        from = p.at[operand] + head.offset(x, 0, head.first + row, first + column) * 2;
        to = row * PITCH + column * 2;
    }
    DEVICE void load(u32 tile, int rows) {
        UNROLL for (int j = 0; j < W; j += APART) {
            bool there = row + j < rows;
            if ((W % APART && row + j >= W)) continue;
            const u8 *p = from + j * step;
            if (FAST)
                copy16(tile + to + j * PITCH, p, there && (WHOLE || left > 0) ? 16 : 0);
            else
                store16(tile + to + j * PITCH, gathered((const u16 *)p, right, there ? left : 0));
        }
        from += W * step;
    }
};

// ---- Weights of a chunk by one warp, a token a lane

DEVICE void put_weights(u32 lists, double a) {
    int t = threadIdx.x & 31;
    a *= LOG2E;
    a = a < RESET ? RESET : a;  // a NaN stays
    UNROLL for (int n = 1; n < 32; n *= 2) {
        double other = __shfl_up_sync(~0u, a, n);
        if (t >= n) a += other;
    }
    double last = __shfl_sync(~0u, a, W - 1);
    if (t >= W) return;
    store_float(lists + UNTIL + t * 4, (float)a);
    store_float(lists + BEFORE + t * 4, power_of_2((float)a));
    store_float(lists + AFTER + t * 4, power_of_2((float)(last - a)));
    if (t == 0) store_float(lists + WHOLE_CHUNK, power_of_2((float)last));
}

struct Gate {
    const u8 *p;
    const Operand &of;
    int tokens;
    float next;  // of this lane's token in the chunk that is next

    DEVICE Gate(const Sweep &sweep, const Head &head) : of(sweep.of[AT_GATE]) {
        if (!GATE) return;
        p = sweep.at[AT_GATE] + head.offset(of, 0, GATE == 2 ? head.first : 0, 0) * width_of((int)of.type);
        tokens = (int)head.tokens, next = 0.f;
        load(0);
    }
    DEVICE void load(int chunk) {
        int t = chunk * W + (threadIdx.x & 31);
        bool there = t < tokens && (threadIdx.x & 31) < W;
        if (GATE == 2)
            next = there ? get(p, t * of.row, (int)of.type) : 0.f;
        else if (chunk == 0)
            next = get(p, 0, (int)of.type);
    }
    DEVICE void put(u32 base, int chunk) {
        double a = next;
        int t = chunk * W + (threadIdx.x & 31);
        if (GATE == 1) {  // of a decay all chunks but the last have the same
            if (chunk > 2 && chunk * W + W <= tokens) return;
            a = t < tokens ? log(a < LEAST ? LEAST : a) : 0.;  // a NaN stays
        }
        load(chunk + 1);
        put_weights(base + WEIGHTS + chunk % 3 * LISTS, a);
    }
};

// ---- Blocks

template <int N> struct Number {
    static constexpr int value = N;
};

DEVICE Block block_at(u32 place) {
    Block x;
    ldmatrix(x.x, place);
    return x;
}

DEVICE Block block_turned(u32 place) {
    Block x;
    ldmatrix_turned(x.x, place);
    return x;
}

// The same of second factors, whose registers a product takes in another order: of the places of this
// lane's rows in blocks turned, and as they are.
DEVICE Block second_at(u32 place) {
    Block x = block_at(place);
    return {x.x[0], x.x[2], x.x[1], x.x[3]};
}

DEVICE Block second_turned(u32 place) {
    Block x = block_turned(place);
    return {x.x[0], x.x[2], x.x[1], x.x[3]};
}

// Scale the columns of a block by a list from this lane's first column on.
DEVICE Block weighed(const Block &b, float2 w, float2 w8) {
    return {bf16_pair(of_bf16(b.x[0]) * w.x, of_bf16_high(b.x[0]) * w.y),
            bf16_pair(of_bf16(b.x[1]) * w.x, of_bf16_high(b.x[1]) * w.y),
            bf16_pair(of_bf16(b.x[2]) * w8.x, of_bf16_high(b.x[2]) * w8.y),
            bf16_pair(of_bf16(b.x[3]) * w8.x, of_bf16_high(b.x[3]) * w8.y)};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) fused_kernel(const __grid_constant__ Sweep p) {
    extern __shared__ __align__(128) u8 memory[];
    const u32 base = shared_address(memory);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same in a warp, which it shows
    const int lane = threadIdx.x & 31, g = lane >> 2, j = 2 * (lane & 3);
    const bool first = warp < FIRST, late = warp >= FIRST + MIDDLE;
    const int rank = warp - (first ? 0 : late ? FIRST + MIDDLE : FIRST);
    const int power = late ? AHLA ? 1 : OPERATOR : 1;
    auto raise = [&](float x) { return power == 1 ? x : power == 2 ? x * x : x * x * x; };

    const Head head(p);
    const int chunks = head.chunks(), T = (int)head.tokens, D = (int)p.keys, V = (int)p.values;
    const int v0 = head.tile * 64;
    const int pass = HLA3 ? first ? 0 : late ? 2 : 1 : late;
    const int rows = first && !AHLA ? D : V, row0 = (first ? 0 : v0) + rank * 32;

    Sum S[2][KEYS];  // S', of rows from row0 on
    auto each = [&](const Head &head, int operand, auto &&visit) {
        const Operand &x = p.of[operand];
        float *at = (float *)p.at[operand] + head.offset(x, head.segment, 0, 0);
        UNROLL for (int m = 0; m < 2; m++) UNROLL for (int d = 0; d < KEYS; d++) UNROLL for (int i = 0; i < 8; i++) {
            int row = row0 + 16 * m + g + (i >> 1 & 1) * 8, column = 16 * d + j + (i & 1) + (i >> 2) * 8;
            if (row < rows && column < D) visit(at + row * x.row + column * x.column, S[m][d].x[i]);
        }
    };
    UNROLL for (int m = 0; m < 2; m++) UNROLL for (int d = 0; d < KEYS; d++) S[m][d].clear();
    if (p.at[AT_START + pass]) each(head, AT_START + pass, [](const float *at, float &x) { x = *at; });

    Copies<B> q(p, AT_Q, head, D, 0), k(p, AT_K, head, D, 0);
    Copies<BV> v(p, AT_V, head, V, v0);
    auto fetch = [&](int chunk, int slot) {  // if there is such a chunk
        if (chunk < chunks) {
            const u32 to = base + slot * STAGE;
            const int n = T - chunk * W;
            q.load(to, n), k.load(to + TILE, n), v.load(to + 2 * TILE, n);
        }
        copies_commit();
    };
    UNROLL for (int i = 0; i < STAGES - 2; i++) fetch(i, i);

    // What a warp makes, 32 columns of rows, goes from shared memory to where it is stored.
    const int made_operand = first ? AT_Y : late ? AT_O : AT_U;
    const bool stores = first ? KEEP && head.is_first(p.of[AT_Y]) && head.tile == 0
                        : late ? READ && !WIDE
                               : KEEP_U && head.is_first(p.of[AT_U]);
    const Operand &x_o = p.of[made_operand];
    const int in_piece = lane % 4 * 8, left = rows - row0 - in_piece;
    u8 *to = p.at[made_operand] + head.offset(x_o, 0, head.first + lane / 4, row0 + in_piece) * 2;
    const float scale = (float)p.factors[pass];

    // Places in a tile of this lane's rows, of blocks as they are and turned
    const u32 straight = (lane & 15) * PITCH + (lane >> 4) * 16;
    const u32 turned = ((lane & 7) + (lane >> 4) * 8) * PITCH + (lane >> 3 & 1) * 16;
    const u32 pairs_at = (lane & 15) * PITCH_P + (lane >> 4) * 16;
    const u32 own_columns = rank * 64, written = g * PITCH + own_columns + j * 2;

    // Leave so many blocks of P in a row of blocks, from one on.
    auto make_pairs = [&](u32 q_0, u32 k_0, u32 tile, u32 lists, int t, int first_s, auto count) {
        constexpr int N = decltype(count)::value;
        Sum A[N], other[N];
        UNROLL for (int n = 0; n < N; n++) A[n].clear(), other[n].clear();
        UNROLL for (int d = 0; d < KEYS; d++) {  // two sums: half as long a chain
            const Block q_t = block_at(q_0 + t * 16 * PITCH + d * 32);
            UNROLL for (int n = 0; n < N; n++)
                multiply(d & 1 ? other[n] : A[n], q_t, second_at(k_0 + (first_s + n) * 16 * PITCH + d * 32));
        }
        UNROLL for (int n = 0; n < N; n++) {
            const int s = first_s + n;
            float *x = A[n].x;
            UNROLL for (int e = 0; e < 8; e++) x[e] += other[n].x[e];
            if (GATE) {
                float c_t[2], power_of = (float)power;
                float2 c_s[2];
                UNROLL for (int r = 0; r < 2; r++) {
                    c_t[r] = load_float(lists + UNTIL + (16 * t + g + 8 * r) * 4);
                    c_s[r] = load_floats(lists + UNTIL + (16 * s + j + 8 * r) * 4);
                }
                UNROLL for (int e = 0; e < 8; e++)  // where it overflows no pair is
                    x[e] *= power_of_2((c_t[e >> 1 & 1] - (e & 1 ? c_s[e >> 2].y : c_s[e >> 2].x)) * power_of);
            }
            const u32 at = tile + (16 * t + g) * PITCH_P + (16 * s + j) * 2;
            UNROLL for (int e = 0; e < 8; e += 2) {
                const int row = g + (e >> 1 & 1) * 8, column = j + (e >> 2) * 8;
                const float one = t == s && row < column ? 0.f : x[e], two = t == s && row < column + 1 ? 0.f : x[e + 1];
                store4(at + (e >> 1 & 1) * 8 * PITCH_P + (e >> 2) * 16, bf16_pair(one, two));
            }
        }
    };

    Gate gate(p, head);
    if (GATE && warp == WEIGHER) gate.put(base, 0);
    int slot = 0;  // of this warp's next chunk
    auto fetch_next = [&](int c) {
        const int to = slot + STAGES - 3 + late;
        fetch(c + STAGES - 2, to < STAGES ? to : to - STAGES);
    };
#pragma unroll 1
    for (int c = 0; c <= chunks; c++) {
        copies_wait<STAGES - 3>();
        __syncthreads();  // this chunk is there, and what was made of the last one; nobody reads the one before
        const int chunk = c - late;
        if (chunk < 0 || chunk >= chunks) {
            fetch_next(c);
            continue;
        }
        const int parity = chunk & 1;
        const u32 stage = base + slot * STAGE, y = base + MADE + parity * TILE;
        const u32 u = AHLA ? y : base + US + parity * TILE;
        const u32 keys = late && !AHLA ? y : stage + TILE;
        const u32 values = first ? AHLA ? stage + 2 * TILE : stage + TILE
                           : late && (AHLA || HLA3) ? u : stage + 2 * TILE;
        const u32 made = first ? y : late ? base + OUT : u;
        const u32 tile = base + TILES + (parity + (late && !AHLA ? 2 : 0)) * TILE_P;
        const u32 lists = base + WEIGHTS + chunk % 3 * LISTS;
        if (++slot == STAGES) slot = 0;

        // The first part makes its P first, the last part reads its state first: one has latency to hide
        // when the other has work.
        auto make_own_pairs = [&](auto warps) {
            const u32 q_0 = stage + straight, k_0 = keys + turned;
            if (decltype(warps)::value >= BLOCKS * (BLOCKS + 1) / 2) {
                const int pair = HLA3 && rank > 1 ? 5 - rank : rank;  // a scheduler has as many
                if (pair < BLOCKS * (BLOCKS + 1) / 2)
                    make_pairs(q_0, k_0, tile, lists, pair > 0, pair > 1, Number<1>());
            } else if (rank == 0) {
                make_pairs(q_0, k_0, tile, lists, BLOCKS - 1, 0, Number<BLOCKS>());
            } else if (BLOCKS > 1) {
                make_pairs(q_0, k_0, tile, lists, 0, 0, Number<1>());
            }
        };
        if (first) make_own_pairs(Number<FIRST>());
        Sum o[BLOCKS][2];
        if (READ || !late) {
            UNROLL for (int t = 0; t < BLOCKS; t++) o[t][0].clear(), o[t][1].clear();
            UNROLL for (int d = 0; d < KEYS; d++) {
                const Block s0 = block_of(S[0][d]), s1 = block_of(S[1][d]);
                UNROLL for (int t = 0; t < BLOCKS; t++) {
                    const Block a = block_at(stage + straight + t * 16 * PITCH + d * 32);
                    multiply(o[t][0], a, s0);
                    multiply(o[t][1], a, s1);
                }
            }
            if (GATE) UNROLL for (int t = 0; t < BLOCKS; t++) UNROLL for (int r = 0; r < 2; r++) {
                const float w = raise(load_float(lists + BEFORE + (16 * t + g + 8 * r) * 4));
                UNROLL for (int m = 0; m < 2; m++) UNROLL for (int i = 0; i < 4; i++)
                    o[t][m].x[(i >> 1) * 4 + 2 * r + (i & 1)] *= w;
            }
            if (late && !AHLA) make_own_pairs(Number<LAST>());
            fetch_next(c);
            if (GATE && warp == WEIGHER && c + 1 < chunks) gate.put(base, c + 1);
            if (!late || !AHLA) threads_sync(late ? 2 : 1, late ? 32 * LAST : 32 * (FIRST + MIDDLE));
        }

        if (!READ && late) fetch_next(c);
        Block b[2][BLOCKS];
        UNROLL for (int m = 0; m < 2; m++) UNROLL for (int s = 0; s < BLOCKS; s++)
            b[m][s] = block_turned(values + turned + s * 16 * PITCH + own_columns + m * 32);
        if (READ || !late) UNROLL for (int t = 0; t < BLOCKS; t++) UNROLL for (int s = 0; s <= t; s++) {
            const Block a = block_at(tile + pairs_at + t * 16 * PITCH_P + s * 32);
            multiply(o[t][0], a, b[0][s]);
            multiply(o[t][1], a, b[1][s]);
        }
        if (GATE) {
            UNROLL for (int s = 0; s < BLOCKS; s++) {
                float2 w = load_floats(lists + AFTER + (16 * s + j) * 4);
                float2 w8 = load_floats(lists + AFTER + (16 * s + j + 8) * 4);
                w = {raise(w.x), raise(w.y)}, w8 = {raise(w8.x), raise(w8.y)};
                b[0][s] = weighed(b[0][s], w, w8), b[1][s] = weighed(b[1][s], w, w8);
            }
            const float total = raise(load_float(lists + WHOLE_CHUNK));
            UNROLL for (int m = 0; m < 2; m++) UNROLL for (int d = 0; d < KEYS; d++) UNROLL for (int i = 0; i < 8; i++)
                S[m][d].x[i] *= total;
        }
        UNROLL for (int d = 0; d < KEYS; d++) UNROLL for (int s = 0; s < BLOCKS; s++) {
            const Block a = second_turned(keys + straight + s * 16 * PITCH + d * 32);
            multiply(S[0][d], b[0][s], a);
            multiply(S[1][d], b[1][s], a);
        }

        if (!READ && late) continue;
        if (WIDE && late) {
            float *at = (float *)p.at[AT_O] + head.offset(x_o, 0, head.first + chunk * W + g, row0 + j);
            UNROLL for (int t = 0; t < BLOCKS; t++) UNROLL for (int m = 0; m < 2; m++) UNROLL for (int i = 0; i < 8; i++) {
                int down = 16 * t + (i >> 1 & 1) * 8, along = 16 * m + (i & 1) + (i >> 2) * 8;
                if (chunk * W + g + down < T && row0 + j + along < rows)
                    at[down * x_o.row + along * x_o.column] = o[t][m].x[i] * scale;
            }
            continue;
        }
        UNROLL for (int t = 0; t < BLOCKS; t++) UNROLL for (int m = 0; m < 2; m++) UNROLL for (int i = 0; i < 8; i += 2)
            store4(made + written + (16 * t + (i >> 1 & 1) * 8) * PITCH + m * 32 + (i >> 2) * 16,
                   bf16_pair(o[t][m].x[i] * scale, o[t][m].x[i + 1] * scale));
        if (!stores) continue;
        __syncwarp();
        const int n = T - chunk * W - lane / 4;
        UNROLL for (int i = 0; i < W; i += 8) {
            const uint4 x = load16(made + (lane / 4 + i) * PITCH + own_columns + in_piece * 2);
            u8 *at = to + ((i64)chunk * W + i) * x_o.row * 2;
            if (i >= n) continue;
            if (!FAST)
                scattered((u16 *)at, x_o.column, left, x);
            else if (WHOLE || left > 0)
                *(uint4 *)at = x;
        }
    }
    // Of the heads that share a state the first writes it, and of those of a head that have S the first.
    const Head again(p);  // else registers would hold it till here
    if (p.at[AT_END + pass] && again.is_first(p.of[AT_END + pass]) && (!first || again.tile == 0))
        each(again, AT_END + pass, [](float *at, float &x) { *at = x; });
}
