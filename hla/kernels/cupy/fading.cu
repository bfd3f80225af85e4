// Sums of the log gate over segments, float64: a block of one warp a head and segment.
#include "ptx.cuh"
#include "arrays.cuh"

struct Fading {
    u8 *gate, *o;
    i64 gate_head[3], gate_token, o_head[3], o_segment, tokens, segment, heads1, heads2, log, type;
};

extern "C" __global__ void __launch_bounds__(32) fading_kernel(const __grid_constant__ Fading p) {
    const i64 parts = (p.tokens + p.segment - 1) / p.segment, part = blockIdx.x % parts;
    const i64 index = blockIdx.x / parts, first = part * p.segment;
    const i64 head[3] = {index / p.heads2 / p.heads1, index / p.heads2 % p.heads1, index % p.heads2};
    const i64 count = p.tokens - first < p.segment ? p.tokens - first : p.segment;
    i64 from = 0, to = part * p.o_segment;
    for (int i = 0; i < 3; i++) from += head[i] * p.gate_head[i], to += head[i] * p.o_head[i];
    double total = 0.;
    for (i64 t = threadIdx.x; t < count; t += 32) {
        double a = get(p.gate, from + (first + t) * p.gate_token, (int)p.type);
        if (!p.log) a = log(a < 1e-30 ? 1e-30 : a);
        total += a < -1e6 ? -1e6 : a;  // not fmax, which would drop a NaN
    }
#pragma unroll
    for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    if (threadIdx.x == 0) ((double*)p.o)[to] = total;
}
