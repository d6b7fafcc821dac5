// Mixtures of experts: rows are routed, put in the order of their experts, multiplied, and mixed again. What becomes of a row
// depends on that row alone: its experts are in the order in which it likes them, whoever else goes to them.
#pragma once
#include <algorithm>
#include <cmath>

#include "linear.h"
#include "ops.h"
#include "simd.h"

namespace TGI_ISA {

// The place of the largest, the first of equal ones; it becomes -infinity.
static int take_best(float* x, int size) {
    int best = 0;
    for (int i = 1; i < size; i++)
        if (x[i] > x[best]) best = i;
    x[best] = -__builtin_inff();
    return best;
}

static void softmax(const float* x, float* out, int size) {
    V16 most = set1(-__builtin_inff()), total = zero();
    for (int i = 0; i < size; i += 16) most = vmax(most, load_some(x + i, size - i, -__builtin_inff()));
    const V16 top = set1(largest(most));
    for (int i = 0; i < size; i += 16) {
        V16 y = vexp(load_some(x + i, size - i, -__builtin_inff()) - top);
        store_some(out + i, y, size - i);
        total = total + y;
    }
    const V16 all = set1(sum(total));
    for (int i = 0; i < size; i += 16) store_some(out + i, load_some(out + i, size - i) / all, size - i);
}

static void sigmoid(const float* x, float* out, int size) {
    for (int i = 0; i < size; i += 16)
        store_some(out + i, set1(1.f) / (set1(1.f) + vexp(zero() - load_some(x + i, size - i))), size - i);
}

// Leaves only the best groups' scores; `spare` is as long as `scores`.
static void keep_groups(const Route& op, float* scores, float* spare) {
    const int size = op.experts / op.groups;
    float group[op.groups];
    std::copy(scores, scores + op.experts, spare);
    for (int g = 0; g < op.groups; g++) {
        group[g] = 0;
        for (int i = 0; i < op.group_best; i++) group[g] += scores[g * size + take_best(spare + g * size, size)];
    }
    for (int i = 0; i < op.groups_per_token; i++) take_best(group, op.groups);
    for (int g = 0; g < op.groups; g++)
        if (group[g] != -__builtin_inff()) std::fill_n(scores + g * size, size, -__builtin_inff());
}

// One expert after the other: each is weighted by softmax over those that are left and close to it.
static void sparse_mixer(const Route& op, const float* x, float* left, int32_t* chosen, float* weight) {
    std::copy(x, x + op.experts, left);
    for (int i = 0; i < op.per_token; i++) {
        chosen[i] = take_best(left, op.experts);
        const float most = x[chosen[i]];
        float total = 1;
        for (int e = 0; e < op.experts; e++) {
            bool far = (most - x[e]) / std::max(std::fabs(x[e]), most) > 2 * op.jitter;
            if (!far) total += std::exp(left[e] - most);
        }
        weight[i] = 1 / total;
    }
}

static void route(const Route& op, int row) {
    const float* x = op.x + row * op.x_stride;
    int32_t* chosen = op.chosen + (int64_t)row * op.per_token;
    float* weight = op.weight + (int64_t)row * op.per_token;
    float scores[op.experts], liked[op.experts], spare[op.experts];
    if (op.score == SPARSE_MIXER) return sparse_mixer(op, x, liked, chosen, weight);
    if (op.score == SIGMOID) sigmoid(x, scores, op.experts);
    else softmax(x, scores, op.experts);
    for (int e = 0; e < op.experts; e++) liked[e] = op.bias ? scores[e] + op.bias[e] : scores[e];
    if (op.groups > 1) keep_groups(op, liked, spare);
    float powers = 0;
    for (int i = 0; i < op.per_token; i++) {
        chosen[i] = take_best(liked, op.experts);
        weight[i] = scores[chosen[i]];
        if (op.norm != 0) powers += std::pow(weight[i], op.norm);
    }
    const float norm = op.norm != 0 ? std::max(std::pow(powers, 1 / op.norm), op.norm_least) : 1;
    for (int i = 0; i < op.per_token; i++) weight[i] = weight[i] / norm * op.factor;
}

// A counting sort, by one thread.
static void arrange(const Arrange& op, int rows, Worker& worker) {
    if (worker.next() > 0) return;
    const int pairs = rows * op.per_token;
    std::fill_n(op.first, op.experts + 1, 0);
    for (int i = 0; i < pairs; i++) op.first[op.chosen[i] + 1]++;
    for (int e = 0; e < op.experts; e++) op.first[e + 1] += op.first[e];
    // Each expert's beginning moves on to its end, which is the next one's beginning.
    for (int i = 0; i < pairs; i++) {
        op.place[i] = op.first[op.chosen[i]]++;
        op.row[op.place[i]] = i / op.per_token;
    }
    for (int e = op.experts; e > 0; e--) op.first[e] = op.first[e - 1];
    op.first[0] = 0;
}

// The product of one expert.
static Linear linear_of(const Experts& op, int expert, int panels) {
    Linear one = behind(op, op.first[expert], (int64_t)expert * panels);
    one.out = op.out + op.first[expert] * op.out_stride;
    return one;
}

static void experts(const Experts& op, int, Worker& worker) {
    const int count = (op.outs + 31) / 32 * 2;
    int number = worker.next(), before = 0;  // of tasks: this one's, and how many the experts before have
    for (int expert = 0; expert < op.experts; expert++) {
        const int rows = op.first[expert + 1] - op.first[expert], task = rows > 6 ? 2 : 4;  // as in `linear`
        const int tasks = rows ? (count + task - 1) / task : 0;
        for (; number < before + tasks; number = worker.next()) {
            const int from = (number - before) * task;
            panels(linear_of(op, expert, count), rows, from, std::min(from + task, count));
        }
        before += tasks;
    }
}

static void mix(const Mix& op, int row) {
    const float* weight = op.weight + (int64_t)row * op.per_token;
    const int32_t own = row, *place = op.place ? op.place + (int64_t)row * op.per_token : &own;
    float* out = op.out + row * op.out_stride;
    for (int at = 0; at < op.size; at += 16) {
        V16 total = zero();
        for (int i = 0; i < op.per_token; i++)
            total = fma(load_some(op.x + place[i] * op.x_stride + at, op.size - at), set1(weight[i]), total);
        V16 before = op.add ? load_some(out + at, op.size - at) : zero();
        store_some(out + at, fma(total, set1(op.factor), before), op.size - at);
    }
}

}  // namespace TGI_ISA
