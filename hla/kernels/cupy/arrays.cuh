// Arrays of any type and strides, as launches describe them (launch.operand).

struct Operand {  // strides in elements
    i64 head[3], segment, row, column, type;
};

// Elements of arrays by their type: 0 bfloat16, 1 float16, 2 float32, 3 float64.
DEVICE int width_of(int type) { return type < 2 ? 2 : type == 2 ? 4 : 8; }
DEVICE float get(const u8* p, i64 at, int type) {
    if (type == 0) return of_bf16(((const u16*)p)[at]);
    if (type == 1) return of_f16(((const u16*)p)[at]);
    if (type == 2) return ((const float*)p)[at];
    return (float)((const double*)p)[at];
}
DEVICE void put(u8* p, i64 at, int type, double x) {
    if (type == 0) ((u16*)p)[at] = (u16)bf16_pair((float)x, 0.f);
    else if (type == 1) ((u16*)p)[at] = to_f16((float)x);
    else if (type == 2) ((float*)p)[at] = (float)x;
    else ((double*)p)[at] = x;
}
