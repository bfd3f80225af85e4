// What the kernels of this folder call: products and loads of 16 x 16 blocks (block.cuh), copies, and
// accesses to memory by address. All have the signature that Numba calls: a result's place first.
//
// Shared memory is meant by the index of an element in it, of results by bytes. A block is opaque.
#include "ptx.cuh"
#include "arrays.cuh"
#include "block.cuh"

extern __shared__ __align__(128) u8 memory[];
#define CALL(name, ...) extern "C" __device__ int hla_##name(__VA_ARGS__)
#define APART(name, ...) extern "C" __device__ __noinline__ int hla_##name(__VA_ARGS__)
#define TILE(at) ((const Element*)memory + at)
constexpr int WORDS = sizeof(Block) / 4;
struct Words {
    u32 x[WORDS];
};
#if NARROW
#define WORDS_OF(x) u32 x##0, u32 x##1, u32 x##2, u32 x##3
#define BLOCK(x) Block {x##0, x##1, x##2, x##3}
#elif PARTS == 2
#define WORDS_OF(x)                                                                               \
    u32 x##0, u32 x##1, u32 x##2, u32 x##3, u32 x##4, u32 x##5, u32 x##6, u32 x##7, u32 x##8,     \
        u32 x##9, u32 x##10, u32 x##11, u32 x##12, u32 x##13, u32 x##14, u32 x##15
#define BLOCK(x)                                                                                  \
    Block {                                                                                       \
        {x##0, x##1, x##2, x##3, x##4, x##5, x##6, x##7}, {                                       \
            x##8, x##9, x##10, x##11, x##12, x##13, x##14, x##15                                  \
        }                                                                                         \
    }
#else
#define WORDS_OF(x) u32 x##0, u32 x##1, u32 x##2, u32 x##3, u32 x##4, u32 x##5, u32 x##6, u32 x##7
#define BLOCK(x) Block {{x##0, x##1, x##2, x##3, x##4, x##5, x##6, x##7}}
#endif
#define FLOATS float c0, float c1, float c2, float c3, float c4, float c5, float c6, float c7
#define SUM Sum {{c0, c1, c2, c3, c4, c5, c6, c7}}

// Address of an element in shared memory: in 32 bits, of which a load adds a constant by itself
DEVICE u32 place(int at) { return shared_address(memory) + at * (int)sizeof(Element); }
#if NARROW
DEVICE int upright(int pitch) { return (threadIdx.x & 15) * pitch + (threadIdx.x >> 4 & 1) * 8; }
DEVICE int across(int pitch) {
    return ((threadIdx.x & 7) + (threadIdx.x >> 4 & 1) * 8) * pitch + (threadIdx.x >> 3 & 1) * 8;
}
DEVICE Block swapped(const Block& b) { return {b.x[0], b.x[2], b.x[1], b.x[3]}; }
CALL(load, Block* r, int at, int pitch) { return ldmatrix(r->x, place(at) + upright(pitch) * 2), 0; }
CALL(load_turned, Block* r, int at, int pitch) {
    return ldmatrix_turned(r->x, place(at) + across(pitch) * 2), 0;
}
CALL(second, Block* r, int at, int pitch) {
    ldmatrix(r->x, place(at) + across(pitch) * 2);
    return *r = swapped(*r), 0;
}
CALL(second_turned, Block* r, int at, int pitch) {
    ldmatrix_turned(r->x, place(at) + upright(pitch) * 2);
    return *r = swapped(*r), 0;
}
#else
#define BY_PITCH(f)                                                          \
    (pitch == PITCH_1   ? f<PITCH_1>(TILE(at), 0, 0)                         \
     : pitch == PITCH_2 ? f<PITCH_2>(TILE(at), 0, 0)                         \
                        : f<PITCH_3>(TILE(at), 0, 0))
CALL(load, Block* r, int at, int pitch) { return *r = BY_PITCH(load), 0; }
CALL(load_turned, Block* r, int at, int pitch) { return *r = BY_PITCH(load_turned), 0; }
CALL(second, Block* r, int at, int pitch) { return *r = BY_PITCH(second), 0; }
CALL(second_turned, Block* r, int at, int pitch) { return *r = BY_PITCH(second_turned), 0; }
#endif
CALL(multiply, Sum* r, FLOATS, WORDS_OF(a), WORDS_OF(b)) {  // c + a b'
    Sum c = SUM;
    multiply(c, BLOCK(a), BLOCK(b));
    return *r = c, 0;
}
CALL(block_of, Block* r, FLOATS) { return *r = block_of(SUM), 0; }
CALL(weighed, Block* r, float w0, float w1, float w8, float w9, WORDS_OF(a)) {  // a lane's columns
#if NARROW
    return *r = {bf16_pair(of_bf16(a0) * w0, of_bf16_high(a0) * w1),
                 bf16_pair(of_bf16(a1) * w0, of_bf16_high(a1) * w1),
                 bf16_pair(of_bf16(a2) * w8, of_bf16_high(a2) * w9),
                 bf16_pair(of_bf16(a3) * w8, of_bf16_high(a3) * w9)}, 0;
#else
    const Block a = BLOCK(a);
    const float w[4] = {w0, w1, w8, w9};
    UNROLL for (int i = 0; i < 8; i++) r->put(i, a.get(i) * w[i / 4 * 2 + (i >> 1 & 1)]);
    return 0;
#endif
}
CALL(power_of_2, float* r, float x) { return *r = power_of_2(x), 0; }
CALL(threads_sync, int* r, int name, int threads) { return threads_sync(name, threads), *r = 0; }
CALL(value, float* r, int at) { return *r = value(*TILE(at)), 0; }
CALL(put_value, int* r, int at, float x) { return *(Element*)TILE(at) = element(x), *r = 0; }
CALL(put_pair, int* r, int at, float x, float y) { return put_pair((Element*)TILE(at), x, y), *r = 0; }
// Weights and sums, by their number from the first byte on
CALL(number, float* r, int at) { return *r = ((const float*)memory)[at], 0; }
CALL(put_number, int* r, int at, float x) { return ((float*)memory)[at] = x, *r = 0; }
struct Four {
    float x[4];
};
CALL(numbers, Four* r, int at) {  // four, from a multiple of four on
    const float4 x = *(const float4*)((const float*)memory + at);
    return *r = {x.x, x.y, x.z, x.w}, 0;
}
CALL(put_numbers, int* r, int at, float a, float b, float c, float d) {
    return *(float4*)((float*)memory + at) = make_float4(a, b, c, d), *r = 0;
}
CALL(dot_at, SUM_TYPE* r, int at) { return *r = ((const SUM_TYPE*)memory)[at], 0; }
CALL(put_dot, int* r, int at, SUM_TYPE x) { return ((SUM_TYPE*)memory)[at] = x, *r = 0; }

// Copies into tiles: 16 bytes, not yet there; or eight 16-bit numbers that become float32.
CALL(copy16, int* r, int at, i64 from, int bytes) {
    return copy16(place(at), (const void*)from, bytes), *r = 0;
}
CALL(widen8, int* r, int at, i64 from, i64 type, int there) {
    uint4 all = {0, 0, 0, 0};
    if (there) all = *(const uint4*)from;
    const u32 pairs[4] = {all.x, all.y, all.z, all.w};
    UNROLL for (int n = 0; n < 8; n++) {
        const u16 one = (u16)(pairs[n / 2] >> n % 2 * 16);
        *(Element*)TILE(at + n) = element(type == 1 ? of_f16(one) : of_bf16(one));
    }
    return *r = 0;
}
CALL(copies_commit, int* r) { return copies_commit(), *r = 0; }
CALL(copies_wait, int* r, int n) {
    n == 0 ? copies_wait<0>() : n == 1 ? copies_wait<1>() : n == 2 ? copies_wait<2>() : copies_wait<3>();
    return *r = 0;
}
CALL(syncwarp, int* r) { return __syncwarp(), *r = 0; }

// Results, of a type that is float where they are added or are float
#if ADD || TYPE_O == 2
typedef float Out;
#else
typedef u16 Out;
#endif
#define PLACE(at) (memory + at)
CALL(put_out, int* r, int at, float x, float y) {
#if ADD || TYPE_O == 2
    *(float2*)PLACE(at) = make_float2(x, y);
#elif TYPE_O == 1
    *(u32*)PLACE(at) = to_f16(x) | (u32)to_f16(y) << 16;
#else
    *(u32*)PLACE(at) = bf16_pair(x, y);
#endif
    return *r = 0;
}
CALL(out, float* r, int at) { return *r = get(PLACE(at), 0, sizeof(Out) == 4 ? 2 : TYPE_O), 0; }
CALL(leave16, int* r, i64 to, int at) {  // write 16 bytes of them, or add them
    const u8* piece = PLACE(at);
#if ADD && TYPE_O == 2
    float4 old = *(float4*)to, more = *(const float4*)piece;
    *(float4*)to = float4{old.x + more.x, old.y + more.y, old.z + more.z, old.w + more.w};
#elif ADD && TYPE_O == 0
    uint2 old = *(uint2*)to;
    float4 more = *(const float4*)piece;
    *(uint2*)to = uint2{bf16_pair(of_bf16(old.x) + more.x, of_bf16_high(old.x) + more.y),
                        bf16_pair(of_bf16(old.y) + more.z, of_bf16_high(old.y) + more.w)};
#elif ADD
    for (int e = 0; e < 4; e++) put((u8*)to, e, TYPE_O, get((u8*)to, e, TYPE_O) + ((const float*)piece)[e]);
#else
    *(uint4*)to = *(const uint4*)piece;
#endif
    return *r = 0;
}

// Elements of arrays of any type
CALL(get, float* r, i64 p, i64 at, i64 type) { return *r = get((const u8*)p, at, (int)type), 0; }
CALL(put, int* r, i64 p, i64 at, i64 type, double x) { return put((u8*)p, at, (int)type, x), *r = 0; }
CALL(load4, Four* r, i64 p) {
    const float4 x = *(const float4*)p;
    return *r = {x.x, x.y, x.z, x.w}, 0;
}
CALL(store4, int* r, i64 p, float a, float b, float c, float d) {
    return *(float4*)p = make_float4(a, b, c, d), *r = 0;
}
CALL(get64, double* r, i64 p, i64 at, i64 type) {
    return *r = type == 3   ? ((const double*)p)[at]
                : type == 4 ? (double)((const u8*)p)[at]
                : type == 5 ? (double)((const i64*)p)[at]
                            : (double)get((const u8*)p, at, (int)type), 0;
}
CALL(put64, int* r, i64 p, i64 at, i64 type, double x) {
    if (type == 4) ((u8*)p)[at] = x != 0.;
    else if (type == 5) ((i64*)p)[at] = (i64)x;
    else put((u8*)p, at, (int)type, x);
    return *r = 0;
}

// Sums of a lane in a matrix of so many rows and columns from here on. Apart: a loop over the blocks of
// a state is short enough to be unrolled, without which they are not held in registers.
template <class F> DEVICE void each(i64 row_step, i64 column_step, int rows, int columns, F&& visit) {
    const int g = (threadIdx.x & 31) >> 2, j = 2 * (threadIdx.x & 3);
    UNROLL for (int i = 0; i < 8; i++) {
        const int row = g + (i >> 1 & 1) * 8, column = j + (i & 1) + (i >> 2) * 8;
        if (row < rows && column < columns) visit(i, row * row_step + column * column_step);
    }
}
APART(get_block, Sum* r, i64 p, i64 row, i64 column, i64 type, int rows, int columns) {
    r->clear();
    each(row, column, rows, columns, [&](int i, i64 at) { r->x[i] = get((const u8*)p, at, (int)type); });
    return 0;
}
APART(put_block, int* r, i64 p, i64 row, i64 column, i64 type, int rows, int columns, FLOATS) {
    Sum c = SUM;
    each(row, column, rows, columns, [&](int i, i64 at) { put((u8*)p, at, (int)type, c.x[i]); });
    return *r = 0;
}
// Of a matrix in bfloat16 with so many elements a row: write a block of sums times a factor; return the sum
// of a block of sums times one that is there transposed.
APART(keep_block, int* r, i64 p, i64 pitch, float factor, FLOATS) {
    Sum c = SUM;
    each(pitch, 1, 16, 16, [&](int i, i64 at) { put((u8*)p, at, 0, c.x[i] * factor); });
    return *r = 0;
}
APART(meet_block, float* r, i64 p, i64 pitch, FLOATS) {
    Sum c = SUM;
    float total = 0.f;
    each(1, pitch, 16, 16, [&](int i, i64 at) { total += c.x[i] * get((const u8*)p, at, 0); });
    return *r = total, 0;
}

// Values of other lanes
CALL(up, double* r, double x, int n) { return *r = __shfl_up_sync(~0u, x, n), 0; }
CALL(of_lane, double* r, double x, int n) { return *r = __shfl_sync(~0u, x, n), 0; }
CALL(across, SUM_TYPE* r, SUM_TYPE x, int n) { return *r = __shfl_xor_sync(~0u, x, n), 0; }
