// o = x / (den + eps); of the adjoint also dden = -(o . num) / (den + eps): a warp a row of V columns.
//
// Bytes of a row: x, o, and num where there is a dden; float32 sums in a fixed order.
#include "ptx.cuh"
#include "arrays.cuh"

constexpr int AXES = 8;
enum { X, DEN, O, NUM, DDEN, OPERANDS };
struct Row {
    i64 strides[AXES], column, type;
};
struct Divide {
    u8* at[OPERANDS];
    Row of[OPERANDS];
    i64 sizes[AXES], rows, columns;
    double eps;
};

extern "C" __global__ void __launch_bounds__(256) divide_kernel(const __grid_constant__ Divide p) {
    i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32, place[OPERANDS] = {};
    const int lane = threadIdx.x & 31;
    if (row >= p.rows) return;
#pragma unroll
    for (int axis = AXES - 1; axis >= 0; axis--) {
        if (p.sizes[axis] == 1) continue;
        i64 i = row % p.sizes[axis];
        row /= p.sizes[axis];
#pragma unroll
        for (int n = 0; n < OPERANDS; n++) place[n] += i * p.of[n].strides[axis];
    }
    const float den = get(p.at[DEN], place[DEN], (int)p.of[DEN].type) + (float)p.eps;
    float dot = 0.f;
    for (int v = lane; v < p.columns; v += 32) {
        float o = get(p.at[X], place[X] + v * p.of[X].column, (int)p.of[X].type) / den;
        put(p.at[O], place[O] + v * p.of[O].column, (int)p.of[O].type, o);
        if (p.at[DDEN]) dot += o * get(p.at[NUM], place[NUM] + v * p.of[NUM].column, (int)p.of[NUM].type);
    }
    if (!p.at[DDEN]) return;
#pragma unroll
    for (int step = 16; step; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    if (lane == 0) put(p.at[DDEN], place[DDEN], (int)p.of[DDEN].type, -dot / den);
}
