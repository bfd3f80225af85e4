// What sweeps leave for a gate's gradient (gate.cu): sums by token, and states at each period's start.
//
// A file that includes this has `B`, `DOTS`, and `EVERY`, chunks of a period. Tokens are a result's rows,
// of which a thread has two, or its columns, of which it has sixteen: two of each eight.

// Take 16 columns of this warp's 16 rows, as an accumulator has them (see put_rows).
DEVICE void take_rows(u32 (&x)[4], u32 rows, int column) {
    int t = thread_of_group(), lane = t % 32;
    u32 from = rows + (t / 32 * 16 + lane % 16) * 128 + column / 64 * PANEL;
    ldmatrix(x, from + ((column % 64 / 8 + lane / 16) ^ lane) % 8 * 16);
}

// Add by row the products of a result and rows in shared memory.
template <int COUNT> DEVICE void add_by_row(float (&sums)[2], const float (&o)[COUNT], u32 rows) {
    UNROLL for (int j = 0; j < COUNT; j += 8) {
        u32 x[4];
        take_rows(x, rows, 2 * j);
        UNROLL for (int i = 0; i < 4; i++)
            sums[i % 2] += o[j + 2 * i] * of_bf16(x[i]) + o[j + 2 * i + 1] * of_bf16_high(x[i]);
    }
}

// As put_pair; add by row and by column the products of these pairs, not weighed, and of other ones.
template <bool UP, int POWER = 1>
DEVICE void add_pairs(u32 tile, u32 k, u32 q, u32 c, u32 other, float (&by_row)[2], float (&by_column)[16]) {
    float a[32] = {};
    pair(a, k, q);
    __syncwarp();
    UNROLL for (int j = 0; j < 32; j += 8) {
        u32 x[4];
        take_rows(x, other, 2 * j);
        UNROLL for (int i = 0; i < 4; i++) {
            float low = a[j + 2 * i] * of_bf16(x[i]), high = a[j + 2 * i + 1] * of_bf16_high(x[i]);
            by_row[i % 2] += low + high;
            by_column[j / 2 + i / 2 * 2] += low, by_column[j / 2 + i / 2 * 2 + 1] += high;
        }
    }
    put_pairs<UP, POWER>(tile, a, c);
    fence_async();
}

// Return the sums of a warp's rows by column: a lane has the tokens 2 lane and the next.
DEVICE float2 of_warp(float (&sums)[16]) {
    UNROLL for (int n = 8; n > 1; n /= 2) {
        bool upper = threadIdx.x & 2 * n;
        UNROLL for (int i = 0; i < n; i++) {
            float mine = upper ? sums[i + n] : sums[i], other = upper ? sums[i] : sums[i + n];
            sums[i] = mine + __shfl_xor_sync(~0u, other, 2 * n);
        }
    }
    return {sums[0], sums[1]};
}

// Return the sums by column of the products of a result and the transpose of 64 columns of rows in shared
// memory, over this warp's part.
DEVICE float2 by_column(const float (&o)[32], u32 rows) {
    float sums[16];
    UNROLL for (int j = 0; j < 4; j++) {
        u32 x[4];
        take(x, rows, j);
        UNROLL for (int i = 0; i < 2; i++) {
            const float *y = o + 8 * j + 4 * i;
            sums[4 * j + 2 * i] = y[0] * of_bf16(x[2 * i]) + y[2] * of_bf16(x[2 * i + 1]);
            sums[4 * j + 2 * i + 1] = y[1] * of_bf16_high(x[2 * i]) + y[3] * of_bf16_high(x[2 * i + 1]);
        }
    }
    return of_warp(sums);
}

DEVICE void put_line(u32 line, float2 x) {
    u32 to = line + threadIdx.x % 32 * 8;
    store_float(to, x.x), store_float(to + 4, x.y);
}

DEVICE void add_line(float2 &x, u32 line) {
    float2 y = load_floats(line + threadIdx.x % 32 * 8);
    x.x += y.x, x.y += y.y;
}

// Where a head's sums go, of tokens from its first on.
DEVICE float *dots_of(const Sweep &p, int operand, int tile) {
    return (float *)p.at[operand] + Head(p).offset(p.of[operand], tile, 0, 0);
}

DEVICE void put_by_column(float *to, float2 x, float factor, int left) {
    int t = threadIdx.x % 32 * 2;
    if (t < left) to[t] = x.x * factor;
    if (t + 1 < left) to[t + 1] = x.y * factor;
}

DEVICE void put_by_row(float *to, float (&sums)[2], float factor, int left) {
    UNROLL for (int i = 0; i < 2; i++) {
        sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
        sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
    }
    int t = thread_of_group(), second = t % 4, row = t / 32 * 16 + t % 32 / 4 + 8 * second;
    if (second < 2 && row < left) to[row] = (second ? sums[1] : sums[0]) * factor;
}

// ---- States where a period begins, in bfloat16, as threads have them

DEVICE bool is_kept(int chunk) { return DOTS && chunk > 0 && chunk % EVERY == 0; }

// Where 64 rows of the state before a chunk lie, from the first on.
DEVICE u8 *kept_of(const Sweep &p, int operand, int chunk, int first) {
    return p.at[operand] + (Head(p).offset(p.of[operand], chunk / EVERY - 1, 0, 0) + first * B) * 2;
}

template <int COUNT> DEVICE void keep(u8 *to, const float (&S)[COUNT], float factor) {
    to += thread_of_group() * 16;
    UNROLL for (int i = 0; i < COUNT; i += 8) {
        u32 x[4];
        UNROLL for (int j = 0; j < 4; j++) x[j] = bf16_pair(S[i + 2 * j] * factor, S[i + 2 * j + 1] * factor);
        *(uint4 *)(to + i * 256) = {x[0], x[1], x[2], x[3]};
    }
}

// Leave the sum by warp of the products of a state, from a column on, and what was kept.
template <int COUNT> DEVICE void meet(
    const Sweep &p, int operand, int chunk, int part, const float (&S)[COUNT], const u8 *kept, int first) {
    float sum = 0;
    kept += thread_of_group() * 16;
    UNROLL for (int i = 0; i < COUNT; i += 8) {
        if (i < first / 2) continue;
        uint4 x = *(const uint4 *)(kept + i * 256);
        u32 pair[4] = {x.x, x.y, x.z, x.w};
        UNROLL for (int j = 0; j < 4; j++)
            sum += S[i + 2 * j] * of_bf16(pair[j]) + S[i + 2 * j + 1] * of_bf16_high(pair[j]);
    }
    UNROLL for (int n = 16; n; n /= 2) sum += __shfl_xor_sync(~0u, sum, n);
    float *to = (float *)p.at[operand] + Head(p).offset(p.of[operand], chunk / EVERY - 1, part, 0);
    if (threadIdx.x % 32 == 0) to[thread_of_group() / 32 * p.of[operand].row] = sum;
}
