// The gradient of a gate by one pass, from what the launches of dq and dv leave: a block a head and
// period of tokens, a warp a chunk.
//
// The gate of token s multiplies every product that crosses it (derivations 5). In a chunk
//
//     G_s = E + sum_{t>=s} c_t + sum_{j<s} (d_j + w_j) - sum_{t<s} r_t    E = B - sum c    B <- E + sum d
//
// where c_t is read from earlier chunks, d_j is written to later ones, r_t and w_j sum the chunk's own
// pairs by query and by key, and B and E are what crosses its start and what crosses all of it. B is
// <S, R>, the state and its gradient, at both borders of every period (fused rows leave parts of it):
// from the first it is carried on, and what is then missing at the second is added along the way. E is
// 0 in a chunk whose gate leaves nothing. For a decay the sum of G over all tokens is needed. Sums in
// float64, in a fixed order.
#include "ptx.cuh"
#include "arrays.cuh"

constexpr int AXES = 8;
enum { READS, WRITES, GATE, BORDER, STATE, GRADIENT, MET, O, OPERANDS };
struct Gate {
    u8* at[OPERANDS];  // arrays in order (*batch, ...), but for the gate
    i64 type[OPERANDS], tokens, keys, values, log, strict, ends, reads, writes, met;
    double power, factor;
    i64 sizes[AXES], strides[AXES], step;  // of the gate: axes of the batch, tokens
};
constexpr int CHUNKS = PERIOD / W, EACH = W / 32, THREADS = PERIOD / EACH;  // a lane has so many tokens

// Elements from the gate's first to a head's.
DEVICE i64 of_gate(const Gate& p, i64 head) {
    i64 at = 0;
#pragma unroll
    for (int axis = AXES - 1; axis >= 0; axis--) {
        if (p.sizes[axis] == 1) continue;
        at += head % p.sizes[axis] * p.strides[axis];
        head /= p.sizes[axis];
    }
    return at;
}

DEVICE double number(const u8* p, i64 at, i64 type) {
    return type == 3 ? ((const double*)p)[at] : (double)get(p, at, (int)type);
}

// Sum over the block, the same in all threads.
DEVICE double summed(double x, double* shared) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.;
    for (int i = 0; i < THREADS / 32; i++) x += shared[i];
    return x;
}

// Sum over the chunk, a warp's; the same in all lanes.
DEVICE double in_chunk(const double (&x)[EACH]) {
    double sum = 0.;
    for (int e = 0; e < EACH; e++) sum += x[e];
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

// Sums over the chunk's tokens before each.
DEVICE void before(const double (&x)[EACH], double (&sums)[EACH]) {
    double upto = 0.;
    for (int e = 0; e < EACH; e++) sums[e] = upto, upto += x[e];
    const double own = upto;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        double other = __shfl_up_sync(~0u, upto, step);
        if ((threadIdx.x & 31) >= step) upto += other;
    }
    for (int e = 0; e < EACH; e++) sums[e] += upto - own;
}

// <S, R>, of whose parts it is the sum, or of (D, V) and (V, D).
DEVICE double crossing(const Gate& p, i64 at, double* shared) {
    if (p.at[MET]) {
        double sum = 0.;
        for (i64 i = 0; i < p.met; i++) sum += number(p.at[MET], at * p.met + i, p.type[MET]);
        return sum;
    }
    const i64 size = p.keys * p.values;
    double sum = 0.;
    for (i64 i = threadIdx.x; i < size; i += THREADS) {
        i64 d = i / p.values, v = i % p.values;
        sum += number(p.at[STATE], at * size + i, p.type[STATE])
               * number(p.at[GRADIENT], at * size + v * p.keys + d, p.type[GRADIENT]);
    }
    return summed(sum, shared) * p.factor;
}

extern "C" __global__ void __launch_bounds__(THREADS) gate_kernel(const __grid_constant__ Gate p) {
    extern __shared__ __align__(16) u8 memory[];
    double* shared = (double*)memory;  // of 32 sums
    double* of_chunk = shared + 32;  // (3, CHUNKS)
    const i64 T = p.tokens, parts = (T + PERIOD - 1) / PERIOD;
    const i64 part = blockIdx.x % parts, head = blockIdx.x / parts, first = part * PERIOD;
    const int i = threadIdx.x / 32, i_t = threadIdx.x % 32 * EACH;
    const i64 t = first + i * W + i_t, rest = T - first < PERIOD ? T - first : PERIOD;
    const i64 left = rest - i * W < 0 ? 0 : rest - i * W > W ? W : rest - i * W;  // of the chunk
    double B = 0., after = 0.;
    if (part == 0 && p.at[BORDER]) B = number(p.at[BORDER], head, p.type[BORDER]);
    const bool states = p.at[STATE] || p.at[MET];
    if (part > 0 && states) B = crossing(p, head * (parts - 1) + part - 1, shared);
    if (part < parts - 1 && states) after = crossing(p, head * (parts - 1) + part, shared);

    const i64 gate = of_gate(p, head);
    double c[EACH] = {}, d[EACH] = {}, query[EACH] = {}, a[EACH] = {};  // d with what pairs sum to by key
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        if (t + e >= T) continue;
        for (i64 n = 0; n < p.reads; n++)
            c[e] += number(p.at[READS], (head * p.reads + n) * T + t + e, p.type[READS]);
        for (i64 n = 0; n < p.writes; n++) {
            const i64 at = (head * p.writes + n) * 2 * T + t + e;
            d[e] += number(p.at[WRITES], at, p.type[WRITES]);
            query[e] += number(p.at[WRITES], at + T, p.type[WRITES]);
        }
        if (p.log) a[e] = number(p.at[GATE], gate + (t + e) * p.step, p.type[GATE]);
    }
    // Of its own pairs both sums are the same.
    const double sum_c = in_chunk(c), sum_d = in_chunk(d) - in_chunk(query);
    double sum_a = p.log ? in_chunk(a) : 0.;
    if (i_t == 0) {
        if (!p.log) {
            const double g = number(p.at[GATE], gate, p.type[GATE]);
            sum_a = (double)left * log(g < 1e-30 ? 1e-30 : g);
        }
        of_chunk[i] = sum_c, of_chunk[CHUNKS + i] = sum_d;
        of_chunk[2 * CHUNKS + i] = exp(sum_a * p.power) < 5.9604644775390625e-08 ? 0. : 1.;
    }
    __syncthreads();
    double begin = 0., E = 0.;
    for (int n = 0; n < CHUNKS; n++) {  // what crosses a chunk, and what is missing behind all
        const double kept = of_chunk[2 * CHUNKS + n], across = kept * (B - of_chunk[n]);
        if (n == i) E = across;
        B = across + of_chunk[CHUNKS + n];
        if (kept == 0.) begin = n + 0.5;
    }
    double missing = (after - B) / ((double)((rest + W - 1) / W) - begin);
    if (!p.ends && part == parts - 1) missing = 0.;
    const double through = E + (i + 0.5 > begin ? missing * (i + 0.5 - begin) : 0.);
    if (p.log) {
        double read[EACH], written[EACH], both[EACH];
        for (int e = 0; e < EACH; e++) both[e] = c[e] + query[e];
        before(both, read), before(d, written);
        for (int e = 0; e < EACH; e++) {
            const double G = through + sum_c - (read[e] + (p.strict ? both[e] : 0.)) + written[e];
            if (t + e < T) put(p.at[O], head * T + t + e, (int)p.type[O], G * p.power);
        }
        return;
    }
    double crossed = i_t == 0 ? left * through : 0.;
    for (int e = 0; e < EACH; e++) {
        const double j = i_t + e, last = p.strict ? j - 1 : j;  // the last gate that a read has met
        crossed += (last + 1) * c[e] + (left - 1 - j) * d[e] - (left - 1 - last) * query[e];
    }
    const double all = summed(crossed, shared);
    if (threadIdx.x == 0) put(p.at[O], head * parts + part, (int)p.type[O], all * p.power);
}
