// States over segments, joined in order: S <- r_n S + local_n, o_n the S before it, r_n = exp(power *
// sum of the log gate over n). One thread an element of a head's state; ``local`` and o lie in order.
//
// Bytes a head and segment: 8 D V, 131 kB at D = V = 128: 16 heads of 8 segments take 6 us at 3.0 TB/s.
#include "ptx.cuh"
#include "arrays.cuh"

struct Carry {
    float *local, *o, *start, *end;
    double* fading;
    i64 start_head[3], start_row, start_column, end_head[3], end_row, end_column, fading_head[3],
        fading_segment, count, rows, columns, heads1, heads2, reverse, tiles;
    double power;
};

extern "C" __global__ void __launch_bounds__(128) carry_kernel(const __grid_constant__ Carry p) {
    const i64 size = p.rows * p.columns, index = blockIdx.x / p.tiles;
    const i64 e = blockIdx.x % p.tiles * 128 + threadIdx.x;
    if (e >= size) return;
    const i64 head[3] = {index / p.heads2 / p.heads1, index / p.heads2 % p.heads1, index % p.heads2};
    i64 from = e / p.columns * p.start_row + e % p.columns * p.start_column, faded = 0;
    i64 to = e / p.columns * p.end_row + e % p.columns * p.end_column;
    for (int i = 0; i < 3; i++) {
        from += head[i] * p.start_head[i], to += head[i] * p.end_head[i];
        faded += head[i] * p.fading_head[i];
    }
    const float* __restrict__ local = p.local + index * p.count * size + e;
    float* __restrict__ o = p.o + index * p.count * size + e;
    float S = p.start ? p.start[from] : 0.f;
#pragma unroll 8
    for (i64 i = 0; i < p.count; i++) {
        const i64 n = p.reverse ? p.count - 1 - i : i;
        const float more = p.end || i < p.count - 1 ? local[n * size] : 0.f;  // the last may not be there
        o[n * size] = S;
        if (p.fading) S *= (float)exp(p.power * p.fading[faded + n * p.fading_segment]);
        S += more;
    }
    if (p.end) p.end[to] = S;
}
