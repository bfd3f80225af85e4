// One token of a program, a block of threads a head: its passes in order, each state in place or beside.
//
//     S <- g S + k v'    m <- g m + k w    out = factor * q' S    den = factor * q' m
//
// A pass reads and writes its state once: warp w has every eighth row, a lane four columns, all loads
// of 16 rows under way at once; q' S is summed over a warp's rows in registers, then over warps in
// shared memory, in order. Vectors (q, k, v, y ...) live in shared memory. A strict pass reads the
// state before its update; one whose state an earlier one has updated reads it alone. A packed S is
// the rows of its upper triangle one behind the other: what lies above the diagonal counts for its
// row and for its column.
//
// Bytes a head of hla2, D = V = 128: 2 x 2 x 64 KB. 1024 heads: 268 MB, 0.094 ms at 2.85 TB/s;
// one H100 takes 0.100. Packed 2 x (33 + 64) KB: 204 MB, 0.071 ms; 0.0873. Slower: F prefetched to the
// second-level cache, and S and F copied to shared memory at once (0.101; rows so 0.141). On Hopper
// hopper_step.cu takes the states that are whole.
#include "ptx.cuh"
#include "arrays.cuh"
#include "step.cuh"

constexpr int BLOCKS = 2, ROWS = 16;

// y = q S of one warp's rows of a packed S (D x D), which is updated: y is added to ``sums``.
DEVICE void triangle(
    const Turn& turn, const float* S, float* made, i64 from, i64 to, float g, bool there, bool writes,
    const float* q, const float* k, float* sums, int warp, int lane
) {
    constexpr int ROWS = 8;
    const int D = turn.rows;
    for (int c = lane; c < D; c += 32) sums[c] = 0.f;
    for (int c0 = lane; c0 - lane < D; c0 += 128) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f}, q_c[4], k_c[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            q_c[i] = c0 + 32 * i < D ? q[c0 + 32 * i] : 0.f;
            k_c[i] = c0 + 32 * i < D ? k[c0 + 32 * i] : 0.f;
        }
#pragma unroll 1
        for (int r0 = warp; r0 < D && r0 < c0 - lane + 128; r0 += WARPS * ROWS) {
            float x[ROWS][4], own[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int row = r0 + r * WARPS;
                const float* at = S + (row * D - row * (row + 1) / 2 + c0) * from;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int c = c0 + 32 * i;
                    x[r][i] = there && row <= c && c < D ? at[32 * i * from] : 0.f;
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int row = r0 + r * WARPS;
                const float key = row < D ? k[row] : 0.f, query = row < D ? q[row] : 0.f;
                float* at = made + (row * D - row * (row + 1) / 2 + c0) * to;
                own[r] = 0.f;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int c = c0 + 32 * i;
                    const float y = turn.first ? advanced(g, x[r][i], key, k_c[i]) : x[r][i];
                    const float read = turn.strict ? x[r][i] : y;
                    own[r] = row <= c ? fmaf(q_c[i], read, own[r]) : own[r];
                    sum[i] = row < c ? fmaf(query, read, sum[i]) : sum[i];
                    if (writes && row <= c && c < D) at[32 * i * to] = y;
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int step = 16; step; step /= 2) own[r] += __shfl_xor_sync(~0u, own[r], step);
                const int row = r0 + r * WARPS;
                if (row < D && (row & 31) == lane) sums[row] += own[r];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (c0 + 32 * i < D) sums[c0 + 32 * i] += sum[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) step_kernel(const __grid_constant__ Step p) {
    extern __shared__ __align__(16) u8 memory[];
    const Room room = room_at(memory);
    float *vectors = room.vectors, *parts = room.parts, *dens = room.dens;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const Head head = head_of(p, blockIdx.x);
    auto first = [&](int i) {  // of the heads that share an array, whether this one writes it
        bool found = true;
        for (int axis = 0; axis < 3; axis++) found &= p.of[i].head[axis] != 0 || head.at[axis] == 0;
        return found;
    };
    for (int i = threadIdx.x; i < NAMES * WIDTH; i += THREADS) vectors[i] = 0.f;
    if (threadIdx.x < NAMES) dens[threadIdx.x] = threadIdx.x == 2 ? 1.f : 0.f;
    __syncthreads();
    for (int n = 0; n < 3; n++) {
        const int count = (int)(n == 2 ? p.values : p.keys);
        for (int i = threadIdx.x; i < count; i += THREADS) vectors[n * WIDTH + i] = element(p, head, n, i);
    }
    const double log_g = log_gate(p, head);
    __syncthreads();

#pragma unroll 1
    for (int n = 0; n < p.turns; n++) {
        const Turn& turn = p.turn[n];
        const float g = turn.power && p.gated ? (float)exp(log_g * turn.power) : 1.f;
        const float *q = vectors + turn.q * WIDTH, *k = vectors + turn.k * WIDTH, *v = vectors + turn.v * WIDTH;
        const int old = turn.first || turn.strict ? OLD + turn.matrix : NEW + turn.matrix;
        const Field &from = p.of[old], &to = p.of[NEW + turn.matrix];
        const float* S = (const float*)base(p, head, old);
        float* made = (float*)base(p, head, NEW + turn.matrix);
        const bool there = p.at[old] != 0, writes = turn.first && first(NEW + turn.matrix);
#if PACKED
        if (turn.packed)
            triangle(
                turn, S, made, WHOLE ? 1 : from.row, WHOLE ? 1 : to.row, g, there, writes, q, k,
                parts + warp * WIDTH, warp, lane
            );
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
                    const float* at = S + row * from.row + c * from.column;
#if WHOLE
                    float4 all = {0.f, 0.f, 0.f, 0.f};
                    if (there && row < turn.rows && c < turn.columns) all = *(const float4*)at;
                    x[r][0] = all.x, x[r][1] = all.y, x[r][2] = all.z, x[r][3] = all.w;
#else
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        x[r][i] = there && row < turn.rows && c + i < turn.columns ? at[i * from.column] : 0.f;
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
                        y[i] = turn.first ? advanced(g, x[r][i], key, mate[i]) : x[r][i];
                        sum[i] = fmaf(query, turn.strict ? x[r][i] : y[i], sum[i]);
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
            const float* m = (const float*)base(p, head, was);
            float* to = (float*)base(p, head, NEW_VECTOR + turn.vector);
            const bool writes = turn.first && first(NEW_VECTOR + turn.vector);
            for (int d = threadIdx.x; d < turn.rows; d += THREADS) {
                const float x = p.at[was] ? m[d * p.of[was].row] : 0.f;
                const float y = turn.first ? advanced(g, x, k[d], w) : x;
                weight = fmaf(q[d], turn.strict ? x : y, weight);
                if (writes) to[d * p.of[NEW_VECTOR + turn.vector].row] = y;
            }
        }
        collect(turn, room, weight, [] { __syncthreads(); });
    }
    finish(p, head, room);
}
