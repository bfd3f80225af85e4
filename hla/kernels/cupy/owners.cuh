// What kernels of two state owners share: where things lie, copies, weights, products of an owner.

constexpr int W = 64;
constexpr bool AHLA = OPERATOR == 1, HLA3 = OPERATOR == 3, HANDS = AHLA || HLA3;  // A' to the second
constexpr int BY = AHLA ? BV : BD;
constexpr int HEAD_D = W * BD * 2, HEAD_V = W * BV * 2, HEAD_Y = W * BY * 2, TILE = W * W * 2;
constexpr int Q = 4, K = HANDS && !GATE ? Q : Q - 1, V_ = HLA3 || !AHLA && !GATE ? 3 : 2;  // chunks
// Chunks by which a buffer is free again later than that of q: the first pass is one ahead
constexpr int K_LATER = HANDS ? Q - K : Q - K - 1, V_LATER = AHLA ? Q - V_ - 1 : Q - V_;
constexpr int GROUPS = AHLA ? 1 : 2;  // of lists: one for each power
constexpr int SLOTS = GATE == 2 ? Q * GROUPS : GATE == 1 ? 2 * GROUPS : 0;
constexpr int UNTIL = 0, BEFORE = W * 4, AFTER = W * 8, LISTS = W * 12;

// Shared memory
constexpr int QS = 0, KS = QS + Q * HEAD_D, VS = KS + K * HEAD_D, MADE = VS + V_ * HEAD_V;
constexpr int US = MADE + 2 * HEAD_Y, OUT = US + (HLA3 ? HEAD_V : 0), TILES = OUT + HEAD_V;
constexpr int WEIGHTS = TILES + (HLA3 ? 3 : 2) * TILE, ENDS = WEIGHTS + SLOTS * LISTS;
constexpr int Q_FULL = ENDS + (SLOTS + 1) / 2 * 8, Q_FREE = Q_FULL + 8 * Q;
constexpr int K_FULL = Q_FREE + 8 * Q, K_FREE = K_FULL + 8 * K;
constexpr int V_FULL = K_FREE + 8 * K, V_FREE = V_FULL + 8 * V_;
constexpr int THERE = V_FREE + 8 * V_, TAKEN = THERE + 16, READY = TAKEN + 16, STORED = READY + 8;
constexpr int U_THERE = STORED + 8, U_TAKEN = U_THERE + 8, BYTES = U_TAKEN + 8;
static_assert(BYTES <= 232448, "more shared memory than there is");
constexpr int OWNER_REGISTERS = 224, MOVER_REGISTERS = 56;

struct Rows {
    char *p;
    i64 s0, s1, s2, st;  // in bytes
};

struct State {
    float *p;
    i64 s0, s1, s2, sn, sd, sv;  // in numbers
};

struct Gate {
    const GATE_TYPE *p;
    i64 s0, s1, s2, st;
};

struct Arguments {
    Rows q, k, v, y, u, o;
    State start1, end1, start2, end2, start3, end3;
    Gate gate;
    i64 T, tokens;  // tokens of a segment, 0: the whole
    int D, V, N1, N2;
    float scale1, scale2, scale3;
};

// Place in a ring
template <int N> struct Ring {
    u32 i = 0, turn = 0;
    INLINE void next() {
        if (++i == N) i = 0, turn ^= 1;
    }
};

INLINE int thread_of_group() { return threadIdx.x & 127; }

// Arrive with a warp, whose threads have all come so far.
INLINE void arrive(u32 bar) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(bar);
}

INLINE float real(float x) { return x; }
INLINE double real(double x) { return x; }
INLINE float real(unsigned short x) { return __uint_as_float((u32)x << 16); }

// Which head a block does, and which segment of it
struct Head {
    i64 i_0, i_1, i_2, part, first, T;  // its first token, and how many there are
    int i_v = 0;                        // of which 64 values, where a head has several blocks

    INLINE Head(const Arguments &a) {
        i64 i = block();
        if (HLA3) {
            int tiles = (a.V + 63) / 64;
            i_v = i % tiles, i /= tiles;
        }
        part = first = 0, T = a.T;
        if (a.tokens) {
            i64 parts = (a.T + a.tokens - 1) / a.tokens;
            part = i % parts, i /= parts, first = part * a.tokens;
            T = T - first < a.tokens ? T - first : a.tokens;
        }
        i_2 = i % a.N2, i /= a.N2;
        i_1 = i % a.N1, i_0 = i / a.N1;
    }
    template <class X> INLINE i64 at(const X &x) const { return i_0 * x.s0 + i_1 * x.s1 + i_2 * x.s2; }
    INLINE char *rows(const Rows &x) const { return x.p + (at(x) + first * x.st); }
    INLINE const GATE_TYPE *gate(const Gate &x) const { return x.p + (at(x) + first * x.st); }
    INLINE float *state(const State &x) const { return x.p ? x.p + (at(x) + part * x.sn) : nullptr; }
    INLINE float *columns(const State &x) const { return x.p ? state(x) + i_v * 64 * x.sv : nullptr; }
    // Whether it is the first of those that share an array, of strides 0
    template <class X> INLINE bool is_first(const X &x) const {
        return (x.s0 || !i_0) && (x.s1 || !i_1) && (x.s2 || !i_2);
    }
};

// ---- States: 64 rows of values v, from the first on, and BD columns of keys d, as products leave them

INLINE void load_state(float (&S)[BD / 2], const State &s, const float *p, int first, int D, int V) {
    int t = thread_of_group(), v = first + t / 32 * 16 + t % 32 / 4, d = t % 4 * 2;
    UNROLL for (int i = 0; i < BD / 2; i++) S[i] = 0.0f;
    if (!p) return;
    UNROLL for (int i = 0; i < BD / 2; i++) {
        int v_i = v + (i & 2) * 4, d_i = d + i / 4 * 8 + (i & 1);
        if (v_i < V && d_i < D) S[i] = p[v_i * s.sv + d_i * s.sd];
    }
}

INLINE void store_state(const float (&S)[BD / 2], const State &s, float *p, int first, int D, int V) {
    int t = thread_of_group(), v = first + t / 32 * 16 + t % 32 / 4, d = t % 4 * 2;
    UNROLL for (int i = 0; i < BD / 2; i++) {
        int v_i = v + (i & 2) * 4, d_i = d + i / 4 * 8 + (i & 1);
        if (v_i < V && d_i < D) p[v_i * s.sv + d_i * s.sd] = S[i];
    }
}

// ---- Weights

// Leave those of one token, of both powers; c and last are sums in base 2.
INLINE void put_weights(u32 base, int slot, int t, double c, double last) {
    UNROLL for (int group = 0; group < GROUPS; group++) {
        u32 lists = base + WEIGHTS + (slot * GROUPS + group) * LISTS + t * 4;
        double power = group ? OPERATOR : 1;
        store_float(lists + UNTIL, (float)(c * power));
        store_float(lists + BEFORE, power_of_2((float)(c * power)));
        store_float(lists + AFTER, power_of_2((float)((last - c) * power)));
        if (t == 0)
            store_float(base + ENDS + (slot * GROUPS + group) * 4, power_of_2((float)(last * power)));
    }
}

constexpr double LOG2E = 1.4426950408889634, RESET = -160.0, LEAST = 1e-30;

// Leave those of a decay in a whole chunk and, behind them, in the last one.
INLINE void put_decay(u32 base, const GATE_TYPE *p, int t, int rest) {
    double g = real(*p), log_g = log2(g < LEAST ? LEAST : g);  // a NaN stays
    put_weights(base, 0, t, (t + 1) * log_g, W * log_g);
    put_weights(base, 1, t, (t < rest ? t + 1 : rest) * log_g, rest * log_g);
}

// Leave those of a chunk by its log gate, two tokens a lane.
INLINE void put_gate(u32 base, int slot, int lane, double a, double b) {
    a *= LOG2E, b *= LOG2E;
    a = a < RESET ? RESET : a, b = b < RESET ? RESET : b;  // a NaN stays
    double sum = a + b;
    UNROLL for (int n = 1; n < 32; n *= 2) {
        double other = __shfl_up_sync(~0u, sum, n);
        if (lane >= n) sum += other;
    }
    double last = __shfl_sync(~0u, sum, 31);
    put_weights(base, slot, lane * 2, sum - b, last);
    put_weights(base, slot, lane * 2 + 1, sum, last);
}

// Where the weights of a chunk lie; of a decay all chunks but the last have the same.
INLINE int weights_at(u32 slot, bool is_last, int group) {
    return (GATE == 1 ? (int)is_last : (int)slot) * GROUPS + group;
}

// ---- Copies of a chunk's rows: 16 bytes a thread, rows and columns that are not there are zeros

template <int B> struct Copies {
    static constexpr int IN_ROW = B / 8, APART = 128 / IN_ROW, COUNT = W / APART;
    char *from;  // of this thread's first row
    u32 to;
    int row, there;

    INLINE Copies(char *p, i64 st, int width) {
        int t = thread_of_group(), column = t % IN_ROW;
        row = t / IN_ROW;
        from = p + row * st + column * 16;
        to = column / 8 * PANEL + row * 128 + ((column ^ row) % 8) * 16;
        there = column * 8 < width;
    }
    INLINE void load(u32 tile, i64 st, int left) {
        UNROLL for (int j = 0; j < COUNT; j++)
            copy16(tile + to + j * APART * 128, from + j * APART * st,
                   row + j * APART < left && (WHOLE || there));
        from += W * st;
    }
    INLINE void store(u32 tile, i64 st, int left) {
        UNROLL for (int j = 0; j < COUNT; j++) {
            uint4 x = load16(tile + to + j * APART * 128);
            if (row + j * APART < left && (WHOLE || there)) put16(from + j * APART * st, x);
        }
        from += W * st;
    }
};

// ---- Products of an owner

// Leave A' = upper(K Q'), weighed; c is where its list of sums lies.
INLINE void make_pairs(u32 tile, u32 k, u32 q, u32 c, int name) {
    int t = thread_of_group(), warp = t / 32, lane = t % 32;
    float a[32];
    products();
    UNROLL for (int i = 0; i < BD / 16; i++) {
        int at = i / 4 * PANEL + i % 4 * 32;
        multiply<0, 0>(a, k + at, q + at, i > 0);
    }
    products_begun();
    products_done(a);
    int row = warp * 16 + lane / 4, column = lane % 4 * 2;
    float c_0, c_8;
    if (GATE) c_0 = load_float(c + row * 4), c_8 = load_float(c + row * 4 + 32);
    UNROLL for (int j = 0; j < 8; j++) {
        int t_j = j * 8 + column;
        float *x = a + 4 * j;
        if (GATE) {  // where it overflows no pair is
            float2 c_t = load_floats(c + t_j * 4);
            x[0] *= power_of_2(c_t.x - c_0), x[1] *= power_of_2(c_t.y - c_0);
            x[2] *= power_of_2(c_t.x - c_8), x[3] *= power_of_2(c_t.y - c_8);
        }
        if (row > t_j) x[0] = 0;
        if (row > t_j + 1) x[1] = 0;
        if (row + 8 > t_j) x[2] = 0;
        if (row + 8 > t_j + 1) x[3] = 0;
    }
    u32 to = tile + (warp * 16 + lane % 16) * 128;
    UNROLL for (int j = 0; j < 8; j += 2) {
        float *x = a + 4 * j;
        store_blocks(to + (((j + lane / 16) ^ lane) % 8) * 16, pack(x[0], x[1]), pack(x[2], x[3]),
                     pack(x[4], x[5]), pack(x[6], x[7]));
    }
    fence_async();
    group_sync(name);
}

// A state, weighed by its chunk's gate.
INLINE void fade(float (&S)[BD / 2], u32 end) {
    float fading = load_float(end);
    UNROLL for (int i = 0; i < BD / 2; i++) S[i] *= fading;
}

// Leave 64 values of O = a (Q S + X A); return the state as the gate leaves it.
INLINE void read(float (&S)[BD / 2], u32 made, u32 q, u32 x, u32 tile, u32 before, u32 end, float scale) {
    int t = thread_of_group(), warp = t / 32, lane = t % 32;
    float o[32];
    u32 a[BD / 4];
    UNROLL for (int i = 0; i < BD / 4; i++) a[i] = pack(S[2 * i], S[2 * i + 1]);
    products();
    UNROLL for (int i = 0; i < BD / 16; i++)
        multiply<0>(o, a + 4 * i, q + i / 4 * PANEL + i % 4 * 32, i > 0);
    if (GATE) {
        products_begun();
        fade(S, end);  // as the product runs
        products_done(o);
        unchanged(a);
        UNROLL for (int j = 0; j < 8; j++) {
            float2 w = load_floats(before + (j * 8 + lane % 4 * 2) * 4);
            o[4 * j] *= w.x, o[4 * j + 1] *= w.y, o[4 * j + 2] *= w.x, o[4 * j + 3] *= w.y;
        }
        products();
    }
    UNROLL for (int i = 0; i < W / 16; i++) multiply<1, 1>(o, x + i * 2048, tile + i * 2048, true);
    products_begun();
    products_done(o);
    unchanged(a);
    if (scale != 1.0f) UNROLL for (int i = 0; i < 32; i++) o[i] *= scale;
    u32 to = made + (lane / 16 * 8 + lane % 8) * 128 + (((warp * 2 + lane / 8 % 2) ^ lane) % 8) * 16;
    UNROLL for (int j = 0; j < 8; j += 2) {
        float *y = o + 4 * j;
        store_blocks_turned(to + j * 1024, pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]),
                            pack(y[6], y[7]));
    }
}

// Return 64 values of a chunk as they enter a state, weighed by token.
INLINE void weigh(u32 (&a)[16], u32 x, u32 after) {
    int t = thread_of_group(), warp = t / 32, lane = t % 32;
    u32 from = x + (lane % 8 + lane / 16 * 8) * 128 + (((warp * 2 + lane / 8 % 2) ^ lane) % 8) * 16;
    UNROLL for (int i = 0; i < 4; i++) {
        load_blocks_turned(from + i * 2048, a + 4 * i);
        UNROLL for (int j = 0; j < 4; j++) {
            float2 w = load_floats(after + (i * 16 + j / 2 * 8 + lane % 4 * 2) * 4);
            a[4 * i + j] = pack(low(a[4 * i + j]) * w.x, high(a[4 * i + j]) * w.y);
        }
    }
}

// S' += X' K of 64 values and F' += Z' Y, by which nothing else is under way; weighed by a gate.
INLINE void update_both(float (&S)[BD / 2], u32 x, u32 k, u32 after, float (&F)[BD / 2], u32 z, u32 y,
                        u32 after_z) {
    if (GATE) {
        u32 a[16], b[16];
        weigh(a, x, after);
        weigh(b, z, after_z);
        products();
        UNROLL for (int i = 0; i < W / 16; i++) multiply<1>(S, a + 4 * i, k + i * 2048, true);
        UNROLL for (int i = 0; i < W / 16; i++) multiply<1>(F, b + 4 * i, y + i * 2048, true);
        products_begun();
        products_done(S, F);
        unchanged(a);
        unchanged(b);
    } else {
        products();
        UNROLL for (int i = 0; i < W / 16; i++) multiply<1, 1>(S, x + i * 2048, k + i * 2048, true);
        UNROLL for (int i = 0; i < W / 16; i++) multiply<1, 1>(F, z + i * 2048, y + i * 2048, true);
        products_begun();
        products_done(S, F);
    }
}

// The same of all values of one state.
INLINE void update(float (&S)[2][BD / 2], u32 x, u32 k, u32 after) {
    update_both(S[0], x, k, after, S[1], x + PANEL, k, after);
}

INLINE void update(float (&S)[1][BD / 2], u32 x, u32 k, u32 after) {
    u32 a[16];
    if (GATE) weigh(a, x, after);
    products();
    UNROLL for (int i = 0; i < W / 16; i++) {
        if (GATE)
            multiply<1>(S[0], a + 4 * i, k + i * 2048, true);
        else
            multiply<1, 1>(S[0], x + i * 2048, k + i * 2048, true);
    }
    products_begun();
    products_done(S[0]);
    if (GATE) unchanged(a);
}
