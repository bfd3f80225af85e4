// What sweeps from the last token on share: a state of B x B that is read both ways round.
//
// A file that includes this has `B`, and `POWER`, the gate's of that state. Rows are read from a copy in
// bfloat16, which has panels of B rows and 64 columns.

constexpr int HALVES = B / 64, ROWS_R = B * 128;  // bytes of a panel of the copy

// Return a R [64, B], a by rows; turned: a R'.
template <bool TURNED> DEVICE void read_rows(float (&o)[B / 2], u32 a, u32 copy, u32 after) {
    products();
    UNROLL for (int i = 0; i < B / 16; i++) {
        u32 at = a + i / 4 * PANEL + i % 4 * 32;
        if (TURNED)
            multiply<0, 0>(o, at, copy + i / 4 * ROWS_R + i % 4 * 32, i > 0);
        else
            multiply<0, 1, ROWS_R>(o, at, copy + i * 2048, i > 0);
    }
    if (GATE) {
        products_begun();
        int t = thread_of_group(), row = t / 32 * 16 + t % 32 / 4;
        float w = raised<POWER>(load_float(after + row * 4)), x = raised<POWER>(load_float(after + row * 4 + 32));
        products_done(o);
        UNROLL for (int i = 0; i < B / 2; i++) o[i] *= i & 2 ? x : w;
        products();
    }
}

// Add the product of a tile of pairs and rows.
DEVICE void read_pairs(float (&o)[B / 2], u32 tile, u32 rows) {
    UNROLL for (int i = 0; i < W / 16; i++) multiply<0, 1>(o, tile + i * 32, rows + i * 2048, true);
    products_begun();
    products_done(o);
}

// Return the state after the last token, whose gradient has no factor.
DEVICE void load_reverse(float (&R)[HALVES][B / 2], const Sweep &p, int operand) {
    UNROLL for (int h = 0; h < HALVES; h++) {
        load_state(R[h], p, operand, h * 64, p.keys, p.values);
        UNROLL for (int i = 0; i < B / 2; i++) R[h][i] *= (float)p.factors[1];
    }
}

DEVICE void store_reverse(float (&R)[HALVES][B / 2], const Sweep &p, int operand) {
    UNROLL for (int h = 0; h < HALVES; h++) {
        UNROLL for (int i = 0; i < B / 2; i++) R[h][i] *= (float)p.factors[0];
        store_state(R[h], p, operand, h * 64, p.keys, p.values, true);
    }
}

DEVICE void put_copy(u32 copy, const float (&R)[HALVES][B / 2]) {
    UNROLL for (int h = 0; h < HALVES; h++) put_rows<B, ROWS_R>(copy + h * PANEL, R[h], 1.0f);
}

// R += Q' dO, weighed by a gate half by half, else registers would not suffice.
DEVICE void write_rows(float (&R)[HALVES][B / 2], u32 q, u32 g, u32 before, u32 end) {
    if (GATE) {
        UNROLL for (int h = 0; h < HALVES; h++) {
            u32 a[16];
            weigh<POWER>(a, q + h * PANEL, before);
            fade<POWER>(R[h], end);
            products();
            UNROLL for (int j = 0; j < W / 16; j++) multiply<1>(R[h], a + 4 * j, g + j * 2048, true);
            products_begun();
            products_done(R[h]);
            unchanged(a);
        }
    } else {
        products();
        UNROLL for (int h = 0; h < HALVES; h++)
            UNROLL for (int j = 0; j < W / 16; j++)
                multiply<1, 1>(R[h], q + h * PANEL + j * 2048, g + j * 2048, true);
        products_begun();
        if constexpr (HALVES == 2)
            products_done(R[0], R[1]);
        else
            products_done(R[0]);
    }
}

DEVICE void operand(u32 (&a)[16], const float (&S)[32], float factor = 1.0f) {
    UNROLL for (int i = 0; i < 16; i++) a[i] = bf16_pair(S[2 * i] * factor, S[2 * i + 1] * factor);
}

// Add what was left in shared memory, a row a token.
DEVICE void add_left(float (&o)[32], u32 made) {
    UNROLL for (int j = 0; j < 4; j++) {
        u32 x[4];
        take(x, made, j);
        UNROLL for (int i = 0; i < 4; i++)
            o[8 * j + 2 * i] += of_bf16(x[i]), o[8 * j + 2 * i + 1] += of_bf16_high(x[i]);
    }
}
