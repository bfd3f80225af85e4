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
// 0.26 ms. No atomics; bits depend on nothing but the head's data.
//
// Compiled for each OPERATOR (1 ahla, 2 hla2, 3 hla3), BD and BV (tiles of 64 or 128 keys and values;
// of hla3 64 values), GATE (0 none, 1 decay, 2 log gate) and GATE_TYPE, READ (o is requested, not the
// states alone), KEEP (y, or u of ahla, is stored), KEEP_U (u of hla3), WHOLE (tiles have no columns
// that are not there).

// ---- The warpgroups

// Own the state of one pass: of the first, which makes y, or of the second, which makes o.
template <int PASS> INLINE void own(const Arguments &a, u32 base) {
    int chunks = (int)((Head(a).T + W - 1) / W);
    constexpr bool FIRST = PASS == 1;
    constexpr int ROWS = FIRST ? BY : BV, HALVES = ROWS / 64, NAME = PASS;
    constexpr bool READS = FIRST || READ;
    const State &start = FIRST ? a.start1 : a.start2, &end = FIRST ? a.end1 : a.end2;
    int V = FIRST && !AHLA ? a.D : a.V;
    float scale = FIRST ? a.scale1 : a.scale2;
    float S[HALVES][BD / 2];
    UNROLL for (int h = 0; h < HALVES; h++)
        load_state(S[h], start, Head(a).state(start), h * 64, a.D, V);
    Ring<Q> i_q;
    Ring<K> i_k;
    Ring<V_> i_v;
    Ring<2> i_y;
    #pragma unroll 1
    for (int c = 0; c < chunks; c++) {
        int at = weights_at(i_q.i, c == chunks - 1, PASS - 1 < GROUPS ? PASS - 1 : 0);
        u32 weights = base + WEIGHTS + at * LISTS, last = base + ENDS + at * 4;
        u32 q = base + QS + i_q.i * HEAD_D, k = base + KS + i_k.i * HEAD_D;
        u32 v = base + VS + i_v.i * HEAD_V, y = base + MADE + i_y.i * HEAD_Y;
        u32 keys = FIRST || AHLA ? k : y;
        u32 values = FIRST ? (AHLA ? v : k) : (AHLA ? y : v);
        u32 tile = base + TILES + (HANDS ? i_y.i : (u32)(PASS - 1)) * TILE;
        u32 made = FIRST ? y : base + OUT;
        barrier_wait(base + Q_FULL + 8 * i_q.i, i_q.turn);
        if (FIRST) {
            barrier_wait(base + K_FULL + 8 * i_k.i, i_k.turn);
            if (HANDS) barrier_wait(base + TAKEN + 8 * i_y.i, i_y.turn ^ 1);
        } else {
            barrier_wait(base + THERE + 8 * i_y.i, i_y.turn);
        }
        fence_async();
        if (READS && (FIRST || !AHLA)) make_pairs(tile, keys, q, weights + UNTIL, NAME);
        if (FIRST ? AHLA : !AHLA) {
            barrier_wait(base + V_FULL + 8 * i_v.i, i_v.turn);
            fence_async();
        }
        if (FIRST && !HANDS) barrier_wait(base + TAKEN + 8 * i_y.i, i_y.turn ^ 1);
        if (!FIRST && READ) barrier_wait(base + STORED, (c & 1) ^ 1);
        UNROLL for (int h = 0; h < HALVES; h++) {
            if (READS) {
                read(S[h], made + h * PANEL, q, values + h * PANEL, tile, weights + BEFORE, last, scale);
            } else if (GATE) {
                fade(S[h], last);
            }
        }
        if (FIRST) {
            fence_async();
            arrive(base + THERE + 8 * i_y.i);
        } else if (READ) {
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
    Head head(a);  // once more, else registers would hold it till here
    if (float *p = head.state(end); p && head.is_first(end) && head.i_v == 0)
        UNROLL for (int h = 0; h < HALVES; h++) store_state(S[h], end, p, h * 64, a.D, V);
}

// Own P and F of hla3, the states of the second pass, which makes u, and of the third.
INLINE void own_both(const Arguments &a, u32 base) {
    int chunks = (int)((Head(a).T + W - 1) / W);
    float S[2][BD / 2];
    {
        Head head(a);
        load_state(S[0], a.start2, head.columns(a.start2), 0, a.D, a.V - head.i_v * 64);
        load_state(S[1], a.start3, head.columns(a.start3), 0, a.D, a.V - head.i_v * 64);
    }
    Ring<Q> i_q;
    Ring<K> i_k;
    Ring<V_> i_v;
    Ring<2> i_y;
    #pragma unroll 1
    for (int c = 0; c < chunks; c++) {
        int at = weights_at(i_q.i, c == chunks - 1, 0);
        u32 weights = base + WEIGHTS + at * LISTS, last = base + ENDS + at * 4;
        u32 q = base + QS + i_q.i * HEAD_D, k = base + KS + i_k.i * HEAD_D;
        u32 v = base + VS + i_v.i * HEAD_V, y = base + MADE + i_y.i * HEAD_Y, u = base + US;
        u32 tile = base + TILES + i_y.i * TILE, own = base + TILES + 2 * TILE;
        barrier_wait(base + Q_FULL + 8 * i_q.i, i_q.turn);
        barrier_wait(base + V_FULL + 8 * i_v.i, i_v.turn);
        barrier_wait(base + THERE + 8 * i_y.i, i_y.turn);
        fence_async();
        if (KEEP_U) barrier_wait(base + U_TAKEN, (c & 1) ^ 1);
        read(S[0], u, q, v, tile, weights + BEFORE, last, a.scale2);
        if (READ) {
            make_pairs(own, y, q, weights + LISTS + UNTIL, 2);  // fences u too
        } else {
            fence_async();
            group_sync(2);
        }
        if (KEEP_U) arrive(base + U_THERE);
        if (READ) {
            barrier_wait(base + STORED, (c & 1) ^ 1);
            read(S[1], base + OUT, q, u, own, weights + LISTS + BEFORE, last + 4, a.scale3);
            arrive(base + READY);
        } else if (GATE) {
            fade(S[1], last + 4);
        }
        if (GATE < 2) arrive(base + Q_FREE + 8 * i_q.i);
        update_both(S[0], v, k, weights + AFTER, S[1], u, y, weights + LISTS + AFTER);
        if (GATE == 2) arrive(base + Q_FREE + 8 * i_q.i);
        arrive(base + K_FREE + 8 * i_k.i);
        arrive(base + V_FREE + 8 * i_v.i);
        arrive(base + TAKEN + 8 * i_y.i);
        i_q.next(), i_k.next(), i_v.next(), i_y.next();
    }
    Head head(a);
    float *P = head.columns(a.end2), *F = head.columns(a.end3);
    if (P && head.is_first(a.end2)) store_state(S[0], a.end2, P, 0, a.D, a.V - head.i_v * 64);
    if (F && head.is_first(a.end3)) store_state(S[1], a.end3, F, 0, a.D, a.V - head.i_v * 64);
}

// Load what the owners read, in the order in which they free it; store what they make.
INLINE void move(const Arguments &a, u32 base) {
    Head head(a);
    int t = thread_of_group(), T = (int)head.T, chunks = (T + W - 1) / W;
    Copies<BD> q(head.rows(a.q), a.q.st, a.D), k(head.rows(a.k), a.k.st, a.D);
    int V = a.V - head.i_v * 64, part = head.i_v * 128;
    Copies<BV> v(head.rows(a.v) + part, a.v.st, V), o(head.rows(a.o) + part, a.o.st, V);
    Copies<BV> u(head.rows(a.u) + part, a.u.st, V);
    Copies<BY> y(head.rows(a.y), a.y.st, AHLA ? a.V : a.D);
    int T_y = head.is_first(a.y) && head.i_v == 0 ? T : 0, T_u = head.is_first(a.u) ? T : 0;
    Ring<Q> i_q;
    Ring<K> i_k;
    Ring<V_> i_v;
    Ring<2> i_y;
    const GATE_TYPE *p_gate = head.gate(a.gate);
    double gate[2] = {0, 0};
    if (GATE == 2) {
        if (t < 32) UNROLL for (int i = 0; i < 2; i++)
            if (2 * t + i < T) gate[i] = real(p_gate[(2 * t + i) * a.gate.st]);
    }
    #pragma unroll 1
    for (int c = 0; c < chunks + Q; c++) {
        if (c >= K_LATER && c < chunks + K_LATER) {
            barrier_wait(base + K_FREE + 8 * i_k.i, i_k.turn ^ 1);
            k.load(base + KS + i_k.i * HEAD_D, a.k.st, T - (c - K_LATER) * W);
            barrier_arrive_copies(base + K_FULL + 8 * i_k.i);
            i_k.next();
        }
        if (c < chunks) {
            barrier_wait(base + Q_FREE + 8 * i_q.i, i_q.turn ^ 1);
            q.load(base + QS + i_q.i * HEAD_D, a.q.st, T - c * W);
            barrier_arrive_copies(base + Q_FULL + 8 * i_q.i);
            if (GATE == 2 && t < 32) {
                double a_0 = gate[0], a_1 = gate[1];
                UNROLL for (int i = 0; i < 2; i++) {
                    i64 next = (c + 1) * (i64)W + 2 * t + i;
                    gate[i] = next < T ? (double)real(p_gate[next * a.gate.st]) : 0.0;
                }
                put_gate(base, i_q.i, t, a_0, a_1);
                arrive(base + Q_FULL + 8 * i_q.i);
            }
            i_q.next();
        }
        if (c >= Q) {
            int e = c - Q;
            if (READ) {
                barrier_wait(base + READY, e & 1);
                o.store(base + OUT, a.o.st, T - e * W);
                arrive(base + STORED);
            }
            if (KEEP) {
                barrier_wait(base + THERE + 8 * i_y.i, i_y.turn);
                y.store(base + MADE + i_y.i * HEAD_Y, a.y.st, T_y - e * W);
                arrive(base + TAKEN + 8 * i_y.i);
                i_y.next();
            }
            if (KEEP_U) {
                barrier_wait(base + U_THERE, e & 1);
                u.store(base + US, a.u.st, T_u - e * W);
                arrive(base + U_TAKEN);
            }
        }
        if (c >= V_LATER && c < chunks + V_LATER) {
            barrier_wait(base + V_FREE + 8 * i_v.i, i_v.turn ^ 1);
            v.load(base + VS + i_v.i * HEAD_V, a.v.st, T - (c - V_LATER) * W);
            barrier_arrive_copies(base + V_FULL + 8 * i_v.i);
            i_v.next();
        }
    }
}

// One head, or one segment of a head.
extern "C" __global__ void __launch_bounds__(384, 1)
forward(const __grid_constant__ Arguments a) {
    u32 base = shared_start();
    if (threadIdx.x == 0) {
        UNROLL for (int i = 0; i < Q; i++) {
            barrier_init(base + Q_FULL + 8 * i, 128 + (GATE == 2)), barrier_init(base + Q_FREE + 8 * i, 8);
        }
        UNROLL for (int i = 0; i < K; i++) {
            barrier_init(base + K_FULL + 8 * i, 128), barrier_init(base + K_FREE + 8 * i, HANDS ? 8 : 4);
        }
        UNROLL for (int i = 0; i < V_; i++) {
            barrier_init(base + V_FULL + 8 * i, 128), barrier_init(base + V_FREE + 8 * i, 4);
        }
        UNROLL for (int i = 0; i < 2; i++) {
            barrier_init(base + THERE + 8 * i, 4), barrier_init(base + TAKEN + 8 * i, KEEP ? 8 : 4);
        }
        barrier_init(base + READY, 4), barrier_init(base + STORED, 4);
        barrier_init(base + U_THERE, 4), barrier_init(base + U_TAKEN, 4);
        fence_async();
    }
    if (GATE == 1 && threadIdx.x < W) {
        Head head(a);
        put_decay(base, head.gate(a.gate), threadIdx.x, (int)((head.T - 1) % W + 1));
    }
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in a warp, which it shows
    if (group == 0) {
        registers_more<OWNER_REGISTERS>();
        own<1>(a, base);
    } else if (group == 1) {
        registers_more<OWNER_REGISTERS>();
        if constexpr (HLA3)
            own_both(a, base);
        else
            own<2>(a, base);
    } else {
        registers_less<MOVER_REGISTERS>();
        move(a, base);
    }
}
