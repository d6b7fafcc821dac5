// The next token of a row of logits, and the log-probabilities of tokens. tgi/runtime/torch_sampler.py says the same with
// torch and is the definition; here nothing is sorted but a few candidates, and a row costs what its request asks for.
//
// A token's depth is how far its logit, divided by the temperature, lies below the largest: never negative. Each warper keeps
// the tokens down to some depth, or near to some depth, so what is left is a list of (depth, id), in the order of ids.
#pragma once
#include <cmath>
#include <cstdlib>

#include "linear.h"
#include "ops.h"
#include "simd.h"

namespace TGI_ISA {

constexpr int BUCKET = 256;  // tokens whose largest and whose sum are kept; the draw chooses one of these first
constexpr float INFINITE = __builtin_inff(), GREATEST = 3.402823466e38f;
constexpr float BOTTOM = 89.f;  // from this depth on e^-depth is nothing
constexpr float LOG2E = 1.44269504f;

// Memory that is kept for the next row. (No std::vector: the linker would share its code between instruction sets.)
template <class T> struct Room {
    T* at = nullptr;
    int64_t size = 0;
    T* of(int64_t wanted) {
        if (size < wanted) {
            free(at);
            size = (wanted + 15) / 16 * 16;
            at = (T*)aligned_alloc(64, size * sizeof(T));
            if (!at) abort();
        }
        return at;
    }
    ~Room() { free(at); }
};

// One thread's memory: a row as its request's wishes change it, its buckets, and the list.
struct Desk {
    Room<float> row_, most_, mass_, depth_, weight_, key_, some_key_, some_weight_;
    Room<int32_t> id_;
    float *row, *most, *mass, *depth, *weight, *key, *some_key, *some_weight;
    int32_t* id;
    double histogram[2048];

    void fit(int size) {
        int64_t tokens = size + 32, buckets = size / BUCKET + 16;
        row = row_.of(tokens), depth = depth_.of(tokens), weight = weight_.of(tokens), key = key_.of(tokens);
        some_key = some_key_.of(tokens), some_weight = some_weight_.of(tokens);
        most = most_.of(buckets), mass = mass_.of(buckets), id = id_.of(tokens);
    }
};

INLINE V16 take(const float* x, int left, float rest) { return left >= 16 ? load(x) : load_some(x, left, rest); }
INLINE unsigned first(int n) { return n >= 16 ? 0xffff : (1u << n) - 1; }
INLINE unsigned bits16(const uint8_t* bits, int at, int left) { return bits[at / 8] | (left > 8 ? bits[at / 8 + 1] << 8 : 0); }

// 2^y for y ≤ 0, within 2 units in the last place; 0 below -126. The polynomial is minimax on |r| <= 1/2.
INLINE V16 fall(V16 y) {
    y = vmax(set1(-127.f), y);  // in this order, which leaves NaN as it is
    V16 n = vround(y), r = y - n;
    V16 p = set1(1.32647273e-3f);
    p = fma(p, r, set1(9.67151299e-3f));
    p = fma(p, r, set1(5.55073358e-2f));
    p = fma(p, r, set1(2.40222424e-1f));
    p = fma(p, r, set1(6.93147004e-1f));
    p = fma(p, r, set1(1.f));
    return p * as_float(shl<23>(to_int(n) + iset1(127)));
}

INLINE int buckets_of(int size) { return (size + BUCKET - 1) / BUCKET; }
INLINE int within(int bucket, int size) { return size - bucket * BUCKET < BUCKET ? size - bucket * BUCKET : BUCKET; }

// Of a bucket of n numbers: the largest, its first place, and the sum of e^((x - most) / temperature).
INLINE float most_of(const float* x, int n) {
    V16 even = set1(-INFINITE), odd = even;
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        even = vmax(even, load(x + i));
        odd = vmax(odd, load(x + i + 16));
    }
    for (; i < n; i += 16) even = vmax(even, take(x + i, n - i, -INFINITE));
    return largest(vmax(even, odd));
}
INLINE int place_of(const float* x, int n, float most) {
    V16 bound = set1(most);
    for (int i = 0; i < n; i += 16)
        if (unsigned bits = at_most(bound, take(x + i, n - i, -INFINITE)) & first(n - i)) return i + __builtin_ctz(bits);
    return 0;
}
INLINE float mass_of(const float* x, int n, float most, float temperature) {
    V16 offset = set1(most > -INFINITE ? most : 0), factor = set1(LOG2E / temperature), even = zero(), odd = zero();
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        even = even + fall((load(x + i) - offset) * factor);
        odd = odd + fall((load(x + i + 16) - offset) * factor);
    }
    for (; i < n; i += 16) even = even + fall((take(x + i, n - i, -INFINITE) - offset) * factor);
    return sum(even + odd);
}

// The masses of buckets, each of which is one of its own, become parts of e^0 for `top`, the largest of all. Returns their
// sum: NaN if a number is NaN or infinite.
static double settle(const float* most, float* mass, int buckets, float top, float temperature) {
    V16 offset = set1(top), factor = set1(LOG2E / temperature);
    for (int b = 0; b < buckets; b += 16) store(mass + b, load(mass + b) * fall((load(most + b) - offset) * factor));
    double total = 0;
    for (int b = 0; b < buckets; b++) total += mass[b];
    return total;
}

INLINE int highest(const float* most, int buckets) {
    int best = 0;
    for (int b = 1; b < buckets; b++)
        if (most[b] > most[best]) best = b;
    return best;
}

// Each bucket's largest number in `most`; returns the first place of the largest of all.
static int peak(const float* x, int size, float* most) {
    for (int b = 0; b < buckets_of(size); b++) most[b] = most_of(x + b * BUCKET, within(b, size));
    int best = highest(most, buckets_of(size));
    return best * BUCKET + place_of(x + best * BUCKET, within(best, size), most[best]);
}

// Each bucket's sum of e^((x - top) / temperature) in `mass`; returns the sum of all.
static double masses(const float* x, int size, const float* most, float top, float temperature, float* mass) {
    for (int b = 0; b < buckets_of(size); b++) mass[b] = mass_of(x + b * BUCKET, within(b, size), most[b], temperature);
    return settle(most, mass, buckets_of(size), top, temperature);
}

// List the tokens at most `limit` below `top`, with that as their depth, buckets without any unseen.
static int collect(const float* x, int size, float top, float limit, Desk& d) {
    V16 offset = set1(top), bound = set1(limit);
    const I16 steps = iload("\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0\4\0\0\0\5\0\0\0\6\0\0\0\7\0\0\0"
                            "\10\0\0\0\11\0\0\0\12\0\0\0\13\0\0\0\14\0\0\0\15\0\0\0\16\0\0\0\17\0\0\0");
    int n = 0;
    for (int b = 0, at = 0; at < size; b++, at += BUCKET) {
        if (!(top - d.most[b] <= limit)) continue;
        int end = size - at < BUCKET ? size : at + BUCKET;
        for (int i = at; i < end; i += 16) {
            V16 depth = offset - take(x + i, end - i, -INFINITE);
            unsigned bits = at_most(depth, bound) & first(end - i);
            if (!bits) continue;
            pack((float*)d.id + n, as_float(iset1(i) + steps), bits);
            n += pack(d.depth + n, depth, bits);
        }
    }
    return n;
}

// Keep those of the list whose key is at most `limit`.
static int keep(const float* key, int n, float limit, Desk& d) {
    V16 bound = set1(limit);
    int kept = 0;
    for (int i = 0; i < n; i += 16) {  // all lists have room for 16 more
        unsigned bits = at_most(load(key + i), bound) & first(n - i);
        V16 depth = load(d.depth + i), weight = load(d.weight + i), id = load((float*)d.id + i);
        pack(d.weight + kept, weight, bits);
        pack((float*)d.id + kept, id, bits);
        kept += pack(d.depth + kept, depth, bits);
    }
    return kept;
}

// Weights are summed part by part, `before` being what they come to already. Returns the part in which they reach `target`, or
// else the last that has any, and adds to `before` all in front of it.
template <class F> static int part_of(F part, const float* weight, int n, double target, double& before, double* histogram) {
    memset(histogram, 0, 2048 * sizeof(double));
    for (int i = 0; i < n; i++) histogram[part(i)] += weight ? weight[i] : 1.f;
    int found = 0;
    double last = 0;
    for (int p = 0; p < 2048; p++) {
        if (histogram[p] == 0) continue;
        before += last;
        last = histogram[p], found = p;
        if (before + last >= target) break;
    }
    return found;
}

INLINE uint32_t bits_of(float x) {  // ordered as numbers that are not negative are
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

// The key at which weights (null: 1 each), summed from the least key on, reach `target`; if they don't, the largest. Keys are
// not negative. Not a sort: a histogram finds the part where that happens, and then only what is in it counts.
static float reach(const float* key, const float* weight, int n, double target, Desk& d) {
    constexpr float STEP = 1.f / 16, LAST = 2047 * STEP;
    float *keys = d.some_key, *weights = d.some_weight;
    double before = 0;
    float low = 0, high = INFINITE;
    if (n > 256) {
        auto step = [&](int i) { return key[i] < LAST ? (int)(key[i] * 16.f) : 2047; };
        int part = part_of(step, weight, n, target, before, d.histogram);
        low = (float)part * STEP;
        if (part < 2047) high = low + STEP;
    }
    int left = 0;
    for (int i = 0; i < n; i += 16) {
        V16 k = load(key + i);
        unsigned bits = at_most(set1(low), k) & first(n - i);
        if (high < INFINITE) bits &= ~at_most(set1(high), k);
        if (!bits) continue;
        pack(weights + left, weight ? load(weight + i) : set1(1.f), bits);
        left += pack(keys + left, k, bits);
    }
    n = left;
    for (int shift = 20; shift >= 0 && n > 48; shift -= 10) {
        auto digits = [&](int i) { return (int)(bits_of(keys[i]) >> shift & 2047); };
        int part = part_of(digits, weights, n, target, before, d.histogram);
        left = 0;
        for (int i = 0; i < n; i++) {
            bool inside = digits(i) == part;
            keys[left] = keys[i], weights[left] = weights[i];
            left += inside;
        }
        n = left;
        if (shift == 0) n = n > 0;  // all the same
    }
    for (int i = 1; i < n; i++) {
        float k = keys[i], w = weights[i];
        int j = i;
        for (; j && keys[j - 1] > k; j--) keys[j] = keys[j - 1], weights[j] = weights[j - 1];
        keys[j] = k, weights[j] = w;
    }
    for (int i = 0; i < n; i++)
        if ((before += weights[i]) >= target) return keys[i];
    return n ? keys[n - 1] : INFINITE;
}

// List the k largest, and ties with the last.
static int best(const float* x, int size, float top, int k, Desk& d) {
    int buckets = buckets_of(size);
    float limit = INFINITE;
    if (k < buckets) {  // as many buckets have a token of that depth: it can't be lower
        for (int b = 0; b < buckets; b++) d.key[b] = top - d.most[b];
        limit = reach(d.key, nullptr, buckets, k, d);
    }
    int n = collect(x, size, top, limit, d);
    return k < n ? keep(d.depth, n, reach(d.depth, nullptr, n, k, d), d) : n;
}

// weight = e^-depth of the list, depths being divided by the temperature first; returns the weights' sum.
static double weigh(int n, float temperature, Desk& d) {
    double total = 0;
    for (int i = 0; i < n; i += 16) {
        V16 depth = take(d.depth + i, n - i, INFINITE) / set1(temperature), weight = fall(depth * set1(-LOG2E));
        store(d.depth + i, depth);
        store(d.weight + i, weight);
        total += sum(weight);
    }
    return total;
}

// Exponential races: of all that run, the one of the largest weight / E wins, E being drawn from the unit exponential
// distribution by SplitMix64 (Steele, Lea & Flood 2014) as a function of (seed, position, counter).
struct Race {
    uint64_t key;
    double record = -1;
    int winner = 0;

    static constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;
    static uint64_t mix(uint64_t x) {
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
        x = (x ^ x >> 27) * 0x94D049BB133111EBu;
        return x ^ x >> 31;
    }
    Race(uint64_t seed, uint64_t position) : key(mix(mix(seed + GOLDEN) + (position + 1) * GOLDEN)) {}
    void run(double weight, int64_t counter, int who) {
        if (!(weight > 0)) return;
        uint64_t x = mix(key + (uint64_t)counter * GOLDEN);
        double speed = weight / -log(((double)(x >> 11) + 0.5) * 0x1p-53);
        if (speed > record) record = speed, winner = who;
    }
    void again() { record = -1, winner = 0; }

    int between(const float* mass, int buckets) {
        for (int b = 0; b < buckets; b++) run(mass[b], -1 - b, b);
        return winner;
    }
    // Of the tokens of a bucket, whose n numbers are x.
    int inside(int bucket, const float* x, int n, float top, float temperature, float* weight) {
        for (int i = 0; i < n; i += 16)
            store(weight + i, fall((take(x + i, n - i, -INFINITE) - set1(top)) * set1(LOG2E / temperature)));
        again();
        for (int i = 0; i < n; i++) run(weight[i], bucket * BUCKET + i, bucket * BUCKET + i);
        return winner;
    }
};

// A token drawn from a row whose largest is at `peak`. `total`: of the masses, if d.mass has them at temperature 1; or 0.
static int draw(const Choice& c, int64_t position, const float* x, int size, int peak, double total, Desk& d) {
    float top = x[peak];
    Race race(c.seed, position);
    bool limited = c.top_k > 0, nucleus = c.top_p != 1.f, typical = c.typical_p != 1.f, least = c.min_p != 0.f;
    if (!limited && (nucleus || !(typical || least)) && (c.temperature != 1.f || total == 0))
        total = masses(x, size, d.most, top, c.temperature, d.mass);
    if (!(limited || nucleus || typical || least)) {
        int b = race.between(d.mass, buckets_of(size));
        return race.inside(b, x + b * BUCKET, within(b, size), top, c.temperature, d.weight);
    }
    int n;
    if (limited) {
        n = best(x, size, top, c.top_k, d);
        total = weigh(n, c.temperature, d);
    } else {
        // Together, tokens less likely than `rare` have at most half of what top-p leaves away.
        float rare = (float)(0.5 * (1 - c.top_p) * total / size);
        float depth = nucleus ? -logf(rare) : typical ? BOTTOM : -logf(c.min_p);
        depth = depth < BOTTOM ? depth : BOTTOM;
        n = collect(x, size, top, depth * c.temperature * 1.0001f, d);
        double listed = weigh(n, c.temperature, d);
        if (!nucleus) total = listed;
    }
    if (nucleus) n = keep(d.depth, n, reach(d.depth, d.weight, n, c.top_p * total, d), d);
    if (typical) {
        // A token's information less the entropy is its depth less the mean depth.
        double moment = 0;
        total = 0;
        for (int i = 0; i < n; i += 16) {
            V16 weight = take(d.weight + i, n - i, 0);
            total += sum(weight);
            moment += sum(weight * vmin(take(d.depth + i, n - i, 0), set1(BOTTOM)));
        }
        V16 middle = set1((float)(moment / total));
        for (int i = 0; i < n; i += 16) {
            V16 distance = load(d.depth + i) - middle;
            store(d.key + i, vmax(distance, zero() - distance));
        }
        n = keep(d.key, n, reach(d.key, d.weight, n, c.typical_p * total, d), d);
    }
    if (least) {
        float shallowest = INFINITE;
        for (int i = 0; i < n; i++) shallowest = d.depth[i] < shallowest ? d.depth[i] : shallowest;
        n = keep(d.depth, n, shallowest - logf(c.min_p), d);
    }
    if (!n) return peak;  // not numbers, which a row that was changed can hold
    double mass = 0;
    for (int i = 0, start = 0; i < n; i++) {
        mass += d.weight[i];
        int bucket = d.id[i] / BUCKET;
        if (i + 1 == n || d.id[i + 1] / BUCKET != bucket) {
            race.run(mass, -1 - bucket, start);
            mass = 0, start = i + 1;
        }
    }
    int start = race.winner;
    race.again();
    race.winner = d.id[start];
    for (int i = start; i < n && d.id[i] / BUCKET == d.id[start] / BUCKET; i++) race.run(d.weight[i], d.id[i], d.id[i]);
    return race.winner;
}

// The row with all that applies before the warpers: watermark, penalties, bias, barred tokens, mask; in this order.
static const float* change(const Choice& c, const uint8_t* mask, const float* raw, int size, float* x) {
    if (c.green) {
        for (int i = 0; i < size; i += 16) {
            V16 v = take(raw + i, size - i, 0);
            store(x + i, where(bits16(c.green, i, size - i), v + set1(c.delta), v));
        }
    } else {
        memcpy(x, raw, size * sizeof(float));
    }
    for (int i = 0; i < c.history_size; i++) {
        int id = c.history[i];
        if (id < 0 || id >= size) continue;
        float v = x[id];
        if (c.repetition != 1.f) {
            v = v > 0 ? v / c.repetition : v * c.repetition;
            v = v < -GREATEST ? -GREATEST : v > GREATEST ? GREATEST : v;
        }
        x[id] = v - c.frequency * c.counts[i] - (c.counts[i] > 0 ? c.presence : 0.f);
    }
    for (int i = 0; i < c.biased_size; i++)
        if (c.biased[i] >= 0 && c.biased[i] < size) x[c.biased[i]] += c.bias[i];
    for (int i = 0; i < c.barred_size; i++)
        if (c.barred[i] >= 0 && c.barred[i] < size) x[c.barred[i]] = -INFINITE;
    if (mask)
        for (int i = 0; i < size; i += 16) store(x + i, where(bits16(mask, i, size - i), load(x + i), set1(-INFINITE)));
    return x;
}

static void sample_row(const Sample& op, int row, Desk& d) {
    const Choice& c = *op.choices[row];
    const uint8_t* mask = op.masks ? op.masks[row] : nullptr;
    const float *raw = op.logits + row * op.stride, *x = raw;
    int size = op.vocabulary, id = peak(raw, size, d.most);
    float top = raw[id];
    double total = masses(raw, size, d.most, top, 1, d.mass);
    if (!(total < INFINITE)) {
        op.ids[row] = -1, op.logprobs[row] = __builtin_nanf("");
        return;
    }
    double rest = log(total);  // of the row's logarithm of its sum, less `top`
    if (c.top_n) {
        int n = best(raw, size, top, c.top_n, d);
        // Inserted one by one, ids staying in order where depths are equal.
        for (int i = 1; i < n; i++) {
            float depth = d.depth[i];
            int32_t token = d.id[i], j = i;
            for (; j && d.depth[j - 1] > depth; j--) d.depth[j] = d.depth[j - 1], d.id[j] = d.id[j - 1];
            d.depth[j] = depth, d.id[j] = token;
        }
        for (int i = 0; i < n && i < c.top_n; i++) {
            op.top_ids[row * op.most + i] = d.id[i];
            op.top_logprobs[row * op.most + i] = (float)((double)raw[d.id[i]] - top - rest);
        }
    }
    if (op.known) {
        id = (int)op.known[row];
    } else {
        if (c.green || c.history_size || c.biased_size || c.barred_size || mask) {
            x = change(c, mask, raw, size, d.row);
            id = peak(x, size, d.most);
            total = 0;
        }
        if (!c.greedy && x[id] > -INFINITE) id = draw(c, op.positions[row], x, size, id, total, d);
    }
    op.ids[row] = id;
    op.logprobs[row] = (float)((double)raw[id] - top - rest);
}

// Some rows' logits in one bucket.
static void logits_of(const Linear& head, int row, int rows, int bucket, float* out, int64_t stride) {
    Linear part = behind(head, row, (int64_t)bucket * (BUCKET / 16));
    part.out = out, part.out_stride = stride, part.outs = within(bucket, head.outs);
    panels(part, rows, 0, (part.outs + 31) / 32 * 2);
}

static void head(const Head& op, int rows, Worker& worker) {
    static thread_local Room<float> memory;
    constexpr int TILE = 48, STRIDE = BUCKET + 16;
    float* logits = memory.of(TILE * STRIDE);
    const int tiles = (rows + TILE - 1) / TILE;
    for (int b; (b = worker.next()) < buckets_of(op.outs);) {
        const int n = within(b, op.outs);
        for (int t = 0, row = 0; t < tiles; t++) {
            const int first = row, end = rows * (t + 1) / tiles;
            logits_of(op, first, end - first, b, logits, STRIDE);
            for (; row < end; row++) {
                const Choice& c = *op.choices[row];
                const float* x = logits + (row - first) * STRIDE;
                const int64_t at = b * op.most_stride + row;
                const float most = op.most[at] = most_of(x, n);
                op.mass[at] = mass_of(x, n, most, 1);
                if (c.greedy) op.place[at] = b * BUCKET + place_of(x, n, most);
                else if (c.temperature != 1) op.warm[at] = mass_of(x, n, most, c.temperature);
            }
        }
    }
}

// As sample_row, to the same result.
static void sample_head(const Sample& op, int row, Desk& d) {
    const Choice& c = *op.choices[row];
    const Head& head = *op.head;
    const int buckets = buckets_of(head.outs);
    auto row_of = [&](auto* to, const auto* from) {
        for (int b = 0; b < buckets; b++) to[b] = from[b * head.most_stride + row];
    };
    row_of(d.most, head.most), row_of(d.mass, head.mass);
    const int best = highest(d.most, buckets);
    const float top = d.most[best];
    const double total = settle(d.most, d.mass, buckets, top, 1);
    if (!(total < INFINITE)) {
        op.ids[row] = -1, op.logprobs[row] = __builtin_nanf("");
        return;
    }
    float logit = top;
    if (c.greedy) {
        op.ids[row] = head.place[best * head.most_stride + row];
    } else {
        if (c.temperature != 1) {
            row_of(d.mass, head.warm);
            settle(d.most, d.mass, buckets, top, c.temperature);
        }
        Race race(c.seed, op.positions[row]);
        const int b = race.between(d.mass, buckets);
        logits_of(head, row, 1, b, d.row, BUCKET);
        op.ids[row] = race.inside(b, d.row, within(b, head.outs), top, c.temperature, d.weight);
        logit = d.row[op.ids[row] - b * BUCKET];
    }
    op.logprobs[row] = (float)((double)logit - top - log(total));
}

static void sample(const Sample& op, int rows, Worker& worker) {
    static thread_local Desk memory;
    Desk* desk = &memory;
    asm("" : "+r"(desk));  // the compiler would look up the thread's memory in each loop's every turn
    desk->fit(op.head ? op.head->outs : op.vocabulary);
    for (int row; (row = worker.next()) < rows;)
        if (op.head) sample_head(op, row, *desk);
        else sample_row(op, row, *desk);
}

}  // namespace TGI_ISA
