// o = sum of factor * term, each term broadcast, or summed over further axes: one thread an element.
//
// A term is walked by the axes of o (stride 0 where it is broadcast), then by up to two of its own
// that are summed, in order. Sums in float32, of float64 results in float64. No terms: zeros.
#include "ptx.cuh"
#include "arrays.cuh"

constexpr int AXES = 8, MOST = 4;
struct Term {
    i64 strides[AXES], count[2], step[2], type;
    double factor;
};
struct Sums {
    u8* at[MOST + 1];  // of terms, of o
    Term term[MOST];
    i64 sizes[AXES], strides[AXES], type, count, terms;
};

extern "C" __global__ void __launch_bounds__(256) sum_kernel(const __grid_constant__ Sums p) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= p.count) return;
    i64 to = 0, from[MOST] = {};
#pragma unroll
    for (int axis = AXES - 1; axis >= 0; axis--) {
        if (p.sizes[axis] == 1) continue;
        i64 place = i % p.sizes[axis];
        i /= p.sizes[axis];
        to += place * p.strides[axis];
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
    put(p.at[MOST], to, (int)p.type, total);
}
