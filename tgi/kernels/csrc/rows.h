// What works on one row of activations at a time: embedding, norm, quantization. A row's result depends on that row alone.
#pragma once
#include <algorithm>
#include <cmath>

#include "linear.h"
#include "ops.h"
#include "simd.h"

namespace TGI_ISA {

// A row into groups of int8, each with a scale that takes its largest number to 127, and the sum of the group's integers.
static void quantize_row(const float* x, int size, int group, int8_t* q, float* scale, int32_t* total) {
    for (int g = 0; g * group < size; g++) {
        const float* from = x + g * group;
        V16 most = zero();
        for (int i = 0; i < group; i += 16) {
            V16 v = load(from + i);
            most = vmax(most, vmax(v, zero() - v));
        }
        float top = largest(most), inverse = top > 0 ? 127.f / top : 0.f;
        I16 sums = iset1(0);
        for (int i = 0; i < group; i += 16) {
            I16 v = to_int(load(from + i) * set1(inverse));
            sums = sums + v;
            store_bytes(q + g * group + i, v);
        }
        int32_t parts[16], all = 0;
        istore(parts, sums);
        for (int i = 0; i < 16; i++) all += parts[i];
        scale[g] = top / 127.f;
        total[g] = all;
    }
}

static void quantize(const Quantize& op, int row) {
    int64_t groups = row * op.sum_stride;
    const float* x = op.x + row * op.x_stride;
    float ordered[op.order ? op.size : 1];
    if (op.order) {
        // The last matrix that begins at this row or before has it: those without rows begin where the next one does.
        int matrix = op.first ? (int)(std::upper_bound(op.first, op.first + op.matrices, row) - op.first) - 1 : 0;
        const int32_t* order = op.order + (int64_t)matrix * op.size;
        for (int i = 0; i < op.size; i++) ordered[i] = x[order[i]];
        x = ordered;
    }
    quantize_row(x, op.size, op.group, op.q + row * op.q_stride, op.scale + groups, op.sum + groups);
}

// x / rms(x) * w (Zhang & Sennrich, arXiv 1910.07467).
static void rms_norm(const float* x, const float* w, float* out, int size, float eps, bool add = false) {
    V16 squares = zero();
    int i = 0;
    for (; i + 16 <= size; i += 16) { V16 v = load(x + i); squares = fma(v, v, squares); }
    if (i < size) { V16 v = load_some(x + i, size - i); squares = fma(v, v, squares); }
    float inverse = 1.f / std::sqrt(sum(squares) / (float)size + eps);
    for (i = 0; i + 16 <= size; i += 16) {
        V16 y = load(x + i) * set1(inverse) * load(w + i);
        store(out + i, add ? load(out + i) + y : y);
    }
    if (i < size) {
        V16 y = load_some(x + i, size - i) * set1(inverse) * load_some(w + i, size - i);
        store_some(out + i, add ? load_some(out + i, size - i) + y : y, size - i);
    }
}

static void pick(const Pick& op, int row) {
    memcpy(op.out + row * op.out_stride, op.x + (op.place ? op.place[row] : row) * op.x_stride, op.size * sizeof(float));
}

// (x - mean) / deviation * w + b (Ba, Kiros & Hinton, arXiv 1607.06450).
static void layer_norm(const float* x, const float* w, const float* b, float* out, int size, float eps, bool add) {
    V16 total = zero(), squares = zero();
    for (int i = 0; i < size; i += 16) total = total + (size - i >= 16 ? load(x + i) : load_some(x + i, size - i));
    const float mean = sum(total) / (float)size;
    for (int i = 0; i < size; i += 16) {
        V16 v = (size - i >= 16 ? load(x + i) : load_some(x + i, size - i, mean)) - set1(mean);
        squares = fma(v, v, squares);
    }
    const float inverse = 1.f / std::sqrt(sum(squares) / (float)size + eps);
    auto some = [&](const float* from, int i) { return size - i >= 16 ? load(from + i) : load_some(from + i, size - i); };
    for (int i = 0; i < size; i += 16) {
        V16 y = (some(x, i) - set1(mean)) * set1(inverse) * some(w, i);
        if (b) y = y + some(b, i);
        if (add) y = y + some(out, i);
        if (size - i >= 16) store(out + i, y);
        else store_some(out + i, y, size - i);
    }
}

static void norm(const Norm& op, int row) {
    const float* x = op.x + row * op.x_stride;
    float* out = op.out + row * op.out_stride;
    for (int at = 0; at < op.parts * op.size; at += op.size)
        if (op.center) layer_norm(x + at, op.weight + at, op.bias ? op.bias + at : nullptr, out + at, op.size, op.eps, op.add);
        else rms_norm(x + at, op.weight + at, out + at, op.size, op.eps, op.add);
}

// A lane of a panel of E4M3, E5M2 or CODES.
template <int FORM> static void embed_scaled(const Embed& op, int64_t panel, int lane, float* out) {
    const int groups = op.size / op.group;
    const char* w = (const char*)op.weight + panel * (op.size / depth(FORM) * 64);
    const Sixteen table = FORM == CODES ? load_sixteen(op.table) : Sixteen{};
    for (int k = 0; k < op.size; k += depth(FORM), w += 64) {
        const V16 scale = load_scale(op.scale, (panel * groups + k / op.group) * 16, op.half) * set1(UNIT<FORM>);
        I16 held = iload(w);
        for (int j = 0; j < depth(FORM); j++) {
            float all[16];
            store(all, expand<FORM>(held, j, table) * scale);
            out[k + j] = all[lane];
        }
    }
}

// A row of the matrix that the head also multiplies by, taken out of its panels: one copy of it serves both.
static void embed(const Embed& op, int row) {
    int64_t id = op.ids[row] + op.first, panel = id / 16;
    const int lane = id % 16;
    float fresh[op.add ? op.size : 1];
    float* into = op.out + row * op.out_stride;
    float* out = op.add ? fresh : into;
    if (id < 0 || id >= op.count) {
        if (!op.add) memset(out, 0, op.size * sizeof(float));
        return;
    }
    switch (op.form) {
        case FP32:
            for (int k = 0; k < op.size; k++) out[k] = ((const float*)op.weight)[(panel * op.size + k) * 16 + lane];
            break;
        case BF16: {
            const bf16* w = (const bf16*)op.weight + panel * ((op.size + 1) / 2) * 32 + lane * 2;
            for (int k = 0; k < op.size; k++) out[k] = from_bf16(w[k / 2 * 32 + k % 2]);
            break;
        }
        case E4M3: embed_scaled<E4M3>(op, panel, lane, out); break;
        case E5M2: embed_scaled<E5M2>(op, panel, lane, out); break;
        case CODES: embed_scaled<CODES>(op, panel, lane, out); break;
        default: {
            int64_t groups = op.size / op.group;
            const uint8_t* w = (const uint8_t*)op.weight + panel * op.size * (op.form == INT4 ? 8 : 16) + lane * 4;
            for (int64_t g = 0; g < groups; g++) {
                int64_t at = (panel * groups + g) * 16;
                float scales[16], mins[16] = {};
                store(scales, load_scale(op.scale, at, op.half));
                if (op.min) store(mins, load_scale(op.min, at, op.half));
                for (int k = (int)g * op.group; k < (g + 1) * op.group; k++) {
                    int q = op.form == INT8 ? w[k / 4 * 64 + k % 4] : w[k / 8 * 64 + k % 4] >> (k / 4 % 2 * 4) & 15;
                    out[k] = (float)(q - op.zero) * scales[lane] + mins[lane];
                }
            }
        }
    }
    const float factor = op.factors ? op.factor * op.factors[id] : op.factor;
    if (factor != 1.f)
        for (int k = 0; k < op.size; k++) out[k] *= factor;
    if (op.add)
        for (int k = 0; k < op.size; k++) into[k] += out[k];
}

}  // namespace TGI_ISA
