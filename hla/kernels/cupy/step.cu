// One token of a program, a block of threads a head: its passes in order, each state in place or beside.
//
//     S <- g S + k v'    m <- g m + k w    out = factor * q' S    den = factor * q' m
//
// A pass reads and writes its state once: warp w has every eighth row, a lane four columns, all loads
// of 16 rows under way at once; q' S is summed over a warp's rows in registers, then over warps in
// shared memory, in order. Vectors (q, k, v, y ...) live in shared memory. A strict pass reads the
// state before its update; one whose state an earlier one has updated reads it alone. A packed S is
// the rows of its upper triangle one behind the other: what lies above the diagonal counts for its
// row and for its column. The states of the first passes, where a packed one is among them, are
// copied to shared memory from the start, all at once: a packed one is updated there.
//
// Bytes a head of hla2, D = V = 128: 2 x 2 x 64 KB. 1024 heads: 268 MB, 0.089 ms at 3.0 TB/s. Packed
// 2 x (33 + 64) KB: 204 MB, 0.068 ms.
#include "ptx.cuh"
#include "arrays.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, BLOCKS = 2, ROWS = 16, MATRICES = 6, VECTORS = 4, TURNS = 12, NAMES = 8;
constexpr int GATE = 3, O = 4, OLD = 5, NEW = OLD + MATRICES, OLD_VECTOR = NEW + MATRICES;
constexpr int NEW_VECTOR = OLD_VECTOR + VECTORS, OPERANDS = NEW_VECTOR + VECTORS;
struct Field {
    i64 head[3], row, column, type;
};
struct Turn {  // vectors by number (q, k, v are 0, 1, 2; o is 3), states by number or -1
    int q, k, v, out, matrix, vector, power, strict, first, weighs, rows, columns, packed;
    float factor;
};
struct Step {
    u8* at[OPERANDS];
    Field of[OPERANDS];
    Turn turn[TURNS];
    i64 turns, keys, values, heads1, heads2, log, gated, divides;
    double scale, eps;
};

// Numbers of a state, and where one of a state with rows of so many lies, as memory has it.
DEVICE int size_of(const Turn& turn) {
    return turn.packed ? turn.rows * (turn.rows + 1) / 2 : turn.rows * turn.columns;
}
DEVICE i64 place(const Turn& turn, int i, i64 row) {
    return turn.packed ? i : i / turn.columns * row + i % turn.columns;
}

// y = q S of one warp's rows of a packed S (D x D) in shared memory, which is updated; ``sums`` takes
// the warp's share of y. Lane l has the columns 32 i + l: those of its own rows' sums too.
DEVICE void triangle(
    const Turn& turn, float* S, float g, const float* q, const float* k, float* sums, int warp, int lane
) {
    constexpr int PARTS = (WIDTH + 31) / 32;
    const int D = turn.rows;
    float sum[PARTS], query[PARTS], key[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        const int c = 32 * i + lane;
        sum[i] = 0.f, query[i] = c < D ? q[c] : 0.f, key[i] = c < D ? k[c] : 0.f;
        if (c < D) sums[c] = 0.f;
    }
#pragma unroll 2
    for (int row = warp; row < D; row += WARPS) {
        float* at = S + row * D - row * (row + 1) / 2;
        const float q_r = q[row], k_r = k[row];
        float own = 0.f;
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            const int c = 32 * i + lane;
            if (32 * i + 31 < row || c < row || c >= D) continue;
            const float y = g * at[c] + k_r * key[i];
            at[c] = y;
            own += query[i] * y;
            sum[i] += c > row ? q_r * y : 0.f;
        }
#pragma unroll
        for (int step = 16; step; step /= 2) own += __shfl_xor_sync(~0u, own, step);
        if ((row & 31) == lane) sums[row] += own;
    }
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        if (32 * i + lane < D) sums[32 * i + lane] += sum[i];
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) step_kernel(const __grid_constant__ Step p) {
    extern __shared__ __align__(16) u8 memory[];
    float* vectors = (float*)memory;  // (NAMES, WIDTH)
    float* parts = vectors + NAMES * WIDTH;  // (WARPS, WIDTH)
    float* dens = parts + WARPS * WIDTH;  // of each name
    float* weights = dens + NAMES;  // of each warp
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const i64 index = blockIdx.x;
    const i64 head[3] = {index / p.heads2 / p.heads1, index / p.heads2 % p.heads1, index % p.heads2};
    auto base = [&](int i) {
        const Field& x = p.of[i];
        i64 at = head[0] * x.head[0] + head[1] * x.head[1] + head[2] * x.head[2];
        return p.at[i] + at * width_of((int)x.type);
    };
    auto first = [&](int i) {  // of the heads that share an array, whether this one writes it
        bool found = true;
        for (int axis = 0; axis < 3; axis++) found &= p.of[i].head[axis] != 0 || head[axis] == 0;
        return found;
    };
    float* copy = weights + WARPS;  // of the first STAGED passes' states, one behind the other
#if STAGED
    for (int n = 0; n < STAGED; n++) {
        const Turn& turn = p.turn[n];
        const Field& from = p.of[OLD + turn.matrix];
        const float* S = (const float*)base(OLD + turn.matrix);
        const bool there = p.at[OLD + turn.matrix] != 0;
        const int count = size_of(turn);
#if WHOLE
        for (int i = 4 * threadIdx.x; i < count; i += 4 * THREADS)
            if (there) copy16(shared_address(copy + i), S + place(turn, i, from.row), 16);
            else *(float4*)(copy + i) = float4{0.f, 0.f, 0.f, 0.f};
#else
        for (int i = threadIdx.x; i < count; i += THREADS) copy[i] = there ? S[i * from.row] : 0.f;
#endif
        copies_commit();
        copy += count;
    }
    copy = weights + WARPS;
#endif
    for (int i = threadIdx.x; i < NAMES * WIDTH; i += THREADS) vectors[i] = 0.f;
    if (threadIdx.x < NAMES) dens[threadIdx.x] = threadIdx.x == 2 ? 1.f : 0.f;
    __syncthreads();
    for (int n = 0; n < 3; n++) {
        const int count = (int)(n == 2 ? p.values : p.keys);
        const u8* from = base(n);
        for (int i = threadIdx.x; i < count; i += THREADS)
            vectors[n * WIDTH + i] = get(from, i * p.of[n].column, (int)p.of[n].type) * (n ? 1.f : (float)p.scale);
    }
    double log_g = 0.;
    if (p.gated) {
        log_g = get(base(GATE), 0, (int)p.of[GATE].type);
        if (!p.log) log_g = log(log_g);
    }
    __syncthreads();

#pragma unroll 1
    for (int n = 0; n < p.turns; n++) {
        const Turn& turn = p.turn[n];
        const float g = turn.power && p.gated ? (float)exp(log_g * turn.power) : 1.f;
        const float *q = vectors + turn.q * WIDTH, *k = vectors + turn.k * WIDTH, *v = vectors + turn.v * WIDTH;
        float* out = vectors + turn.out * WIDTH;
        const int old = turn.first || turn.strict ? OLD + turn.matrix : NEW + turn.matrix;
        const Field &from = p.of[old], &to = p.of[NEW + turn.matrix];
        const float* S = (const float*)base(old);
        float* made = (float*)base(NEW + turn.matrix);
        const bool writes = turn.first && first(NEW + turn.matrix);
        bool there = p.at[old] != 0;
        i64 row_step = from.row, column_step = from.column;
#if STAGED
        if (n < STAGED) {
            if (n) copies_wait<0>();
            else copies_wait<STAGED - 1>();
            __syncthreads();
            S = copy, there = true, row_step = turn.columns, column_step = 1;
        }
        if (turn.packed)
            triangle(turn, copy, g, q, k, parts + warp * WIDTH, warp, lane);
        else
#endif
        for (int c0 = 0; c0 < turn.columns; c0 += 128) {
            const int c = c0 + lane * 4;
            float sum[4] = {0.f, 0.f, 0.f, 0.f}, mate[4];
#pragma unroll
            for (int i = 0; i < 4; i++) mate[i] = c + i < turn.columns ? v[c + i] : 0.f;
            for (int r0 = warp; r0 < turn.rows; r0 += WARPS * ROWS) {
                float x[ROWS][4];
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const i64 row = r0 + r * WARPS;
                    const float* at = S + row * row_step + c * column_step;
#if WHOLE
                    float4 all = {0.f, 0.f, 0.f, 0.f};
                    if (there && row < turn.rows && c < turn.columns) all = *(const float4*)at;
                    x[r][0] = all.x, x[r][1] = all.y, x[r][2] = all.z, x[r][3] = all.w;
#else
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        x[r][i] = there && row < turn.rows && c + i < turn.columns ? at[i * column_step] : 0.f;
#endif
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const i64 row = r0 + r * WARPS;
                    if (row >= turn.rows || c >= turn.columns) continue;
                    const float key = k[row], query = q[row];
                    float y[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        y[i] = turn.first ? g * x[r][i] + key * mate[i] : x[r][i];
                        sum[i] += query * (turn.strict ? x[r][i] : y[i]);
                    }
                    if (!writes) continue;
                    float* at = made + row * to.row + c * to.column;
#if WHOLE
                    *(float4*)at = float4{y[0], y[1], y[2], y[3]};
#else
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (c + i < turn.columns) at[i * to.column] = y[i];
#endif
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (c + i < turn.columns) parts[warp * WIDTH + c + i] = sum[i];
        }
        float weight = 0.f;
        if (turn.vector >= 0 && (turn.first || turn.weighs)) {
            const int was = turn.first || turn.strict ? OLD_VECTOR + turn.vector : NEW_VECTOR + turn.vector;
            const float w = dens[turn.v];
            const float* m = (const float*)base(was);
            float* to = (float*)base(NEW_VECTOR + turn.vector);
            const bool writes = turn.first && first(NEW_VECTOR + turn.vector);
            for (int d = threadIdx.x; d < turn.rows; d += THREADS) {
                const float x = p.at[was] ? m[d * p.of[was].row] : 0.f;
                const float y = turn.first ? g * x + k[d] * w : x;
                weight += q[d] * (turn.strict ? x : y);
                if (writes) to[d * p.of[NEW_VECTOR + turn.vector].row] = y;
            }
        }
#pragma unroll
        for (int step = 16; step; step /= 2) weight += __shfl_xor_sync(~0u, weight, step);
        if (lane == 0) weights[warp] = weight;
        __syncthreads();
#if STAGED
        if (turn.packed && writes)
#if WHOLE
            for (int i = 4 * threadIdx.x; i < size_of(turn); i += 4 * THREADS)
                *(float4*)(made + i) = *(const float4*)(copy + i);
#else
            for (int i = threadIdx.x; i < size_of(turn); i += THREADS) made[i * to.row] = copy[i];
#endif
        if (n < STAGED) copy += size_of(turn);
#endif
        for (int c = threadIdx.x; c < turn.columns; c += THREADS) {
            float all = 0.f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) all += parts[i * WIDTH + c];
            out[c] += turn.factor * all;
        }
        if (threadIdx.x == 0 && turn.weighs) {
            float all = 0.f;
            for (int i = 0; i < WARPS; i++) all += weights[i];
            dens[turn.out] += turn.factor * all;
        }
        __syncthreads();
    }
    const float by = p.divides ? dens[3] + (float)p.eps : 1.f;
    u8* o = base(O);
    for (int i = threadIdx.x; i < p.values; i += THREADS)
        put(o, i * p.of[O].column, (int)p.of[O].type, vectors[3 * WIDTH + i] / by);
}
