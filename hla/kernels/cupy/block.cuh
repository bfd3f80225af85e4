// Products of 16 x 16 blocks: everything that a pass multiplies is x y' of two of them.
//
// With g = lane / 4 and j = lane % 4 a lane holds of `Sum`, 16 x 16 float32, the rows g and g + 8 in
// the columns 2 j, 2 j + 1, 2 j + 8 and 2 j + 9: x[4 h + 2 r + i] is (g + 8 r, 8 h + 2 j + i). Of
// `Block`, an operand whose columns are summed over, it holds the same elements, so that sums
// become an operand without an exchange between lanes; and one operand serves as the first factor
// or as the second, of which it then is the rows.
//
// NARROW: bfloat16, two elements a register. Else float32 by three products of two TF32 parts (PARTS 1:
// as one TF32 number), where the unit's column j is our 2 j and its column j + 4 our 2 j + 1: the order of a sum.

#ifndef PARTS
#define PARTS 2
#endif
#if NARROW
typedef u16 Element;
#else
typedef float Element;
#endif
constexpr int PAD = 8;  // elements behind a row of a tile, so that rows begin in different banks

struct Sum {
    float x[8];
    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = 0.f;
    }
};

#if NARROW
struct Block {
    u32 x[4];  // (g, 2j), (g + 8, 2j), (g, 2j + 8), (g + 8, 2j + 8), each with its right neighbour
};

DEVICE void multiply(Sum& c, const Block& a, const Block& b) {  // c += a b'
    mma_bf16(c.x, a.x, b.x[0], b.x[2]);
    mma_bf16(c.x + 4, a.x, b.x[1], b.x[3]);
}

DEVICE Block block_of(const Sum& s) {
    return {bf16_pair(s.x[0], s.x[1]), bf16_pair(s.x[2], s.x[3]), bf16_pair(s.x[4], s.x[5]),
            bf16_pair(s.x[6], s.x[7])};
}

// Rows and columns of a tile from (row, column) on.
template <int PITCH> DEVICE Block load(const Element* tile, int row, int column) {
    int lane = threadIdx.x & 31;
    Block found;
    ldmatrix(found.x, shared_address(tile) + ((row + (lane & 15)) * PITCH + column + (lane >> 4) * 8) * 2);
    return found;
}

// The transpose of 16 rows and 16 columns: rows of the block are columns of the tile.
template <int PITCH> DEVICE Block load_turned(const Element* tile, int row, int column) {
    int lane = threadIdx.x & 31;
    int down = (lane & 7) + (lane >> 4) * 8, right = (lane >> 3 & 1) * 8;
    Block found;
    ldmatrix_turned(found.x, shared_address(tile) + ((row + down) * PITCH + column + right) * 2);
    return found;
}

// The same of second factors: in the order in which a product takes their registers.
template <int PITCH> DEVICE Block second(const Element* tile, int row, int column) {
    int lane = threadIdx.x & 31;
    int down = (lane & 7) + (lane >> 4) * 8, right = (lane >> 3 & 1) * 8;
    u32 x[4];
    ldmatrix(x, shared_address(tile) + ((row + down) * PITCH + column + right) * 2);
    return {x[0], x[2], x[1], x[3]};
}

template <int PITCH> DEVICE Block second_turned(const Element* tile, int row, int column) {
    int lane = threadIdx.x & 31;
    u32 x[4];
    ldmatrix_turned(x, shared_address(tile) + ((row + (lane & 15)) * PITCH + column + (lane >> 4) * 8) * 2);
    return {x[0], x[2], x[1], x[3]};
}

// Scale the columns of a block by w[0 .. 15].
DEVICE Block weighed(const Block& b, const float* w) {
    int j = 2 * (threadIdx.x & 3);
    float w0 = w[j], w1 = w[j + 1], w8 = w[j + 8], w9 = w[j + 9];
    return {bf16_pair(of_bf16(b.x[0]) * w0, of_bf16_high(b.x[0]) * w1),
            bf16_pair(of_bf16(b.x[1]) * w0, of_bf16_high(b.x[1]) * w1),
            bf16_pair(of_bf16(b.x[2]) * w8, of_bf16_high(b.x[2]) * w9),
            bf16_pair(of_bf16(b.x[3]) * w8, of_bf16_high(b.x[3]) * w9)};
}

DEVICE Block scaled(const Block& b, float w) {
    Block found;
#pragma unroll
    for (int i = 0; i < 4; i++)
        found.x[i] = bf16_pair(of_bf16(b.x[i]) * w, of_bf16_high(b.x[i]) * w);
    return found;
}

DEVICE void put_pair(Element* p, float a, float b) { *(u32*)p = bf16_pair(a, b); }
DEVICE float value(Element x) { return of_bf16(x); }
DEVICE Element element(float x) { return (u16)bf16_pair(x, 0.f); }
#else
struct Block {
    u32 high[8];  // of columns 0 .. 7: (g, 2j), (g + 8, 2j), (g, 2j + 1), (g + 8, 2j + 1)
#if PARTS == 2
    u32 low[8];
#endif
    DEVICE void put(int i, float x) {
        high[i] = to_tf32(x);
#if PARTS == 2
        low[i] = to_tf32(x - __uint_as_float(high[i]));
#endif
    }
    DEVICE float get(int i) const {
#if PARTS == 2
        return __uint_as_float(high[i]) + __uint_as_float(low[i]);
#else
        return __uint_as_float(high[i]);
#endif
    }
};

// c += a b', the least first. The unit truncates its sums: those of a block begin at 0, and are then
// added as float32 numbers are.
DEVICE void multiply(Sum& c, const Block& a, const Block& b) {
    Sum of;
    of.clear();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float* x = of.x + 4 * half;
#if PARTS == 2
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
            mma_tf32(x, a.low + k, b.high[k + half], b.high[k + half + 2]);
            mma_tf32(x, a.high + k, b.low[k + half], b.low[k + half + 2]);
        }
#endif
#pragma unroll
        for (int k = 0; k < 8; k += 4)
            mma_tf32(x, a.high + k, b.high[k + half], b.high[k + half + 2]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) c.x[i] += of.x[i];
}

DEVICE Block block_of(const Sum& s) {
    Block found;
#pragma unroll
    for (int k = 0; k < 8; k += 4) {
        found.put(k, s.x[k]);
        found.put(k + 1, s.x[k + 2]);
        found.put(k + 2, s.x[k + 1]);
        found.put(k + 3, s.x[k + 3]);
    }
    return found;
}

template <int PITCH> DEVICE Block load(const Element* tile, int row, int column) {
    int g = (threadIdx.x & 31) >> 2, j = threadIdx.x & 3;
    const Element* p = tile + (row + g) * PITCH + column + 2 * j;
    Block found;
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float2 x = *(const float2*)(p + 8 * k + 8 * r * PITCH);
            found.put(4 * k + r, x.x);
            found.put(4 * k + r + 2, x.y);
        }
    return found;
}

template <int PITCH> DEVICE Block load_turned(const Element* tile, int row, int column) {
    int g = (threadIdx.x & 31) >> 2, j = threadIdx.x & 3;
    const Element* p = tile + (row + 2 * j) * PITCH + column + g;
    Block found;
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                found.put(4 * k + r + 2 * i, p[(8 * k + i) * PITCH + 8 * r]);
    return found;
}

template <int PITCH> DEVICE Block second(const Element* tile, int row, int column) {
    return load<PITCH>(tile, row, column);
}

template <int PITCH> DEVICE Block second_turned(const Element* tile, int row, int column) {
    return load_turned<PITCH>(tile, row, column);
}

DEVICE Block weighed(const Block& b, const float* w) {
    int j = 2 * (threadIdx.x & 3);
    Block found;
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            found.put(4 * k + i, b.get(4 * k + i) * w[8 * k + j + (i >> 1)]);
    return found;
}

DEVICE Block scaled(const Block& b, float w) {
    Block found;
#pragma unroll
    for (int i = 0; i < 8; i++) found.put(i, b.get(i) * w);
    return found;
}

DEVICE void put_pair(Element* p, float a, float b) { *(float2*)p = make_float2(a, b); }
DEVICE float value(Element x) { return x; }
DEVICE Element element(float x) { return x; }
#endif
