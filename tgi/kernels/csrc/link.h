// Sums and joins over the ranks of one machine: processes that run the same program for the same rows, and share memory.
//
// Each rank copies its rows into a slot of its own, says so, waits for the others, and reads all slots in the order of ranks:
// so every rank gets the same sums, whoever comes first. Slots come in twos, used by turns: a rank writes a slot again only
// when all have arrived at the exchange between, and so have read it.
#pragma once
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "ops.h"
#include "simd.h"

namespace TGI_ISA {

static double clock_seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Ranks do the same work in the same time. One that takes far longer than this one did hangs, and so would all: the process
// ends, and the launcher starts all anew. Only time that this thread was running itself counts, about.
static void await(const Link& link, int rank, int next, double stretch) {
    auto arrived = (const std::atomic<int32_t>*)(link.memory + LINK_HEAD * rank);
    auto there = [&] { return arrived->load(std::memory_order_acquire) - next >= 0; };
    for (int spins = 0; spins < 4000; spins++)
        if (there()) return; else relax();
    double waited = 0, patience = link.patience + 3 * stretch;
    for (double last = clock_seconds(); !there();) {
        std::this_thread::yield();
        double now = clock_seconds();
        waited += std::min(now - last, 0.02);
        last = now;
        if (waited > patience) {
            fprintf(stderr, "Rank %d hangs: rank %d has waited for it for %.1f s\n", rank, link.rank, waited);
            std::_Exit(1);
        }
    }
}

// Rows [begin, end), of all that a slot has room for.
static void exchange_some(const Exchange& op, int begin, int end, const Worker& worker) {
    Link& link = *op.link;
    Link::Turn& own = link.turn[worker.index];
    const int turn = own.value++, next = turn + 1, rows = end - begin;
    const double stretch = clock_seconds() - std::max(own.left, link.began);
    auto slot = [&](int rank) { return (float*)(link.memory + LINK_HEAD * link.ranks + ((turn & 1) * link.ranks + rank) * link.slot); };
    const int from = (int)((int64_t)rows * worker.index / worker.count), to = (int)((int64_t)rows * (worker.index + 1) / worker.count);

    float* mine = slot(link.rank);
    for (int row = from; row < to; row++)
        memcpy(mine + (int64_t)row * op.size, op.x + (begin + row) * op.x_stride, op.size * sizeof(float));
    // The thread that comes last speaks for all.
    if (link.copied.fetch_add(1, std::memory_order_acq_rel) + 1 == worker.count) {
        link.copied.store(0, std::memory_order_relaxed);
        ((std::atomic<int32_t>*)(link.memory + LINK_HEAD * link.rank))->store(next, std::memory_order_release);
    }
    for (int rank = 0; rank < link.ranks; rank++) await(link, rank, next, stretch);

    for (int row = from; row < to && op.out; row++) {
        float* out = op.out + (begin + row) * op.out_stride;
        if (op.first) {
            for (int rank = 0; rank < link.ranks; rank++) {
                int wide = op.first[rank + 1] - op.first[rank];
                memcpy(out + op.first[rank], slot(rank) + (int64_t)row * wide, wide * sizeof(float));
            }
            continue;
        }
        for (int i = 0; i < op.size; i += 16) {
            int n = op.size - i < 16 ? op.size - i : 16;
            V16 sum = load_some(slot(0) + (int64_t)row * op.size + i, n);
            for (int rank = 1; rank < link.ranks; rank++) sum = sum + load_some(slot(rank) + (int64_t)row * op.size + i, n);
            if (op.add) sum = fma(sum, set1(op.factor), load_some(out + i, n));
            store_some(out + i, sum, n);
        }
    }
    own.left = clock_seconds();
}

static void exchange(const Exchange& op, int rows, Worker& worker) {
    // The widest of the ranks says how many: all must come to the same.
    int width = op.size;
    for (int rank = 0; op.first && rank < op.link->ranks; rank++) width = std::max(width, op.first[rank + 1] - op.first[rank]);
    const int most = (int)(op.link->slot / (width * (int64_t)sizeof(float)));
    for (int begin = 0; begin < rows; begin += most) exchange_some(op, begin, std::min(begin + most, rows), worker);
}

}  // namespace TGI_ISA
