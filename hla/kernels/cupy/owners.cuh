// What sweeps of state owners share: heads, states, weights, copies of chunks, products of an owner.
//
// A file that includes this has the places of its operands in memory (`OPERANDS`, `AT_GATE`) and of
// weights in shared memory (`WEIGHTS`, `ENDS`, `GROUPS` of lists a chunk, `POWERS` of the gate).

constexpr int UNTIL = 0, BEFORE = W * 4, AFTER = W * 8;  // lists of a chunk's weights

// Place in a ring
template <int N> struct Ring {
    u32 i = 0, turn = 0;
    DEVICE void next() {
        if (++i == N) i = 0, turn ^= 1;
    }
};

DEVICE int thread_of_group() { return threadIdx.x & 127; }

// Arrive with a warp, whose threads have all come so far.
DEVICE void arrive(u32 bar) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(bar);
}

// Set up barriers that lie one after the other.
DEVICE void begin(u32 bar, int count, int arrivals) {
    UNROLL for (int i = 0; i < count; i++) barrier_init(bar + 8 * i, arrivals);
}

// ---- States: 64 rows of values and BD columns of keys, as products leave them

// Visit this thread's elements of rows from the first on: number, pointer, whether it is there.
template <int COUNT, class T, class Visit>
DEVICE void each(T *p, const Operand &x, int first, int rows, int columns, Visit visit) {
    int t = thread_of_group(), row = first + t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    bool upper = row < rows, lower = row + 8 < rows;
    p += row * x.row + column * x.column;
    T *q = p + 8 * x.row;
    UNROLL for (int i = 0; i < COUNT; i += 4, column += 8) {
        visit(i, p, upper && column < columns);
        visit(i + 1, p + x.column, upper && column + 1 < columns);
        visit(i + 2, q, lower && column < columns);
        visit(i + 3, q + x.column, lower && column + 1 < columns);
        p += 8 * x.column, q += 8 * x.column;
    }
}

// Return 64 rows of a first state, from a column on, zeros where there is none.
template <int COUNT>
DEVICE void load_state(
    float (&S)[COUNT], const Sweep &p, int operand, int first, i64 rows, i64 columns, int column = 0) {
    UNROLL for (int i = 0; i < COUNT; i++) S[i] = 0.0f;
    if (!p.at[operand]) return;
    Head head(p);
    const Operand &x = p.of[operand];
    const float *from = (const float *)p.at[operand] + head.offset(x, head.segment, 0, column);
    each<COUNT>(from, x, first, (int)rows, (int)columns - column, [&](int i, const float *at, bool there) {
        if (there) S[i] = *at;
    });
}

// Store 64 rows of a last state, in the head that is to, and where it is mine.
template <int COUNT>
DEVICE void store_state(
    const float (&S)[COUNT], const Sweep &p, int operand, int first, i64 rows, i64 columns, bool mine,
    int column = 0) {
    Head head(p);  // once more, else registers would hold it till here
    const Operand &x = p.of[operand];
    if (!p.at[operand] || !head.is_first(x) || !mine) return;
    float *to = (float *)p.at[operand] + head.offset(x, head.segment, 0, column);
    each<COUNT>(to, x, first, (int)rows, (int)columns - column, [&](int i, float *at, bool there) {
        if (there) *at = S[i];
    });
}

// ---- Weights

// Leave those of one token, of both powers; c and last are sums in base 2.
DEVICE void put_weights(u32 base, int slot, int t, double c, double last) {
    UNROLL for (int group = 0; group < GROUPS; group++) {
        u32 lists = base + WEIGHTS + (slot * GROUPS + group) * LISTS + t * 4;
        double power = POWERS[group];
        store_float(lists + UNTIL, (float)(c * power));
        store_float(lists + BEFORE, power_of_2((float)(c * power)));
        store_float(lists + AFTER, power_of_2((float)((last - c) * power)));
        if (t == 0)
            store_float(base + ENDS + (slot * GROUPS + group) * 4, power_of_2((float)(last * power)));
    }
}


// Leave those of a decay in a whole chunk and, behind them, in the last one, of so many tokens.
DEVICE void put_decay(u32 base, double g, int t, int rest) {
    double log_g = log2(g < LEAST ? LEAST : g);  // a NaN stays
    put_weights(base, 0, t, (t + 1) * log_g, W * log_g);
    put_weights(base, 1, t, (t < rest ? t + 1 : rest) * log_g, rest * log_g);
}

// Leave those of a chunk by its log gate, two tokens a lane.
DEVICE void put_gate(u32 base, int slot, int lane, double a, double b) {
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

// Leave those of a decay for all chunks, by the block's first threads.
DEVICE void put_decay_of(const Sweep &p, u32 base) {
    if (GATE != 1 || threadIdx.x >= W) return;
    Head head(p);
    const Operand &x = p.of[AT_GATE];
    double g = get(p.at[AT_GATE], head.offset(x, 0, 0, 0), (int)x.type);
    put_decay(base, g, threadIdx.x, (int)((head.tokens - 1) % W + 1));
}

// The log gate of a chunk, which the first warp of a group loads one chunk ahead.
struct LogGate {
    const Operand &of;
    const u8 *p;
    i64 from;
    int tokens;
    float a[2] = {0, 0};  // of this lane's two tokens

    DEVICE LogGate(const Sweep &sweep, const Head &head, i64 first) : of(sweep.of[AT_GATE]) {
        if (GATE != 2) return;
        p = sweep.at[AT_GATE], from = head.offset(of, 0, head.first, 0), tokens = (int)head.tokens;
        load(first);
    }
    DEVICE void load(i64 chunk) {
        int t = thread_of_group();
        UNROLL for (int i = 0; i < 2; i++) {
            i64 token = chunk + 2 * t + i;
            bool there = t < 32 && token >= 0 && token < tokens;
            a[i] = there ? get(p, from + token * of.row, (int)of.type) : 0.0f;
        }
    }
    // Leave the weights of a chunk; load the gate of the next one.
    DEVICE void put(u32 base, int slot, i64 next, u32 bar) {
        if (thread_of_group() >= 32) return;
        float b[2] = {a[0], a[1]};
        load(next);
        put_gate(base, slot, thread_of_group(), b[0], b[1]);
        arrive(bar);
    }
};

// Where the weights of a chunk lie; of a decay all chunks but the last have the same.
DEVICE int weights_at(u32 slot, bool is_last, int group) {
    return (GATE == 1 ? (int)is_last : (int)slot) * GROUPS + group;
}

// ---- Copies of a chunk's rows: 16 bytes a thread, rows and columns that are not there are zeros

// By DIRECTION: 1 first chunk first, -1 last chunk first. Elements in memory have so many BYTES: results may
// be float32.
template <int WIDTH, int DIRECTION = 1, int BYTES = 2> struct Copies {
    static constexpr int IN_ROW = WIDTH / 8, APART = 128 / IN_ROW, COUNT = W / APART;
    u8 *from;  // of this thread's first row
    i64 step, right;
    u32 to;
    int row, left;  // columns from this thread's first one on

    DEVICE Copies(const Sweep &p, int operand, const Head &head, int columns, int first = 0) {
        const Operand &x = p.of[operand];
        int t = thread_of_group(), column = t % IN_ROW;
        row = t / IN_ROW;
        i64 begin = DIRECTION > 0 ? 0 : (head.chunks() - 1) * (i64)W;
        left = columns - first - column * 8, step = x.row * BYTES, right = x.column;
        from = p.at[operand] + head.offset(x, 0, head.first + begin + row, first + column * 8) * BYTES;
        to = column / 8 * PANEL + row * 128 + ((column ^ row) % 8) * 16;
    }
    DEVICE void load(u32 tile, int rows) {
        UNROLL for (int j = 0; j < COUNT; j++) {
            bool there = row + j * APART < rows;
            const u8 *p = from + j * APART * step;
            u32 place = tile + to + j * APART * 128;
            if (FAST)
                copy16(place, p, there && (WHOLE || left > 0) ? 16 : 0);
            else
                store16(place, gathered((const u16 *)p, there));
        }
        from += DIRECTION * W * step;
    }
    // Store rows, or add them to what is there; some at a time, whose sums do not wait for each other.
    template <bool ADD = false> DEVICE void store(u32 tile, int rows) {
        constexpr int EACH = ADD && BYTES == 2 ? 4 : 1;
        UNROLL for (int j = 0; j < COUNT; j += EACH) {
            uint4 old[EACH];
            if (ADD && BYTES == 2) UNROLL for (int e = 0; e < EACH; e++) {
                bool there = row + (j + e) * APART < rows;
                const u8 *p = from + (j + e) * APART * step;
                if (FAST)
                    old[e] = there && (WHOLE || left > 0) ? *(const uint4 *)p : uint4{0, 0, 0, 0};
                else
                    old[e] = gathered((const u16 *)p, there);
            }
            UNROLL for (int e = 0; e < EACH; e++) {
                uint4 x = load16(tile + to + (j + e) * APART * 128);
                u8 *p = from + (j + e) * APART * step;
                bool there = row + (j + e) * APART < rows;
                if (BYTES == 4) {
                    put_wide<ADD>(p, x, there);
                } else {
                    if (ADD) x = sum(x, old[e]);
                    put(p, x, there);
                }
            }
        }
        from += DIRECTION * W * step;
    }
    DEVICE void put(u8 *p, uint4 x, bool there) const {
        if (FAST) {
            if (there && (WHOLE || left > 0)) *(uint4 *)p = x;
        } else if (there) {
            u32 pair[4] = {x.x, x.y, x.z, x.w};
            UNROLL for (int i = 0; i < 8; i++)
                if (i < left) ((u16 *)p)[i * right] = (u16)(pair[i / 2] >> (i % 2 * 16));
        }
    }
    template <bool ADD> DEVICE void put_wide(u8 *p, uint4 x, bool there) const {
        u32 pair[4] = {x.x, x.y, x.z, x.w};
        UNROLL for (int h = 0; h < 2; h++) {
            float y[4] = {of_bf16(pair[2 * h]), of_bf16_high(pair[2 * h]),
                          of_bf16(pair[2 * h + 1]), of_bf16_high(pair[2 * h + 1])};
            if (FAST && there && (WHOLE || left > 0)) {
                float4 *to = (float4 *)p + h;
                float4 old = {};
                if (ADD) old = *to;
                *to = {old.x + y[0], old.y + y[1], old.z + y[2], old.w + y[3]};
            } else if (!FAST && there) {
                UNROLL for (int i = 0; i < 4; i++) {
                    float *to = (float *)p + (4 * h + i) * right;
                    if (4 * h + i < left) *to = y[i] + (ADD ? *to : 0.0f);
                }
            }
        }
    }
    DEVICE static uint4 sum(uint4 x, uint4 y) { return {sum(x.x, y.x), sum(x.y, y.y), sum(x.z, y.z), sum(x.w, y.w)}; }
    DEVICE static u32 sum(u32 x, u32 y) {
        return bf16_pair(of_bf16(x) + of_bf16(y), of_bf16_high(x) + of_bf16_high(y));
    }
    DEVICE uint4 gathered(const u16 *p, bool there) const {
        u32 pair[4] = {};
        UNROLL for (int i = 0; i < 8; i++)
            if (there && i < left) pair[i / 2] |= (u32)p[i * right] << (i % 2 * 16);
        return {pair[0], pair[1], pair[2], pair[3]};
    }
    // Arrive when what was copied is there.
    DEVICE static void arrive(u32 bar) {
        if (FAST)
            barrier_arrive_copies(bar);
        else
            barrier_arrive(bar);
    }
};

// ---- Products of an owner

// Leave 64 rows of a result in shared memory; a panel has so many bytes.
template <int WIDTH, int BYTES = PANEL> DEVICE void put_rows(u32 to, const u32 (&o)[WIDTH / 4]) {
    int t = thread_of_group(), lane = t % 32;
    to += (t / 32 * 16 + lane % 16) * 128;
    UNROLL for (int j = 0; j < WIDTH / 8; j += 2) {
        u32 at = to + j / 8 * BYTES + (((j % 8 + lane / 16) ^ lane) % 8) * 16;
        store_blocks(at, o[2 * j], o[2 * j + 1], o[2 * j + 2], o[2 * j + 3]);
    }
}

// The same, times a factor.
template <int WIDTH, int BYTES = PANEL> DEVICE void put_rows(u32 to, const float (&o)[WIDTH / 2], float factor) {
    u32 packed[WIDTH / 4];
    UNROLL for (int i = 0; i < WIDTH / 4; i++) packed[i] = bf16_pair(o[2 * i] * factor, o[2 * i + 1] * factor);
    put_rows<WIDTH, BYTES>(to, packed);
}

// Return K Q', [64, W].
DEVICE void pair(float (&a)[32], u32 k, u32 q) {
    products();
    UNROLL for (int i = 0; i < BD / 16; i++) {
        int at = i / 4 * PANEL + i % 4 * 32;
        multiply<0, 0>(a, k + at, q + at, i > 0);
    }
    products_begun();
    products_done(a);
}

// Leave pairs whose row is not later than the column, or not earlier; weighed by the gate's power, c
// is where the list of its sums lies.
template <bool UP = true, int POWER = 1> DEVICE void put_pairs(u32 tile, float (&a)[32], u32 c) {
    int t = thread_of_group(), warp = t / 32, lane = t % 32;
    int row = warp * 16 + lane / 4, column = lane % 4 * 2;
    constexpr float POWERED = UP ? POWER : -POWER;
    float c_0, c_8;
    if (GATE) c_0 = load_float(c + row * 4), c_8 = load_float(c + row * 4 + 32);
    UNROLL for (int j = 0; j < 8; j++) {
        int t_j = j * 8 + column;
        float *x = a + 4 * j;
        if (GATE) {  // where it overflows no pair is
            float2 c_t = load_floats(c + t_j * 4);
            x[0] *= power_of_2((c_t.x - c_0) * POWERED), x[1] *= power_of_2((c_t.y - c_0) * POWERED);
            x[2] *= power_of_2((c_t.x - c_8) * POWERED), x[3] *= power_of_2((c_t.y - c_8) * POWERED);
        }
        if (UP ? row > t_j : row < t_j) x[0] = 0;
        if (UP ? row > t_j + 1 : row < t_j + 1) x[1] = 0;
        if (UP ? row + 8 > t_j : row + 8 < t_j) x[2] = 0;
        if (UP ? row + 8 > t_j + 1 : row + 8 < t_j + 1) x[3] = 0;
    }
    put_rows<W>(tile, a, 1.0f);
}

// Leave pairs of K Q', for products of the group to read after `make_pairs` or a barrier.
template <bool UP = true, int POWER = 1> DEVICE void put_pair(u32 tile, u32 k, u32 q, u32 c) {
    float a[32] = {};  // else NVRTC would have products run one after the other
    pair(a, k, q);
    put_pairs<UP, POWER>(tile, a, c);
}

template <bool UP = true, int POWER = 1> DEVICE void make_pairs(u32 tile, u32 k, u32 q, u32 c, int name) {
    put_pair<UP, POWER>(tile, k, q, c);
    fence_async();
    group_sync(name);
}

// A state, weighed by its chunk's gate.
template <int POWER = 1, int COUNT> DEVICE void fade(float (&S)[COUNT], u32 end) {
    float fading = raised<POWER>(load_float(end));
    UNROLL for (int i = 0; i < COUNT; i++) S[i] *= fading;
}

// Columns of a result, weighed by token.
template <int POWER = 1> DEVICE void weigh_columns(float (&o)[32], u32 list) {
    UNROLL for (int j = 0; j < 8; j++) {
        float2 w = load_floats(list + (j * 8 + threadIdx.x % 4 * 2) * 4);
        w = {raised<POWER>(w.x), raised<POWER>(w.y)};
        o[4 * j] *= w.x, o[4 * j + 1] *= w.y, o[4 * j + 2] *= w.x, o[4 * j + 3] *= w.y;
    }
}

// Return 64 values of O = a (Q S + X A); leave the state as the gate does.
DEVICE void read(float (&o)[32], float (&S)[BD / 2], u32 q, u32 x, u32 tile, u32 before, u32 end, float scale) {
    u32 a[BD / 4];
    UNROLL for (int i = 0; i < BD / 4; i++) a[i] = bf16_pair(S[2 * i], S[2 * i + 1]);
    products();
    UNROLL for (int i = 0; i < BD / 16; i++)
        multiply<0>(o, a + 4 * i, q + i / 4 * PANEL + i % 4 * 32, i > 0);
    if (GATE) {
        products_begun();
        fade(S, end);  // as the product runs
        products_done(o);
        unchanged(a);
        weigh_columns(o, before);
        products();
    }
    UNROLL for (int i = 0; i < W / 16; i++) multiply<1, 1>(o, x + i * 2048, tile + i * 2048, true);
    products_begun();
    products_done(o);
    unchanged(a);
    if (scale != 1.0f) UNROLL for (int i = 0; i < 32; i++) o[i] *= scale;
}

// Leave what was read in shared memory, a row a token.
DEVICE void leave(u32 made, const u32 (&o)[16]) {
    int t = thread_of_group(), warp = t / 32, lane = t % 32;
    u32 to = made + (lane / 16 * 8 + lane % 8) * 128 + (((warp * 2 + lane / 8 % 2) ^ lane) % 8) * 16;
    UNROLL for (int j = 0; j < 4; j++)
        store_blocks_turned(to + j * 2048, o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]);
}

DEVICE void leave(u32 made, const float (&o)[32]) {
    u32 packed[16];
    UNROLL for (int i = 0; i < 16; i++) packed[i] = bf16_pair(o[2 * i], o[2 * i + 1]);
    leave(made, packed);
}

// Take 16 tokens of 64 columns of rows in shared memory, as registers feed a product with their transpose.
DEVICE void take(u32 (&x)[4], u32 rows, int tokens) {
    int t = thread_of_group(), warp = t / 32, lane = t % 32;
    u32 from = rows + (lane % 8 + lane / 16 * 8) * 128 + (((warp * 2 + lane / 8 % 2) ^ lane) % 8) * 16;
    ldmatrix_turned(x, from + tokens * 2048);
}

// Return 64 values of a chunk as they enter a state, weighed by token.
template <int POWER = 1> DEVICE void weigh(u32 (&a)[16], u32 x, u32 after) {
    UNROLL for (int i = 0; i < 4; i++) {
        u32 b[4];
        take(b, x, i);
        UNROLL for (int j = 0; j < 4; j++) {
            float2 w = load_floats(after + (i * 16 + j / 2 * 8 + threadIdx.x % 4 * 2) * 4);
            w = {raised<POWER>(w.x), raised<POWER>(w.y)};
            a[4 * i + j] = bf16_pair(of_bf16(b[j]) * w.x, of_bf16_high(b[j]) * w.y);
        }
    }
}

// S += X' K and F += Z' Y of 64 rows each, by which nothing else is under way; weighed by a gate.
template <int POWER = 1>
DEVICE void update(float (&S)[BD / 2], u32 x, u32 k, u32 after, float (&F)[BD / 2], u32 z, u32 y, u32 after_z) {
    if (GATE) {
        u32 a[16], b[16];
        weigh<POWER>(a, x, after);
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

// The same of one state.
template <int POWER = 1> DEVICE void update(float (&S)[BD / 2], u32 x, u32 k, u32 after) {
    u32 a[16];
    if (GATE) weigh<POWER>(a, x, after);
    products();
    UNROLL for (int i = 0; i < W / 16; i++) {
        if (GATE)
            multiply<1>(S, a + 4 * i, k + i * 2048, true);
        else
            multiply<1, 1>(S, x + i * 2048, k + i * 2048, true);
    }
    products_begun();
    products_done(S);
    if (GATE) unchanged(a);
}

DEVICE void update(float (&S)[1][BD / 2], u32 x, u32 k, u32 after) { update(S[0], x, k, after); }

// And of all rows of one state.
DEVICE void update(float (&S)[2][BD / 2], u32 x, u32 k, u32 after) {
    update(S[0], x, k, after, S[1], x + PANEL, k, after);
}
