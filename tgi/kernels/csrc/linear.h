// y = W x for up to some thousand rows of x. W lies in panels of 16 outputs, an even number of them, so that a register
// holds 16 outputs at one place along k (or at 2, 4 or 8 neighbouring places, if the numbers are narrower):
//   FP32 [k][16]    BF16 [k/2][16][2]    INT8 [k/4][16][4], + 128    INT4 [k/8][16][4]: low half k…k+3, high half k+4…k+7
//   E4M3, E5M2 [k/4][2][16][2], see from_fp8    CODES [k/8][16] of 32 bits, k in the lowest four
// Each result is one sum along k in one accumulator (per group, if quantized), so it depends on its row and its panel only.
#pragma once
#include "ops.h"
#include "simd.h"

namespace TGI_ISA {

constexpr int FETCH = 2048;  // bytes ahead in a panel that only one tile reads

// Which lines of the panels to ask for while a tile is computed: the processor's own prefetching is too late. Where the
// rows make several tiles, each of them asks for a part of the next panels.
struct Ahead {
    const char* from;  // in the first panel
    int slow;          // one new line for 2^slow lines computed

    void operator()(int64_t panel, int64_t line) const { __builtin_prefetch(from + panel + (line >> slow) * 64); }
};

static V16 activate(int act, V16 x) {
    switch (act) {
        case SILU: return silu(x);
        case GELU_TANH: return gelu_tanh(x);
        case GELU: return gelu(x);
        case RELU: return vmax(x, zero());
        case RELU2: return vmax(x, zero()) * vmax(x, zero());
    }
    return x;
}

// What follows a product, of `rows` times `panels` (an even number) accumulators: bias, factor, and where it goes.
__attribute__((noinline)) static void finish(const Linear& op, int row, int panel, V16* acc, int rows, int panels) {
    for (int m = 0; m < rows; m++, acc += panels) {
        float* out = op.out + (row + m) * op.out_stride;
        for (int p = 0; p < panels && op.bias; p++) acc[p] = acc[p] + load(op.bias + (panel + p) * 16);
        for (int p = 0; p < panels && op.finish == GATE; p += 2) {
            int first = (panel + p) / 2 * 16, n = op.outs / 2 - first;
            V16 y = activate(op.act, acc[p]) * acc[p + 1];
            if (n >= 16) store(out + first, y);
            else if (n > 0) store_some(out + first, y, n);
        }
        for (int p = 0; p < panels && op.finish != GATE; p++) {
            int first = (panel + p) * 16, n = op.outs - first;
            V16 y = activate(op.act, acc[p] * set1(op.alpha));
            if (op.act == CLIP) y = vmin(vmax(y, set1(-op.cap)), set1(op.cap));
            else if (op.cap != 0) y = softcap(y, op.cap);
            if (n >= 16) store(out + first, op.finish == ADD ? load(out + first) + y : y);
            else if (n > 0) store_some(out + first, op.finish == ADD ? load_some(out + first, n) + y : y, n);
        }
    }
}

// Where a tile's sums go: accumulator [m][p] to m rows and 16 p numbers behind `to`.
struct Sums {
    float* to;
    int64_t stride;
};
template <int MR, int NP> INLINE void leave(V16 (&acc)[MR][NP], Sums sums) {
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int p = 0; p < NP; p++) store(sums.to + m * sums.stride + p * 16, acc[m][p]);
}

// Columns whose numbers lie side by side in 64 bytes of a panel.
constexpr int depth(int form) { return form == FP32 ? 1 : form == BF16 ? 2 : form == INT4 || form == CODES ? 8 : 4; }
constexpr bool is_int(int form) { return form == INT8 || form == INT4; }

static int64_t panel_bytes(const Linear& op) { return (int64_t)(op.in + depth(op.form) - 1) / depth(op.form) * 64; }

// The weights of 16 outputs in the next of the columns that 64 bytes hold, the j-th.
template <int FORM> INLINE V16 expand(I16& held, int j, const Sixteen& table) {
    if constexpr (FORM == BF16) return j ? high_bf16(held) : low_bf16(held);
    if constexpr (FORM == E4M3 || FORM == E5M2) return from_fp8<FORM == E4M3>(held, j);
    if constexpr (FORM == CODES) {
        V16 found = look_up(table, held);
        held = shr<4>(held);
        return found;
    }
    return as_float(held);
}

// What they are to be multiplied by.
template <int FORM> constexpr float UNIT = FORM == E4M3 ? 256.f : 1.f;

// acc += `columns` of x, a multiple of what 64 bytes hold, times the same of NP panels.
template <int FORM, int MR, int NP>
INLINE void add_columns(V16 (&acc)[MR][NP], const Linear& op, const float* x, const char* w, int64_t line, int columns,
                        const Sixteen& table, Ahead ahead) {
    constexpr int DEPTH = depth(FORM);
    const int64_t bytes = panel_bytes(op);
    for (int k = 0; k < columns; k += DEPTH, line++) {
        I16 held[NP];
        UNROLL for (int p = 0; p < NP; p++) {
            held[p] = iload(w + p * bytes + line * 64);
            ahead(p * bytes, line);
        }
        UNROLL for (int j = 0; j < DEPTH; j++) {
            V16 b[NP];
            UNROLL for (int p = 0; p < NP; p++) b[p] = expand<FORM>(held[p], j, table);
            UNROLL for (int m = 0; m < MR; m++) {
                V16 a = set1(x[m * op.x_stride + k + j]);
                UNROLL for (int p = 0; p < NP; p++) acc[m][p] = fma(b[p], a, acc[m][p]);
            }
        }
    }
}

// FP32 and BF16.
template <int FORM, int MR, int NP> static void tile_plain(const Linear& op, int row, int panel, Ahead ahead, Sums sums) {
    const float* x = (const float*)op.x + row * op.x_stride;
    const char* w = (const char*)op.weight + panel * panel_bytes(op);
    const int odd = op.in % depth(FORM);
    V16 acc[MR][NP];
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int p = 0; p < NP; p++) acc[m][p] = zero();
    add_columns<FORM>(acc, op, x, w, 0, op.in - odd, Sixteen{}, ahead);
    if (odd) {
        UNROLL for (int p = 0; p < NP; p++) {
            V16 b = low_bf16(iload(w + (p + 1) * panel_bytes(op) - 64));
            UNROLL for (int m = 0; m < MR; m++) acc[m][p] = fma(b, set1(x[m * op.x_stride + op.in - 1]), acc[m][p]);
        }
    }
    leave(acc, sums);
}

INLINE V16 load_scale(const void* scales, int64_t at, bool half) {
    return half ? load_half((const f16*)scales + at) : load((const float*)scales + at);
}

// E4M3, E5M2 and CODES: a group's sum is multiplied by its scale, which costs less than to multiply the weights by it.
template <int FORM, int MR, int NP> static void tile_scaled(const Linear& op, int row, int panel, Ahead ahead, Sums sums) {
    const float* x = (const float*)op.x + row * op.x_stride;
    const char* w = (const char*)op.weight + panel * panel_bytes(op);
    const int groups = op.in / op.group, lines = op.group / depth(FORM);
    const Sixteen table = FORM == CODES ? load_sixteen(op.table) : Sixteen{};
    V16 acc[MR][NP];
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int p = 0; p < NP; p++) acc[m][p] = zero();
    for (int g = 0; g < groups; g++) {
        V16 part[MR][NP];
        UNROLL for (int m = 0; m < MR; m++) UNROLL for (int p = 0; p < NP; p++) part[m][p] = zero();
        add_columns<FORM>(part, op, x + g * op.group, w, (int64_t)g * lines, op.group, table, ahead);
        UNROLL for (int p = 0; p < NP; p++) {
            V16 scale = load_scale(op.scale, ((int64_t)(panel + p) * groups + g) * 16, op.half) * set1(UNIT<FORM>);
            UNROLL for (int m = 0; m < MR; m++) acc[m][p] = fma(part[m][p], scale, acc[m][p]);
        }
    }
    if (FORM == CODES && op.factors) {
        UNROLL for (int p = 0; p < NP; p++) {
            V16 factor = load(op.factors + (panel + p) * 16);
            UNROLL for (int m = 0; m < MR; m++) acc[m][p] = acc[m][p] * factor;
        }
    }
    leave(acc, sums);
}

INLINE int32_t quad(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return four;
}

// INT8 and INT4: integers within a group of k, then float32.
template <int MR, int NP, bool FOUR>
static void tile_int(const Linear& op, int row, int panel, Ahead ahead, Sums sums) {
    const int8_t* x = (const int8_t*)op.x + row * op.x_stride;
    const int groups = op.in / op.group, quads = op.group / 4;
    const int64_t bytes = (int64_t)op.in * (FOUR ? 8 : 16);  // of a panel
    const char* w = (const char*)op.weight + panel * bytes;
    const I16 nibble = iset1(0x0f0f0f0f);
    V16 acc[MR][NP];
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int p = 0; p < NP; p++) acc[m][p] = zero();
    for (int g = 0; g < groups; g++) {
        I16 dot[MR][NP];
        UNROLL for (int m = 0; m < MR; m++) {
            I16 first = iset1(-op.zero * op.x_sum[(row + m) * op.sum_stride + g]);
            UNROLL for (int p = 0; p < NP; p++) dot[m][p] = first;
        }
        const int8_t* xg = x + g * op.group;
        const char* wg = w + g * (FOUR ? op.group * 8 : op.group * 16);
        if constexpr (FOUR) {
            for (int q = 0; q < quads; q += 2) {
                I16 b[NP];
                UNROLL for (int p = 0; p < NP; p++) {
                    b[p] = iload(wg + p * bytes + q * 32);
                    ahead(p * bytes, (g * quads + q) / 2);
                }
                UNROLL for (int m = 0; m < MR; m++) {
                    I16 a = iset1(quad(xg + m * op.x_stride + q * 4));
                    UNROLL for (int p = 0; p < NP; p++) dot[m][p] = dot4<true>(dot[m][p], b[p] & nibble, a);
                }
                UNROLL for (int m = 0; m < MR; m++) {
                    I16 a = iset1(quad(xg + m * op.x_stride + q * 4 + 4));
                    UNROLL for (int p = 0; p < NP; p++) dot[m][p] = dot4<true>(dot[m][p], shr<4>(b[p]) & nibble, a);
                }
            }
        } else {
            for (int q = 0; q < quads; q++) {
                I16 b[NP];
                UNROLL for (int p = 0; p < NP; p++) {
                    b[p] = iload(wg + p * bytes + q * 64);
                    ahead(p * bytes, g * quads + q);
                }
                UNROLL for (int m = 0; m < MR; m++) {
                    I16 a = iset1(quad(xg + m * op.x_stride + q * 4));
                    UNROLL for (int p = 0; p < NP; p++) dot[m][p] = dot4<false>(dot[m][p], b[p], a);
                }
            }
        }
        UNROLL for (int p = 0; p < NP; p++) {
            int64_t at = ((int64_t)(panel + p) * groups + g) * 16;
            V16 scale = load_scale(op.scale, at, op.half);
            UNROLL for (int m = 0; m < MR; m++) {
                V16 a = set1(op.x_scale[(row + m) * op.sum_stride + g]);
                acc[m][p] = fma(to_float(dot[m][p]), scale * a, acc[m][p]);
            }
            if (op.min) {
                V16 min = load_scale(op.min, at, op.half);
                UNROLL for (int m = 0; m < MR; m++) {
                    int64_t of = (row + m) * op.sum_stride + g;
                    acc[m][p] = fma(min, set1(op.x_scale[of] * (float)op.x_sum[of]), acc[m][p]);
                }
            }
        }
    }
    leave(acc, sums);
}

// How many rows a tile takes, and against how many panels: as many accumulators as there are registers, and at least so
// many that an addition need not wait for the one before it.
template <int FORM> struct Shape {
    static constexpr bool ints = is_int(FORM);                 // which need two kinds of accumulators
    static constexpr bool expands = !ints && depth(FORM) > 2;  // which takes registers, too
    static constexpr int rows = PARTS == 1 ? (ints ? 6 : expands ? 10 : 12) : (ints || expands ? 4 : 6);
    static constexpr int few = PARTS == 1 ? (ints ? 3 : expands ? 4 : 6) : 1;  // rows that go against four panels
    static constexpr int panels(int m) { return m <= few ? 4 : PARTS == 1 ? 2 : m <= (ints ? 1 : PARTS == 2 ? 2 : 3) ? 2 : 1; }
};

template <int FORM, int MR, int NP>
INLINE void tile(const Linear& op, int row, int panel, Ahead ahead, Sums sums) {
    if constexpr (is_int(FORM)) tile_int<MR, NP, FORM == INT4>(op, row, panel, ahead, sums);
    else if constexpr (FORM == FP32 || FORM == BF16) tile_plain<FORM, MR, NP>(op, row, panel, ahead, sums);
    else tile_scaled<FORM, MR, NP>(op, row, panel, ahead, sums);
}

// MR rows against GROUP panels, 2 or 4, whose results belong together.
template <int FORM, int MR, int GROUP>
static void group_of(const Linear& op, int rows, int row, int panel, Ahead ahead) {
    if constexpr (MR > 0) {
        if (rows < MR) return group_of<FORM, MR - 1, GROUP>(op, rows, row, panel, ahead);
        constexpr int fits = Shape<FORM>::panels(MR), NP = fits < GROUP ? fits : GROUP;
        bool plain = op.finish == STORE && !op.bias && op.alpha == 1.f && !op.act && op.cap == 0 && (panel + GROUP) * 16 <= op.outs;
        V16 kept[MR * GROUP];
        Sums sums = {plain ? op.out + row * op.out_stride + panel * 16 : (float*)kept, plain ? op.out_stride : GROUP * 16};
        UNROLL for (int p = 0; p < GROUP; p += NP) {
            tile<FORM, MR, NP>(op, row, panel + p, ahead, sums);
            ahead.from += NP * panel_bytes(op);
            sums.to += NP * 16;
        }
        if (!plain) finish(op, row, panel, kept, MR, GROUP);
    }
}

template <int FORM> static void panels(const Linear& op, int rows, int panel, int end) {
    using S = Shape<FORM>;
    const int64_t bytes = panel_bytes(op);
    const char* w = (const char*)op.weight;
    if (rows <= S::few)
        for (; panel + 4 <= end; panel += 4) group_of<FORM, S::few, 4>(op, rows, 0, panel, {w + panel * bytes + FETCH, 0});
    const int blocks = (rows + S::rows - 1) / S::rows;
    int slow = 0;
    while (1 << slow < blocks) slow++;
    for (; panel < end; panel += 2) {
        const char* next = blocks == 1 ? w + panel * bytes + FETCH : w + (panel + 2) * bytes;
        for (int b = 0, row = 0; b < blocks; b++) {
            int stop = (int)((int64_t)rows * (b + 1) / blocks);
            group_of<FORM, S::rows, 2>(op, stop - row, row, panel, {next, slow});
            next += (bytes / 64 >> slow) * 64;
            row = stop;
        }
    }
}

static void panels(const Linear& op, int rows, int first, int end) {
    switch (op.form) {
        case FP32: return panels<FP32>(op, rows, first, end);
        case BF16: return panels<BF16>(op, rows, first, end);
        case INT8: return panels<INT8>(op, rows, first, end);
        case INT4: return panels<INT4>(op, rows, first, end);
        case E4M3: return panels<E4M3>(op, rows, first, end);
        case E5M2: return panels<E5M2>(op, rows, first, end);
        case CODES: return panels<CODES>(op, rows, first, end);
    }
}

// What is left of a product behind a row and a panel; `out` stays.
static Linear behind(const Linear& op, int64_t row, int64_t panel) {
    Linear rest = op;
    rest.x = (const char*)op.x + row * op.x_stride * (is_int(op.form) ? 1 : 4);
    if (is_int(op.form)) rest.x_scale += row * op.sum_stride, rest.x_sum += row * op.sum_stride;
    rest.weight = (const char*)op.weight + panel * panel_bytes(op);
    const int64_t scales = op.scale ? panel * (op.in / op.group) * 16 * (op.half ? 2 : 4) : 0;
    rest.scale = (const char*)op.scale + scales;
    if (op.min) rest.min = (const char*)op.min + scales;
    if (op.factors) rest.factors += panel * 16;
    if (op.bias) rest.bias += panel * 16;
    return rest;
}

static void linear(const Linear& op, int rows, Worker& worker) {
    const int count = (op.outs + 31) / 32 * 2;
    // Small tasks: at the end no thread waits long for the others' last one.
    const int task = rows > 6 ? 2 : 4;
    for (int first; (first = worker.next() * task) < count;) {
        int end = first + task < count ? first + task : count;
        panels(op, rows, first, end);
    }
}

}  // namespace TGI_ISA
