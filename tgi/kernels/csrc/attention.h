// Attention over pages. A page holds keys and values of PAGE tokens for one head, as panels that a register reads (linear.h):
// keys have a token in each lane and run along the head's dimension, values have a dimension in each lane and run along tokens.
//   keys    FP32 [dim][16]         BF16 [dim/2][16][2]      INT8 [dim/4][16][4]      E4M3, E5M2 [dim/4][2][16][2]
//   values  FP32 [dim/16][16][16]  BF16 [dim/16][8][16][2]  INT8 [dim/16][4][16][4]  E4M3, E5M2 [dim/16][4][2][16][2]
// and behind each of those of one byte, which begin as from_fp8 reads them, float32 scales [16] of the tokens.
// So q·k and p·v are products of a few rows with panels, as in a linear layer. A row is one head of one token.
//
// A row's result depends on that row, its keys and their positions only: softmax goes on from block to block of 64 positions
// (Milakov & Gimelshein, arXiv 1805.02867), begins anew at every SPLIT, and the splits' results are merged in order, whoever
// computed them. What a row doesn't see is left out of sums, never multiplied by zero.
#pragma once
#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "linear.h"
#include "ops.h"
#include "plan.h"
#include "rows.h"
#include "simd.h"

namespace TGI_ISA {

constexpr int DIM = 640;             // the largest head
constexpr int BLOCK = 64;            // positions
constexpr int PAGES = BLOCK / PAGE;  // of a block

// Numbers of one lane that lie side by side, in four bytes.
template <int FORM> constexpr int PACK = FORM == FP32 ? 1 : FORM == BF16 ? 2 : 4;

// Whether each token's keys, and its values, have a scale.
constexpr bool scaled(int form) { return form != FP32 && form != BF16; }

// One of them for each lane.
template <int FORM> INLINE V16 unpack(I16 four, int j) {
    if (FORM == E4M3 || FORM == E5M2) return from_fp8<FORM == E4M3>(four, j);
    if (FORM == FP32) return as_float(four);
    if (FORM == BF16) return j ? high_bf16(four) : low_bf16(four);
    switch (j) {
        case 0: return to_float(sar<24>(shl<24>(four)));
        case 1: return to_float(sar<24>(shl<16>(four)));
        case 2: return to_float(sar<24>(shl<8>(four)));
        default: return to_float(sar<24>(four));
    }
}

// ---- What is done before: angles, norms, rotation, and keys and values into their pages.

static void angles(const Angles& op, int row) {
    for (int i = 0; i < op.half; i++) {
        float angle = (float)op.positions[row] * op.frequencies[i];
        op.cos[row * op.stride + i] = std::cos(angle) * op.factor;
        op.sin[row * op.stride + i] = std::sin(angle) * op.factor;
    }
}

// Dimension i turns against i + half.
static void rotate(float* x, const float* cos, const float* sin, int half) {
    for (int i = 0; i < half; i += 16) {
        int n = half - i < 16 ? half - i : 16;
        V16 a = load_some(x + i, n), b = load_some(x + half + i, n), c = load_some(cos + i, n), s = load_some(sin + i, n);
        store_some(x + i, a * c - b * s, n);
        store_some(x + half + i, b * c + a * s, n);
    }
}

// A head's numbers as a page stores them, in 16s; returns their scale, which INT8 takes from them alone, E4M3 and E5M2 if
// they don't fit into the `given` one. What is no number stays none.
template <int FORM> static float convert(const float* x, int dim, float given, void* out) {
    V16 most = zero(), wrong = zero();
    for (int i = 0; i < dim; i += 16) {
        V16 v = load_some(x + i, dim - i);
        if (FORM == FP32) store((float*)out + i, v);
        if (FORM == BF16) store_bf16((bf16*)out + i, v);
        most = vmax(most, vmax(v, zero() - v));
        wrong = wrong + (v - v);
    }
    if (!scaled(FORM)) return 1.f;
    float top = largest(most);
    if (FORM == INT8) {
        float inverse = top > 0 ? 127.f / top : 0.f;
        for (int i = 0; i < dim; i += 16) store_bytes((int8_t*)out + i, to_int(load_some(x + i, dim - i) * set1(inverse)));
        return top / 127.f + sum(wrong);
    }
    float scale = std::max(given, top / (FORM == E4M3 ? 448.f : 57344.f)), inverse = 1.f / scale;
    for (int i = 0; i < dim; i += 16) store_bytes((int8_t*)out + i, to_fp8<FORM == E4M3>(load_some(x + i, dim - i) * set1(inverse)));
    return scale * UNIT<FORM> + sum(wrong);
}

template <int FORM> static void keep(const Turn& op, const float* x, bool value, char* page, int place) {
    constexpr int pack = PACK<FORM>;
    alignas(64) uint32_t words[DIM];
    float scale = convert<FORM>(x, value ? op.size : op.dim, value ? op.value_scale : op.key_scale, words);
    if (FORM == E4M3 || FORM == E5M2) {
        const uint8_t* from = (const uint8_t*)words;
        if (!value) {
            for (int i = 0; i < op.dim; i++) page[i / 4 * 64 + i % 2 * 32 + place * 2 + i % 4 / 2] = from[i];
        } else {
            char* to = page + op.values + place / 4 * 64 + place % 2 * 32 + place % 4 / 2;
            for (int i = 0; i < op.size; i++) to[i / 16 * 256 + i % 16 * 2] = from[i];
        }
    } else if (!value) {
        for (int i = 0; i < op.dim / pack; i++) ((uint32_t*)page)[i * 16 + place] = words[i];
    } else {
        using Number = std::conditional_t<FORM == FP32, uint32_t, std::conditional_t<FORM == BF16, uint16_t, uint8_t>>;
        const Number* from = (const Number*)words;
        Number* to = (Number*)(page + op.values) + place / pack * 16 * pack + place % pack;
        for (int panel = 0; panel < op.size; panel += 16, from += 16, to += 256)
            UNROLL for (int i = 0; i < 16; i++) to[i * pack] = from[i];
    }
    if (scaled(FORM)) ((float*)(page + (value ? op.page : op.values)))[place - 16] = scale;
}

static void turn(const Turn& op, int rows, Worker& worker) {
    const int heads = op.step->heads, kv = op.step->kv_heads;
    int task = rows / (worker.count * 4);  // tokens: neighbours share lines of a page
    task = task < 1 ? 1 : task > PAGE ? PAGE : task;
    for (int from; (from = worker.next() * task) < rows;) {
        for (int row = from; row < rows && row < from + task; row++) {
            float* qkv = op.qkv + row * op.qkv_stride;
            for (int head = 0; head < heads + kv; head++) {
                float* x = qkv + head * op.dim;
                if (op.norm) rms_norm(x, op.norm + head * op.dim, x, op.dim, op.eps);
                if (op.cos) rotate(x, op.cos + row * op.angle_stride, op.sin + row * op.angle_stride, op.half);
            }
            int slot = op.step->slot[row];
            for (int head = 0; head < 2 * kv; head++) {
                const bool value = head >= kv;
                const float* x = qkv + (heads + head) * op.dim;
                if (value && op.latent) x -= (kv - 1) * op.dim + op.size;
                char* page = op.pages + ((int64_t)(slot / PAGE) * kv + head % kv) * op.page;
                switch (op.form) {
                    case FP32: keep<FP32>(op, x, value, page, slot % PAGE); break;
                    case BF16: keep<BF16>(op, x, value, page, slot % PAGE); break;
                    case INT8: keep<INT8>(op, x, value, page, slot % PAGE); break;
                    case E4M3: keep<E4M3>(op, x, value, page, slot % PAGE); break;
                    case E5M2: keep<E5M2>(op, x, value, page, slot % PAGE); break;
                }
            }
        }
    }
}

// ---- Attention.

// A thread's own memory, which grows to what its largest task needs.
class Memory {
  public:
    float* of(size_t floats) {
        if (floats > size_) {
            std::free(memory_);
            memory_ = (float*)std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
            size_ = floats;
            std::fill(memory_, memory_ + floats, 0.f);
        }
        return memory_;
    }
    ~Memory() { std::free(memory_); }

  private:
    float* memory_ = nullptr;
    size_t size_ = 0;
};

// Positions at … at + BLOCK. The next block's pages are fetched meanwhile.
struct Block {
    int at;
    const char *keys[PAGES], *values[PAGES], *next_keys[PAGES], *next_values[PAGES];
};

// One item's rows of one kv head, and what a thread computes with.
//   q       tile by tile [dim][rows of the tile], scaled
//   state   [rows, stride] of one split: Σ p v [columns]; Σ p, one sum for each lane, [16]; the largest score
//   total   the same, of all splits up to now
struct Task {
    const Attend& op;
    const Item& item;
    const int head, shared, rows, panels, columns, stride;
    float *q, *state, *total, *scores;
    int *first, *past;  // [rows]: a row sees the positions from first up to past
    const char* ahead[PAGES];  // what the thread is likely to read after this task

    Task(const Attend& op, const Item& item, int head, Memory& memory)
        : op(op), item(item), head(head), shared(op.step->heads / op.step->kv_heads), rows(item.tokens * shared),
          panels((op.size + 15) / 16), columns((panels + 3) / 4 * 64), stride(columns + 32) {
        const int room = (rows + 15) / 16 * 16 + 16;  // a tile may reach beyond the rows
        q = memory.of(room * (op.dim + 2 * stride + 2) + 16 * BLOCK);
        state = q + room * op.dim;
        total = state + room * stride;
        scores = total + room * stride;
        first = (int*)(scores + 16 * BLOCK);
        past = first + room;
        for (int p = 0; p < PAGES; p++) ahead[p] = op.pages;
        for (int row = 0; row < rows; row++) {
            int position = item.position + row / shared, window = op.step->window;
            first[row] = window && position >= window ? position - window + 1 : 0;
            past[row] = position + 1;
        }
    }

    const float* query(int row) const {
        return op.q + (item.row + row / shared) * op.q_stride + (head * shared + row % shared) * op.dim;
    }
    const char* page(int position) const {
        return op.pages + ((int64_t)item.blocks[position / PAGE] * op.step->kv_heads + head) * op.page;
    }
    bool sees(int row, int split) const { return first[row] < (split + 1) * SPLIT && past[row] > split * SPLIT; }
    // What it sees of a block's positions; nothing, if the end isn't behind the beginning.
    int begin(int row, const Block& block) const { return std::max(first[row] - block.at, 0); }
    int end(int row, const Block& block) const { return std::min(past[row] - block.at, BLOCK); }
};

// scores[m][64] of NP pages: each row's q times each token's k.
template <int FORM, int MR, int NP>
NOINLINE static void score(const float* q, const char* const* keys, const char* const* next, int dim, float* scores) {
    V16 acc[MR][NP];
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int p = 0; p < NP; p++) acc[m][p] = zero();
    for (int k = 0; k < dim; k += PACK<FORM>, q += PACK<FORM> * MR) {
        I16 four[NP];
        UNROLL for (int p = 0; p < NP; p++) four[p] = iload(keys[p] + k / PACK<FORM> * 64);
        if (MR <= 8) UNROLL for (int p = 0; p < NP; p++) __builtin_prefetch(next[p] + k / PACK<FORM> * 64);
        UNROLL for (int j = 0; j < PACK<FORM>; j++) {
            V16 b[NP];
            UNROLL for (int p = 0; p < NP; p++) b[p] = unpack<FORM>(four[p], j);
            UNROLL for (int m = 0; m < MR; m++) {
                V16 a = set1(q[j * MR + m]);
                UNROLL for (int p = 0; p < NP; p++) acc[m][p] = fma(b[p], a, acc[m][p]);
            }
        }
    }
    UNROLL for (int p = 0; p < NP; p++) {
        V16 scale = scaled(FORM) ? load((const float*)(keys[p] + dim / PACK<FORM> * 64)) : zero();
        UNROLL for (int m = 0; m < MR; m++) store(scores + m * BLOCK + p * 16, scaled(FORM) ? acc[m][p] * scale : acc[m][p]);
    }
}

// Rows m… of the tile at `row`: their sums in NP panels times fade, plus the values of the block's tokens from `begin` to
// `end`, each times its p.
template <int FORM, int MR, int NP>
NOINLINE static void weigh(const Task& t, const Block& block, int row, int m, int panel, int begin, int end, const float* fade) {
    const float* p = t.scores + m * BLOCK;
    float* out = t.state + (row + m) * t.stride + panel * 16;
    int64_t at[NP];
    UNROLL for (int n = 0; n < NP; n++) at[n] = std::min(panel + n, t.panels - 1) * (1024 / PACK<FORM>);
    V16 acc[MR][NP];
    UNROLL for (int i = 0; i < MR; i++)
        UNROLL for (int n = 0; n < NP; n++) acc[i][n] = load(out + i * t.stride + n * 16) * set1(fade[m + i]);
    auto add = [&](const I16(&four)[NP], int j, int token) __attribute__((always_inline)) {
        V16 b[NP];
        UNROLL for (int n = 0; n < NP; n++) b[n] = unpack<FORM>(four[n], j);
        UNROLL for (int i = 0; i < MR; i++) {
            V16 a = set1(p[i * BLOCK + token]);
            UNROLL for (int n = 0; n < NP; n++) acc[i][n] = fma(b[n], a, acc[i][n]);
        }
    };
    for (int token = begin; token < end;) {
        int64_t offset = token % PAGE / PACK<FORM> * 64;
        const char *values = block.values[token / PAGE] + offset, *next = block.next_values[token / PAGE] + offset;
        I16 four[NP];
        UNROLL for (int n = 0; n < NP; n++) four[n] = iload(values + at[n]);
        if (MR <= 8) UNROLL for (int n = 0; n < NP; n++) __builtin_prefetch(next + at[n]);
        if (token % PACK<FORM> == 0 && token + PACK<FORM> <= end) {
            UNROLL for (int j = 0; j < PACK<FORM>; j++) add(four, j, token + j);
            token += PACK<FORM>;
        } else {
            add(four, token % PACK<FORM>, token);
            token++;
        }
    }
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int n = 0; n < NP; n++) store(out + i * t.stride + n * 16, acc[i][n]);
}

// The scores of some rows become their p, and what the rows' sums up to now are to be multiplied by comes into fade[16].
NOINLINE static void soften(const Task& t, int row, int rows, const Block& block, float* fade) {
    const V16 nothing = set1(-__builtin_inff());
    static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const V16 steps = load(lanes);
    float* state = t.state + row * t.stride + t.columns;
    std::fill(fade, fade + 16, 0.f);
    for (int m = 0; m < rows; m++) {
        int begin = t.begin(row + m, block), end = t.end(row + m, block);
        if (begin >= end) continue;
        uint64_t seen = ~(uint64_t)0 >> (BLOCK - end) & ~(uint64_t)0 << begin;
        V16 most = nothing;
        for (int p = 0; p < PAGES; p++) {
            V16 x = load(t.scores + m * BLOCK + p * PAGE);
            if (t.op.softcap != 0) x = softcap(x, t.op.softcap);
            if (t.op.slopes) {
                const float slope = t.op.slopes[t.head * t.shared + (row + m) % t.shared];
                const int ahead = block.at + p * PAGE - (t.past[row + m] - 1);
                x = x + (to_float(iset1(ahead)) + steps) * set1(slope);
            }
            if (seen != ~(uint64_t)0) x = where((unsigned)(seen >> (PAGE * p) & 0xffff), x, nothing);
            store(t.scores + m * BLOCK + p * PAGE, x);
            most = vmax(most, x);
        }
        float& top = state[m * t.stride + 16];
        float now = std::max(largest(most), top);
        fade[m] = top - now;
        top = now;
    }
    store(fade, vexp(load(fade)));
    for (int m = 0; m < rows; m++) {
        if (t.begin(row + m, block) >= t.end(row + m, block)) continue;
        float* sums = state + m * t.stride;
        V16 top = set1(sums[16]), total = load(sums) * set1(fade[m]);
        for (int p = 0; p < PAGES; p++) {
            V16 e = vexp(load(t.scores + m * BLOCK + p * PAGE) - top);
            total = total + e;
            if (scaled(t.op.form)) e = e * load((const float*)(block.values[p] + t.panels * 256));
            store(t.scores + m * BLOCK + p * PAGE, e);
        }
        store(sums, total);
    }
}

// One block of keys for up to MR rows.
template <int FORM, int MR, int NP> static void tile(const Task& t, int row, const float* q, const Block& block) {
    const int rows = std::min(t.rows - row, MR), last = row + rows - 1;
    // What some row sees, and what all see: what they see begins and ends later from row to row.
    const int some_begin = t.begin(row, block), some_end = t.end(last, block);
    int all_begin = t.begin(last, block), all_end = t.end(row, block);
    if (some_begin >= some_end) return;
    if (all_begin >= all_end) all_begin = all_end = BLOCK;

    for (int p = some_begin / PAGE / NP * NP; p * PAGE < some_end; p += NP)
        score<FORM, MR, NP>(q, block.keys + p, block.next_keys + p, t.op.dim, t.scores + p * PAGE);
    alignas(64) float fade[16];
    soften(t, row, rows, block, fade);

    // In order of tokens. The first that a row adds fade what it had.
    auto weigh_one = [&](int m, int begin, int end) {
        if (begin >= end) return;
        for (int panel = 0; panel < t.panels; panel += 4) weigh<FORM, 1, 4>(t, block, row, m, panel, begin, end, fade);
        fade[m] = 1;
    };
    for (int m = 0; m < rows; m++) weigh_one(m, t.begin(row + m, block), std::min(all_begin, t.end(row + m, block)));
    if (all_begin < all_end) {
        for (int panel = 0; panel < t.panels; panel += NP) weigh<FORM, MR, NP>(t, block, row, 0, panel, all_begin, all_end, fade);
        std::fill(fade, fade + 16, 1.f);
    }
    for (int m = 0; m < rows; m++) weigh_one(m, std::max(all_end, t.begin(row + m, block)), t.end(row + m, block));
}

// Rows that a tile takes of those that are left: as few sizes as will do. Against so many panels that the accumulators fill
// the registers, and are enough that none is waited for.
INLINE int tile_rows(int left) {
    if (PARTS == 1) return left > 8 ? 12 : left > 4 ? 8 : left;
    return left > 4 ? 6 : left;
}
template <int MR> constexpr int AGAINST = PARTS == 1 ? (MR > 4 ? 2 : 4) : MR > 2 ? 1 : MR > 1 ? 2 : 4;

template <int FORM> static void split(Task& t, int index) {
    for (int row = 0; row < t.rows; row++) {
        float* state = t.state + row * t.stride;
        std::fill(state, state + t.columns + 16, 0.f);
        state[t.columns + 16] = -__builtin_inff();
    }
    const int past = t.past[t.rows - 1];
    Block block;
    for (block.at = std::max(index * SPLIT, t.first[0] / BLOCK * BLOCK); block.at < std::min((index + 1) * SPLIT, past);
         block.at += BLOCK) {
        for (int p = 0; p < PAGES; p++) {
            // Pages that nobody sees may not be there: their neighbour stands in.
            int position = block.at + p * PAGE;
            block.keys[p] = t.page(std::min(std::max(position, t.first[0]), past - 1));
            block.values[p] = block.keys[p] + t.op.values;
            bool last = block.at + BLOCK >= std::min((index + 1) * SPLIT, past);
            block.next_keys[p] = last ? t.ahead[p] : t.page(std::min(position + BLOCK, past - 1));
            block.next_values[p] = block.next_keys[p] + t.op.values;
        }
        const float* q = t.q;
        for (int row = 0, size; row < t.rows; row += size, q += size * t.op.dim) {
            size = tile_rows(t.rows - row);
            switch (size) {
#define SIZE(MR) case MR: tile<FORM, MR, AGAINST<MR>>(t, row, q, block); break;
#if defined(__AVX512F__)
                SIZE(12) SIZE(8) SIZE(3)
#else
                SIZE(6) SIZE(3)
#endif
                SIZE(4) SIZE(2) SIZE(1)
#undef SIZE
            }
        }
    }
}

// The next split's state joins the total.
static void merge(Task& t, const float* state, int split) {
    for (int row = 0; row < t.rows; row++, state += t.stride) {
        if (!t.sees(row, split)) continue;
        float* total = t.total + row * t.stride;
        if (t.first[row] / SPLIT == split) {
            memcpy(total, state, (t.columns + 17) * sizeof(float));
            continue;
        }
        float& top = total[t.columns + 16];
        float now = std::max(state[t.columns + 16], top);
        V16 old = vexp(set1(top - now)), fresh = vexp(set1(state[t.columns + 16] - now));
        for (int i = 0; i < t.columns + 16; i += 16) store(total + i, fma(load(state + i), fresh, load(total + i) * old));
        top = now;
    }
}

static void finish(const Task& t, const float* state) {
    for (int row = 0; row < t.rows; row++, state += t.stride) {
        float* out = t.op.out + (t.item.row + row / t.shared) * t.op.out_stride + (t.head * t.shared + row % t.shared) * t.op.size;
        V16 share = set1(1.f / sum(load(state + t.columns)));
        for (int i = 0; i < t.op.size; i += 16) {
            V16 y = load(state + i) * share;
            if (t.op.size - i >= 16) store(out + i, y); else store_some(out + i, y, t.op.size - i);
        }
    }
}

template <int FORM> static void attend_item(Task& t) {
    float* q = t.q;
    for (int row = 0, size; row < t.rows; row += size, q += size * t.op.dim) {
        size = tile_rows(t.rows - row);
        for (int m = 0; m < size; m++) {
            const float* from = t.query(std::min(row + m, t.rows - 1));
            for (int k = 0; k < t.op.dim; k++) q[k * size + m] = from[k] * t.op.scale;
        }
    }
    const Item& item = t.item;
    if (item.split < 0) {
        for (int i = item.first; i < item.end; i++) {
            split<FORM>(t, i);
            if (item.end - item.first > 1) merge(t, t.state, i);
        }
        return finish(t, item.end - item.first > 1 ? t.total : t.state);
    }
    // Who computes the last of the splits merges them all.
    const int splits = item.end - item.first;
    const int64_t size = (int64_t)t.rows * t.stride;
    float* partial = t.op.step->partial + item.partial * (int64_t)t.stride + t.head * splits * size;
    std::atomic<int>& done = t.op.step->done[item.done + t.head];
    split<FORM>(t, item.split);
    memcpy(partial + (item.split - item.first) * size, t.state, size * sizeof(float));
    if (done.fetch_add(1, std::memory_order_acq_rel) != splits - 1) return;
    done.store(0, std::memory_order_relaxed);
    for (int i = 0; i < splits; i++) merge(t, partial + i * size, item.first + i);
    finish(t, t.total);
}

static void attend(const Attend& op, int, Worker& worker) {
    static thread_local Memory memory;
    const int heads = op.step->kv_heads, tasks = op.step->items * heads;
    for (int task; (task = worker.next()) < tasks;) {
        // The last items first: they are the longest where a prompt is cut into several.
        Task t(op, op.step->item[op.step->items - 1 - task / heads], task % heads, memory);
        if (int next = task + worker.count; next < tasks) {
            const Item& item = op.step->item[op.step->items - 1 - next / heads];
            for (int p = 0; p < PAGES; p++) {
                int position = std::min(std::max(item.split, item.first) * SPLIT + p * PAGE, item.position + item.tokens - 1);
                t.ahead[p] = op.pages + ((int64_t)item.blocks[position / PAGE] * heads + next % heads) * op.page;
            }
        }
        switch (op.form) {
            case FP32: attend_item<FP32>(t); break;
            case BF16: attend_item<BF16>(t); break;
            case INT8: attend_item<INT8>(t); break;
            case E4M3: attend_item<E4M3>(t); break;
            case E5M2: attend_item<E5M2>(t); break;
        }
    }
}

}  // namespace TGI_ISA
