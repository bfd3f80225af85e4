// What a launch of one token is told, and what its kernels do alike (step.py).

constexpr int WARPS = 8, THREADS = 32 * WARPS, MATRICES = 6, VECTORS = 4, TURNS = 12, NAMES = 8;
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
    i64 turns, keys, values, heads, blocks, heads1, heads2, log, gated, divides;
    double scale, eps;
};

struct Head {
    i64 at[3];
};
DEVICE Head head_of(const Step& p, i64 index) {
    return {{index / p.heads2 / p.heads1, index / p.heads2 % p.heads1, index % p.heads2}};
}
// Where an operand of a head begins.
DEVICE u8* base(const Step& p, const Head& head, int i) {
    const Field& x = p.of[i];
    i64 at = head.at[0] * x.head[0] + head.at[1] * x.head[1] + head.at[2] * x.head[2];
    return p.at[i] + at * width_of((int)x.type);
}
// An element of q (scaled), k or v.
DEVICE float element(const Step& p, const Head& head, int n, i64 i) {
    return get(base(p, head, n), i * p.of[n].column, (int)p.of[n].type) * (n ? 1.f : (float)p.scale);
}
DEVICE double log_gate(const Step& p, const Head& head) {
    if (!p.gated) return 0.;
    const double g = get(base(p, head, GATE), 0, (int)p.of[GATE].type);
    return p.log ? g : log(g);
}

// An element of a state behind a token: to the same bits in every kernel.
DEVICE float advanced(float g, float x, float key, float value) { return fmaf(g, x, key * value); }

struct Room {  // in shared memory
    float *vectors, *parts, *dens, *weights;  // (NAMES, WIDTH), (WARPS, WIDTH), of each name, of each warp
};
DEVICE Room room_at(u8* memory) {
    float* vectors = (float*)memory;
    float* dens = vectors + (NAMES + WARPS) * WIDTH;
    return {vectors, vectors + NAMES * WIDTH, dens, dens + NAMES};
}
constexpr int ROOM = 4 * ((NAMES + WARPS) * WIDTH + NAMES + WARPS);  // bytes

// What a turn leaves: the sums of all warps, added in their order.
template <class Sync> DEVICE void collect(const Turn& turn, const Room& room, float weight, Sync sync) {
#pragma unroll
    for (int step = 16; step; step /= 2) weight += __shfl_xor_sync(~0u, weight, step);
    if ((threadIdx.x & 31) == 0) room.weights[threadIdx.x / 32] = weight;
    sync();
    for (int c = threadIdx.x; c < turn.columns; c += THREADS) {
        float all = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) all += room.parts[i * WIDTH + c];
        room.vectors[turn.out * WIDTH + c] += turn.factor * all;
    }
    if (threadIdx.x == 0 && turn.weighs) {
        float all = 0.f;
        for (int i = 0; i < WARPS; i++) all += room.weights[i];
        room.dens[turn.out] += turn.factor * all;
    }
    sync();
}

DEVICE void finish(const Step& p, const Head& head, const Room& room) {
    const float by = p.divides ? room.dens[3] + (float)p.eps : 1.f;
    u8* o = base(p, head, O);
    for (int i = threadIdx.x; i < p.values; i += THREADS)
        put(o, i * p.of[O].column, (int)p.of[O].type, room.vectors[3 * WIDTH + i] / by);
}
