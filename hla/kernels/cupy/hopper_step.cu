// One token of a program, of heads whose states are whole: blocks that stay, states by bulk copies.
//
//     S <- g S + k v'    m <- g m + k w    out = factor * q' S    den = factor * q' m
//
// A block takes a head after the other. Its states go through a ring of places in shared memory, 32
// rows each: one thread begins the copies in, as many as there are places, so that those of later
// passes and of the next head are under way while warps work; warps change a piece where it lies; the
// thread begins its copy out, and when that has read it, the next copy in. Sums are those of step.cu,
// in its order, to the same bits. Rows of a packed triangle lie one behind the other, so a piece of it
// is one copy too; 32 rows begin at whole 16 bytes.
//
// Barriers of a place: ``full``, its bytes are there; ``done``, all warps have changed it.
//
// Bytes a head of hla2, D = V = 128: 2 x 2 x 64 KB, packed 2 x (33 + 64) KB. 1024 heads: 268 and 204 MB,
// 0.094 and 0.071 ms at the 2.85 TB/s of an H100 that multiplies in place; of its 132 multiprocessors
// none has more than 8 heads, 3% more than a share. One took 0.0959 ms, and packed, where warps have more
// to do for a byte, 0.0753 by two blocks a multiprocessor with half the places each (0.0793 by one; rows by
// two 0.0981), in a run in which Triton's kernels took 0.0978 and 0.0869. Slower: lines that stay in the
// second-level cache (0.102 and 0.091), pieces of 16 rows (0.100 and 0.102). One sequence of 16 heads 0.0090.
#include "ptx.cuh"
#include "warpgroup.cuh"
#include "arrays.cuh"
#include "step.cuh"

constexpr int ROWS = 32, EACH = ROWS / WARPS, SLOT = ROWS * WIDTH * 4;  // rows and bytes of a place

// Numbers before a row of a state.
DEVICE int before(const Turn& turn, int row) {
    return turn.packed ? row * turn.columns - row * (row - 1) / 2 : row * turn.columns;
}

// The pieces of a block's heads, one after the other.
struct Walk {
    const Step& p;
    i64 index;
    int turn, row;
    DEVICE bool more() const { return index < p.heads; }
    DEVICE const Turn& at() const { return p.turn[turn]; }
    DEVICE int end() const { return row + ROWS < at().rows ? row + ROWS : at().rows; }
    DEVICE u32 bytes() const { return 4 * (before(at(), end()) - before(at(), row)); }
    DEVICE float* place(int states) const {
        return (float*)base(p, head_of(p, index), states + at().matrix) + before(at(), row);
    }
    DEVICE void next() {
        row += ROWS;
        if (row < at().rows) return;
        row = 0;
        if (++turn == p.turns) turn = 0, index += p.blocks;
    }
};

// Begin all copies: one thread.
DEVICE void move(const Step& p, u32 places, u32 full, u32 done) {
    const u64 policy = evicted_first();
    Walk in{p, (i64)blockIdx.x, 0, 0}, out = in;
    auto load = [&](int slot) {
        bulk_load(places + slot * SLOT, in.place(OLD), in.bytes(), full + 8 * slot, policy);
        in.next();
    };
    for (int slot = 0; slot < SLOTS && in.more(); slot++) load(slot);
    u32 phase = 0;
    int slot = 0;
    for (bool first = true; out.more(); first = false) {
        barrier_wait(done + 8 * slot, phase);
        bulk_store(out.place(NEW), places + slot * SLOT, out.bytes(), policy);
        out.next();
        if (!first && in.more()) {
            bulk_read<1>();
            load(slot ? slot - 1 : SLOTS - 1);
        }
        if (++slot == SLOTS) slot = 0, phase ^= 1;
    }
    bulk_read<0>();
}

// One warp's rows of a piece, ``x``, from ``row`` to ``end``: a lane four columns.
DEVICE void rows_of(
    const Turn& turn, float* x, int row, int end, float g, const float* q, const float* k,
    const float (&mate)[4], float (&sum)[4], int warp, int lane
) {
    const int c = 4 * lane;
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        const int at = row + warp + r * WARPS;
        if (at >= end || c >= turn.columns) continue;
        float4* place = (float4*)(x + (at - row) * turn.columns + c);
        const float4 old = *place;
        const float of[4] = {old.x, old.y, old.z, old.w}, key = k[at], query = q[at];
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            y[i] = advanced(g, of[i], key, mate[i]);
            sum[i] = fmaf(query, y[i], sum[i]);
        }
        *place = float4{y[0], y[1], y[2], y[3]};
    }
}

// The same of a packed S, a lane every 32nd column; a row's own sum goes to ``sums``.
DEVICE void triangle(
    const Turn& turn, float* x, int row, int end, float g, const float* q, const float* k,
    const float (&q_c)[4], const float (&k_c)[4], float (&sum)[4], float* sums, int warp, int lane
) {
    float own[EACH];
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        const int at = row + warp + r * WARPS;
        const float key = at < end ? k[at] : 0.f, query = at < end ? q[at] : 0.f;
        float* place = x + before(turn, at) - before(turn, row) - at;
        own[r] = 0.f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = lane + 32 * i;
            if (at > c || c >= turn.columns) continue;
            const float y = advanced(g, place[c], key, k_c[i]);
            own[r] = fmaf(q_c[i], y, own[r]);
            sum[i] = at < c ? fmaf(query, y, sum[i]) : sum[i];
            place[c] = y;
        }
    }
#pragma unroll
    for (int r = 0; r < EACH; r++) {
#pragma unroll
        for (int step = 16; step; step /= 2) own[r] += __shfl_xor_sync(~0u, own[r], step);
        const int at = row + warp + r * WARPS;
        if (at < end && (at & 31) == lane) sums[at] += own[r];
    }
}

// A head's q, k, v: of q and k one element a thread.
struct Token {
    float key, value;
    double log_g;
};
DEVICE Token token_of(const Step& p, i64 index) {
    Token x = {0.f, 0.f, 0.};
    if (index >= p.heads) return x;
    const Head head = head_of(p, index);
    const int i = threadIdx.x % 128, n = threadIdx.x / 128;
    if (i < p.keys) x.key = element(p, head, n, i);
    if (n == 0 && i < p.values) x.value = element(p, head, 2, i);
    x.log_g = log_gate(p, head);
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, BLOCKS) hopper_step_kernel(const __grid_constant__ Step p) {
    extern __shared__ __align__(128) u8 memory[];
    const Room room = room_at(memory + SLOTS * SLOT);
    const u32 places = shared_address(memory), full = places + SLOTS * SLOT + ROOM, done = full + 8 * SLOTS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    if (threadIdx.x < SLOTS) {
        barrier_init(full + 8 * threadIdx.x, 1);
        barrier_init(done + 8 * threadIdx.x, WARPS);
    }
    fence_async();
    __syncthreads();
    if (warp == WARPS) {
        if (lane == 0) move(p, places, full, done);
        return;
    }
    auto sync = [] { threads_sync(1, THREADS); };
    int slot = 0;
    u32 phase = 0;
    Token next = token_of(p, blockIdx.x);
#pragma unroll 1
    for (i64 index = blockIdx.x; index < p.heads; index += p.blocks) {
        const Head head = head_of(p, index);
        const Token token = next;
        sync();
        const int element = threadIdx.x % 128;
        if (element < WIDTH) {
            room.vectors[threadIdx.x / 128 * WIDTH + element] = token.key;
            if (threadIdx.x < 128) room.vectors[2 * WIDTH + element] = token.value;
        }
        for (int i = 3 * WIDTH + threadIdx.x; i < NAMES * WIDTH; i += THREADS) room.vectors[i] = 0.f;
        if (threadIdx.x < NAMES) room.dens[threadIdx.x] = threadIdx.x == 2 ? 1.f : 0.f;
        next = token_of(p, index + p.blocks);
        sync();
#pragma unroll 1
        for (int n = 0; n < p.turns; n++) {
            const Turn& turn = p.turn[n];
            const float g = turn.power && p.gated ? (float)exp(token.log_g * turn.power) : 1.f;
            const float *q = room.vectors + turn.q * WIDTH, *k = room.vectors + turn.k * WIDTH;
            const float *v = room.vectors + turn.v * WIDTH;
            float* parts = room.parts + warp * WIDTH;
            const bool weighs = turn.vector >= 0 && threadIdx.x < turn.rows;
            float m = 0.f;
            if (weighs)
                m = ((const float*)base(p, head, OLD_VECTOR + turn.vector))[threadIdx.x * p.of[OLD_VECTOR + turn.vector].row];
            float sum[4] = {0.f, 0.f, 0.f, 0.f}, mate[4], q_c[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int c = turn.packed ? lane + 32 * i : 4 * lane + i;
                mate[i] = c < turn.columns ? v[c] : 0.f;
                q_c[i] = turn.packed && c < turn.columns ? q[c] : 0.f;
                if (turn.packed && c < turn.columns) parts[c] = 0.f;
            }
            __syncwarp();
#pragma unroll 1
            for (int row = 0; row < turn.rows; row += ROWS) {
                const int end = row + ROWS < turn.rows ? row + ROWS : turn.rows;
                float* x = (float*)(memory + slot * SLOT);
                barrier_wait(full + 8 * slot, phase);
                if (turn.packed) triangle(turn, x, row, end, g, q, k, q_c, mate, sum, parts, warp, lane);
                else rows_of(turn, x, row, end, g, q, k, mate, sum, warp, lane);
                fence_async();
                __syncwarp();
                if (lane == 0) barrier_arrive(done + 8 * slot);
                if (++slot == SLOTS) slot = 0, phase ^= 1;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int c = turn.packed ? lane + 32 * i : 4 * lane + i;
                if (c < turn.columns) parts[c] = turn.packed ? parts[c] + sum[i] : sum[i];
            }
            float weight = 0.f;
            if (weighs) {
                const float y = advanced(g, m, k[threadIdx.x], room.dens[turn.v]);
                weight = fmaf(q[threadIdx.x], y, 0.f);
                const Field& to = p.of[NEW_VECTOR + turn.vector];
                ((float*)base(p, head, NEW_VECTOR + turn.vector))[threadIdx.x * to.row] = y;
            }
            collect(turn, room, weight, sync);
        }
        finish(p, head, room);
    }
}
