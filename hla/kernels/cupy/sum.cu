// o = sum of factor * term, each term broadcast, or summed over further axes: one thread an element.
//
// A term is walked by the axes of o (stride 0 where it is broadcast), then by up to two of its own
// that are summed, in order. Sums in float32, of float64 results in float64. No terms: zeros.
//
// GATE_KIND: of gradients of the gate's logarithm; 1, a decay, by which it is divided; 2, a log gate, 0 where it
// is -inf.
#include "ptx.cuh"
#include "arrays.cuh"

constexpr int AXES = 8, MOST = 4;
struct Term {
    i64 strides[AXES], count[2], step[2], type;
    double factor;
};
struct Sums {
    u8* at[MOST + 2];  // of terms, of the gate, of o
    Term term[MOST];
    i64 sizes[AXES], strides[AXES], gate[AXES], type, gate_type, count, terms;
};

extern "C" __global__ void __launch_bounds__(256) sum_kernel(const __grid_constant__ Sums p) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= p.count) return;
    i64 to = 0, of_gate = 0, from[MOST] = {};
#pragma unroll
    for (int axis = AXES - 1; axis >= 0; axis--) {
        if (p.sizes[axis] == 1) continue;
        i64 place = i % p.sizes[axis];
        i /= p.sizes[axis];
        to += place * p.strides[axis];
        if (GATE_KIND) of_gate += place * p.gate[axis];
#pragma unroll
        for (int n = 0; n < MOST; n++) from[n] += place * p.term[n].strides[axis];
    }
    TOTAL total = 0;
#pragma unroll
    for (int n = 0; n < MOST; n++) {
        if (n >= p.terms) break;
        const Term& x = p.term[n];
        TOTAL sum = 0;
        for (i64 a = 0; a < x.count[0]; a++)
            for (i64 b = 0; b < x.count[1]; b++) {
                i64 at = from[n] + a * x.step[0] + b * x.step[1];
                sum += x.type == 3 ? (TOTAL)((const double*)p.at[n])[at]
                                   : (TOTAL)get(p.at[n], at, (int)x.type);
            }
        total += (TOTAL)x.factor * sum;
    }
    if (GATE_KIND) {
        const float gate = get(p.at[MOST], of_gate, (int)p.gate_type);
        if (GATE_KIND == 1) total /= gate < 1e-30f ? 1e-30f : gate;  // a NaN stays
        else if (gate == __uint_as_float(0xff800000u)) total = 0;
    }
    put(p.at[MOST + 1], to, (int)p.type, total);
}
