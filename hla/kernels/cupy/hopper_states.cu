// A state alone on Hopper, of whose pass no row is requested: S' = sum v k', weighed by a gate.
//
// A block of threads does a head, or a segment of it. A warpgroup owns 64 rows, of values, of S' in float32
// registers; the last one loads k and v, as many chunks of W = 64 tokens ahead as there is memory for. Weights
// of a gate lie beside a chunk: see hopper.cu; its power raises them.
//
//     S' = r S' + (b V)' K    b, r: what is left of the chunk (of REVERSE: what came before), and all of it
//
// Bytes a token and head, D = V = 128: k and v once, 512, or 256 of k alone (ONE): 0.157 and 0.078 ms for
// B = 1, T = 65536, H = 16 without the last of 8 segments, at 3.0 TB/s; one H100 took 0.170 (92%) and 0.098
// (80%), where pass.cu took 0.239 and 0.192. Operations 33 k.
//
// Compiled for each B (tiles of 64 or 128 keys and values), ONE (v is k), REVERSE (last token first), S_POWER of
// the gate, GATE (0 none, 1 decay, 2 log gate), FAST, WHOLE and SHARED as hopper.cu.
#include "ptx.cuh"
#include "arrays.cuh"
#include "warpgroup.cuh"

#define BD B
constexpr bool SPLIT = false;
constexpr int TILE = W * B * 2, OWNERS = B / 64, STAGES = ONE ? 12 : 6, GROUPS = 1;
constexpr double POWERS[] = {1};

// Shared memory
constexpr int KS = 0, VS = ONE ? KS : KS + STAGES * TILE, WEIGHTS = VS + STAGES * TILE;
constexpr int SLOTS = GATE == 2 ? STAGES : GATE ? 2 : 0, ENDS = WEIGHTS + SLOTS * LISTS, FULL = ENDS + STAGES * 8;
constexpr int FREE = FULL + STAGES * 8;
static_assert(FREE + STAGES * 8 <= SHARED, "more shared memory than a block is given");

enum { AT_K, AT_V, AT_GATE, AT_START, AT_END, OPERANDS };
#include "sweep.cuh"
#include "owners.cuh"

// Own rows of S' from 64 H on; a state has no factor, what is written has one.
DEVICE void own(const Sweep &p, u32 base, int h) {
    int chunks = Head(p).chunks();
    float S[B / 2];
    load_state(S, p, AT_START, h * 64, p.values, p.keys);
    UNROLL for (int i = 0; i < B / 2; i++) S[i] *= (float)p.factors[1];
    Ring<STAGES> at;
    #pragma unroll 1
    for (int i = 0; i < chunks; i++, at.next()) {
        int slot = weights_at(at.i, i == (REVERSE ? 0 : chunks - 1), 0);
        u32 weights = base + WEIGHTS + slot * LISTS + (REVERSE ? BEFORE : AFTER), here = base + at.i * TILE;
        barrier_wait(base + FULL + 8 * at.i, at.turn);
        fence_async();
        if (GATE) fade<S_POWER>(S, base + ENDS + slot * 4);
        update<S_POWER>(S, here + VS + h * PANEL, here + KS, weights);
        arrive(base + FREE + 8 * at.i);
    }
    UNROLL for (int i = 0; i < B / 2; i++) S[i] *= (float)p.factors[0];
    store_state(S, p, AT_END, h * 64, p.values, p.keys, true);
}

DEVICE void move(const Sweep &p, u32 base) {
    constexpr int DIRECTION = REVERSE ? -1 : 1;
    Head head(p);
    int T = (int)head.tokens, chunks = head.chunks(), row = REVERSE ? (chunks - 1) * W : 0;
    Copies<B, DIRECTION> k(p, AT_K, head, (int)p.keys), v(p, AT_V, head, (int)p.values);
    LogGate gate(p, head, row);
    Ring<STAGES> at;
    #pragma unroll 1
    for (int i = 0; i < chunks; i++, at.next(), row += DIRECTION * W) {
        u32 here = base + at.i * TILE, full = base + FULL + 8 * at.i;
        barrier_wait(base + FREE + 8 * at.i, at.turn ^ 1);
        k.load(here + KS, T - row);
        if (!ONE) v.load(here + VS, T - row);
        k.arrive(full);
        if (GATE == 2) gate.put(base, at.i, row + DIRECTION * W, full);
    }
}

extern "C" __global__ void __launch_bounds__(128 * OWNERS + 128, 1)
hopper_states_kernel(const __grid_constant__ Sweep p) {
    extern __shared__ __align__(1024) u8 memory[];
    u32 base = shared_address(memory);
    if (threadIdx.x == 0) {
        begin(base + FULL, STAGES, 128 + (GATE == 2)), begin(base + FREE, STAGES, 4 * OWNERS);
        fence_async();
    }
    put_decay_of(p, base);
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in a warp, which it shows
    if (group == OWNERS)
        move(p, base);
    else
        own(p, base, group);
}
