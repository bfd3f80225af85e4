// A sweep over the tokens of heads: what its kernels are given, and which head a block does.
//
// A file that includes this has the places of its operands in memory (`OPERANDS`), and `SPLIT`, whether a
// head has a block for each 64 values.

struct Sweep {
    u8 *at[OPERANDS];
    Operand of[OPERANDS];  // of a state rows are values and columns keys
    double factors[3];
    i64 tokens, segment, keys, values, heads1, heads2;
};

// Which head a block does, and which segment of it
struct Head {
    i64 head[3], segment, first, tokens;  // its first token, and how many there are
    int tile = 0;                         // of values, where a head has several blocks

    DEVICE Head(const Sweep &p) {
        i64 i = block_index();
        if (SPLIT) {
            int tiles = (int)((p.values + 63) / 64);
            tile = i % tiles, i /= tiles;
        }
        segment = first = 0, tokens = p.tokens;
        if (p.segment) {
            i64 segments = (p.tokens + p.segment - 1) / p.segment;
            segment = i % segments, i /= segments, first = segment * p.segment;
            tokens = tokens - first < p.segment ? tokens - first : p.segment;
        }
        head[2] = i % p.heads2, i /= p.heads2;
        head[1] = i % p.heads1, head[0] = i / p.heads1;
    }
    DEVICE int chunks() const { return (int)((tokens + W - 1) / W); }
    DEVICE int earlier() const { return (int)(first / W); }  // chunks before those here
    // Elements from an array's first to the head's at a segment, row and column
    DEVICE i64 offset(const Operand &x, i64 of_segment, i64 row, i64 column) const {
        return head[0] * x.head[0] + head[1] * x.head[1] + head[2] * x.head[2] +
               of_segment * x.segment + row * x.row + column * x.column;
    }
    // Whether it is the first of those that share an array, of strides 0
    DEVICE bool is_first(const Operand &x) const {
        return (x.head[0] || !head[0]) && (x.head[1] || !head[1]) && (x.head[2] || !head[2]);
    }
};

// ---- Weights of a gate, in base 2

constexpr double LOG2E = 1.4426950408889634, RESET = -160.0, LEAST = 1e-30;

template <int POWER> DEVICE float raised(float x) {
    return POWER == 1 ? x : POWER == 2 ? x * x : x * x * x;
}
